"""Forms that compilers and torch's own kernels make fast: plain operations that fuse, and attention without scores.

Nothing here hides from ``torch.compile``, as a hand-written backward would: inside a compiled block what stands between
two products becomes one pass over memory. Heads are three views of one product, never a stack.

- ``sdpa``: ``scaled_dot_product_attention``, on every device.
- ``flex``: FlexAttention with block masks, CUDA only: blocks that a pattern forbids are not computed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.models.plain import Heads


def split_heads(projected: Tensor, heads: int) -> Heads:
    """Queries, keys and values [B, heads, S, head_dim] as views of [B, S, 3 * heads * head_dim]."""
    queries, keys, values = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    return queries, keys, values


def rotate(heads: Heads, cosines: Tensor, sines: Tensor) -> Heads:
    """Turn each pair (i, i + head_dim / 2) of the queries and keys by its slot's angle; the values stay what they are.

    The halves are swapped by a flip, whose backward is a flip: both are a matter of where a kernel reads.
    """
    queries, keys, values = heads
    return _turned(queries, cosines, sines), _turned(keys, cosines, sines), values


def _turned(inputs: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    # In the order in which the product wrote them, [B, S, heads, head_dim]: another would be another pass over memory,
    # and one more for what attention makes, which has the order of its queries.
    inputs = inputs.transpose(-3, -2)
    swapped = inputs.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (inputs * cosines[:, None] + swapped * sines[:, None]).transpose(-3, -2)


def shift_slots(inputs: Tensor, first_below: int, width: int) -> Tensor:
    """Token shift as ``plain.shift_slots`` has it, by choosing for each place where it is read from: one pass, where
    slices that are joined again would be one each."""
    quarter, (_, length, dim) = inputs.shape[-1] // 4, inputs.shape
    slots = torch.arange(length, device=inputs.device)[:, None]
    features = torch.arange(dim, device=inputs.device)
    left = F.pad(inputs, (0, 0, 1, 0))[:, :-1]
    above = F.pad(inputs, (0, 0, width, 0))[:, :length]
    from_left = (features < quarter) & (slots > 0)
    from_above = (features >= quarter) & (features < 2 * quarter) & (slots >= first_below)
    return torch.where(from_left, left, torch.where(from_above, above, inputs))


def sdpa_attention(heads: Heads, mask: Tensor | None) -> Tensor:
    """[B, heads, S, head_dim] from queries, keys and values of that shape.

    bool ``mask`` [S, S], none for plain causal attention.
    """
    queries, keys, values = heads
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)


def attend(stacked: Tensor, mask: Tensor | None) -> Tensor:
    """The same with an additive ``mask`` [S, S], or with none."""
    queries, keys, values = stacked
    return F.scaled_dot_product_attention(queries, keys, values, None if mask is None else mask.to(queries.dtype))


def flex_attention(heads: Heads, mask: Any) -> Tensor:
    """The same through FlexAttention and a block mask: part of the graph of a block that is being compiled, else
    compiled by itself, since uncompiled it holds all scores."""
    queries, keys, values = heads
    if torch.compiler.is_compiling():
        from torch.nn.attention.flex_attention import flex_attention as attend

        return attend(queries, keys, values, block_mask=mask)
    return _compiled_flex(mask.mask_mod)(queries, keys, values, mask)


@lru_cache(maxsize=64)
def _compiled_flex(mask_function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """FlexAttention compiled by itself, for the block masks of one mask function.

    Each has a code object of its own: torch compiles one code object only so often, and then runs it uncompiled.
    """
    from torch.nn.attention.flex_attention import flex_attention as attend

    def attend_by(queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
        return attend(queries, keys, values, block_mask=mask)

    attend_by.__code__ = attend_by.__code__.replace()
    return torch.compile(attend_by)
