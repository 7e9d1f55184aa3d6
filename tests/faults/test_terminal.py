"""What a terminal does to a run: Ctrl-C, Ctrl-C again, and a connection that closes. Real signals to real processes.

The toys wait in a step until a marker is taken away, so that nothing depends on how fast a machine is.
"""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
from tiny_shards import start_command, wait_until, write_job, write_shards
from toy_worker import Ranks, Toy, start

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from launching import free_port

from dalle.data.index import ShardIndex
from dalle.errors import EXIT_INTERRUPTED, EXIT_STOPPED_BY_SIGNAL
from dalle.training.checkpoint import CheckpointStore
from dalle.training.signals import ONE_INTERRUPT_SECONDS

ROOT = Path(__file__).resolve().parents[2]
PAUSED = {"steps": 6, "save_every": 0, "keep_last": 9}
SECONDS = 240


def paused(out: Path, **environment: str) -> tuple[Ranks, Path]:
    """One process in the middle of step 3, and the marker that keeps it there."""
    job = start([Toy("toy", kind="single", faults={3: "pause"}, settings=PAUSED)], out, world_size=1, **environment)
    marker = out / "toy/pause"
    wait_until(marker.exists, job.processes[0], SECONDS)
    return job, marker


def checkpoints(run: Path) -> list[str]:
    store = CheckpointStore(run / "checkpoints", 9)
    newest, passed_over = store.newest()
    assert not passed_over
    return [path.name for path in store.all()]


def test_ctrl_c_saves_and_ends_with_75_however_many_pass_it_on(tmp_path):
    job, marker = paused(tmp_path)
    job.processes[0].send_signal(signal.SIGINT)
    job.processes[0].send_signal(signal.SIGINT)      # as from a launcher that was told of it, too
    wait_until(lambda: "Ctrl-C again" in job.errors(0), job.processes[0], SECONDS)
    marker.unlink()
    assert job.wait(SECONDS) == [EXIT_STOPPED_BY_SIGNAL]
    assert "Traceback" not in job.errors(0) and "step_00000004" in checkpoints(tmp_path / "toy/toy")


def test_ctrl_c_again_ends_at_once_with_130_also_where_a_step_never_ends(tmp_path):
    job, _ = paused(tmp_path)
    try:
        job.processes[0].send_signal(signal.SIGINT)
        wait_until(lambda: "Ctrl-C again" in job.errors(0), job.processes[0], SECONDS)
        time.sleep(ONE_INTERRUPT_SECONDS + 0.1)
        job.processes[0].send_signal(signal.SIGINT)
    finally:
        assert job.wait(SECONDS) == [EXIT_INTERRUPTED]
    assert job.errors(0).splitlines()[-1] == "interrupted" and "Traceback" not in job.errors(0)
    assert checkpoints(tmp_path / "toy/toy") == ["step_00000000"]


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path):
    """``nohup`` starts a command so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        job, marker = paused(tmp_path)
    finally:
        signal.signal(signal.SIGHUP, before)
    job.processes[0].send_signal(signal.SIGHUP)
    marker.unlink()
    assert job.wait(SECONDS) == [0] and "step_00000006" in checkpoints(tmp_path / "toy/toy")


def test_ctrl_c_before_the_first_step_ends_at_once_and_a_missing_rank_is_named(tmp_path):
    """The one process of two that was started waits for the other, and says so."""
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(free_port())}
    said, job = tmp_path / "said", write_job(tmp_path, write_shards(tmp_path / "shards"))
    with open(said, "w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch/train.py"), str(job.config)], stdout=output, stderr=output,
            env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment})
    try:
        wait_until(lambda: "waiting for rank 1 of 2 at 127.0.0.1:" in said.read_text(), process, SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == EXIT_INTERRUPTED
    finally:
        process.kill()
    assert said.read_text().splitlines()[-1] == "interrupted" and "Traceback" not in said.read_text()


def long_job(folder: Path) -> tuple[Path, Path]:
    """A config with a loader worker, for more steps than anyone waits for, and its run's folder."""
    job = write_job(folder, write_shards(folder / "shards"), data={"workers": 1}, settings={"steps": 10**6})
    return job.config, job.run


def has_steps(run: Path) -> bool:
    log = run / "log.jsonl"
    return log.is_file() and any("loss" in json.loads(line) for line in log.read_text().splitlines()
                                 if line.endswith("}"))


def saved_step(run: Path) -> int:
    return max(int(name.removeprefix("step_")) for name in checkpoints(run))


def gone(processes: list[psutil.Process]) -> bool:
    return all(not one.is_running() or one.status() == psutil.STATUS_ZOMBIE for one in processes)


def test_ctrl_c_under_torchrun_reaches_every_rank_once_and_they_save(tmp_path):
    """It starts each rank in a session of its own, and passes on what the terminal tells it alone."""
    config, run = long_job(tmp_path)
    process = start_command("launch/train.py", config,
                            launcher=("torch.distributed.run", "--standalone", "--nproc_per_node", "2"))
    try:
        wait_until(lambda: has_steps(run), process, SECONDS)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    assert saved_step(run) > 0 and "stopped by a signal after step" in output, errors
    assert not [line for line in errors.splitlines() if line.startswith("error")]


def test_a_terminal_that_closes_saves(tmp_path):
    """The kernel sends SIGHUP to all in its foreground, loader workers and their server too; nobody can write there."""
    config, run = long_job(tmp_path)
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        os.execv(sys.executable, [sys.executable, str(ROOT / "launch/train.py"), str(config)])
    os.set_blocking(terminal, False)
    family: list[psutil.Process] = []
    try:
        end = time.monotonic() + SECONDS
        while not has_steps(run):
            assert time.monotonic() < end
            drain(terminal)
            time.sleep(0.05)
        family = psutil.Process(pid).children(recursive=True)
        os.close(terminal)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGKILL)
    assert status == EXIT_STOPPED_BY_SIGNAL and saved_step(run) > 0
    end = time.monotonic() + SECONDS
    while not gone(family):
        assert time.monotonic() < end
        time.sleep(0.05)


def drain(terminal: int) -> None:
    """Read what is there, or the other side waits once its buffer is full."""
    try:
        while os.read(terminal, 65536):
            pass
    except OSError:
        return


def test_ctrl_c_in_another_command_is_one_line_and_130(run_here, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ShardIndex, "load", interrupted)
    before = signal.getsignal(signal.SIGINT)
    try:
        ended = run_here("train_tokenizer", "nowhere", "--out", "nowhere")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (ended.status, ended.error) == (EXIT_INTERRUPTED, "interrupted\n")
