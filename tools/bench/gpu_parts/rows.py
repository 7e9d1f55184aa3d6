"""A row of the table: what was measured, what the machine would allow, and what is asked for."""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

MARK = "row "            # before a row in the output of a part's process


@dataclass(frozen=True)
class Row:
    """``value`` in ``unit``; ``limit`` what this device could at most do, as measured in this run; ``bar`` and ``goal``
    what is asked for, all in the same unit. ``more_is_better`` is false for times."""

    what: str
    value: float
    unit: str
    limit: float | None = None
    bar: float | None = None
    goal: float | None = None
    note: str = ""
    more_is_better: bool = True

    def verdict(self) -> str:
        """``goal``, ``bar`` or ``missed``, by the best that the value reaches; nothing where nothing is asked."""
        for name, asked in (("goal", self.goal), ("bar", self.bar)):
            if asked is not None and (self.value >= asked if self.more_is_better else self.value <= asked):
                return name
        return "" if self.bar is None else "missed"

    def line(self) -> str:
        parts = [f"{self.what:52s} {shown(self.value):>9s} {self.unit:10s}"]
        parts += [f"{name} {shown(number)}" for name, number in
                  (("limit", self.limit), ("bar", self.bar), ("goal", self.goal)) if number is not None]
        verdict = self.verdict()
        return "  ".join([*parts, *([f"[{verdict}]"] if verdict else []), *([self.note] if self.note else [])])


def shown(number: float) -> str:
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.3g}"


def emit(row: Row) -> None:
    """Tell the command that started this part, at once: what follows may run out of time."""
    print(MARK + json.dumps(asdict(row)), flush=True)


def parse(line: str) -> Row | None:
    return Row(**json.loads(line[len(MARK):])) if line.startswith(MARK) else None


@dataclass(frozen=True)
class Setting:
    """Where a part runs, and how large: ``small`` stands for models of no use, to see that the part works."""

    device: torch.device
    small: bool
    folder: Path
    copy_bandwidth: float | None = None     # bytes/s, read and written, as `limits` measured them in this run
    matrix_rate: float | None = None        # bf16 FLOP/s


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(action: Callable[[], object], device: torch.device, times: int) -> float:
    """Seconds of one of ``times`` calls in a row, the device's work included."""
    wait(device)
    began = time.perf_counter()
    for _ in range(times):
        action()
    wait(device)
    return (time.perf_counter() - began) / times
