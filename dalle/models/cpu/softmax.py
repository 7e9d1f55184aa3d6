"""Softmax of many logits in blocks that stay in the cache, in place."""

import torch
from torch import Tensor

from dalle.models import plain

BLOCK = 1 << 18      # logits: 1 MiB in fp32


def softmax_errors(logits: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(logits)[chosen], at least fp32 [n, 1], and its gradient by the logits, which takes their place.

    ``logits`` [n, V], ``chosen`` int64 [n, 1], ``counts`` [n, 1]: 0 for the rows whose gradient is zero, else 1.
    """
    if torch.compiler.is_compiling():       # a compiler makes one pass of the plain form, and has no graph for this one
        return plain.softmax_errors(logits, chosen, counts)
    wide = torch.promote_types(logits.dtype, torch.float32)
    losses, parts = [], min(len(logits), -(-logits.numel() // BLOCK))
    for block, token, count in zip(*(rows.tensor_split(parts) for rows in (logits, chosen, counts)), strict=True):
        logs = block.log_softmax(dim=-1, dtype=wide)
        losses.append(-logs.gather(1, token))
        block.copy_(logs.exp_().scatter_add_(1, token, logs.new_full((), -1.0).expand_as(token)).mul_(count))
    return torch.cat(losses), logits
