"""Where the time of a step goes: named parts of it, in the log and, while a trace is written, in that."""

import time
from collections import defaultdict
from types import TracebackType
from typing import Any

import torch


class Part:
    """A part of a step that runs on the processor, measured by its clock; entered as often as wanted, not in itself."""

    def __init__(self, timings: "Timings", name: str):
        self._timings, self.name = timings, name
        self._range: Any = None

    def __enter__(self) -> None:
        if self._timings.traced:
            self._range = torch.profiler.record_function(self.name)
            self._range.__enter__()
        self.begin()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.end()
        if self._range is not None:
            self._range.__exit__(kind, error, trace)
            self._range = None

    def begin(self) -> None:
        self._began = time.perf_counter()

    def end(self) -> None:
        self._timings.seconds[self.name] += time.perf_counter() - self._began


class DevicePart(Part):
    """A part whose work the device does: two events on the stream of the moment, read when a line is due.

    The time between them is the device's, with what it waited for the host. Inside a CUDA graph that is being captured
    no event is recorded: it would have no time.
    """

    def begin(self) -> None:
        self._first = self._timings.recorded_event()

    def end(self) -> None:
        last = self._timings.recorded_event()
        if self._first is not None and last is not None:
            self._timings.pairs.append((self.name, self._first, last))


class Timings:
    """Seconds by part, summed up until :meth:`read`. Nothing here waits for the device before."""

    def __init__(self, device: torch.device | None = None):
        self.traced = False                          # whether the parts are named in a profiler's trace
        self.seconds: dict[str, float] = defaultdict(float)
        self.pairs: list[tuple[str, Any, Any]] = []  # (part, CUDA event before, after)
        self._spare: list[Any] = []                  # events that were read: to make one costs more than to record it
        self._on_device = device is not None and device.type == "cuda"
        self._parts: dict[str, Part] = {}

    def host(self, name: str) -> Part:
        """What the processor does, or waits for, in ``with``."""
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = Part(self, name)
        return part

    def device(self, name: str) -> Part:
        """What the networks' device does for what is called in ``with``; on a CPU the same as :meth:`host`."""
        if not self._on_device:
            return self.host(name)
        part = self._parts.get(name)
        if part is None:
            part = self._parts[name] = DevicePart(self, name)
        return part

    def recorded_event(self) -> Any:
        """An event of now on the current stream; None while a graph is captured there."""
        if torch.cuda.is_current_stream_capturing():
            return None
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Seconds of each part since the last call, in the order of their first run; waits for the device."""
        if self.pairs:
            self.pairs[-1][2].synchronize()          # the newest: all before it on its stream are done, too
        for name, first, last in self.pairs:
            last.synchronize()                       # at once, but for a part on another stream
            self.seconds[name] += 1e-3 * first.elapsed_time(last)
            self._spare += first, last
        seconds = dict(self.seconds)
        self.forget()
        return seconds

    def forget(self) -> None:
        """Begin anew."""
        self.seconds.clear()
        self.pairs.clear()
