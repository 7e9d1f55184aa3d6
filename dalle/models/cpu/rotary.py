"""Rotation in place: one copy, which then serves as the contiguous input of the products."""

import torch
from torch import Tensor


class Rotate(torch.autograd.Function):
    """Turn each pair (i, i + head_dim / 2) of the queries and keys in [3, ..., S, head_dim] by its slot's angle.

    Values pass through, so that one copy serves as the contiguous input of the products. The gradient is turned back.
    """

    @staticmethod
    def forward(context, stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        context.save_for_backward(cosines, sines)
        return rotate_(stacked.clone(memory_format=torch.contiguous_format), cosines, sines)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = context.saved_tensors
        return rotate_(grad.clone(memory_format=torch.contiguous_format), cosines, -sines), None, None


def rotate_(stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    # Whole contiguous rows, x cos + swap(x) sin with the signs in the sines: halves would be strided, and slow.
    turned = stacked[:2]
    swapped = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
    turned.mul_(cosines).addcmul_(swapped, sines)
    return stacked


def rotate(stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """A rotated copy of ``stacked``, by the tables of ``rotary_table``."""
    return Rotate.apply(stacked, cosines, sines)
