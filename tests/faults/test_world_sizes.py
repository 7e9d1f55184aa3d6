"""Other numbers of processes at a resume: the same samples, losses and weights as without."""

import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from fault_runs import EXACT, UNDISTURBED, events, log_of, losses, train_here
from tiny_shards import start_command, wait_until, write_job, write_shards
from toy_worker import Toy, start

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from launching import largest_difference, weights

from dalle.errors import EXIT_STOPPED_BY_SIGNAL
from dalle.training.sample_log import surviving

TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    """Two processes under DeepSpeed go on with the toy ``elastic``, which was begun by one process."""
    out = tmp_path_factory.mktemp("zero")
    train_here(out / "elastic", stop_after=1, dropout=0, **UNDISTURBED)
    elastic = [Toy("elastic_zero2", folder="elastic", kind="zero2", stop_after=3, settings=UNDISTURBED),
               Toy("elastic_zero3", folder="elastic", kind="zero3", stop_after=5, settings=UNDISTURBED)]
    job = start(elastic, out, ACCELERATE_USE_DEEPSPEED="true")
    assert job.wait() == [0, 0], job.errors(0) + job.errors(1)
    return out


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
