"""Faults of the training itself: losses that are no numbers or jump, signals, lost processes, new world sizes.

The functions are named after the fault and what is promised. Several processes train toys, one launch for many tests.
"""

import json
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny_shards import start_command, wait_until, write_job, write_shards
from toy_worker import BATCH, FaultyTask, NumberedLoader, Ranks, Toy, keys, positions, start

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from launching import largest_difference, weights
from toys import GanTask, ToyLoader, toy_run

from dalle.errors import EXIT_LOST_PROCESS, EXIT_STOPPED_BY_SIGNAL, UserError
from dalle.training.checkpoint import CheckpointStore, find_fault
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.sample_log import surviving

EXACT = 2e-6                            # other processes, other order of additions
STEPS, BAD = 10, 5                      # of a run over batches of which one explodes
SPIKE = {"zscore": 30, "history": 8}
LIMITS = {"timeout_minutes": 2}         # a mistake here must not cost ten minutes
TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")

NOT_FINITE = {1: "nan", 2: "inf", 4: "gradient"}         # with log_every=2: the loss of step 2 is not logged
DDP_AND_ZERO = pytest.mark.parametrize("kind", ["ddp", "zero1", "zero3"])


def not_finite(kind: str) -> list[Toy]:
    """What goes wrong on rank 1 alone, and what goes wrong for ever."""
    settings = {"engine": LIMITS}
    return [Toy(f"{kind}_not_finite", kind=kind, faults=NOT_FINITE,
                settings={**settings, "steps": 6, "save_every": 1, "keep_last": 9}),
            Toy(f"{kind}_hopeless", kind=kind, faults=dict.fromkeys(range(3, 20), "nan"),
                settings={**settings, "steps": 20, "max_skipped": 3})]


def spiking() -> list[Toy]:
    settings = {"steps": STEPS, "save_every": 2, "log_samples": True, "engine": LIMITS}
    jumpy = {**settings, "spike": {**SPIKE, "skip_batches": 2}}
    return [Toy("spike", spikes=[BAD], settings=jumpy),
            Toy("without", without=[BAD, BAD + 1], settings=settings),
            Toy("begun", folder="spike_resumed", spikes=[BAD], stop_after=7, settings=jumpy),
            Toy("spike_resumed", spikes=[BAD], settings=jumpy),
            Toy("runaway", spikes=list(range(BAD, 99)), settings={**settings, "spike": {**SPIKE, "max_rollbacks": 2}})]


STOPS = {"SIGTERM": {}, "SIGUSR2": {}, "SIGINT": {}, "SIGHUP": {},
         "SIGUSR1": {"stop_signals": ["SIGUSR1"]}, "stop_file": {}}
UNDISTURBED = {"steps": 6, "save_every": 0, "keep_last": 9, "engine": LIMITS}
FRAGILE = {**UNDISTURBED, "save_every": 1}
SECONDS_ALLOWED = 3
IMPATIENT = {**FRAGILE, "engine": {**LIMITS, "step_timeout_minutes": SECONDS_ALLOWED / 60}}


def stopping() -> list[Toy]:
    """Rank 1 alone is asked to stop, in the middle of step 3; and one whose minutes are over."""
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
    job = start([*not_finite("ddp"), *spiking(), *stopping(), *ending, bug], lost.out)
    assert job.wait() == [EXIT_LOST_PROCESS, 1], job.errors(0) + job.errors(1)
    return lost.out


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    """Two processes under DeepSpeed; the toy ``elastic`` was begun by one process."""
    out = tmp_path_factory.mktemp("zero")
    train_here(out / "elastic", stop_after=1, dropout=0, **UNDISTURBED)
    elastic = [Toy("elastic_zero2", folder="elastic", kind="zero2", stop_after=3, settings=UNDISTURBED),
               Toy("elastic_zero3", folder="elastic", kind="zero3", stop_after=5, settings=UNDISTURBED)]
    job = start([*not_finite("zero1"), *not_finite("zero3"), *elastic], out, ACCELERATE_USE_DEEPSPEED="true")
    assert job.wait() == [0, 0], job.errors(0) + job.errors(1)
    return out


@pytest.fixture
def out(request, kind) -> Path:
    return request.getfixturevalue("ddp" if kind == "ddp" else "zero")


def train_here(folder: Path, *, faults=None, spikes=(), without=(), stop_after=None, resume="auto", dropout=0.3,
               **settings):
    """In this process, alone."""
    config = toy_run(folder, **{"steps": STEPS, **settings})
    return Trainer(FaultyTask(folder, faults, spikes, dropout), config, create_engine(config),
                   lambda first: NumberedLoader(first, without=without),
                   resume=str(resume), stop_after=stop_after).run()


def results(out: Path, name: str) -> list[dict]:
    """What each of two ranks knew at the end."""
    return [json.loads((out / f"{name}.rank{rank}.json").read_text()) for rank in (0, 1)]


def log_of(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def events(folder: Path, name: str) -> list[dict]:
    return [line for line in log_of(folder / "toy") if line.get("event") == name]


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of it: weights and moments. It must verify."""
    place = CheckpointStore(folder / "toy/checkpoints", 1).path(step)
    assert find_fault(place) is None
    return {f"{path.name.partition('-')[0]}:{name}": tensor for path in place.glob("net/*.safetensors")
            for name, tensor in load_file(path).items()}         # whichever rank wrote it


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys() and left
    return all(torch.equal(left[name], right[name]) for name in left)


def finished_like(out: Path, name: str, folder: str) -> bool:
    """Whether the training ended on both ranks with the very weights and moments of the undisturbed one."""
    assert [result["status"] for result in results(out, name)] == ["finished"] * 2
    return equal(checkpoint(out / folder, 6), checkpoint(out / "straight", 6))


# -- losses -----------------------------------------------------------------------------------------------------------

@DDP_AND_ZERO
def test_nan_or_inf_loss_or_gradient_on_one_rank_skips_the_step_on_all_and_moves_nothing(out, kind):
    folder = out / f"{kind}_not_finite"
    after = [checkpoint(folder, step) for step in range(1, 7)]
    moved = [not equal(before, behind) for before, behind in zip(after, after[1:], strict=False)]
    assert [step for step, did in enumerate(moved, start=1) if not did] == list(NOT_FINITE)
    assert [result["skipped"] for result in results(out, folder.name)] == [3, 3]
    assert all(tensor.isfinite().all() for tensor in after[-1].values())
    if kind != "zero3":                                  # where no rank has a whole weight
        first, second = (result["digest"] for result in results(out, folder.name))
        assert first == second


@DDP_AND_ZERO
def test_nan_or_inf_loss_or_gradient_is_logged_with_the_samples_of_all_ranks(out, kind):
    skipped = events(out / f"{kind}_not_finite", "skipped")
    assert [event["step"] - 1 for event in skipped] == list(NOT_FINITE)
    for event in skipped:
        assert (event["player"], event["phase"]) == ("net", "fit")
        assert sorted(event["keys"]) == keys(event["step"] - 1)
    figures = [line for line in log_of(out / f"{kind}_not_finite/toy") if "skipped_steps" in line]
    assert [(line["step"], line["skipped_steps"]) for line in figures] == [(2, 1), (4, 2), (6, 3)]


@DDP_AND_ZERO
def test_nan_loss_on_one_rank_trains_on_as_one_process_does(out, kind, tmp_path):
    train_here(tmp_path / "one", faults=NOT_FINITE, dropout=0, steps=6)
    assert largest_difference(weights(out, f"{kind}_not_finite"), weights(tmp_path, "one")) < EXACT


@DDP_AND_ZERO
def test_nan_loss_in_every_step_ends_with_status_2_and_names_player_phase_step_and_samples(out, kind):
    for result in results(out, f"{kind}_hopeless"):
        assert result["exit"] == 2 and "\n" not in result["error"]
        for words in ("player 'net', phase 'fit'", "3 times in a row", "step 5", *keys(5)):
            assert words in result["error"]


def test_nan_loss_of_a_rare_phase_of_a_gan_names_that_phase(tmp_path):
    class HopelessPenalty(GanTask):
        def r1(self, networks, batch, step):
            loss = super().r1(networks, batch, step)
            loss.total = loss.total * float("nan")
            return loss

    config = toy_run(tmp_path, steps=10, max_skipped=2)
    with pytest.raises(UserError, match="player 'd', phase 'r1'.* 2 times in a row up to step 2"):
        Trainer(HopelessPenalty(), config, create_engine(config), ToyLoader).run()


def test_fp16_whose_overflow_would_need_a_scaler_is_refused_in_one_line(tmp_path, run_here):
    ended = run_here("train", write_job(tmp_path, tmp_path, settings={"precision": "fp16"}).config)
    assert ended.status == 2 and ended.error.count("\n") == 1
    assert all(words in ended.error for words in ("train.precision", "fp16", "fp32", "bf16"))


def test_loss_spike_rolls_back_and_ends_like_a_run_that_never_met_the_batch(tmp_path):
    settings = {"spike": SPIKE, "log_samples": True, "micro_batch_size": 4}
    train_here(tmp_path / "spike", spikes=[BAD], **settings)
    train_here(tmp_path / "without", without=[BAD], **settings)
    assert equal(checkpoint(tmp_path / "spike", STEPS), checkpoint(tmp_path / "without", STEPS))
    assert surviving(tmp_path / "spike/toy") == surviving(tmp_path / "without/toy")
    (event,) = events(tmp_path / "spike", "rollback")
    assert (event["step"], event["to_step"]) == (BAD + 1, 4) and event["zscore"] > SPIKE["zscore"]
    assert event["left_out_positions"] == [[BAD * BATCH, BAD * BATCH + BATCH - 1]] and event["keys"] == keys(BAD)
    assert not events(tmp_path / "without", "rollback")
    assert losses(tmp_path / "spike/toy") == losses(tmp_path / "without/toy")       # nor does it show in the figures


def losses(run: Path) -> dict[int, float]:
    """The newest figure of every step."""
    return {line["step"]: line["loss"] for line in log_of(run) if "loss" in line}


def test_loss_spike_after_a_resume_from_an_older_checkpoint_goes_back_to_that_one(tmp_path):
    """Not to a later one of the steps that the user gave up."""
    train_here(tmp_path / "spike", stop_after=8, keep_last=9, spike=SPIKE)
    train_here(tmp_path / "spike", spikes=[BAD], resume=tmp_path / "spike/toy/checkpoints/step_00000004", spike=SPIKE)
    assert [event["to_step"] for event in events(tmp_path / "spike", "rollback")] == [4]
    train_here(tmp_path / "without", without=[BAD])
    assert equal(checkpoint(tmp_path / "spike", STEPS), checkpoint(tmp_path / "without", STEPS))


def test_loss_spike_is_left_alone_unless_the_config_asks(tmp_path):
    train_here(tmp_path, spikes=[BAD], log_samples=True)
    assert not events(tmp_path, "rollback")
    assert [key for _, key in surviving(tmp_path / "toy")[BAD]] == keys(BAD)


def test_loss_spike_on_one_rank_rolls_back_all_ranks_alike(ddp):
    for result in results(ddp, "spike"):
        assert (result["status"], result["rollbacks"], result["excluded"]) == ("finished", 1, [BAD, BAD + 1])
    of_ranks = [[entry.get("start", entry.get("step")) for entry in sample_log(ddp / "spike", rank)] for rank in (0, 1)]
    assert of_ranks[0] == of_ranks[1] == [0, *range(BAD + 1), 4, *range(4, STEPS)]      # starts at 0, and at 4 again
    (event,) = events(ddp / "spike", "rollback")
    assert sorted(event["keys"]) == keys(BAD)
    assert equal(checkpoint(ddp / "spike", STEPS), checkpoint(ddp / "without", STEPS))


def sample_log(folder: Path, rank: int) -> list[dict]:
    lines = (folder / f"toy/sample_log/rank{rank:05d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def test_loss_spike_leaves_out_its_positions_and_trains_on_all_others_once(ddp):
    kept = surviving(ddp / "spike/toy")
    assert list(kept) == list(range(STEPS))
    numbers = [number for number in range(STEPS + 2) if number not in (BAD, BAD + 1)]
    assert [[position for position, _ in kept[step]] for step in kept] == [positions(n).tolist() for n in numbers]
    assert [[key for _, key in kept[step]] for step in kept] == [keys(number) for number in numbers]


def test_loss_spike_stays_left_out_after_a_restart(ddp):
    (event,) = events(ddp / "spike_resumed", "rollback")
    assert [line["step"] for line in events(ddp / "spike_resumed", "resume")] == [7]
    assert all(result["excluded"] == [BAD, BAD + 1] for result in results(ddp, "spike_resumed"))
    assert equal(checkpoint(ddp / "spike_resumed", STEPS), checkpoint(ddp / "without", STEPS))


def test_loss_spikes_beyond_max_rollbacks_end_with_status_2(ddp):
    for result in results(ddp, "runaway"):
        assert result["exit"] == 2 and "\n" not in result["error"]
        for words in ("player 'net', phase 'fit'", f"step {BAD}", "train.spike.max_rollbacks=2"):
            assert words in result["error"]
    assert len(events(ddp / "runaway", "rollback")) == 2
    assert CheckpointStore(ddp / "runaway/toy/checkpoints", 1).newest()[0].name == "step_00000004"


# -- signals ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", STOPS)
def test_stop_signal_or_file_at_one_rank_saves_once_ends_with_75_and_resumes_exactly(ddp, fault):
    for result in results(ddp, f"{fault}_stopped"):
        assert (result["status"], result["exit"], result["steps"]) == ("signal", EXIT_STOPPED_BY_SIGNAL, 4)
    assert [line["step"] for line in events(ddp / fault, "checkpoint")] == [0, 4, 6]
    assert [line["step"] for line in events(ddp / fault, "resume")] == [4]
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
    assert [line["step"] for line in events(ddp / "paused", "checkpoint")] == [0, 4, 6]
    assert finished_like(ddp, "paused_resumed", "paused")


# -- lost processes ---------------------------------------------------------------------------------------------------

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


# -- world sizes ------------------------------------------------------------------------------------------------------

def test_changed_world_size_and_engine_at_resume_end_like_the_straight_run(zero, tmp_path):
    """One process, ZeRO-2 over two, ZeRO-3 over two, one process again."""
    assert [line["engine"] for line in events(zero / "elastic", "resume")] == ["zero2", "zero3"]
    assert train_here(zero / "elastic", dropout=0, **UNDISTURBED).steps == 6
    train_here(tmp_path / "straight", dropout=0, **UNDISTURBED)
    assert largest_difference(weights(zero, "elastic"), weights(tmp_path, "straight")) < EXACT


@dataclass
class Chain:
    """A run that was killed and went on with other numbers of processes, and one that was left alone."""

    straight: Path
    changed: Path
    killed_status: int


@pytest.fixture(scope="module")
def chain(workshop, commands, tmp_path_factory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    settings = {"steps": 24, "save_every": 3, "validate_every": 0, "preview_every": 0, "log_samples": True}
    straight, changed = (workshop.config("transformer", folder / name, train=settings)
                         for name in ("straight", "changed"))
    run = folder / "changed/transformer"
    process = start_command("launch/train.py", changed, launcher=TWO_PROCESSES)
    try:
        wait_until(lambda: any(line.get("loss") and line["step"] >= 4 for line in log_of(run)), process,
                   seconds=120)
        for worker in psutil.Process(process.pid).children():
            worker.send_signal(signal.SIGKILL)
        output = process.communicate(timeout=60)
    finally:
        process.kill()
    assert 4 <= log_of(run)[-1]["step"] < 14, output
    assert commands["train"](changed, "--stop-after", 16) == 0
    again = start_command("launch/train.py", changed, launcher=TWO_PROCESSES)
    try:
        output = again.communicate(timeout=240)
    finally:
        again.kill()
    assert again.returncode == 0, output
    assert commands["train"](straight) == 0
    return Chain(folder / "straight/transformer", run, process.returncode)


def test_killed_processes_end_the_launcher_with_a_failure(chain):
    assert chain.killed_status not in (0, EXIT_STOPPED_BY_SIGNAL)


def test_changed_world_size_after_a_kill_trains_on_the_samples_of_the_uninterrupted_run(chain):
    """2 processes, SIGKILL, 1 process, 2 processes: two epochs."""
    begun = [line["processes"] for line in log_of(chain.changed) if line.get("event") in ("start", "resume")]
    assert begun == [2, 1, 2]
    expected, found = surviving(chain.straight), surviving(chain.changed)
    assert list(expected) == list(range(24)) and all(len(samples) == 8 for samples in expected.values())
    assert found == expected
    seen = Counter(key for samples in found.values() for _, key in samples)
    assert len(seen) == 96 and set(seen.values()) == {2}


def test_changed_world_size_after_a_kill_has_the_losses_of_the_uninterrupted_run(chain):
    expected, found = losses(chain.straight), losses(chain.changed)
    assert list(expected) == list(range(1, 25)) and found.keys() == expected.keys()
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), abs=1e-5)


def test_world_size_that_does_not_divide_the_batch_is_refused_with_those_that_do(tmp_path, monkeypatch):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), settings={"batch_size": 8})
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    process = start_command("launch/train.py", job.config)      # the other two never come: it must not wait for them
    try:
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error")]
    assert "3 processes" in line and "1, 2, 4, 8" in line and not job.run.exists()
