"""What is logged, in a form that can be joined: over steps, ragged batches and ranks, to what one process would say.

A mean of means is not a mean, and neither are the largest of a step's numbers or the perplexity of a share: each kind
of figure is a class here, whose shares are joined before its value is taken.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Self

import torch
from torch import Tensor


class Figure:
    """One rank's share of a figure."""

    value: float

    def joined(self, other: Self) -> Self:
        """The figure of what both have seen."""
        raise NotImplementedError


@dataclass
class Mean(Figure):
    """A sum and a count, so that averages over ranks and ragged batches are exact."""

    total: float = 0.0
    count: float = 0.0

    def add(self, value: float | Tensor, count: float = 1) -> None:
        """Add the mean ``value`` of ``count`` samples."""
        self.total += float(value) * count
        self.count += count

    def joined(self, other: Self) -> Self:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else math.nan


@dataclass
class Max(Figure):
    """The largest of all that was seen; from a loss, a 0-d tensor that stays on its device until a line is due."""

    maximum: float | Tensor = -math.inf

    def joined(self, other: Self) -> Self:
        return Max(max(self.maximum, other.maximum))

    @property
    def value(self) -> float:
        return float(self.maximum) if self.maximum > -math.inf else math.nan


@dataclass
class Counts(Figure):
    """How often each of K things came, int64 [K] on the CPU; a subclass says what is made of it."""

    counts: Tensor

    def joined(self, other: Self) -> Self:
        return type(self)(self.counts + other.counts)


class Used(Counts):
    """How many of the things came at least once."""

    @property
    def value(self) -> float:
        return int((self.counts > 0).sum())


class Perplexity(Counts):
    """exp(entropy) of the things' frequencies: K when all come equally often, 0 before the first."""

    @property
    def value(self) -> float:
        seen = int(self.counts.sum())
        return float(torch.special.entr(self.counts.double() / seen).sum().exp()) if seen else 0.0


def numbers_of(values: Sequence[Tensor]) -> list[float]:
    """The numbers of 0-d or one-element tensors that may live on several devices; each but the CPU is read once."""
    numbers: dict[int, float] = {}
    elsewhere: dict[torch.device, list[int]] = {}
    for index, value in enumerate(values):
        if value.is_cpu:
            numbers[index] = value.item()
        else:
            elsewhere.setdefault(value.device, []).append(index)
    for here in elsewhere.values():
        stacked = torch.stack([values[index].reshape(()).float() for index in here])
        numbers.update(zip(here, stacked.tolist(), strict=True))
    return [numbers[index] for index in range(len(values))]


def joined_values(shares: Sequence[Mapping[str, Figure]]) -> dict[str, float]:
    """The value of every figure over all ranks' ``shares``; a rank may lack some."""
    names = dict.fromkeys(name for share in shares for name in share)
    return {name: reduce(lambda one, other: one.joined(other), [share[name] for share in shares if name in share]).value
            for name in names}
