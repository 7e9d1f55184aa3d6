"""Verifying with all ranks: each byte once, the same answer on each, the watchdog fed only while it comes forward."""

import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import SingleTask, ToyLoader, toy_run

from dalle.files import write_json
from dalle.training import checkpoint, verifying
from dalle.training.checkpoint import FORMAT, CheckpointStore, find_fault, write_tensors
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig
from dalle.training.verifying import find_fault_together, newest_that_verifies

RANKS = 3


class ThreadedRank:
    """The part of an engine that agrees, for ranks that are threads of one process."""

    device = torch.device("cpu")

    def __init__(self, rank: int, meeting: threading.Barrier, table: list[Any]):
        self.rank, self.world_size, self.meeting, self.table = rank, len(table), meeting, table
        self.is_rank0 = rank == 0

    def gather(self, value: Any) -> list[Any]:
        self.table[self.rank] = value
        self.meeting.wait()
        values = list(self.table)
        self.meeting.wait()
        return values

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        return tuple(map(max, zip(*self.gather(values), strict=True)))

    def together(self, action: Callable[[], Any], only_rank0: bool) -> Any:
        return self.gather(action() if self.rank == 0 else None)[0]


def on_all_ranks(action: Callable[[ThreadedRank], Any], count: int = RANKS) -> list[Any]:
    meeting, table = threading.Barrier(count, timeout=30), [None] * count
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda rank: action(ThreadedRank(rank, meeting, table)), range(count)))


def no_food() -> None:
    pass


@pytest.fixture
def hashed(monkeypatch) -> list[str]:
    """The files that were read to be hashed, in the order of their reading."""
    read, real = [], checkpoint.sha256_of

    def counted(path: Path, *rest: Any) -> str:
        read.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(checkpoint, "sha256_of", counted)
    return read


def save(store: CheckpointStore, step: int) -> Path:
    temporary = store.begin(step)
    (temporary / "net").mkdir()
    for writer in range(4):
        write_tensors(temporary / f"net/weights-{writer:05d}.safetensors", {f"{writer}": torch.ones(writer + 1)})
    write_json(temporary / "state.json", {"format": FORMAT, "step": step})
    return store.commit(temporary, step)


def flip(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


FILE = "net/weights-00002.safetensors"


@pytest.mark.parametrize("damage", [
    lambda path: None,
    lambda path: flip(path / FILE),
    lambda path: (path / FILE).write_bytes(b"torn"),
    lambda path: (path / FILE).unlink(),
    lambda path: (path / "manifest.json").write_text("{"),
    lambda path: flip(path / "state.json"),
    lambda path: shutil.copy(path / FILE, path / "net/weights-00009.safetensors"),
])
def test_all_ranks_say_what_one_says(tmp_path, damage):
    path = save(CheckpointStore(tmp_path, 3), 1)
    damage(path)
    assert on_all_ranks(lambda rank: find_fault_together(rank, path, no_food)) == [find_fault(path)] * RANKS


def test_the_ranks_share_the_files(tmp_path, hashed):
    path = save(CheckpointStore(tmp_path, 3), 1)
    hashed.clear()
    assert on_all_ranks(lambda rank: find_fault_together(rank, path, no_food)) == [None] * RANKS
    assert Counter(hashed) == Counter(["state.json", *(f"weights-{writer:05d}.safetensors" for writer in range(4))])


def test_the_newest_that_verifies_is_found_without_looking_further(tmp_path, hashed):
    store = CheckpointStore(tmp_path, 5)
    for step in (1, 2, 3):
        save(store, step)
    flip(store.path(3) / FILE)
    hashed.clear()
    for path, faults in on_all_ranks(lambda rank: newest_that_verifies(rank, store.all(), no_food)):
        assert path == store.path(2)
        assert faults == {store.path(3): f"{FILE} is damaged (its sha256 differs)"}
    assert Counter(hashed)["state.json"] == 2                          # of 3 and 2; 1 was left alone


def test_the_watchdog_is_fed_by_any_rank_that_comes_forward_and_by_none_that_hangs(tmp_path, monkeypatch):
    """One file comes a piece at a time, when it is asked for: each feeds every rank once, and a wait feeds none."""
    path = save(CheckpointStore(tmp_path, 3), 1)
    demand, fed, nothing_came = threading.Semaphore(0), [0] * RANKS, threading.Event()
    real = checkpoint.sha256_of

    def in_pieces(file: Path, came: Callable[[], None]) -> str:
        for _ in range(3 if file.name == Path(FILE).name else 0):
            demand.acquire()
            came()
        return real(file)

    def verify(rank: ThreadedRank) -> str | None:
        agree = rank.all_reduce_max

        def watched(*values: int) -> tuple[int, ...]:
            busy, came = agree(*values)
            if not came:
                nothing_came.set()
            return busy, came

        def feed() -> None:
            fed[rank.rank] += 1

        rank.all_reduce_max = watched
        return find_fault_together(rank, path, feed)

    monkeypatch.setattr(verifying, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(checkpoint, "sha256_of", in_pieces)
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(on_all_ranks, verify)
        for piece in range(3):
            nothing_came.clear()
            assert nothing_came.wait(30)
            assert fed == [piece] * RANKS
            demand.release()
            while fed != [piece + 1] * RANKS:
                time.sleep(0.001)
                assert not answers.done() or fed == [piece + 1] * RANKS      # rather than wait for ever
        assert answers.result(30) == [None] * RANKS
    assert fed == [3] * RANKS


def train(folder: Path, **settings) -> None:
    config = toy_run(folder, save_every=1, keep_last=9, **settings)
    Trainer(SingleTask(OptimizerConfig(ema=0.9)), config, create_engine(config), ToyLoader).run()


def test_a_save_reads_back_its_state_alone_and_a_resume_everything_once(tmp_path, hashed):
    train(tmp_path, steps=3)
    assert set(hashed) == {"state.json"}
    newest = CheckpointStore(tmp_path / "toy/checkpoints", 9).path(3)
    hashed.clear()
    train(tmp_path, steps=3)                      # it verifies, and exports what it found
    counts = Counter(hashed)
    assert counts.pop("state.json") <= 3
    assert counts == Counter(file.name for file in newest.rglob("*.safetensors"))


def test_what_rank_0_knows_decides_for_all_which_checkpoint_a_rollback_takes(tmp_path):
    """Only rank 0 hears that a save was published; the others still think of the checkpoint that the run began with."""
    train(tmp_path, steps=3)
    store = CheckpointStore(tmp_path / "toy/checkpoints", 9)

    def choose(rank: ThreadedRank) -> tuple[Path | None, int]:
        trainer = Trainer(SingleTask(), toy_run(tmp_path), rank, ToyLoader)
        trainer.checkpoints.unexported = None if rank.is_rank0 else store.path(1)
        return trainer.checkpoints.choose(newest=True), trainer.steps.done

    assert on_all_ranks(choose, 2) == [(store.path(3), 3)] * 2
