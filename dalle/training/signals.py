"""Stopping on a signal: the handler only sets a flag; the loop reads it at the end of a step, agrees and saves."""

import contextlib
import signal
import threading
from types import FrameType

EXIT_STOPPED_BY_SIGNAL = 75      # EX_TEMPFAIL: a checkpoint is on disk, start the same command again to go on

# SIGTERM from launchers and schedulers, SIGUSR2 as a warning before a time limit (NCCL has used SIGUSR1 itself)
SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class StopSignals:
    """While open, SIGTERM and SIGUSR2 set ``received`` instead of ending the process."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[int, object] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():    # Python allows handlers nowhere else
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            with contextlib.suppress(TypeError):    # None: installed by something other than Python
                signal.signal(number, handler)
