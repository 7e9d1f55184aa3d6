"""When a save is made: by steps, by minutes, at a signal, at the file ``stop``."""

import json
import os
import signal

import pytest
from saved_runs import BOTH, assert_same, events, saved_steps, saved_steps_so_far, tensors, train, until_written
from tiny_shards import start_command, wait_until, write_job, write_shards

from dalle.errors import EXIT_STOPPED_BY_SIGNAL
from dalle.training import run_folder
from dalle.training.checkpoint import CheckpointStore


@BOTH
def test_crash_between_saves_costs_the_steps_since_the_last_by_steps_or_by_minutes(tmp_path, undisturbed, async_save):
    class PowerCut(Exception):
        pass

    def crash(step):
        until_written()
        if step == 5:
            raise PowerCut

    settings = {"steps": 6, "keep_last": 9, "async_save": async_save}
    with pytest.raises(PowerCut):
        train(tmp_path / "steps", crash, save_every=3, **settings)
    assert saved_steps_so_far(tmp_path / "steps") == [0, 3]
    with pytest.raises(PowerCut):
        train(tmp_path / "minutes", crash, save_every=0, save_minutes=1e-9, **settings)
    assert set(saved_steps_so_far(tmp_path / "minutes")) >= {0, 1, 2, 3}
    with pytest.raises(PowerCut):
        train(tmp_path / "late", crash, save_every=0, save_minutes=60, **settings)
    assert saved_steps_so_far(tmp_path / "late") == [0]
    for name, since in (("steps", 3), ("late", 0)):
        assert train(tmp_path / name, save_every=0, **settings).status == "finished"
        assert [line["step"] for line in events(tmp_path / name, "resume")] == [since]
        assert_same(tensors(tmp_path / name, 6), tensors(undisturbed, 6))


@BOTH
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGUSR1"])
def test_stop_signal_saves_ends_with_75_and_the_next_start_goes_on(tmp_path, undisturbed, name, async_save):
    settings = {"steps": 6, "save_every": 0, "keep_last": 9, "async_save": async_save}
    if name == "SIGUSR1":                              # one that is not a stop signal unless asked for
        settings["stop_signals"] = ("SIGUSR1",)

    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.Signals[name])

    summary = train(tmp_path, at, **settings)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", EXIT_STOPPED_BY_SIGNAL, 4)
    assert saved_steps(tmp_path) == [0, 4] and not (tmp_path / "toy/finished").exists()
    assert train(tmp_path, **settings).status == "finished"
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def test_stop_file_saves_ends_with_75_and_is_removed(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(run_folder, "STOP_FILE_SECONDS", 0.0)
    stop = tmp_path / "toy/stop"
    summary = train(tmp_path, lambda step: stop.touch() if step == 3 else None, steps=6, save_every=0, keep_last=9)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", EXIT_STOPPED_BY_SIGNAL, 4)
    assert saved_steps(tmp_path) == [0, 4] and not stop.exists()
    stop.touch()
    os.utime(stop, (1e9, 1e9))                         # left for an earlier start
    assert train(tmp_path, steps=6, save_every=0, keep_last=9).status == "finished"
    assert not stop.exists()
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def test_stop_file_ends_the_command_with_75_and_the_next_one_finishes(tmp_path, run_here):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), settings={"steps": 4000})
    process = start_command("launch/train.py", job.config)
    try:
        wait_until(lambda: len(job.steps()) > 2, process)
        (job.run / "stop").touch()
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED_BY_SIGNAL, errors
    assert "Traceback" not in errors and "start again to go on" in out
    assert not (job.run / "stop").exists() and not (job.run / "finished").exists()
    newest, passed_over = CheckpointStore(job.run / "checkpoints", 1).newest()
    last = job.steps()[-1]
    assert passed_over == [] and newest.name == f"step_{last:08d}"
    assert run_here("train", job.config, f"train.steps={last + 2}").status == 0
    assert job.steps() == list(range(1, last + 3))                 # nothing lost, nothing repeated
    assert json.loads((job.run / "finished").read_text()) == {"step": last + 2}


def test_finished_file_says_so_until_the_run_starts_over(tmp_path):
    mark = tmp_path / "toy/finished"
    train(tmp_path, stop_after=2)
    assert not mark.exists()
    train(tmp_path)
    assert json.loads(mark.read_text()) == {"step": 4}
    train(tmp_path)
    assert json.loads(mark.read_text()) == {"step": 4}
    train(tmp_path, resume="none", stop_after=1)
    assert not mark.exists()
