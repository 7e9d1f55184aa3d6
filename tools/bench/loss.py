#!/usr/bin/env python
"""A head's cross-entropy with its logits whole and fused with the head: time, memory; and the blocks of each pattern.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tools/bench/loss.py --rounds 9

On the CPU, one thread, in the process's own processor time, in shuffled rounds; a ratio is the median over rounds of
time with whole logits / time fused. Memory is the growth of the process's largest size over one forward and backward,
each in a process of its own.
"""

import argparse
import random
import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing import get_context

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.models.losses import Head
from dalle.models.masks import BLOCK, computed_blocks
from dalle.models.patterns import AttentionPattern

SIZES = [(256, 256, 10_032), (2048, 256, 512), (512, 512, 16_640), (2048, 512, 8192)]     # rows, width, vocabulary
LARGE = (8192, 256, 8192)


def contenders(size: tuple[int, int, int], dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    rows, dim, vocabulary = size
    head, targets = Head(dim, vocabulary), torch.randint(vocabulary, (rows,))
    hidden = torch.randn(rows, dim, requires_grad=True)

    def whole() -> Tensor:
        return F.cross_entropy(head(hidden), targets, reduction="sum")

    def run(loss: Callable[[], Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            total = loss()
        torch.autograd.grad(total, (hidden, head.weight))

    return {"whole": lambda: run(whole), "fused": lambda: run(lambda: head(hidden, targets))}


def measure(size: tuple[int, int, int], dtype: torch.dtype, rounds: int) -> None:
    runs = contenders(size, dtype)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in random.sample(list(runs), len(runs)):
            start = time.process_time()
            runs[name]()
            if turn:
                times[name].append(time.process_time() - start)
    ratio = statistics.median(a / b for a, b in zip(times["whole"], times["fused"], strict=True))
    whole, fused = (statistics.median(times[name]) * 1e3 for name in ("whole", "fused"))
    print(f"{size} {str(dtype)[6:]:9s} whole {whole:7.1f} ms  fused {fused:7.1f} ms  {ratio:.2f}x", flush=True)


def growth(name: str) -> int:
    """MiB."""
    torch.set_num_threads(1)
    run = contenders(LARGE, torch.bfloat16)[name]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for name in ("whole", "fused"):
        with get_context("spawn").Pool(1) as pool:
            print(f"{LARGE} bfloat16  {name}: {pool.apply(growth, (name,))} MiB", flush=True)
    for name, by_columns in (("full", False), ("row", False), ("column", False), ("column", True), ("conv", False)):
        touched, free = computed_blocks(AttentionPattern(name, 257, (32, 32)), 1280, by_columns)
        order = " by columns" if by_columns else ""
        print(f"{name}{order}: {touched} blocks of {BLOCK} x {BLOCK}, {free} without a mask")
    torch.set_num_threads(1)
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            measure(size, dtype, arguments.rounds)


if __name__ == "__main__":
    main()
