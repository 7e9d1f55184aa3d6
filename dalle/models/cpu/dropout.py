"""Dropout from 16 random bits a feature: torch's own draws a number of 32 for each, and passes over it three times."""

import torch
import torch.nn.functional as F
from torch import Tensor

LEVELS = 1 << 16      # what a share is rounded to; what is kept is divided by the rounded share of it


class Dropout(torch.autograd.Function):
    """``dropped`` of 65,536 features become zero, in the mean; the others are divided by the share of the kept."""

    @staticmethod
    def forward(context, inputs: Tensor, dropped: int) -> Tensor:
        factors = draw(inputs, dropped)
        context.save_for_backward(factors)
        return inputs * factors

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None]:
        return grad * context.saved_tensors[0], None


def draw(inputs: Tensor, dropped: int) -> Tensor:
    """What each feature is multiplied by: 0 or 65,536 / (65,536 - dropped)."""
    words = torch.empty((inputs.numel() + 3) // 4, dtype=torch.int64).random_(-1 << 63, None)     # all 64 bits
    numbers = words.view(torch.int16)[:inputs.numel()].view(inputs.shape)
    return (numbers >= dropped - LEVELS // 2).to(inputs.dtype).mul_(LEVELS / (LEVELS - dropped))


def dropout(inputs: Tensor, share: float) -> Tensor:
    """``F.dropout`` in training, its ``share`` rounded to 1 / 65,536."""
    dropped = round(share * LEVELS)
    if torch.compiler.is_compiling() or dropped in (0, LEVELS):
        return F.dropout(inputs, share)
    return Dropout.apply(inputs, dropped)
