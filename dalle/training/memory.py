"""Bytes that a process needs on its device, by part, and a node in host memory; computed before anything is built.

The figures follow the tensors through one step: what is always there (weights, optimiser state, average), then block by
block through the backward pass what is gathered, kept and exchanged, and of all these moments the fullest. Under FSDP2
that is held against counted bytes by ``tests/training/test_engine_large.py``; ZeRO's are what its papers say
(arXiv 1910.02054, section 5, with fp32 weights), and DDP's plain sums. Not counted: the allocator's gaps, the workspace
of libraries, NCCL's buffers (together some 2 to 5 GB on a GPU), the companions (a codec) and a batch.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import nn

FP32, BF16 = 4, 2
GB = 1e9


@dataclass(frozen=True)
class Layout:
    """How a run is spread: the engine's kind, processes, processes that share one copy, processes of a node."""

    engine: str
    processes: int
    shard_size: int
    node_processes: int = 8


@dataclass(frozen=True)
class Activations:
    """Bytes of one micro-batch that are kept for the backward pass."""

    kept: tuple[int, ...]        # of each block, from its forward to its backward
    working: tuple[int, ...]     # of each block while its backward runs, what it kept or computed again included
    outside: int                 # logits, losses and their gradients: gone before the first block's backward


@runtime_checkable
class CountsActivations(Protocol):
    """A task that can say what a micro-batch of its player keeps."""

    def activations(self, samples: int, bf16: bool) -> Activations: ...


@dataclass(frozen=True)
class Blocks:
    """The elements of a player's parameters, apart as an engine gathers them."""

    blocks: tuple[tuple[nn.Parameter, ...], ...]
    rest: tuple[nn.Parameter, ...]
    whole: tuple[nn.Parameter, ...] = ()        # never split

    def own(self, parts: int, blocks: Iterable[tuple[nn.Parameter, ...]] | None = None) -> int:
        """Elements of one rank's rows: each parameter's are padded to equal numbers of rows."""
        split = [*self.blocks, self.rest] if blocks is None else blocks
        return sum(math.ceil(len(parameter) / parts) * (parameter.numel() // max(1, len(parameter)))
                   for part in split for parameter in part) + (elements(self.whole) if blocks is None else 0)


def elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


@dataclass(frozen=True)
class Setting:
    """What of a run's config the memory depends on."""

    bf16: bool
    average: bool
    accumulates: bool
    exchanged: int = FP32        # bytes of an element of the gradients that the ranks exchange
    state: int = 2               # fp32 numbers that the optimiser keeps of each weight (AdamW: 2)


def step_memory(blocks: Blocks, layout: Layout, setting: Setting, activations: Activations | None) -> dict[str, int]:
    """Part -> bytes of a process at the fullest moment of a step."""
    moments = fsdp_moments if layout.engine == "fsdp2" else other_moments
    return max(moments(blocks, layout, setting, activations or no_activations(blocks)),
               key=lambda parts: sum(parts.values()))


def no_activations(blocks: Blocks) -> Activations:
    nothing = (0,) * len(blocks.blocks)
    return Activations(nothing, nothing, 0)


def fsdp_moments(blocks: Blocks, layout: Layout, setting: Setting, activations: Activations) -> list[dict[str, int]]:
    """The backward pass from the last block to the first, and the exchange of what lies outside of the blocks."""
    gathered_in = BF16 if setting.bf16 else FP32
    own, rest = blocks.own(layout.shard_size), FP32 * elements(blocks.rest)
    always = {"weights": FP32 * own, "optimizer": FP32 * setting.state * own,
              "average": FP32 * own if setting.average else 0}
    split = FP32 * own if setting.accumulates else 0
    sizes = [elements(block) for block in blocks.blocks]
    moments = [always | {"gradients": split, "gathered": rest + gathered_in * (sizes[-1] if sizes else 0),
                         "exchange": 0, "activations": sum(activations.kept), "logits": activations.outside}]
    for index in reversed(range(len(sizes))):
        size, ahead = sizes[index], sizes[index - 1] if index else 0
        kept = sum(activations.kept[:index])
        gradients = split or FP32 * blocks.own(layout.shard_size, blocks.blocks[index + 1:])
        moments.append(always | {      # in its backward; the block before is gathered, and copied from the ranks' order
            "gradients": gradients + rest, "gathered": rest + gathered_in * (size + 2 * ahead),
            "exchange": gathered_in * size, "activations": kept + activations.working[index], "logits": 0})
        moments.append(always | {      # its gradient is copied into one row of parts, each for one rank
            "gradients": gradients + rest, "gathered": rest + gathered_in * 2 * ahead,
            "exchange": (gathered_in + setting.exchanged) * size + FP32 * blocks.own(layout.shard_size,
                                                                                      [blocks.blocks[index]]),
            "activations": kept, "logits": 0})
    moments.append(always | {"gradients": FP32 * own + rest, "gathered": 0,
                             "exchange": setting.exchanged * elements(blocks.rest), "activations": 0, "logits": 0})
    return moments


def other_moments(blocks: Blocks, layout: Layout, setting: Setting, activations: Activations) -> list[dict[str, int]]:
    """DDP and ZeRO: the end of the forward and that of the backward pass."""
    count = sum(map(elements, blocks.blocks)) + elements(blocks.rest) + elements(blocks.whole)
    stage = int(layout.engine[-1]) if layout.engine.startswith("zero") else 0
    own = math.ceil(count / layout.processes)
    copies = FP32 * own if stage else 0                                # ZeRO moves flat copies of its own part
    always = {"weights": (FP32 * own if stage == 3 else FP32 * count) + copies,
              "optimizer": FP32 * setting.state * (own if stage else count),
              "average": FP32 * (own if stage == 3 else count) if setting.average else 0}
    gradients = FP32 * (own if stage >= 2 else count)
    largest = max([elements(block) for block in blocks.blocks] + [elements(blocks.rest)])
    gathered = 2 * FP32 * largest if stage == 3 else 0
    casts = BF16 * count if setting.bf16 and stage < 3 else 0          # autocast's copies, until the backward is over
    bucket = FP32 * largest if stage else 0                            # DDP's gradients are its buckets
    return [always | {"gradients": gradients if setting.accumulates else 0, "gathered": gathered + casts, "exchange": 0,
                      "activations": sum(activations.kept), "logits": activations.outside},
            always | {"gradients": gradients, "gathered": gathered + casts, "exchange": bucket,
                      "activations": max(activations.working, default=0), "logits": 0}]


def evaluation_memory(blocks: Blocks, layout: Layout, setting: Setting) -> int:
    """Bytes of a process while it evaluates: under FSDP2 and ZeRO-3 all weights are gathered, and averages and weights
    change places without a copy. Activations without a gradient are small."""
    always = step_memory(blocks, layout, setting, None)
    kept = always["weights"] + always["optimizer"] + always["average"]
    if layout.engine == "fsdp2":
        inner = sum(map(elements, blocks.blocks))
        return kept + FP32 * elements(blocks.rest) + (BF16 if setting.bf16 else FP32) * inner
    count = sum(map(elements, blocks.blocks)) + elements(blocks.rest) + elements(blocks.whole)
    return kept + (FP32 * count if layout.engine == "zero3" else 0)


def host_memory(blocks: Blocks, layout: Layout, setting: Setting, writers: Iterable[int]) -> dict[str, int]:
    """Part -> bytes of host memory that the fullest node needs for a player, apart from the programs themselves.

    ``first_weights``: what the node's processes hold while they build it. ``saving``: a checkpoint's copies, which stay
    (they are pinned); all state is copied once, shared by the ranks that write.
    """
    parameters = [parameter for part in [*blocks.blocks, blocks.rest, blocks.whole] for parameter in part]
    processes = min(layout.node_processes, layout.processes)
    at_once = max(map(nn.Parameter.numel, parameters)) if layout.engine == "fsdp2" else elements(parameters)
    state = FP32 * elements(parameters) * (1 + setting.state + setting.average)
    writers = list(writers)
    nodes = [rank // layout.node_processes for rank in writers]
    most = max(map(nodes.count, nodes))
    return {"first_weights": FP32 * at_once * processes, "saving": math.ceil(state * most / len(writers))}
