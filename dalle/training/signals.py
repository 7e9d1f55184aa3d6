"""Stopping on a signal: the handler only sets a flag; the loop reads it at the end of a step, agrees and saves."""

import contextlib
import signal
import threading
from collections.abc import Sequence
from types import FrameType

# SIGTERM from launchers and schedulers, SIGUSR2 as a warning before a time limit (NCCL has used SIGUSR1 itself)
STOP_SIGNALS = ("SIGTERM", "SIGUSR2")


class StopSignals:
    """While open, the signals of these names set ``received`` instead of ending the process."""

    def __init__(self, names: Sequence[str] = STOP_SIGNALS) -> None:
        self.received: str | None = None
        self._numbers = [signal.Signals[name] for name in names]
        self._previous: dict[int, object] = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():    # Python allows handlers nowhere else
            for number in self._numbers:
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            with contextlib.suppress(TypeError):    # None: installed by something other than Python
                signal.signal(number, handler)
