"""One process writes a folder: a lock with its owner's name on it and a sign of life.

The file ``lock`` says who holds the folder. On the same machine the owner's process answers for it: a process that is
gone, or whose number another has now, holds nothing. Of another machine the file's time does, which the owner renews
every few seconds: on storage that several nodes share there is no other sign that all file systems carry (``flock`` is
local on some and absent on others). A job that SLURM has started anew takes its predecessor's lock at once.
"""

import fcntl
import json
import logging
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import psutil

from dalle.errors import EXIT_LOST_PROCESS, UserError

log = logging.getLogger(__name__)

LOCK_FILE = "lock"
BEAT_SECONDS = 10.0
DEAD_SECONDS = 90.0       # without a beat: longer than the 60 s for which NFS may show an old time
POLL_SECONDS = 1.0
UNKNOWN = "a process without a name"      # of a damaged lock


@dataclass(frozen=True)
class Owner:
    """Who holds a folder, as far as another process can tell."""

    host: str
    pid: int
    started: float            # when the process began, see :func:`start_of`
    machine: str              # its boot and its process numbers' namespace: only there do they mean the same
    job: str = ""             # SLURM's
    restarts: int = 0         # of that job
    token: str = ""           # of this lock alone

    @classmethod
    def here(cls) -> Self:
        environment, pid = os.environ, os.getpid()
        job = "@".join(filter(None, (environment.get("SLURM_JOB_ID"), environment.get("SLURM_CLUSTER_NAME"))))
        return cls(socket.gethostname(), pid, start_of(pid), this_machine(), job,
                   int(environment.get("SLURM_RESTART_COUNT", "0")), secrets.token_hex(8))

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}{f', job {self.job}' if self.job else ''}"


def owner_in(text: str) -> Owner | None:
    """The owner that a lock names; None where it is damaged."""
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return None
    kinds = {"host": str, "pid": int, "started": (int, float), "machine": str, "job": str, "restarts": int}
    return owner if all(isinstance(getattr(owner, name), kind) for name, kind in kinds.items()) else None


def this_machine() -> str:
    """Where process numbers mean the same: this boot of this kernel, and in it this container."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def start_of(pid: int) -> float:
    """When the process ``pid`` began: clock ticks since the boot, which no change of the time moves; elsewhere seconds.

    Raises ``psutil.NoSuchProcess``.
    """
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return psutil.Process(pid).create_time()


def is_running(owner: Owner) -> bool:
    """Whether ``owner``, a process of this machine, is; one that took over its number is another."""
    try:
        return start_of(owner.pid) == owner.started and psutil.Process(owner.pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:
        return True


class FolderLock:
    """Holds ``folder`` from :meth:`acquire` to :meth:`release`; one process uses it, once."""

    def __init__(self, folder: Path, say: Callable[[str], None] = log.warning):
        self.folder, self.path, self.say = folder, folder / LOCK_FILE, say
        self._released = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> None:
        """Raises :class:`UserError` where another process holds the folder; waits where that cannot be told at once."""
        self.owner = Owner.here()
        while not self._create():
            self._judge()
        self._sweep()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the folder back; nothing to do where it was never held."""
        if self._thread is None:
            return
        self._released.set()
        self._thread.join(BEAT_SECONDS)
        with suppress(OSError):
            if self._seen()[0] == self.owner:
                self.path.unlink()

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _sweep(self) -> None:
        """Delete what starts that were killed here have left."""
        for left in self.folder.glob(f".{LOCK_FILE}.*"):
            with suppress(OSError):
                if self.path.stat().st_mtime - left.stat().st_mtime > DEAD_SECONDS:
                    left.unlink()

    # -- whose it is

    def _create(self) -> bool:
        """Whether the lock is ours now: it appears at once with what is in it, or not at all."""
        draft = self.folder / f".{LOCK_FILE}.{self.owner.token}"
        draft.write_text(json.dumps(asdict(self.owner)) + "\n", encoding="utf-8")
        try:
            os.link(draft, self.path)
            return True
        except FileExistsError:
            return False
        except OSError:                         # a file system without links
            return self._create_exclusively(draft.read_bytes())
        finally:
            draft.unlink()

    def _create_exclusively(self, content: bytes) -> bool:
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            return False
        try:
            os.write(file, content)
            os.fsync(file)
        finally:
            os.close(file)
        return True

    def _seen(self) -> tuple[Owner | None, float]:
        """Who holds the lock (None: it is damaged) and when it last gave a sign, by the clock of the storage."""
        with open(self.path, encoding="utf-8", errors="replace") as file:         # opened: NFS then looks again
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime
        return owner_in(text), beat

    def _judge(self) -> None:
        """Return when the lock is gone, one that nobody holds put aside; :class:`UserError` when someone holds it."""
        try:
            owner, first = self._seen()
            if owner is not None and self._is_dead(owner):
                self._put_aside(owner, "which has ended without giving it back")
                return
            if owner is not None and owner.machine == self.owner.machine:
                raise self._refusal(owner, first)
            self._watch(owner, first)
        except FileNotFoundError:
            return

    def _is_dead(self, owner: Owner) -> bool:
        """Whether it is certain without looking at the time.

        SLURM starts a job anew when it has given up the nodes of the start before; where one of them was only out of
        reach, its process finds the lock changed and ends.
        """
        if owner.job and owner.job == self.owner.job and owner.restarts < self.owner.restarts:
            return True
        return owner.machine == self.owner.machine and not is_running(owner)

    def _watch(self, owner: Owner | None, first: float) -> None:
        """Wait for a sign of life of an owner whom only the file's time can tell."""
        silent = max(0.0, self._storage_time() - first)
        if silent < DEAD_SECONDS:
            self.say(f"{self.folder} was held {silent:.0f} s ago by {owner or UNKNOWN}: waiting up to "
                     f"{DEAD_SECONDS - silent:.0f} s for a sign of life")
        end = time.monotonic() + DEAD_SECONDS - silent
        while time.monotonic() < end:
            time.sleep(min(POLL_SECONDS, max(0.0, end - time.monotonic())))
            now, beat = self._seen()
            if now != owner or beat > first:
                raise self._refusal(now, beat)
        self._put_aside(owner, f"which gave no sign of life for {DEAD_SECONDS:.0f} s")

    def _storage_time(self) -> float:
        """Now, by the clock that dates the files: those of two nodes may differ."""
        probe = self.folder / f".{LOCK_FILE}.{self.owner.token}"
        try:
            probe.touch()
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, owner: Owner | None, beat: float) -> UserError:
        seen = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(beat))
        return UserError(f"{self.folder} is in use: already running, {owner or UNKNOWN}, last sign of life {seen}. "
                         f"Wait for its end, or stop it; if it is surely dead, delete {self.path}")

    def _put_aside(self, owner: Owner | None, why: str) -> None:
        """Take a dead owner's lock away, unless another was quicker."""
        with self._alone():
            if self._seen()[0] == owner:
                self.path.unlink()
                self.say(f"{self.folder}: took over the lock of {owner or UNKNOWN}, {why}")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One at a time looks at a dead lock and removes it; the next would remove the living one that came after.

        Where the file system has no ``flock``, the two that could still meet find out at their next signs of life.
        """
        folder = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with suppress(OSError):
                fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    # -- the sign of life

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            try:
                if self._seen()[0] != self.owner:
                    self._end()
                os.utime(self.path)
            except FileNotFoundError:            # deleted by hand: held again
                with suppress(OSError):
                    self._create()
            except OSError:                      # storage that is away for a while
                continue

    def _end(self) -> None:
        """Two processes must not write one folder, and the other has begun."""
        print(f"error: {self.folder} was taken over by another process while this one gave no sign of life for "
              f"{DEAD_SECONDS:.0f} s (suspended, or its storage was away); this one ends without saving",
              file=sys.stderr, flush=True)
        os._exit(EXIT_LOST_PROCESS)
