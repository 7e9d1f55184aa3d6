"""FSDP2 in two real processes against plain torch in one, as ``test_engines.py`` does for the other engines.

Run as a script it is one of the two processes: the worker, with the toys below.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent))

import reference
import toys
import worker
from launching import (
    LAUNCH_SECONDS,
    ROOT,
    Job,
    assert_statistics_are_those_of_rank_0,
    free_port,
    largest_difference,
    mean_difference,
    result,
    weights,
)
from toys import SingleTask, toy_run

from dalle.errors import UserError
from dalle.training.checkpoint import SavedPlayer
from dalle.training.compiling import blocks_of
from dalle.training.engines.base import Engine
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig
from dalle.training.task import Mean, Player

EXACT = 2e-6
BF16_MEAN = 2e-4      # AdamW turns a rounded tiny gradient into a full step, so single weights may differ by one
EMA = {"lr": 1e-2, "ema": 0.8, "warmup": 1}
SECTIONS = ("weights", "optimizer", "average")


class Deep(nn.Module):
    """All that is awkward to split: blocks in a list, rows that two ranks cannot share equally, a single number, a
    buffer, a frozen parameter, one without a gradient and a way to be called that is not ``forward``."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 7), nn.Linear(7, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(7), nn.Linear(7, 7), nn.Tanh()) for _ in range(3))
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.full((5,), 0.5), requires_grad=False)
        self.register_buffer("shift", torch.tensor([0.25]))

    def forward(self, x):
        hidden = self.first(x)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return (self.head(hidden) + self.shift * self.frozen.sum()) * self.scale

    def sample(self, x):
        hidden = F.linear(x, self.first.weight, self.first.bias)
        for norm, linear, _ in self.blocks:
            hidden = hidden + torch.tanh(F.linear(norm(hidden), linear.weight, linear.bias))
        return (F.linear(hidden, self.head.weight, self.head.bias) + self.shift * self.frozen.sum()) * self.scale


class DeepTask(SingleTask):
    """Regression by :class:`Deep`, validated and previewed through ``sample``, on a rank as often as it likes."""

    def __init__(self, optimizer=None):
        super().__init__(optimizer)
        self.players = {"net": Player(toys.seeded(Deep), self.players["net"].optimizer)}

    def validate(self, networks, batches):
        mean = Mean()
        for batch in batches:
            batch = self.prepare(batch, networks, 0)
            for _ in range(networks.rank + 1):
                error = (networks.bare("net").sample(batch["x"]) - batch["target"]).square().mean()
            mean.add(error, len(batch["x"]))
        return {"error": mean}

    def preview(self, networks, step):
        net = networks.bare("net")
        assert len({parameter.dtype for parameter in net.parameters()}) == 1      # what decoding needs
        net.sample(toys.global_batch(0))
        return super().preview(networks, step)


class PenaltyTask(SingleTask):
    def fit(self, networks, batch, step):
        networks.penalty("net")(batch["x"])


class NanOnOneRank(toys.NanOnOneRank, DeepTask):
    """One rank's loss is not a number in the second step."""


JOBS = [
    Job("one", "fsdp2"), Job("two", "fsdp2", settings={"micro_batch_size": 2}),
    Job("bf16", "fsdp2", settings={"micro_batch_size": 2, "precision": "bf16"}),
    Job("deep", "fsdp2", "DeepTask"), Job("deep_two", "fsdp2", "DeepTask", settings={"micro_batch_size": 2}),
    Job("deep_bf16", "fsdp2", "DeepTask", settings={"precision": "bf16"}),
    Job("looks_bf16", "fsdp2", "DeepTask", settings={"precision": "bf16", "validate_every": 2, "preview_every": 1}),
    Job("small_exchange", "fsdp2", "DeepTask", settings={"engine": {"gradient_dtype": "bf16"}}),
    Job("compiled", "fsdp2", "DeepTask", settings={"compile": True, "validate_every": 2}),
    Job("unclipped", "fsdp2", "DeepTask", optimizer={"lr": 1e-2, "weight_decay": 0.1, "clip": 0}),
    Job("straight", "fsdp2", "DeepTask", optimizer=EMA,
        settings={"micro_batch_size": 2, "validate_every": 2, "preview_every": 1}),
    Job("first", "fsdp2", "DeepTask", "halves", EMA, {"stop_after": 2}, {"micro_batch_size": 2}),
    Job("second", "fsdp2", "DeepTask", "halves", EMA, settings={"micro_batch_size": 2}),
    Job("taken_up", "fsdp2", "DeepTask", "begun_by_one", EMA, settings={"micro_batch_size": 2}),
    Job("normed", "fsdp2", "NormedTask", settings={"validate_every": 2, "save_every": 3}),
    Job("nan", "fsdp2", "NanOnOneRank"),
    Job("gan", "fsdp2", "GanTask"), Job("penalty", "fsdp2", "PenaltyTask"),
    Job("muon", "fsdp2", optimizer={"name": "muon"}),
    Job("offload", "fsdp2", settings={"engine": {"offload_optimizer": True}}),
]


def alone(folder: Path, **options) -> None:
    """The deep toy, with an average, in one process."""
    config = toy_run(folder, micro_batch_size=2)
    task = DeepTask(OptimizerConfig(**EMA))
    Trainer(task, config, Engine(config, torch.device("cpu")), toys.ToyLoader, **options).run()


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("fsdp2")
    alone(out / "alone")
    alone(out / "begun_by_one", stop_after=2)
    jobs = out / "jobs.json"
    jobs.write_text(json.dumps([{**vars(job), "out": str(out / (job.folder or job.name))} for job in JOBS]))
    command = [sys.executable, "-m", "accelerate.commands.launch",
               "--config_file", str(ROOT / "launch/engines/fsdp2.yaml"), "--num_processes", "2",
               "--main_process_port", str(free_port()), __file__, str(jobs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    alone(out / "ended_by_one", resume=str(checkpoint(out, "halves", 2)))
    return out


def checkpoint(out: Path, folder: str, step: int) -> Path:
    return out / folder / "toy/checkpoints" / f"step_{step:08d}"


def state(out: Path, folder: str, section: str) -> dict[str, torch.Tensor]:
    """A section of the last checkpoint of a run."""
    return SavedPlayer(checkpoint(out, folder, 4) / "net").section(section)


def plain(build=toys.Block, *, bf16: bool = False, clip: float = 1.0) -> dict[str, torch.Tensor]:
    """The module after four steps of plain torch on whole batches."""
    net = toys.seeded(build)
    optimizer = reference.adamw(net, 1e-2, (0.9, 0.95), 0.1)
    for step in range(4):
        x = toys.global_batch(step)
        with reference.autocast(bf16):
            loss = (net(x).float() - x.mean(dim=1, keepdim=True)).square().mean()
        with_gradient = nn.ParameterList(parameter for parameter in net.parameters() if parameter.requires_grad)
        reference.move(with_gradient, optimizer, loss, reference.learning_rate(step, 4, 1e-2), clip)
    return {f"net.{name}": value for name, value in net.state_dict().items()}


def test_both_processes_worked_as_one_world(out):
    ends = [result(out, "one", rank=rank) for rank in (0, 1)]
    assert [(end["kind"], end["world_size"]) for end in ends] == [("fsdp2", 2)] * 2
    assert ends[0]["loss"] == ends[1]["loss"] and ends[0]["samples"] == 32


@pytest.mark.parametrize("job", ["one", "two"])
def test_one_module_equals_plain_torch(out, job):
    assert largest_difference(weights(out, job), plain()) < EXACT


@pytest.mark.parametrize("job", ["deep", "deep_two", "compiled"])
def test_blocks_uneven_rows_and_single_numbers_equal_plain_torch(out, job):
    assert largest_difference(weights(out, job), plain(Deep)) < EXACT


def test_without_clipping_it_equals_plain_torch(out):
    expected = plain(Deep, clip=float("inf"))
    assert largest_difference(weights(out, "unclipped"), expected) < EXACT
    assert largest_difference(expected, plain(Deep)) > 100 * EXACT        # so the other tests do clip


@pytest.mark.parametrize(("job", "build"), [("bf16", toys.Block), ("deep_bf16", Deep)])
def test_bf16_equals_plain_autocast(out, job, build):
    assert mean_difference(weights(out, job), plain(build, bf16=True)) < BF16_MEAN


def test_looking_at_the_networks_in_bf16_leaves_them_as_they_were(out):
    assert largest_difference(weights(out, "looks_bf16"), weights(out, "deep_bf16")) == 0


def test_blocks_are_gathered_in_bf16_and_what_is_kept_is_fp32(out):
    found = result(out, "deep_bf16")
    assert found["types"] == {"blocks.0.0.weight": "torch.float32", "blocks.0.1.weight": "torch.bfloat16",
                              "first.weight": "torch.float32"}
    assert all(value.dtype == torch.float32 for section in ("weights", "optimizer")
               for value in state(out, "deep_bf16", section).values())


def test_gradients_exchanged_in_bf16_are_close_and_not_the_same(out):
    assert 0 < mean_difference(weights(out, "small_exchange"), plain(Deep)) < 10 * BF16_MEAN


def test_the_blocks_were_compiled(out):
    assert result(out, "compiled")["graphs"] > result(out, "small_exchange")["graphs"] == 0


@pytest.mark.parametrize("section", SECTIONS)
def test_weights_optimizer_and_average_equal_those_of_one_process(out, section):
    assert largest_difference(state(out, "straight", section), state(out, "alone", section)) < EXACT


@pytest.mark.parametrize("section", SECTIONS)
def test_two_steps_saved_and_resumed_equal_four_bit_for_bit(out, section):
    assert largest_difference(state(out, "halves", section), state(out, "straight", section)) == 0


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("folder", ["begun_by_one", "ended_by_one"])
def test_two_processes_and_one_go_on_from_one_another(out, folder, section):
    assert largest_difference(state(out, folder, section), state(out, "alone", section)) < EXACT


def test_no_rank_keeps_more_than_its_rows(out):
    kept = [result(out, "straight", rank=rank)["kept"] for rank in (0, 1)]
    whole = sum(parameter.numel() for parameter in Deep().parameters())
    assert sum(kept) == whole + 1                 # the single number is on both
    assert max(kept) < 0.65 * whole               # 7 rows fall into 4 and 3


def test_blocks_give_back_what_they_gathered_even_after_a_validation(out):
    split = [result(out, "straight", rank=rank)["split_after_forward"] for rank in (0, 1)]
    assert split == [len(list(Deep().blocks.parameters()))] * 2


def test_a_rank_with_gathered_weights_goes_back_to_a_checkpoint(out):
    assert all(result(out, "straight", rank=rank)["went_back"] for rank in (0, 1))


def test_validation_sees_the_whole_averaged_weights_on_every_rank(out):
    net = Deep()
    net.load_state_dict({name.removeprefix("net."): value for name, value in weights(out, "straight").items()})
    x = torch.cat([batch["x"] for batch in toys.ToyLoader(steps=3)])
    expected = (net(x) - x.mean(dim=1, keepdim=True)).square().mean().item()
    assert result(out, "straight")["validation/error"] == pytest.approx(expected, rel=1e-5)


def test_batch_statistics_saved_and_validated_with_are_those_of_rank_0(out):
    assert_statistics_are_those_of_rank_0(out, "normed", result(out, "normed"))


def test_a_nan_on_one_rank_skips_the_step_on_all(out):
    assert [result(out, "nan", rank=rank)["skipped_steps"] for rank in (0, 1)] == [1, 1]
    assert all(tensor.isfinite().all() for section in ("weights", "optimizer")
               for tensor in state(out, "nan", section).values())


@pytest.mark.parametrize(("job", "words"), [("gan", "FSDP trains one player and this task has 2"),
                                            ("penalty", "a penalty on gradients"), ("muon", "uses Muon"),
                                            ("offload", "are for ZeRO")])
def test_what_fsdp_cannot_do_is_refused_on_every_rank(out, job, words):
    assert all(words in result(out, job, rank=rank)["error"] for rank in (0, 1))


@pytest.mark.parametrize(("variables", "words"), [({"FSDP_VERSION": "1", "RANK": "0"}, "FSDP2 only"),
                                                  ({"FSDP_OFFLOAD_PARAMS": "true", "RANK": "0"}, "on the device"),
                                                  ({}, "needs a launcher")])
def test_a_start_that_cannot_work_is_refused(monkeypatch, tmp_path, variables, words):
    for name in ("RANK", "WORLD_SIZE", "FSDP_VERSION", "FSDP_OFFLOAD_PARAMS", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"ACCELERATE_USE_FSDP": "true", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        create_engine(toy_run(tmp_path))


def test_the_blocks_of_lists_in_lists_come_from_the_inside_out():
    inner = nn.ModuleList([nn.Linear(1, 1), nn.Tanh()])
    outer = nn.ModuleList([nn.ModuleDict({"part": nn.Linear(1, 1)}), inner, nn.Sequential(nn.ModuleList([inner[0]]))])
    assert blocks_of(nn.Sequential(outer)) == [inner[0], outer[2]]


def train_and_look(job: dict) -> dict:
    """The worker's result with what only the process itself can see."""
    engines = []

    class Kept(Trainer):
        def __init__(self, task, config, engine, *rest, **named):
            engines.append(engine)
            super().__init__(task, config, engine, *rest, **named)

    worker.Trainer = Kept
    found = train(job)
    if "status" not in found or job["task"] != "DeepTask":      # refused, or another toy
        return found
    member = engines[0].members["net"]
    with engines[0].autocast():
        member.module(toys.global_batch(0))
    split = [parameter for parameter in member.module.blocks.parameters() if isinstance(parameter, DTensor)]
    with engines[0].evaluation():
        types = {name: str(member.module.get_parameter(name).dtype)
                 for name in ("blocks.0.0.weight", "blocks.0.1.weight", "first.weight")}
    saved = SavedPlayer(checkpoint(Path(job["out"]), "", 2) / "net")
    engines[0].load_player("net", saved)
    now = {(section, key): value for section, key, value in engines[0].whole_state(member)}
    went_back = (now.keys() == {(section, key) for section in SECTIONS for key in saved.keys(section)}
                 and all(torch.equal(value, saved.tensor(*place)) for place, value in now.items()))
    return {**found, "went_back": went_back, "types": types, "split_after_forward": len(split),
            "kept": sum(rows.numel() for rows in member.wrapper.rows.values()),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


if __name__ == "__main__":
    toys.DeepTask, toys.PenaltyTask, toys.NanOnOneRank = DeepTask, PenaltyTask, NanOnOneRank
    train, worker.train = worker.train, train_and_look
    worker.main()
