"""What is computed in which type, whatever autocast made of it; doubles stay doubles, so that they can check it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_single(tensor: Tensor) -> Tensor:
    """``tensor``, in fp32 where its type is narrower or whole numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """No autocast on ``device`` (the meta device has none to leave)."""
    # by name: torch 2.11 cannot ask `is_autocast_available` in a graph that it compiles
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """The type of the products (autocast's): rounding before the norm halves the bytes that it reads and writes."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
