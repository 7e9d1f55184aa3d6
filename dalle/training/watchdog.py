"""Ends a process that hangs, and says which rank, step and part of the step it hung in.

A collective whose partner is gone or stuck waits for ever, and so does a read from a dead file server. Each rank has a
thread that looks at what the loop last said it began; after the time allowed for that, it prints one line and the stack
of the main thread and ends the process. The other ranks then lose it, or reach their own time.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from dalle.errors import EXIT_LOST_PROCESS
from dalle.training.settings import EngineConfig
from dalle.training.steps import Steps

Item = TypeVar("Item")


class Watchdog:
    """While open, the process ends when one of the things that the loop does takes too long."""

    def __init__(self, rank: int):
        self.rank = rank
        self.step, self.what = 0, "starting"
        self._deadline = float("inf")
        self._allowed = 0.0
        self._part = Part(self)                    # one for all: a part is begun and ended in every step
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    def allow(self, seconds: float, step: int, what: str) -> AbstractContextManager:
        """What happens from here to the end of ``with``, the part ``what`` of ``step``, may take ``seconds``; what an
        error there leads to has the rest of them."""
        self.step, self.what, self._allowed = step, what, seconds
        self._deadline = time.monotonic() + seconds
        return self._part

    def rest(self) -> None:
        """Nothing is due."""
        self._deadline = float("inf")

    def feed(self) -> None:
        """Something came forward: the time begins anew."""
        self._deadline = time.monotonic() + self._allowed

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, max(0.05, self._allowed / 4))):
            if time.monotonic() >= self._deadline:
                self._end()

    def _end(self) -> None:
        try:
            print(f"error (rank {self.rank} on {socket.gethostname()}): step {self.step} has been {self.what} for more "
                  f"than {self._allowed:.0f} s, so this or another process hangs; starting again goes on from the "
                  "newest checkpoint (engine.timeout_minutes and engine.step_timeout_minutes set the time)",
                  file=sys.stderr)
            faulthandler.dump_traceback(all_threads=True)
            sys.stderr.flush()
        finally:
            os._exit(EXIT_LOST_PROCESS)      # also where stderr was a pipe to a launcher that is dead


class Part(AbstractContextManager):
    """After which, if nothing went wrong in it, the watchdog waits for nothing."""

    def __init__(self, watchdog: Watchdog):
        self._watchdog = watchdog

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._watchdog.rest()


class Limits:
    """The times that the settings allow for what a run does; the watchdog ends a process that takes longer."""

    def __init__(self, watchdog: Watchdog, options: EngineConfig, steps: Steps):
        self._watchdog, self._steps = watchdog, steps
        self._long = 60 * options.timeout_minutes
        self._short = 60 * min(options.timeout_minutes, options.step_timeout_minutes)

    def allow(self, what: str, long: bool = True) -> AbstractContextManager:
        """What happens in here, the part ``what`` of the step, has the time of a long part or of a usual one."""
        return self._watchdog.allow(self._long if long else self._short, self._steps.done, what)

    def feed(self) -> None:
        """Something came forward: the time begins anew."""
        self._watchdog.feed()

    def each(self, items: Iterable[Item]) -> Iterator[Item]:
        """``items``, each of which may take the time that was allowed for one."""
        for item in items:
            self.feed()
            yield item
