"""The token shift by one copy and two moves inside it, forward and backward."""

import torch
from torch import Tensor


class ShiftSlots(torch.autograd.Function):
    """The first quarter of the features from the previous slot, the second from the slot one image row above.

    A slot without such a neighbour (the first one; text slots and the first image row) keeps its own features.
    """

    @staticmethod
    def forward(context, inputs: Tensor, first_below: int, width: int) -> Tensor:
        context.first_below, context.width = first_below, width
        quarter = inputs.shape[-1] // 4
        shifted = inputs.clone()
        shifted[:, 1:, :quarter] = inputs[:, :-1, :quarter]
        if inputs.shape[1] > first_below:
            shifted[:, first_below:, quarter:2 * quarter] = inputs[:, first_below - width:-width, quarter:2 * quarter]
        return shifted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        first_below, width = context.first_below, context.width
        quarter = grad.shape[-1] // 4
        moved = grad.clone()
        moved[:, :-1, :quarter] = grad[:, 1:, :quarter]
        moved[:, -1, :quarter] = 0
        moved[:, 0, :quarter] += grad[:, 0, :quarter]    # the first slot kept its own
        if grad.shape[1] > first_below:
            above = slice(quarter, 2 * quarter)
            moved[:, first_below:, above] = 0
            moved[:, first_below - width:-width, above] += grad[:, first_below:, above]
        return moved, None, None


def shift_slots(inputs: Tensor, first_below: int, width: int) -> Tensor:
    """``inputs`` [B, S, dim] shifted, over image rows of ``width`` slots whose second begins at ``first_below``."""
    return ShiftSlots.apply(inputs, first_below, width)
