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

from dalle.models.patterns import AttentionPattern, MaskFunction, mask_function

# Side of a block of FlexAttention: the tiles of its kernels on Hopper, which torch 2.11 cannot make smaller.
BLOCK = 128


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
def block_mask(pattern: AttentionPattern, length: int, device: torch.device, by_columns: bool = False) -> Any:
    """The pattern as FlexAttention's ``BlockMask``: which blocks of scores are empty, whole or mixed, and the function
    that decides inside the mixed ones. The whole table is never made. ``by_columns``: see ``mask_function``.

    Layers of one pattern share one object, so that blocks compiled with it share their code.
    """
    from torch.nn.attention.flex_attention import BlockMask

    allowed = mask_function(pattern, by_columns)
    with torch.inference_mode(False), torch.device("cpu"):
        touched, whole = _blocks(allowed, length)
        mixed = [part.to(device) for part in _listed(touched & ~whole)]
        full = [part.to(device) for part in _listed(whole)]
        return BlockMask.from_kv_blocks(*mixed, *full, BLOCK_SIZE=BLOCK, mask_mod=allowed,
                                        seq_lengths=(length, length))


def computed_blocks(pattern: AttentionPattern, length: int, by_columns: bool = False) -> tuple[int, int]:
    """How many blocks of scores are computed, and how many of those need no look at the single scores."""
    touched, whole = _blocks(mask_function(pattern, by_columns), length)
    return int(touched.sum()), int(whole.sum())


def _blocks(allowed: MaskFunction, length: int) -> tuple[Tensor, Tensor]:
    """For each block of queries and of keys, [blocks, blocks]: whether any score of it is allowed, whether all are."""
    count = -(-length // BLOCK)
    none = torch.zeros((), dtype=torch.int32)
    keys = torch.arange(count * BLOCK, dtype=torch.int32)
    touched, whole = [], []
    for start in range(0, count * BLOCK, BLOCK):
        queries = torch.arange(start, start + BLOCK, dtype=torch.int32)[:, None]
        scores = allowed(none, none, queries, keys) & (queries < length) & (keys < length)
        scores = scores.view(BLOCK, count, BLOCK)
        touched.append(scores.any(dim=2).any(dim=0))
        whole.append(scores.all(dim=2).all(dim=0))
    return torch.stack(touched), torch.stack(whole)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, and which, in order: int32 [1, 1, n] and [1, 1, n, n]."""
    order = chosen.int().argsort(dim=1, descending=True, stable=True)
    return chosen.sum(dim=1, dtype=torch.int32)[None, None], order.int()[None, None]
