"""Figures between two log lines. Nothing here waits for the device until a line is due."""

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dalle.training.figures import Figure, Max, Mean, numbers_of
from dalle.training.timing import Part, Timings

# dense bf16 FLOP/s by a part of the device's name, from the makers' data sheets
PEAK_FLOPS = {"B200": 2.25e15, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "L4": 121e12, "A10": 125e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


class Meter:
    """Collects figures as tensors and times as floats; :meth:`read` turns them into numbers, in one transfer.

    ``timings`` has the seconds of the parts of a step: ``data``, ``prepare``, those of :meth:`part`, ``agreement``.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.timings = Timings(device)
        self._figures: dict[str, list[Tensor]] = defaultdict(list)
        self._maxima: set[str] = set()                       # names of figures whose maximum is asked for
        self.restart()

    def restart(self) -> None:
        """Forget what was collected, and count the time from now on."""
        self._figures.clear()
        self.timings.forget()
        self._paused = 0.0
        self._began = time.perf_counter()
        self.steps = 0

    def add(self, name: str, value: Tensor | float | Max) -> None:
        if isinstance(value, Max):
            self._maxima.add(name)
            value = value.maximum
        self._figures[name].append(value.detach() if isinstance(value, Tensor) else torch.tensor(float(value)))

    def waiting(self) -> Part:
        """Time in here is time waiting for data."""
        return self.timings.host("data")

    def part(self, name: str) -> Part:
        """What is called in here is a part of a step on the device: ``prepare``, or ``forward`` of a phase."""
        return self.timings.device(name)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here (validation, previews, saving) is not training time."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def read(self) -> tuple[dict[str, Figure], float, dict[str, float]]:
        """(figures of the finite values of each name, seconds of training, those of its parts); starts over."""
        numbers = iter(numbers_of([value for values in self._figures.values() for value in values]))
        figures: dict[str, Figure] = {}
        for name, values in self._figures.items():
            finite = [number for number in (next(numbers) for _ in values) if abs(number) < float("inf")]
            figures[name] = (Max(max(finite, default=Max.maximum)) if name in self._maxima
                             else Mean(sum(finite), len(finite)))
        seconds = time.perf_counter() - self._began - self._paused
        parts = self.timings.read()
        self.restart()
        return figures, max(seconds, 1e-9), parts


def memory_gigabytes(device: torch.device) -> float:
    """Most memory used so far: of the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s, or None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)


def speeds(samples_per_second: float, task: Any, device: torch.device, world_size: int) -> dict[str, float]:
    """Samples/s, tokens/s where the task has tokens, and the share of the devices' peak where both sides are known."""
    figures = {"samples_per_second": samples_per_second}
    if task.tokens_per_sample:
        figures["tokens_per_second"] = samples_per_second * task.tokens_per_sample
    peak = peak_flops(device)
    if task.flops_per_sample and peak:
        figures["mfu"] = samples_per_second * task.flops_per_sample / (peak * world_size)
    return figures
