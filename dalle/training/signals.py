"""Stopping on a signal: the handler only sets a flag; the loop reads it at the end of a step, agrees and saves.

A terminal has signals of its own: Ctrl-C (SIGINT), and SIGHUP when it closes. Before the first step they end the
process as they would any other; from then on there is something to save. Only a second Ctrl-C ends the process at once:
a thread sees to that, because the main one may be deep in a collective.
"""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

from dalle.errors import EXIT_INTERRUPTED, EXIT_STOPPED_BY_SIGNAL

# SIGTERM from launchers and schedulers, SIGUSR2 as a warning before a time limit (NCCL has used SIGUSR1 itself), SIGINT
# and SIGHUP from a terminal
STOP_SIGNALS = ("SIGTERM", "SIGUSR2", "SIGINT", "SIGHUP")
OF_A_TERMINAL = ("SIGINT", "SIGHUP")
ONE_INTERRUPT_SECONDS = 1.0     # a launcher passes on what the terminal has also sent: still the same Ctrl-C


class StopSignals:
    """While open, the signals of these names set ``received`` instead of ending the process; those of a terminal only
    once :meth:`begin` was called. ``speaks``: this process says what a Ctrl-C does."""

    def __init__(self, names: Sequence[str] = STOP_SIGNALS, speaks: bool = True) -> None:
        self.received: str | None = None
        self._names, self._speaks = names, speaks
        self._previous: dict[int, object] = {}
        self._listener: InterruptListener | None = None

    def __enter__(self) -> "StopSignals":
        self._handle(name for name in self._names if name not in OF_A_TERMINAL)
        return self

    def begin(self) -> None:
        """From now on there is something to save at a Ctrl-C, and when the terminal closes."""
        self._handle(name for name in self._names if name in OF_A_TERMINAL and not is_ignored(name))
        if signal.SIGINT in self._previous or signal.SIGHUP in self._previous:
            self._listener = InterruptListener(self._speaks)

    def _handle(self, names: Iterable[str]) -> None:
        if threading.current_thread() is threading.main_thread():    # Python allows handlers nowhere else
            for name in names:
                self._previous[signal.Signals[name]] = signal.signal(signal.Signals[name], self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        if self._listener is not None:
            self._listener.close()
        for number, handler in self._previous.items():
            with contextlib.suppress(TypeError):    # None: installed by something other than Python
                signal.signal(number, handler)


def is_ignored(name: str) -> bool:
    """Whether this process was started with the signal ignored, as ``nohup`` and a shell's ``&`` do."""
    return signal.getsignal(signal.Signals[name]) is signal.SIG_IGN


class InterruptListener:
    """A thread that Python's own C handler tells of every signal, whatever the main thread does."""

    def __init__(self, speaks: bool) -> None:
        self._speaks, self._first = speaks, 0.0
        self._ours, self._wakeup = socket.socketpair()
        self._wakeup.setblocking(False)
        self._before = signal.set_wakeup_fd(self._wakeup.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        self._wakeup.close()

    def _listen(self) -> None:
        while numbers := self._ours.recv(64):
            for number in numbers:
                if number == signal.SIGHUP:
                    leave_terminal()
                elif number == signal.SIGINT:
                    self._interrupt()
        self._ours.close()

    def _interrupt(self) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            self._say("stopping within a step or two, with a checkpoint; Ctrl-C again ends at once, without one")
        elif now - self._first > ONE_INTERRUPT_SECONDS:
            self._say("interrupted")
            os._exit(EXIT_INTERRUPTED)      # what was being saved has no name yet, as after a kill

    def _say(self, line: str) -> None:
        if self._speaks:
            with contextlib.suppress(OSError):
                os.write(2, f"\n{line}\n".encode())     # not `print`: the main thread may be in the midst of one


def leave_terminal() -> None:
    """Point what writes to a terminal, which is gone, to nowhere: a line that cannot be written would end the run."""
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)


def run_to_its_end(command: Sequence[str], environment: Mapping[str, str] | None = None) -> int:
    """The exit status of a command on its own. Signals that ask for a stop are passed on and waited for, so that it
    saves; of a Ctrl-C the terminal tells it too, which it takes for the same one."""
    return _run(command, environment)[0]


def run_in_turn(command: Sequence[str], **options: Any) -> int:
    """The same for one command of several: after a signal nothing follows, and this program ends as the command did."""
    status, stopped = _run(command, None, **options)
    if stopped:
        raise SystemExit(status or EXIT_STOPPED_BY_SIGNAL)
    return status


def _run(command: Sequence[str], environment: Mapping[str, str] | None, **options: Any) -> tuple[int, bool]:
    process, received = subprocess.Popen(command, env=environment, **options), []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        process.send_signal(number)

    previous = {signal.Signals[name]: signal.signal(signal.Signals[name], pass_on)
                for name in STOP_SIGNALS if name not in OF_A_TERMINAL or not is_ignored(name)}
    try:
        status = process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status, bool(received)
