"""Signals, time limits and lost processes: a stop is one of all ranks, with a checkpoint, and so is an end.

Several processes train toys, one launch for many tests.
"""

import signal
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fault_runs import LIMITS, UNDISTURBED, checkpoint, equal, events, results
from tiny_shards import wait_until
from toy_worker import Ranks, Toy, start

from dalle.errors import EXIT_LOST_PROCESS, EXIT_STOPPED_BY_SIGNAL
from dalle.training.checkpoint import CheckpointStore

STOPS = {"SIGTERM": {}, "SIGUSR2": {}, "SIGINT": {}, "SIGHUP": {},
         "SIGUSR1": {"stop_signals": ["SIGUSR1"]}, "stop_file": {}}
FRAGILE = {**UNDISTURBED, "save_every": 1}
SECONDS_ALLOWED = 3
IMPATIENT = {**FRAGILE, "engine": {**LIMITS, "step_timeout_minutes": SECONDS_ALLOWED / 60}}


def stopping() -> list[Toy]:
    """Rank 1 alone is asked to stop, in the middle of step 3: all do after the next; and one whose minutes are over."""
    toys = [Toy("straight", settings=UNDISTURBED), Toy("budget", settings={"minutes": 0.01, "steps": 10**6})]
    for fault, settings in STOPS.items():
        toys += [Toy(f"{fault}_stopped", folder=fault, faults={3: fault}, settings={**UNDISTURBED, **settings}),
                 Toy(f"{fault}_resumed", folder=fault, settings={**UNDISTURBED, **settings})]
    return toys


@dataclass
class Lost:
    """Jobs that ended early: where, what each process ended with, and how long after the fault."""

    out: Path
    jobs: dict[str, Ranks]
    ends: dict[str, list[int]]
    seconds: dict[str, float]


@pytest.fixture(scope="module")
def lost(tmp_path_factory) -> Lost:
    """All at once: two processes each, and one with a loader that hangs."""
    out = tmp_path_factory.mktemp("lost")
    jobs = {"paused": start([Toy("paused", faults={3: "pause"}, settings=UNDISTURBED)], out),
            "dead": start([Toy("dead", faults={3: "die"}, settings=FRAGILE)], out),
            "hung": start([Toy("hung", faults={3: "hang"}, settings=IMPATIENT)], out),
            "loader": start([Toy("loader", kind="single", hangs_at=3, settings=IMPATIENT)], out, world_size=1)}
    try:
        marker = out / "paused/pause"
        wait_until(marker.exists, jobs["paused"].processes[1], seconds=120)
        jobs["paused"].processes[1].send_signal(signal.SIGTERM)
        marker.unlink()
        ended = {}
        deadline = time.monotonic() + 180
        while len(ended) < len(jobs):
            assert time.monotonic() < deadline, sorted(jobs.keys() - ended.keys())
            for name, job in jobs.items():
                if name not in ended and all(process.poll() is not None for process in job.processes):
                    ended[name] = time.time()
            time.sleep(0.02)
    finally:
        for job in jobs.values():
            job.kill()
    began = {name: (out / name / fault).stat().st_mtime for name, fault in (("dead", "die"), ("hung", "hang"))}
    return Lost(out, jobs, {name: [process.returncode for process in job.processes] for name, job in jobs.items()},
                {name: ended[name] - began[name] for name in began})


@pytest.fixture(scope="module")
def ddp(lost) -> Path:
    """Two processes under DDP; the jobs that were lost go on here. In the last one rank 1 meets a bug."""
    ending = [Toy(f"{name}_resumed", folder=name, settings=FRAGILE if name != "paused" else UNDISTURBED)
              for name in ("paused", "dead", "hung")]
    bug = Toy("bug", faults={3: "bug"}, settings=FRAGILE)
    job = start([*stopping(), *ending, bug], lost.out)
    assert job.wait() == [EXIT_LOST_PROCESS, 1], job.errors(0) + job.errors(1)
    return lost.out


def finished_like(out: Path, name: str, folder: str) -> bool:
    """Whether the training ended on both ranks with the very weights and moments of the undisturbed one."""
    assert [result["status"] for result in results(out, name)] == ["finished"] * 2
    return equal(checkpoint(out / folder, 6), checkpoint(out / "straight", 6))


# -- signals

@pytest.mark.parametrize("fault", STOPS)
def test_stop_signal_or_file_at_one_rank_saves_once_ends_with_75_and_resumes_exactly(ddp, fault):
    for result in results(ddp, f"{fault}_stopped"):
        assert (result["status"], result["exit"], result["steps"]) == ("signal", EXIT_STOPPED_BY_SIGNAL, 5)
    assert [line["step"] for line in events(ddp / fault, "checkpoint")] == [0, 5, 6]
    assert [line["step"] for line in events(ddp / fault, "resume")] == [5]
    assert not (ddp / fault / "toy/stop").exists()
    assert finished_like(ddp, f"{fault}_resumed", fault)


def test_time_limit_stops_all_ranks_after_the_same_step_with_a_checkpoint(ddp):
    first, second = results(ddp, "budget")
    assert first["status"] == second["status"] == "minutes"
    assert first["exit"] == second["exit"] == EXIT_STOPPED_BY_SIGNAL
    assert first["steps"] == second["steps"] > 0
    newest, passed_over = CheckpointStore(ddp / "budget/toy/checkpoints", 1).newest()
    assert newest.name == f"step_{first['steps']:08d}" and not passed_over


def test_sigterm_to_one_process_in_the_middle_of_a_step_ends_both_with_75_and_resumes_exactly(lost, ddp):
    assert lost.ends["paused"] == [EXIT_STOPPED_BY_SIGNAL] * 2
    assert not lost.jobs["paused"].error_lines(0) + lost.jobs["paused"].error_lines(1)
    assert [line["step"] for line in events(ddp / "paused", "checkpoint")] == [0, 5, 6]
    assert finished_like(ddp, "paused_resumed", "paused")


# -- lost processes

def test_dead_rank_ends_the_other_within_seconds_with_76_and_one_line_of_rank_and_step(lost):
    assert lost.ends["dead"] == [EXIT_LOST_PROCESS, 1]
    assert lost.seconds["dead"] < 10
    (line,) = lost.jobs["dead"].error_lines(0)
    assert "rank 0, step 3: lost another rank while training" in line
    assert "Traceback" not in lost.jobs["dead"].errors(0)


def test_error_on_one_rank_keeps_its_traceback_and_ends_the_other_with_76_and_one_line(ddp):
    job = Ranks([], ddp, "bug")                          # how the two ended was seen by the fixture
    assert "RuntimeError: a bug that only rank 1 meets" in job.errors(1)
    (line,) = job.error_lines(0)
    assert "rank 0, step 3: lost another rank while training" in line and "Traceback" not in job.errors(0)


def test_hung_rank_ends_all_in_time_with_76_rank_step_and_stacks(lost):
    assert lost.ends["hung"] == [EXIT_LOST_PROCESS] * 2
    assert lost.seconds["hung"] < SECONDS_ALLOWED + 10
    (line,) = lost.jobs["hung"].error_lines(1)
    assert "rank 1 on" in line and f"step 3 has been training for more than {SECONDS_ALLOWED} s" in line
    assert " in meet" in lost.jobs["hung"].errors(1)
    (line,) = lost.jobs["hung"].error_lines(0)           # by its own clock, or because rank 1 is gone
    assert "rank 0" in line and "step 3" in line and "training" in line


def test_hung_loader_ends_with_76_and_says_that_it_waited_for_data(lost):
    assert lost.ends["loader"] == [EXIT_LOST_PROCESS]
    (line,) = lost.jobs["loader"].error_lines(0)
    assert "rank 0" in line and f"step 3 has been waiting for data for more than {SECONDS_ALLOWED} s" in line
    assert " in __iter__" in lost.jobs["loader"].errors(0)


@pytest.mark.parametrize("name", ["dead", "hung"])
def test_dead_or_hung_rank_leaves_a_good_checkpoint_and_a_restart_finishes_exactly(lost, ddp, name):
    (resumed,) = events(ddp / name, "resume")
    assert resumed["step"] in (2, 3)                     # the save of step 3 may not have been through
    assert finished_like(ddp, f"{name}_resumed", name)
