"""Rotation during the one copy that then serves as the contiguous input of the products."""

import torch
from torch import Tensor


class Rotate(torch.autograd.Function):
    """Turn each pair (i, i + head_dim / 2) of the queries and keys in [3, ..., S, head_dim] by its slot's angle.

    Values pass through, so that one copy serves as the contiguous input of the products. The gradient is turned back.
    """

    @staticmethod
    def forward(context, stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        context.save_for_backward(cosines, sines)
        return rotated(stacked, cosines, sines)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = context.saved_tensors
        return rotated(grad, cosines, -sines), None, None


def rotated(stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """x cos + swap(x) sin, with the signs in the sines; each half is added where the other stands, and none copied."""
    half = stacked.shape[-1] // 2
    turned = torch.empty_like(stacked, memory_format=torch.contiguous_format)
    turned[2:].copy_(stacked[2:])
    pairs, into = stacked[:2], turned[:2]
    torch.mul(pairs, cosines, out=into)
    into[..., :half].addcmul_(pairs[..., half:], sines[..., :half])
    into[..., half:].addcmul_(pairs[..., :half], sines[..., half:])
    return turned


def rotate(stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """A rotated copy of ``stacked``, by the tables of ``rotary_table``."""
    return Rotate.apply(stacked, cosines, sines)
