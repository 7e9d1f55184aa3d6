"""Two real processes against plain torch in one: every backend, stage, accumulation and precision that is offered.

One launch trains all the jobs of a backend; the tests then read what each left. Everything wrong in this area is
silent, so the answer is the weights after four steps.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import reference
from launching import (
    ROOT,
    Job,
    assert_statistics_are_those_of_rank_0,
    largest_difference,
    launch,
    mean_difference,
    result,
    weights,
)
from toys import GanTask, OftenTask, PaintsOnceTask, SingleTask, ToyLoader, toy_run

from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig

EXACT = 2e-6
BF16_MEAN = 2e-4      # AdamW turns a rounded tiny gradient into a full step, so single weights may differ by one
EMA = {"lr": 1e-2, "ema": 0.8, "warmup": 1}


def jobs_of(kind: str) -> list[Job]:
    """Parity, resume and guards for one backend."""
    jobs = [Job("one", kind), Job("two", kind, settings={"micro_batch_size": 2}),
            Job("bf16", kind, settings={"micro_batch_size": 2, "precision": "bf16"}),
            Job("straight", kind, optimizer=EMA, settings={"micro_batch_size": 2, "validate_every": 2}),
            Job("first", kind, folder="halves", optimizer=EMA, settings={"micro_batch_size": 2},
                options={"stop_after": 2}),
            Job("second", kind, folder="halves", optimizer=EMA, settings={"micro_batch_size": 2}),
            Job("to_one", kind, optimizer=EMA, options={"stop_after": 2}),
            Job("from_one", kind, optimizer=EMA),
            Job("normed", kind, task="NormedTask", settings={"validate_every": 2, "save_every": 3}),
            Job("nan", kind, task="NanOnOneRank", settings={"save_every": 0})]
    if kind != "zero3":
        jobs += [Job("gan", kind, task="GanTask"),
                 Job("gan_two", kind, task="GanTask", settings={"micro_batch_size": 2}),
                 Job("gan_bf16", kind, task="GanTask", settings={"precision": "bf16"}),
                 Job("once", kind, task="PaintsOnceTask"),
                 Job("often", kind, task="OftenPaintsOnceTask"),
                 Job("once_two", kind, task="PaintsOnceTask", settings={"micro_batch_size": 2}),
                 Job("once_bf16", kind, task="PaintsOnceTask", settings={"precision": "bf16"})]
    else:
        jobs += [Job("refused", kind, task="GanTask"),
                 Job("refused_penalty", kind, task="GanTask", settings={"engine": {"allow_zero3_players": True}})]
    return [Job(**{**vars(job), "name": job.name, "folder": f"{kind}/{job.folder or job.name}"}) for job in jobs]


LAUNCHES = {
    "ddp": ["--config_file", str(ROOT / "launch/engines/ddp.yaml")],
    "zero": ["--config_file", str(ROOT / "launch/engines/zero2.yaml")],
}


def train_alone(folder: Path, stop_after: int | None = None) -> None:
    """One process, no launcher, with the averages that the other jobs keep."""
    config = toy_run(folder)
    Trainer(SingleTask(OptimizerConfig(**EMA)), config, create_engine(config), ToyLoader, stop_after=stop_after).run()


def begin_alone(folder: Path) -> None:
    train_alone(folder, stop_after=2)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    out = tmp_path_factory.mktemp("ddp")
    begin_alone(out / "ddp/from_one")
    launch(jobs_of("ddp"), out, LAUNCHES["ddp"])
    return out


@pytest.fixture(scope="module")
def zero(tmp_path_factory):
    out = tmp_path_factory.mktemp("zero")
    for stage in (1, 2, 3):
        begin_alone(out / f"zero{stage}/from_one")
    launch([job for stage in (1, 2, 3) for job in jobs_of(f"zero{stage}")], out, LAUNCHES["zero"])
    return out


@pytest.fixture
def out(request, kind):
    return request.getfixturevalue("ddp" if kind == "ddp" else "zero")


def named(modules) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}


ALL = pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2", "zero3"])
TWO_PLAYERS = pytest.mark.parametrize("kind", ["ddp", "zero1", "zero2"])


@ALL
def test_both_processes_worked_as_one_world(out, kind):
    ends = [result(out, "one", f"{kind}/one", rank) for rank in (0, 1)]
    assert [(end["kind"], end["world_size"]) for end in ends] == [(kind, 2)] * 2
    assert ends[0]["loss"] == ends[1]["loss"] and ends[0]["samples"] == 32


@ALL
@pytest.mark.parametrize("job", ["one", "two"])
def test_one_player_equals_plain_torch(out, kind, job):
    assert largest_difference(weights(out, f"{kind}/{job}"), named(reference.single(4))) < EXACT


@ALL
def test_one_player_in_bf16_equals_plain_autocast(out, kind):
    assert mean_difference(weights(out, f"{kind}/bf16"), named(reference.single(4, bf16=True))) < BF16_MEAN


@TWO_PLAYERS
@pytest.mark.parametrize("job", ["gan", "gan_two", "once", "once_two"])
def test_two_players_and_a_penalty_equal_plain_torch(out, kind, job):
    assert largest_difference(weights(out, f"{kind}/{job}"), named(reference.gan(4))) < EXACT


@TWO_PLAYERS
def test_what_is_made_ahead_is_made_anew_when_its_player_has_moved(out, kind, tmp_path):
    config = toy_run(tmp_path)
    Trainer(OftenTask(), config, create_engine(config), ToyLoader).run()
    assert largest_difference(weights(out, f"{kind}/often"), weights(tmp_path, "")) < EXACT


@TWO_PLAYERS
@pytest.mark.parametrize("job", ["gan_bf16", "once_bf16"])
def test_two_players_in_bf16_equal_plain_autocast(out, kind, job):
    assert mean_difference(weights(out, f"{kind}/{job}"), named(reference.gan(4, bf16=True))) < BF16_MEAN


@ALL
def test_two_steps_saved_and_resumed_equal_four_bit_for_bit(out, kind):
    assert largest_difference(weights(out, f"{kind}/halves"), weights(out, f"{kind}/straight")) == 0


@ALL
def test_one_process_goes_on_from_two_and_two_from_one(out, kind, tmp_path):
    train_alone(tmp_path / "straight")
    train_alone(out / f"{kind}/to_one")
    for job in ("to_one", "from_one"):
        assert largest_difference(weights(out, f"{kind}/{job}"), weights(tmp_path, "straight")) < EXACT


@ALL
def test_validation_adds_up_over_the_ranks(out, kind):
    exported = weights(out, f"{kind}/straight")
    task = SingleTask()
    net = task.players["net"].module
    net.load_state_dict({name.removeprefix("net."): value for name, value in exported.items()})
    x = torch.cat([batch["x"] for batch in ToyLoader(steps=3)])
    expected = (net(x) - x.mean(dim=1, keepdim=True)).square().mean().item()
    assert result(out, "straight", f"{kind}/straight")["validation/error"] == pytest.approx(expected, rel=1e-5)


@ALL
def test_batch_statistics_saved_and_validated_with_are_those_of_rank_0(out, kind):
    assert_statistics_are_those_of_rank_0(out, f"{kind}/normed", result(out, "normed", f"{kind}/normed"))


@ALL
def test_a_nan_on_one_rank_skips_the_step_on_all(out, kind):
    assert [result(out, "nan", f"{kind}/nan", rank)["skipped_steps"] for rank in (0, 1)] == [1, 1]
    assert all(tensor.isfinite().all() for tensor in weights(out, f"{kind}/nan").values())


def test_zero3_in_one_process_keeps_an_average_offloaded_or_not(tmp_path):
    """Previews in between read the weights outside of any forward."""
    offload = {"engine": {"offload_parameters": True, "offload_optimizer": True}}
    jobs = [Job("plain", "zero3", "PreviewTask", optimizer=EMA, settings={"preview_every": 2}),
            Job("offloaded", "zero3", "PreviewTask", optimizer=EMA, settings={"preview_every": 2, **offload})]
    launch(jobs, tmp_path, LAUNCHES["zero"], processes=1)
    train_alone(tmp_path / "alone")
    for job in jobs:
        assert result(tmp_path, job.name)["world_size"] == 1
        assert largest_difference(weights(tmp_path, job.name), weights(tmp_path, "alone")) < EXACT


def test_zero3_refuses_several_players_and_penalties(zero):
    assert "ZeRO-3 with 2 players" in result(zero, "refused", "zero3/refused")["error"]
    assert "penalty" in result(zero, "refused_penalty", "zero3/refused_penalty")["error"]


def test_the_deepspeed_settings_leave_nothing_to_guess(zero):
    text = (zero / "zero2/gan_two/toy/deepspeed_d.json").read_text()
    settings = json.loads(text)
    assert '"auto"' not in text
    assert settings["gradient_clipping"] == 0.7 and settings["gradient_accumulation_steps"] == 2


def test_a_single_process_equals_plain_torch(tmp_path):
    for task, expected in ((SingleTask(), reference.single(4)), (GanTask(), reference.gan(4)),
                           (PaintsOnceTask(), reference.gan(4))):
        config = toy_run(tmp_path / type(task).__name__, micro_batch_size=2)
        Trainer(task, config, create_engine(config), ToyLoader).run()
        assert largest_difference(weights(tmp_path, type(task).__name__), named(expected)) < EXACT


def test_a_launcher_that_starts_too_few_processes_is_refused():
    """``accelerate launch --cpu --num_processes 2`` starts one process and says nothing."""
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import toys; from dalle.errors import run_command; "
            "from dalle.training.engines.launching import create_engine; "
            "run_command(lambda: create_engine(toys.toy_run('x')))")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_MIXED_PRECISION": "no",
                   "MASTER_ADDR": "127.0.0.1"}
    environment.pop("WORLD_SIZE", None)
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parent)], env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "started one process" in done.stderr
