"""Shards that the ranks and their loader workers cannot share evenly, and a worker that is killed.

The functions are named after the fault and what is promised; each goes through the loader or a command.
"""

import itertools
import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
from epochs import data_config
from tiny_shards import sample_key, start_command, wait_until, write_job, write_shards

from dalle.data.loader import train_batches, validation_batches
from dalle.errors import EXIT_LOST_PROCESS

TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def steps_of_ranks(folder: Path, steps: int, *, batch: int, workers: int) -> list[list[list[str]]]:
    """The keys of every step of each of two ranks."""
    loaders = [train_batches(data_config(folder, workers=workers), seed=0, batch_size=batch, rank=rank, world_size=2)
               for rank in range(2)]
    try:
        return [[part["key"] for part in itertools.islice(loader, steps)] for loader in loaders]
    finally:
        for loader in loaders:
            loader.close()


def test_fewer_shards_than_workers_still_feeds_every_rank(tmp_path):
    shards = write_shards(tmp_path / "shards", counts=(4, 4, 4))
    first, second = steps_of_ranks(shards, 4, batch=6, workers=2)
    assert len(first) == len(second) == 4 and {len(keys) for keys in [*first, *second]} == {3}
    steps = [a + b for a, b in zip(first, second, strict=True)]
    whole = {sample_key(shard, sample) for shard in range(3) for sample in range(4)}
    for epoch in (steps[:2], steps[2:]):
        assert sorted(sum(epoch, [])) == sorted(whole)


def test_uneven_shards_give_every_rank_as_many_batches(tmp_path):
    counts = (7, 11, 5, 1, 13)                       # 37 samples, in batches of 6 over 2 ranks
    shards = write_shards(tmp_path / "shards", counts=counts)
    first, second = steps_of_ranks(shards, sum(counts), batch=6, workers=0)
    assert {len(keys) for keys in [*first, *second]} == {3}
    times = Counter(itertools.chain(*first, *second))
    assert len(times) == sum(counts) and set(times.values()) == {6}
    passes = [list(validation_batches(data_config(shards), seed=0, batch_size=6, rank=rank, world_size=2))
              for rank in range(2)]
    assert len(passes[0]) == len(passes[1]) == 7
    assert Counter(key for batches in passes for batch in batches for key in batch["key"]) == Counter(times.keys())


def test_uneven_and_few_shards_train_validate_and_end_on_two_processes(tmp_path):
    shards = write_shards(tmp_path / "shards", counts=(7, 11, 5))
    job = write_job(tmp_path, shards, data={"workers": 2, "validation": str(shards)},
                    settings={"steps": 8, "batch_size": 6, "validate_every": 3, "log_samples": True})
    process = start_command("launch/train.py", job.config, launcher=TWO_PROCESSES)
    try:
        out, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert job.steps()[-1] == 8 and out.count("validation after step") == 3
    of_ranks = [[json.loads(line)["step"] for line in path.read_text().splitlines() if '"position"' in line]
                for path in sorted((job.run / "sample_log").glob("rank*.jsonl"))]
    assert of_ranks == [list(range(8))] * 2


def loader_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The forks of the command's fork server."""
    return [worker for child in psutil.Process(process.pid).children()
            if any("multiprocessing.forkserver" in word for word in child.cmdline()) for worker in child.children()]


def test_killed_loader_worker_ends_the_run_at_once_with_its_name_and_a_restart_finishes(tmp_path, run_here):
    steps = 80
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), data={"workers": 2},
                    settings={"steps": steps, "save_every": 2})
    process = start_command("launch/train.py", job.config)
    try:
        wait_until(lambda: 3 in job.steps(), process)
        victim = loader_workers(process)[0]
        victim.send_signal(signal.SIGKILL)           # what the kernel does when memory runs out
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - killed < 20
    assert process.returncode == EXIT_LOST_PROCESS and 3 <= len(job.steps()) < steps
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors and str(victim.pid) in line and "start" in line and "data.workers" in line
    last = job.steps()[-1]
    assert run_here("train", job.config, "data.workers=0").status == 0
    resumed = job.steps()[job.steps().index(last) + 1:]
    assert resumed[0] > 2 and resumed[-1] == steps and resumed == list(range(resumed[0], steps + 1))
