"""What is computed in fp32 or wider, whatever autocast made of it; doubles stay doubles, so that they can check it."""

import torch
from torch import Tensor


def at_least_single(tensor: Tensor) -> Tensor:
    """``tensor``, in fp32 where its type is narrower or whole numbers."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
