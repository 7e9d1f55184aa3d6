"""The operations of a transformer as their papers write them, in plain torch whose backward is autograd's.

They say what each operation computes. Tests hold every other form against them, and a device that has no form of its
own can run them: see ``dalle/models/kernels.py``.
"""

import math

import torch
from torch import Tensor

from dalle.models.patterns import AttentionPattern


def attention(stacked: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v (arXiv 1706.03762, eq. 1), [B, heads, S, head_dim].

    ``stacked`` are q, k and v [3, B, heads, S, head_dim]; ``mask`` [S, S] is 0 where attention is allowed, else -inf.
    """
    queries, keys, values = stacked
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(stacked.shape[-1]) + mask     # [B, heads, S, S]
    return scores.softmax(dim=-1) @ values


def rotate(stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of the queries and keys in [3, ..., S, head_dim] by its slot's angle.

    Values pass through. The tables [S, head_dim] are those of ``rotary_table``, whose sines carry signs.
    """
    turned, values = stacked[:2], stacked[2:]
    half = stacked.shape[-1] // 2
    cosine, sine = cosines[..., :half], sines[..., half:]
    first, second = turned.chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)
    return torch.cat([turned, values])


def squared_relu(inputs: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return inputs.relu().square()


def shift_slots(inputs: Tensor, first_below: int, width: int) -> Tensor:
    """The first quarter of the features from the previous slot, the second from the slot one image row above.

    ``inputs`` [B, S, dim] over image rows of ``width`` slots, of which the second begins at ``first_below``. A slot
    without such a neighbour (the first one; text slots and the first image row) keeps its own features.
    """
    quarter = inputs.shape[-1] // 4
    left = torch.cat([inputs[:, :1], inputs[:, :-1]], dim=1)
    above = torch.cat([inputs[:, :first_below], inputs[:, first_below - width:-width]], dim=1)
    return torch.cat([left[..., :quarter], above[..., quarter:2 * quarter], inputs[..., 2 * quarter:]], dim=-1)


class KeyValueCache:
    """Keys and values of one layer for B sequences, each [B, heads, length, head_dim]."""

    def __init__(self, batch: int, heads: int, head_dim: int, length: int, device: torch.device, dtype: torch.dtype):
        self.keys = torch.zeros(batch, heads, length, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store the first S slots; both [B, heads, S, head_dim]."""
        self.keys[:, :, :keys.shape[2]] = keys
        self.values[:, :, :keys.shape[2]] = values

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store one slot; both [B, heads, 1, head_dim]."""
        self.keys[:, :, slot:slot + 1] = keys
        self.values[:, :, slot:slot + 1] = values

    def copy_rows(self, source: "KeyValueCache", rows: Tensor, length: int, first: int) -> None:
        """Take the first ``length`` slots of the sequences ``rows`` of ``source`` as sequences ``first`` and on."""
        target = slice(first, first + len(rows))
        self.keys[target, :, :length] = source.keys[rows, :, :length]
        self.values[target, :, :length] = source.values[rows, :, :length]

    def filled(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``length`` slots, each [B, heads, length, head_dim]."""
        return self.keys[:, :, :length], self.values[:, :, :length]

    def attend(self, queries: Tensor, pattern: AttentionPattern, slot: int) -> Tensor:
        """What the queries [B, heads, 1, head_dim] of ``slot`` take from all that the pattern permits them to see.

        The heads' outputs side by side: [B, heads * head_dim].
        """
        allowed = pattern.mask()[slot, :slot + 1].to(queries.device)
        scores = queries @ self.keys[:, :, :slot + 1].transpose(-2, -1) / math.sqrt(queries.shape[-1])
        attended = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1) @ self.values[:, :, :slot + 1]
        return attended.flatten(1)
