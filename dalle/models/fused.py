"""Attention by torch's own fused kernels: none keeps [S, S] scores for each head.

- ``sdpa``: ``scaled_dot_product_attention``, on every device.
- ``flex``: FlexAttention with block masks, CUDA only: blocks that a pattern forbids are not computed.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def sdpa_attention(stacked: Tensor, mask: Tensor | None) -> Tensor:
    """[B, heads, S, head_dim] from q, k, v stacked as [3, B, heads, S, head_dim].

    bool ``mask`` [S, S], none for plain causal attention.
    """
    queries, keys, values = stacked
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)


def attend(stacked: Tensor, mask: Tensor | None) -> Tensor:
    """The same with an additive ``mask`` [S, S], or with none."""
    queries, keys, values = stacked
    return F.scaled_dot_product_attention(queries, keys, values, None if mask is None else mask.to(queries.dtype))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # uncompiled it would hold all scores


def flex_attention(stacked: Tensor, mask: Any) -> Tensor:
    """The same through FlexAttention and a block mask."""
    queries, keys, values = stacked
    return _compiled_flex()(queries, keys, values, block_mask=mask)
