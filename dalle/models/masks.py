"""An attention pattern as the forms of attention take it: ones and zeros, 0 and -inf, or blocks.

``dalle/models/patterns.py`` says what a pattern is, on the CPU and for all slots; here it becomes a constant on a
device, for the slots that are computed, in the type of the scores. Masks are built once for each (pattern, length,
device, type). They are kept here and not as buffers, so that a model built on the meta device, cast by an engine or
copied for an average carries nothing to be lost or rounded.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dalle.models.patterns import AttentionPattern


@lru_cache(maxsize=64)
def boolean_mask(pattern: AttentionPattern, length: int, device: torch.device) -> Tensor:
    """bool [length, length] on ``device``, True where attention is allowed."""
    with torch.inference_mode(False):
        return pattern.mask()[:length, :length].to(device)


@lru_cache(maxsize=64)
def additive_mask(pattern: AttentionPattern, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[length, length]: 0 where attention is allowed, -inf elsewhere."""
    with torch.inference_mode(False):
        allowed = boolean_mask(pattern, length, device)
        return torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


@lru_cache(maxsize=64)
def block_mask(pattern: AttentionPattern, length: int, device: torch.device) -> Any:
    """The pattern as FlexAttention's block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):
        allowed = boolean_mask(pattern, length, device)
        return create_block_mask(lambda batch, head, query, key: allowed[query, key],
                                 None, None, length, length, device=str(device))
