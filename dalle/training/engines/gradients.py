"""What is done to losses and gradients between a backward and an optimiser's step, on the device."""

import torch
from torch import Tensor, nn


def poisoned(loss: Tensor) -> Tensor:
    """``loss`` with a non-finite value made to spoil every gradient, so that all ranks see it without asking."""
    return loss * (loss.detach() * 0 + 1)      # 0 times what is not finite is no number


def total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients together, 0-d."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))


def clipping_divisor(norm: Tensor, largest: float) -> Tensor | None:
    """What gradients of this norm are divided by so that it is at most ``largest`` (0: by nothing); 0-d fp32."""
    return ((norm + 1e-6) / largest).clamp(min=1.0).float() if largest > 0 else None


def fill_gradients(parameters: list[nn.Parameter]) -> bool:
    """Give zeros to parameters without a gradient; whether there were any."""
    missing = [parameter for parameter in parameters if parameter.grad is None]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    return bool(missing)
