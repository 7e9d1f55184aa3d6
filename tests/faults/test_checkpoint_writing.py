"""Saving off the step: a slow disk, a stop in the middle, one of several ranks that fails."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from saved_runs import assert_same, events, saved_steps, store_of, tensors, train
from tiny_shards import ROOT

sys.path.insert(0, str(ROOT / "tests/training"))

from launching import free_port

from dalle.errors import EXIT_STOPPED_BY_SIGNAL
from dalle.training import saving
from dalle.training.checkpoint import CheckpointStore


class SlowDisk:
    """Holds the writing of a checkpoint, from the second on, until ``go`` is set."""

    def __init__(self, monkeypatch):
        self.go, self.held, self.timed_out = threading.Event(), threading.Event(), False
        write_tensors = saving.write_tensors

        def slow(path, tensors):
            if "step_00000000" not in str(path):
                self.held.set()
                self.timed_out |= not self.go.wait(20)
            return write_tensors(path, tensors)

        monkeypatch.setattr(saving, "write_tensors", slow)


@pytest.fixture
def slow_disk(monkeypatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_slow_disk_does_not_hold_up_the_steps_and_what_is_saved_is_the_step_of_the_save(tmp_path, slow_disk,
                                                                                      undisturbed):
    visible = []

    def at(step):
        if step == 5:                                  # two steps went by since the save of step 3 began
            assert slow_disk.held.wait(20)
            visible.extend(path.name for path in store_of(tmp_path).all())
            slow_disk.go.set()

    train(tmp_path, at, steps=6, save_every=3, keep_last=9)
    assert not slow_disk.timed_out and visible == ["step_00000000"]
    assert saved_steps(tmp_path) == [0, 3, 6]
    assert_same(tensors(tmp_path, 3), tensors(undisturbed, 3))
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def recorded(name: str, method, order: list):
    def call(store, first, second, *rest):
        order.append((name, first if name == "begin" else second))
        return method(store, first, second, *rest)
    return call


def test_slow_disk_makes_the_next_save_wait_for_the_one_before(tmp_path, slow_disk, monkeypatch):
    order = []
    for name in ("begin", "commit"):
        monkeypatch.setattr(CheckpointStore, name, recorded(name, getattr(CheckpointStore, name), order))
    releases = []

    def at(step):
        if step == 1:                                  # the save of step 1 is held; that of step 2 comes next
            assert slow_disk.held.wait(20)
            releases.append(threading.Timer(0.5, lambda: [releases.append(list(order)), slow_disk.go.set()]))
            releases[0].start()

    train(tmp_path, at, steps=3, save_every=1, keep_last=9)
    assert not slow_disk.timed_out
    assert releases[1] == [("begin", 0), ("commit", 0), ("begin", 1)]
    assert order == [(name, step) for step in range(4) for name in ("begin", "commit")]
    assert saved_steps(tmp_path) == [0, 1, 2, 3]


def test_sigterm_during_an_asynchronous_save_finishes_it_and_saves_the_last_step_too(tmp_path, slow_disk, undisturbed):
    def at(step):
        if step == 4:                                  # the save of step 3 is held
            assert slow_disk.held.wait(20)
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.5, slow_disk.go.set).start()

    summary = train(tmp_path, at, steps=6, save_every=3, keep_last=9)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", EXIT_STOPPED_BY_SIGNAL, 5)
    assert not slow_disk.timed_out and saved_steps(tmp_path) == [0, 3, 5]
    assert train(tmp_path, steps=6, save_every=3, keep_last=9).status == "finished"
    for step in (3, 5, 6):
        assert_same(tensors(tmp_path, step), tensors(undisturbed, step))


def test_disk_full_for_one_rank_of_two_fails_the_save_on_both_and_training_goes_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).parent / "saving_jobs.py"), "ranks", str(tmp_path)]
    started = [subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    try:
        errors = [process.communicate(timeout=150)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and ranks[0]["status"] == "finished"
    (failure,) = ranks[0]["failed"]
    assert "No space left" in failure
    assert [error.count("THE CHECKPOINT of step 4 COULD NOT BE WRITTEN") for error in errors] == [1, 0]
    assert saved_steps(tmp_path) == [0, 2, 6, 8] and len(events(tmp_path, "save_failed")) == 1
    files = json.loads((store_of(tmp_path).path(8) / "manifest.json").read_text())["files"]
    assert {f"net/weights-{rank:05d}.safetensors" for rank in (0, 1)} <= files.keys()
