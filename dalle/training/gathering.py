"""The whole global batch on every process, for losses that compare samples with each other.

Sample i of the global batch is sample i // R of rank i mod R, as the loader deals them out; so what is gathered here
lies in the same order whatever the number R of processes.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def in_global_order(tensor: Tensor, world_size: int) -> Tensor:
    """[b, ...] of every process -> [B, ...]; without gradient. Every process must call it."""
    if world_size == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(world_size)]
    dist.all_gather(parts, tensor.detach().contiguous())
    return interleaved(parts)


def of_everyone(rows: Tensor, world_size: int) -> Tensor:
    """[n, ...] of every process, each with its own n -> all rows in their order; without gradient.

    For validation, whose shares are ragged. Every process must call it.
    """
    if world_size == 1:
        return rows
    counts = in_global_order(torch.tensor([len(rows)], device=rows.device), world_size)        # [R]
    padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
    padded[: len(rows)] = rows
    there = torch.arange(len(padded), device=rows.device)[:, None] < counts
    return in_global_order(padded, world_size)[there.flatten()]


def in_global_order_with_gradient(tensor: Tensor, world_size: int) -> Tensor:
    """[b, ...] of every process -> [B, ...], differentiable.

    Backward adds up what all processes ask of a share. Where each of them computes the one loss of the global batch,
    the mean of their parameters' gradients, which the engine takes, is then the gradient in a single process.
    """
    if world_size == 1:
        return tensor
    parts = all_gather(tensor.contiguous())
    for part in parts:
        if part.requires_grad:
            # gloo's backward receives into memory laid out like the gradient, and takes it for plain order
            part.register_hook(Tensor.contiguous)
    return interleaved(parts)


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """The ranks' shares [b, ...] as [b * R, ...], one sample of each rank in turn."""
    return torch.stack(list(parts), dim=1).flatten(0, 1)
