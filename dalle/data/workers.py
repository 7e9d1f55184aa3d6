"""The processes that make a loader's batches: forks of a server of their own, never of the process that trains.

A training process has threads (watchdog, trackers, collectives, the saver). A fork of it keeps the locks that they held
at that moment, which nobody will ever release: a worker that needs one of them hangs, and its rank with it. The server
is a new program with one thread that has imported what a worker needs, so that a worker starts in milliseconds.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess

IMPORTED = "dalle.data.loader"       # by the server; and with it all that a worker needs
JOB_SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_AFTER_SIGTERM = 30           # what Slurm grants, too
LOST_SERVER = 255                    # multiprocessing's exit code of a process of which the server can no longer tell


def worker_context() -> BaseContext:
    """What a ``DataLoader`` starts its workers with. The server starts now, beside what the program goes on to do."""
    start_server()
    return multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Start the server where none runs. Signals sent to the whole job must not end it, nor multiprocessing's tracker of
    semaphores: they are blocked from the first instruction on."""
    with _environment(_server_environment()):
        with _blocked_signals():
            resource_tracker.ensure_running()
        forkserver.set_forkserver_preload([IMPORTED])
        with _blocked_signals():                  # again: the tracker's start has unblocked some
            forkserver.ensure_running()


def _server_environment() -> dict[str, str]:
    """Modules are found where this program finds them, not also in the current folder; numeric libraries start no
    threads; and that a killed program's semaphores are cleaned up after it is no news."""
    found = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return {"PYTHONPATH": found, "PYTHONSAFEPATH": "1", "PYTHONWARNINGS": "ignore:resource_tracker",
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """A program started meanwhile has them blocked, as have its forks; this one gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, JOB_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_start() -> Callable[[int], None]:
    """What a worker runs first: it goes on with this process's environment and folder, as a fork of it would."""
    return partial(_start, dict(os.environ), os.getcwd())


def _start(environment: Mapping[str, str], folder: str, worker: int) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    _answer_signals()


def _end_with(trainer: BaseProcess) -> None:
    """Leave as soon as ``trainer`` is gone: the server that forked this worker lives as long as the worker does."""
    trainer.join()
    os._exit(1)


def _answer_signals() -> None:
    """Signals sent to the whole job are the main process's to answer: it still needs batches until its checkpoint."""
    for name in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    # not ignored for good: multiprocessing ends a worker that hangs with this signal
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SECONDS_AFTER_SIGTERM))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, JOB_SIGNALS)


def signal_death(sentinels: Iterable[int]) -> None:
    """SIGCHLD to the main thread as soon as the first of these workers ends: the kernel sends it to the server."""
    own = [os.dup(sentinel) for sentinel in sentinels]        # the workers' are closed, and their numbers used again
    threading.Thread(target=_signal_end, args=(own,), daemon=True).start()


def _signal_end(sentinels: list[int]) -> None:
    wait(sentinels)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGCHLD)
    for sentinel in sentinels:
        os.close(sentinel)


def death_of(number: int, pid: int, exitcode: int) -> str:
    """How a loader worker ended, in words."""
    name = f"loader worker {number} (process {pid})"
    if exitcode == LOST_SERVER:
        return f"{name} was lost with the process that starts the workers; if memory ran out, lower data.workers"
    if exitcode >= 0:
        return f"{name} ended early with status {exitcode}"
    return f"{name} was killed by signal {-exitcode}; if memory ran out, lower data.workers"
