"""What the ranks agree on lags by a step, and none waits for it: two processes, one of them slow, or told to stop."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from toys import SingleTask, ToyLoader, toy_run

from dalle.errors import LostProcess
from dalle.training.agreement import Agreement
from dalle.training.checkpoint import CheckpointStore, find_fault
from dalle.training.engines.ddp import DistributedEngine
from dalle.training.engines.group import GroupEngine
from dalle.training.guards import lost_processes_named
from dalle.training.loop import Trainer

SECONDS = 60                # until a test has failed
STEPS, TOLD_AT = 6, 2       # of a run, and the step in which rank 1 is told to stop


def engine_of(rank: int, kind: type[GroupEngine] = GroupEngine, folder: str | Path = "none", **settings) -> GroupEngine:
    config = toy_run(folder, **settings)
    engine = kind(config, torch.device("cpu"), rank, 2) if kind is not DistributedEngine else kind.start(config)
    engine.open_control_group()
    engine.close = engine.barrier
    return engine


def wait_until(condition, what: str) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.001)


# -- the protocol

def test_a_process_alone_answers_itself_with_what_it_wishes_now():
    alone = GroupEngine(toy_run("none"), torch.device("cpu"), 0, 1)
    wishes = iter([(0, 1), (2, 0)])
    agreement = Agreement(alone, lambda: next(wishes))
    assert agreement.answer() == (0, 1)
    agreement.ask()
    assert agreement.answer() == (2, 0)


def asked_and_answered(rank: int) -> list:
    """Rank 1 wishes more from its third turn on."""
    turn = 0
    agreement = Agreement(engine_of(rank), lambda: (int(turn >= 2 and rank == 1), turn * (1 - rank)))
    answers = [agreement.answer()]
    for turn in range(4):                       # noqa: B007 (read by the wishes)
        agreement.ask()
        answers.append(agreement.answer())
    try:
        agreement.ask()
        agreement.ask()
    except AssertionError as error:
        answers.append(str(error))
        agreement.answer()
    return [list(one) if isinstance(one, tuple) else one for one in answers]


def test_all_ranks_get_the_largest_of_what_each_wished_when_it_asked(ranks):
    expected = [None, [0, 0], [0, 1], [1, 2], [1, 3], "an answer was not read"]
    assert ranks.of("asked") == [expected, expected]


def comes_together_by_itself(rank: int, folder: str) -> bool:
    """Whether the exchange is over, though no rank waits for it, while both exchange something else; and only then."""
    engine, works = engine_of(rank), []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *given, **named: works.append(all_reduce(*given, **named)) or works[-1]
    agreement = Agreement(engine, lambda: (rank,))
    early = True
    if rank == 0:
        agreement.ask()
        early = not works[0].is_completed()      # rank 1 has not asked
        Path(folder, "asked").touch()
    else:
        wait_until(Path(folder, "asked").exists, "rank 0 did not ask")
        agreement.ask()
    dist.all_reduce = all_reduce
    assert engine.gather(rank) == [0, 1]
    wait_until(works[0].is_completed, "nobody waits, and nothing comes")
    assert agreement.answer() == (1,)
    return early


def test_the_answer_comes_together_while_nobody_waits(ranks):
    assert ranks.of("together") == [True, True]


def left_alone(rank: int) -> str:
    """Rank 1 leaves the group without an answer; what becomes of rank 0."""
    engine = engine_of(rank)
    agreement = Agreement(engine, lambda: (0,))
    if rank == 0:
        agreement.ask()
    engine.barrier()                                # of another group, in which all is well
    if rank == 1:
        dist.destroy_process_group(engine.agreement)
        return ""
    where = SimpleNamespace(step=7, what="agreeing with the other ranks")
    try:
        with lost_processes_named(rank, where):
            agreement.answer()
    except LostProcess as error:
        return str(error)
    return "an answer"


def test_a_rank_that_is_lost_before_it_asks_is_noticed_at_the_answer(ranks):
    assert "rank 0, step 7: lost another rank while agreeing with the other ranks" in ranks.of("left")[0]


# -- runs

class Apart(GroupEngine):
    """Two ranks that exchange no gradients: nothing but the agreement binds one to the other's pace."""


class SlowTask(SingleTask):
    """Rank 1 stays in step 2 until rank 0 is in step 3."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def fit(self, networks, batch, step):
        if networks.rank == 0 and step == 3:
            (self.folder / "ahead").touch()      # its own folder: made by the run
        if networks.rank == 1 and step == 2:
            wait_until((self.folder / "ahead").exists, "rank 0 waits for rank 1 before the step after")
        return super().fit(networks, batch, step)


def behind(rank: int, folder: str) -> list[int]:
    """(steps, blocking agreements, started ones) of a run of six steps that neither logs nor saves before its end."""
    engine, counts = engine_of(rank, Apart, folder, steps=STEPS, save_every=0, log_every=99), [0, 0]

    def counted(index: int, function):
        def call(*values):
            counts[index] += steps.done > 0 and steps.done < STEPS
            return function(*values)
        return call

    trainer = Trainer(SlowTask(Path(folder)), engine_config(folder), engine, lambda start: ToyLoader(start, rank, 2))
    steps = trainer.steps
    engine.all_reduce_max = counted(0, engine.all_reduce_max)
    engine.start_max = counted(1, engine.start_max)
    return [trainer.run().steps, *counts]


def engine_config(folder: str, **settings):
    return toy_run(folder, **{"steps": STEPS, "save_every": 0, "log_every": 99, "engine": {"timeout_minutes": 2},
                              **settings})


def test_a_rank_goes_on_while_the_other_is_a_step_behind_and_no_step_waits(ranks):
    assert ranks.of("behind") == [[STEPS, 0, STEPS - 1]] * 2


class ToldTask(SingleTask):
    """Rank 1 is told to stop at one place of step ``TOLD_AT``."""

    def __init__(self, place: str):
        super().__init__()
        self.place = place

    def told(self, place: str, networks, step: int) -> None:
        if place == self.place and networks.rank == 1 and step == TOLD_AT:
            os.kill(os.getpid(), signal.SIGTERM)

    def prepare(self, batch, networks, step):
        self.told("prepare", networks, step)
        return super().prepare(batch, networks, step)

    def fit(self, networks, batch, step):
        self.told("forward", networks, step)
        loss = super().fit(networks, batch, step)
        if loss.total.requires_grad:
            loss.total.register_hook(lambda gradient: self.told("backward", networks, step))
        return loss

    def validate(self, networks, batches):
        if self.place == "validation" and networks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().validate(networks, batches)


class ToldLoader(ToyLoader):
    def __init__(self, start: int, rank: int, place: str):
        super().__init__(start, rank, 2)
        self.place = place

    def __iter__(self):
        for number, batch in enumerate(super().__iter__(), self.start):
            if self.place == "data" and self.rank == 1 and number == TOLD_AT:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@dataclass
class Told:
    """A place, and after how many steps both ranks stop: one step after the turn in which rank 1 was told."""

    name: str
    steps: int = TOLD_AT + 2


# validated and saved in the turn of step TOLD_AT, before it asks
PLACES = [Told("data"), Told("prepare"), Told("forward"), Told("backward"), Told("validation"), Told("saving")]


def all_of_it(rank: int, folder: str) -> dict[str, list]:
    """What came of each test, in one launch; and of each place, with its resume."""
    names = [place.name for place in PLACES]
    return {"asked": asked_and_answered(rank), "together": comes_together_by_itself(rank, folder),
            "behind": behind(rank, folder + "/behind"), "nowhere": ended(rank, folder, "nowhere"),
            **{name: [*ended(rank, folder, name), *ended(rank, folder, "nowhere", name)] for name in names},
            "left": left_alone(rank)}


@dataclass
class Ranks:
    folder: Path
    outcomes: list[dict[str, list]]

    def of(self, name: str) -> list:
        return [outcome[name] for outcome in self.outcomes]


@pytest.fixture(scope="module")
def ranks(two_ranks, tmp_path_factory) -> Ranks:
    folder = tmp_path_factory.mktemp("ranks")
    return Ranks(folder, two_ranks(all_of_it, str(folder)))


def ended(rank: int, folder: str, place: str, resumed: str = "") -> list:
    out = Path(folder) / (resumed or place)
    settings = {"save_every": TOLD_AT + 1, "validate_every": TOLD_AT + 1, "keep_last": 9}
    engine = engine_of(rank, DistributedEngine, out, steps=STEPS, **settings)
    trainer = Trainer(ToldTask(place), engine_config(out, **settings), engine,
                      lambda start: ToldLoader(start, rank, place), lambda: ToyLoader(0, rank, 2, steps=2))
    snapshot = engine.snapshot

    def told_while_saving(name):
        if place == "saving" and rank == 1 and trainer.steps.done == TOLD_AT + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return snapshot(name)

    engine.snapshot = told_while_saving
    summary = trainer.run()
    return [summary.status, summary.exit_status, summary.steps]


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of it, whichever rank wrote it."""
    place = CheckpointStore(folder / "toy/checkpoints", 9).path(step)
    return {f"{path.name.partition('-')[0]}:{name}": tensor for path in place.rglob("*.safetensors")
            for name, tensor in load_file(path).items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys() and left
    return all(torch.equal(left[name], right[name]) for name in left)


def saved(folder: Path) -> list[int]:
    store = CheckpointStore(folder / "toy/checkpoints", 9)
    assert [find_fault(path) for path in store.all()] == [None] * len(store.all())
    return sorted(int(path.name.removeprefix("step_")) for path in store.all())


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_told_to_stop_anywhere_in_a_step_both_ranks_save_after_the_same_one_and_resume_exactly(ranks, place):
    assert ranks.of(place.name) == [["signal", 75, place.steps, "finished", 0, STEPS]] * 2
    assert place.steps in saved(ranks.folder / place.name)
    assert equal(*(checkpoint(ranks.folder / name, STEPS) for name in (place.name, "nowhere")))
    lines = [json.loads(line) for line in (ranks.folder / place.name / "toy/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("event") == "resume"] == [place.steps]


def test_a_line_of_two_ranks_says_how_far_they_are_apart(ranks):
    lines = (ranks.folder / "nowhere/toy/log.jsonl").read_text().splitlines()
    (line,) = [entry for entry in map(json.loads, lines) if "seconds_per_step" in entry]
    for name in ("", "own_"):
        assert 0 < line[f"rank_seconds/{name}smallest"] <= line[f"rank_seconds/{name}largest"]
    assert line["rank_seconds/own_largest"] <= line["rank_seconds/largest"]
