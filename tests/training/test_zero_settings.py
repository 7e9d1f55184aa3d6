"""What the launcher's files say about ZeRO arrives in DeepSpeed's settings."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import toy_run

from dalle.errors import UserError
from dalle.training.engines.zero import DeepSpeedEngine, launched_zero
from dalle.training.settings import EngineConfig, TrainConfig

EXAMPLE = Path(__file__).resolve().parents[2] / "launch" / "engines" / "zero3_offload.json"


@pytest.fixture
def launched(monkeypatch):
    """``launched(NAME=VALUE, ...)``: what is read from such an ACCELERATE_DEEPSPEED_* environment."""

    def launch(**variables: str) -> dict:
        for name in ("ZERO_STAGE", "OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE", "CONFIG_FILE"):
            monkeypatch.delenv(f"ACCELERATE_DEEPSPEED_{name}", raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
        return launched_zero(toy_run("nowhere"))

    return launch


def settings(zero: dict, **options: bool) -> dict:
    """DeepSpeed's ``zero_optimization`` of an engine on the CPU that was launched with ``zero``."""
    config = SimpleNamespace(engine=EngineConfig(**options), train=TrainConfig(batch_size=4))
    engine = DeepSpeedEngine(config, torch.device("cpu"), 0, 2, zero)
    return engine.settings(SimpleNamespace(settings=SimpleNamespace(clip=1.0)))["zero_optimization"]


OFFLOAD = {"device": "cpu", "pin_memory": False}


def test_the_yaml_offloads_as_the_config_does(launched):
    by_yaml = settings(launched(ZERO_STAGE="3", OFFLOAD_OPTIMIZER_DEVICE="cpu", OFFLOAD_PARAM_DEVICE="cpu"))
    by_config = settings(launched(ZERO_STAGE="3"), offload_optimizer=True, offload_parameters=True)
    assert by_yaml == by_config and by_yaml["offload_optimizer"] == by_yaml["offload_param"] == OFFLOAD


def test_nothing_is_offloaded_unasked(launched):
    assert not {"offload_optimizer", "offload_param"} & set(settings(launched(ZERO_STAGE="3")))


def test_deepspeeds_own_file_is_taken_over(launched):
    section = json.loads(EXAMPLE.read_text())["zero_optimization"]
    assert section.items() <= settings(launched(CONFIG_FILE=str(EXAMPLE))).items()


@pytest.mark.parametrize("text, message", [
    ("{", "cannot be read"),
    ("{}", "no zero_optimization"),
    ('{"zero_optimization": {"stage": 3}, "optimizer": {}}', "sets optimizer"),
    ('{"zero_optimization": {"stage": 3}, "train_batch_size": 6}', "train_batch_size is 6 .*: set train.batch_size=6"),
    ('{"zero_optimization": {"stage": 3}, "fp16": {"enabled": true}}', "fp16.enabled is fp16.*train.precision=bf16"),
    ('{"zero_optimization": {"stage": 3}, "bf16": {"enabled": true}}', "set train.precision=bf16"),
    ('{"zero_optimization": {"stage": 3}, "gradient_accumulation_steps": 4}', "set train.micro_batch_size=2"),
    ('{"zero_optimization": {"stage": 0}}', "not one of 1, 2, 3"),
])
def test_a_file_that_cannot_be_followed_is_refused(launched, tmp_path, text, message):
    path = tmp_path / "deepspeed.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        launched(CONFIG_FILE=str(path))


def test_a_file_that_says_what_the_run_says_or_leaves_it_open_is_accepted(launched, tmp_path):
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "fp16": {"enabled": False},
        "bf16": {"enabled": "auto"}, "gradient_clipping": "auto", "gradient_accumulation_steps": 1,
        "train_batch_size": 8, "train_micro_batch_size_per_gpu": "auto"}))
    assert launched(CONFIG_FILE=str(path)) == {"stage": 2}
