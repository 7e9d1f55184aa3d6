"""What the loop does about a loss that is not finite, one that jumps, and a process that is gone."""

import math
import statistics
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dalle.errors import LostProcess, UserError
from dalle.training.figures import numbers_of
from dalle.training.settings import SpikeConfig
from dalle.training.task import Phase
from dalle.words import one_line

KEYS_SHOWN = 16


@dataclass
class SkippedStep:
    """A phase whose player was not moved because its loss or gradient was not finite, on every rank alike."""

    step: int
    phase: Phase
    keys: list[str]       # of this rank's samples
    in_a_row: int = 0     # steps of the phase skipped up to this one


class SkipCounter:
    """Counts steps skipped for a non-finite loss or gradient; ends the run when one phase does nothing else."""

    def __init__(self, allowed: int):
        self.allowed, self.total = allowed, 0
        self._streaks: Counter[str] = Counter()
        self._pending: list[tuple[SkippedStep, Tensor]] = []

    def add(self, step: int, keys: list[str], outcomes: Iterable[tuple[Phase, Any]]) -> None:
        """The outcomes of ``step`` (finished steps before it); nothing is read from the device here."""
        self._pending += [(SkippedStep(step, phase, keys), outcome.skipped) for phase, outcome in outcomes]

    def read(self) -> list[SkippedStep]:
        """What was skipped since the last call."""
        if not self._pending:
            return []
        flags = numbers_of([flag for _, flag in self._pending])
        skipped = []
        for (entry, _), flag in zip(self._pending, flags, strict=True):
            self.total += int(flag)
            self._streaks[entry.phase.name] = entry.in_a_row = self._streaks[entry.phase.name] + 1 if flag else 0
            if flag:
                skipped.append(entry)
        self._pending.clear()
        return skipped

    def check(self, entry: SkippedStep, keys: list[str]) -> None:
        """Raise :class:`UserError` when the phase of ``entry`` was skipped too often in a row."""
        if entry.in_a_row >= self.allowed:
            raise UserError(
                f"player {entry.phase.player!r}, phase {entry.phase.name!r}: loss or gradient was not finite "
                f"{self.allowed} times in a row up to step {entry.step}; the weights are those of before. Lower its "
                f"learning rate, or look at the data; the last samples were {shown(keys)}")


def shown(keys: list[str]) -> str:
    more = f" and {len(keys) - KEYS_SHOWN} more" if len(keys) > KEYS_SHOWN else ""
    return ", ".join(keys[:KEYS_SHOWN]) + more


class SpikeWatch:
    """Compares every phase's loss with its own newest values. Fed with values that are equal on all ranks."""

    def __init__(self, config: SpikeConfig, saved: Mapping[str, Any] | None = None):
        self.config = config
        self._values: dict[str, deque[float]] = {}
        for name, values in (saved or {}).items():
            self._values[name] = deque(values, config.history)

    def state(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self._values.items()}

    def zscore(self, phase: str, loss: float) -> float | None:
        """How far ``loss`` lies above what is usual, in deviations, where it is a spike; it is remembered otherwise."""
        if not math.isfinite(loss):
            return None
        values = self._values.setdefault(phase, deque(maxlen=self.config.history))
        if len(values) >= max(4, self.config.history // 4):
            mean = statistics.fmean(values)
            # a loss that has stopped moving has next to no deviation: a thousandth of it is not a jump
            score = (loss - mean) / max(statistics.pstdev(values), 1e-3 * abs(mean), 1e-12)
            if score > self.config.zscore:
                return score
        values.append(loss)
        return None


class BatchNumbers:
    """Which batch of the reading order each step takes: step t the t-th one that is not left out."""

    def __init__(self, excluded: Iterable[int] = ()):
        self.excluded = sorted(set(excluded))

    def of(self, step: int) -> int:
        number = step
        for left_out in self.excluded:
            if left_out > number:
                break
            number += 1
        return number

    def exclude(self, step: int, count: int) -> list[int]:
        """Leave out the batches of ``count`` steps from ``step`` on; their numbers."""
        numbers = [self.of(step + offset) for offset in range(count)]
        self.excluded = sorted({*self.excluded, *numbers})
        return numbers


@contextmanager
def lost_processes_named(rank: int, where: Any) -> Iterator[None]:
    """Turn what torch raises where another rank is gone into a :class:`LostProcess` of one line.

    ``where`` has ``step`` and ``what``: the step and the part of it.
    """
    try:
        yield
    except RuntimeError as error:
        text = one_line(error)
        if isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "NCCL", "c10d")):
            reason = text.split(". This is")[0][-160:]
            raise LostProcess(f"rank {rank}, step {where.step}: lost another rank while {where.what} ({reason}); its "
                              "own output says why. Start again to go on from the last checkpoint") from error
        raise
