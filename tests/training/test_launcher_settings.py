"""What a user's own accelerate file says is taken, or refused with the key to use; never dropped."""

import pytest

from dalle.errors import UserError
from dalle.training.engines.launcher_settings import check_launcher
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig


class TwoPlayers(RunConfig):
    generator_optimizer: OptimizerConfig = OptimizerConfig(clip=1.0)
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(clip=0.5)


def check(environment: dict[str, str], run: type[RunConfig] = RunConfig, **train: object) -> None:
    config = run(task="any", name="any", data={"train": "any"}, train={"batch_size": 8, **train})
    check_launcher(config, 2, {name if name.startswith("FSDP") else f"ACCELERATE_{name}": value
                               for name, value in environment.items()})


@pytest.mark.parametrize(("environment", "train"), [
    ({}, {"precision": "bf16"}),
    ({"MIXED_PRECISION": "no", "GRADIENT_ACCUMULATION_STEPS": "1", "GRADIENT_CLIPPING": "none", "DYNAMO_BACKEND": "NO",
      "FSDP_RESHARD_AFTER_FORWARD": "true"}, {"precision": "bf16", "micro_batch_size": 2}),     # all the defaults
    ({"MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
    ({"MIXED_PRECISION": "fp8"}, {"precision": "fp8"}),
    ({"GRADIENT_ACCUMULATION_STEPS": "2"}, {"micro_batch_size": 2}),
    ({"DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
    ({"GRADIENT_ACCUMULATION_STEPS": "auto", "GRADIENT_CLIPPING": "auto"}, {}),
])
def test_what_agrees_or_was_never_said_is_accepted(environment, train):
    check(environment, **train)


@pytest.mark.parametrize(("environment", "message"), [
    ({"MIXED_PRECISION": "fp16"}, "fp16: .*set train.precision=bf16"),
    ({"MIXED_PRECISION": "fp8"}, "set train.precision=fp8"),
    ({"MIXED_PRECISION": "bf16"}, "set train.precision=bf16"),
    ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "set train.micro_batch_size=1"),
    ({"GRADIENT_ACCUMULATION_STEPS": "3"}, "does not divide the 4 samples"),
    ({"GRADIENT_ACCUMULATION_STEPS": "often"}, "'often' in the launcher's settings is not a number"),
    ({"DYNAMO_BACKEND": "INDUCTOR"}, "train.compile=true"),
    ({"USE_MEGATRON_LM": "true"}, "Megatron-LM"),
    ({"USE_PARALLELISM_CONFIG": "true"}, "parallelism_config"),
    ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "model.checkpointing=true"),
    ({"FSDP_RESHARD_AFTER_FORWARD": "false"}, "fsdp_reshard_after_forward"),
])
def test_what_differs_is_refused_with_the_key_to_use(environment, message):
    with pytest.raises(UserError, match=message) as caught:
        check(environment)
    assert "\n" not in str(caught.value)


def test_every_player_clips_as_the_file_says():
    with pytest.raises(UserError, match="gradient_clipping is 1 and discriminator_optimizer.clip is 0.5"):
        check({"GRADIENT_CLIPPING": "1.0"}, TwoPlayers)
