"""One start of a command: all processes that came of it, what it logs, and its end."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "TESSERA_CHAOS"              # in the environment of a start: the processes that came of it are found by it
SECONDS_TO_END = 180                # of what came of a command, once that has ended


class Start:
    """One start of a command: its processes, however far down, are found by a mark in their environment."""

    def __init__(self, command: Sequence[object], printed: Path, processes: int):
        self.mark, self.world_size, self.printed = secrets.token_hex(8), processes, printed
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "DS_ACCELERATOR": "cpu", MARK: self.mark}
        printed.parent.mkdir(parents=True, exist_ok=True)
        with open(printed, "wb") as file:
            self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=file,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes that train: the one, or what torchrun gave a rank and has none above it."""
        if self.world_size == 1:
            return [process for process in self.all() if process.pid == self.process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            inside = {process.pid: process for process in self.all() if "RANK" in process.environ()}
            return [process for process in inside.values() if process.ppid() not in inside]
        return []

    def workers(self) -> list[psutil.Process]:
        """Loader workers: forks of a rank's fork server."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [worker for rank in self.ranks() for server in rank.children()
                    if any("multiprocessing.forkserver" in word for word in server.cmdline())
                    for worker in server.children()]
        return []

    def kill_all(self) -> None:
        while processes := self.all():
            send(processes, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait()

    def wait(self, seconds: float) -> str | None:
        """Until no process is left: at most ``seconds`` for the command itself, and then ``SECONDS_TO_END`` for those
        that came of it. What was left after how long is said, and ended."""
        began = time.monotonic()
        wait_until(lambda: self.ended, seconds, every=0.1)
        if self.ended and wait_until(lambda: not self.all(), SECONDS_TO_END, every=0.1):
            return None
        waited, left = time.monotonic() - began, []
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                left.append(f"{process.pid} ({' '.join(process.cmdline()[-6:])[:100]})")
        self.kill_all()
        return f"processes were left {waited:.0f} s later: {', '.join(left)}" if left else None

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def reported_statuses(self) -> list[int]:
        """What torchrun's report says of the ranks that failed; it names the first of them twice."""
        text = self.printed.read_text(errors="replace")
        by_pid = {pid: int(status) for status, pid in re.findall(r"exitcode\s*: (-?\d+) \(pid: (\d+)\)", text)}
        return list(by_pid.values())


def send(processes: Sequence[psutil.Process], number: int) -> bool:
    """Whether one of the processes was still there to get the signal."""
    reached = False
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
            reached = True
    return reached


class Progress:
    """The steps that a run has logged since this object was made."""

    def __init__(self, run: Path):
        self.path = run / "log.jsonl"
        self._offset = self.path.stat().st_size if self.path.exists() else 0

    def steps(self) -> list[int]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            return [line["step"] for line in parse_lines(file.read().decode(errors="replace")) if "loss" in line]


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines of ``text``; a kill may have torn one."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint that has its place."""
    steps = [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]
    return max(steps, default=None)


def wait_until(condition: Callable[[], object], seconds: float, every: float = 0.01) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
