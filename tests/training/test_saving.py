import errno
import json
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))

from toys import SingleTask, toy_run

from dalle.training import saving
from dalle.training.checkpoint import FORMAT, CheckpointStore, find_fault
from dalle.training.engines.copies import Copies
from dalle.training.engines.launching import create_engine
from dalle.training.saving import COMMITTING, IDLE, WRITING, SaveFailed, Saver

STATE = {"format": FORMAT, "step": 3}


class WithAnotherRank:
    """Rank 0 of two: the engine of one process, and what the other rank would say in each agreement."""

    def __init__(self, engine, entries=None, error=None, busy=0):
        self.engine, self.entries, self.error, self.busy = engine, entries or {}, error, busy

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def gather(self, value):
        others = {dict: self.entries, int: 1000, type(None): self.error, str: self.error}
        return [value, others.get(type(value))]

    def all_reduce_max(self, busy, failed):
        return max(busy, self.busy), max(failed, int(self.error is not None))


@pytest.fixture
def engine(tmp_path):
    config = toy_run(tmp_path)
    engine = create_engine(config)
    engine.prepare(SingleTask(), tmp_path)
    return engine


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "checkpoints", keep_last=2)


def saver_of(store, engine, publish=lambda path: None) -> Saver:
    return Saver(store, engine, ["net"], publish)


def wait_for_thread(saver) -> None:
    end = time.monotonic() + 20
    while saver.busy:
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_save_goes_from_stage_to_stage_only_when_no_rank_is_busy(store, engine):
    published = []
    saver = saver_of(store, engine, published.append)
    saver.advance(busy=False, failed=False)
    assert saver.stage == IDLE and not saver.busy
    saver.start(3, STATE)
    wait_for_thread(saver)
    saver.advance(busy=True, failed=False)                   # another rank writes
    assert saver.stage == WRITING and store.all() == []
    saver.advance(busy=False, failed=False)
    assert saver.stage == COMMITTING
    wait_for_thread(saver)
    assert published == [store.path(3)] and find_fault(store.path(3)) is None
    saver.advance(busy=False, failed=False)
    assert saver.stage == IDLE and not saver.busy
    assert saver.seconds["copy"] > 0 and saver.seconds["write"] > 0


def test_what_is_written_is_the_state_at_the_start_of_the_save(store, engine, monkeypatch):
    changed = threading.Event()
    write_tensors = saving.write_tensors

    def late(path, tensors):
        assert changed.wait(20)
        return write_tensors(path, tensors)

    monkeypatch.setattr(saving, "write_tensors", late)
    module = engine.members["net"].module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    saver = saver_of(store, engine)
    saver.start(3, STATE)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    changed.set()
    saver.finish()
    saved = load_file(store.path(3) / "net/weights-00000.safetensors")
    assert saved.keys() == before.keys() and all(torch.equal(saved[name], before[name]) for name in before)


class LateCopies(Copies):
    """Copies that are whole only when they were waited for, in the thread that writes, as those of a GPU."""

    def __init__(self):
        super().__init__(torch.device("cpu"))
        self.calls, self.coming = [], []

    def begin(self):
        self.calls.append("begin")

    def to_host(self, key, tensor):
        buffer = torch.full_like(tensor, 7, memory_format=torch.contiguous_format)
        self.coming.append((buffer, tensor.clone()))
        return buffer

    def end(self):
        self.calls.append("end")

    def wait(self):
        self.calls.append(threading.current_thread().name)
        for buffer, staged in self.coming:
            buffer.copy_(staged)


def test_copies_that_are_still_on_their_way_are_waited_for_by_the_thread_that_writes(store, engine):
    engine.copies = LateCopies()
    saver = saver_of(store, engine)
    saver.start(3, STATE)
    saver.finish()
    saved = load_file(store.path(3) / "net/weights-00000.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in engine.members["net"].module.state_dict().items())
    assert engine.copies.calls == ["begin", "end", "checkpoint"]


def test_the_manifest_lists_the_files_of_every_rank(store, engine):
    other = {"net/weights-00001.safetensors": {"size": 2, "sha256": "of another rank"}}
    saver = saver_of(store, WithAnotherRank(engine, entries=other))
    saver.start(3, STATE)
    (store.temporary(3) / "net/weights-00001.safetensors").write_text("ab")
    saver.finish()
    files = json.loads((store.path(3) / "manifest.json").read_text())["files"]
    assert set(files) == {"state.json", "net/weights-00000.safetensors", *other}
    assert files["net/weights-00001.safetensors"] == other["net/weights-00001.safetensors"]   # not hashed again


def test_a_failure_on_another_rank_fails_the_save_here_and_removes_what_was_written(store, engine):
    saver = saver_of(store, WithAnotherRank(engine, error="OSError: [Errno 28] No space left on device"))
    saver.start(3, STATE)
    with pytest.raises(SaveFailed, match="No space left"):
        saver.finish()
    assert saver.stage == IDLE and not saver.failed
    assert list(store.folder.iterdir()) == []
    saver.engine = engine
    saver.start(4, STATE)
    saver.finish()
    assert store.newest()[0] == store.path(4)


@pytest.mark.parametrize("broken", ["write_tensors", "write_json"])
def test_a_failure_in_the_thread_is_told_at_the_next_agreement_and_does_not_stay(store, engine, monkeypatch, broken):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = saver_of(store, engine)
    with monkeypatch.context() as patch:
        patch.setattr(saving, broken, full)
        saver.start(3, STATE)
        with pytest.raises(SaveFailed, match="No space left"):
            saver.finish()
    assert list(store.folder.iterdir()) == [] and saver.stage == IDLE
    saver.start(4, STATE)
    saver.finish()
    assert store.newest()[0] == store.path(4)


def test_an_export_that_fails_fails_the_save_and_leaves_the_checkpoint(store, engine):
    def publish(path):
        raise ValueError("no such model")

    saver = saver_of(store, engine, publish)
    saver.start(3, STATE)
    with pytest.raises(SaveFailed, match="ValueError: no such model"):
        saver.finish()
    assert store.newest() == (store.path(3), [])


def test_no_room_fails_before_anything_is_written_and_leaves_the_saver_ready(store, engine, monkeypatch):
    saver = saver_of(store, engine)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100}))
        with pytest.raises(SaveFailed, match="no room") as failure:
            saver.start(3, STATE)
    assert failure.value.errno == errno.ENOSPC and saver.stage == IDLE
    assert list(store.folder.iterdir()) == []
    saver.start(3, STATE)
    saver.finish()
    assert find_fault(store.path(3)) is None


def test_the_room_asked_for_is_what_all_ranks_write(store, engine, monkeypatch):
    needed = []
    begin = store.begin
    monkeypatch.setattr(store, "begin", lambda step, size: needed.append(size) or begin(step, size))
    saver = saver_of(store, WithAnotherRank(engine))
    saver.start(3, STATE)
    saver.finish()
    weights = load_file(store.path(3) / "net/weights-00000.safetensors")
    assert needed == [sum(tensor.nbytes for tensor in weights.values()) + 1000]


def test_a_second_save_must_wait_for_the_first(store, engine):
    saver = saver_of(store, engine)
    saver.start(3, STATE)
    with pytest.raises(AssertionError, match="finish"):
        saver.start(4, STATE)
    saver.finish()
