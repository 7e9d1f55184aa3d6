"""The operations of a transformer as their papers write them, in plain torch whose backward is autograd's.

They say what each operation computes. Tests hold every other form against them, and a device that has no form of its
own can run them: see ``dalle/models/kernels.py``.
"""

import math

import torch
from torch import Tensor

from dalle.models.patterns import AttentionPattern

Heads = Tensor | tuple[Tensor, Tensor, Tensor]      # queries, keys, values: each [B, heads, S, head_dim], or a stack


def split_heads(projected: Tensor, heads: int) -> Heads:
    """Queries, keys and values of [B, S, 3 * heads * head_dim], a view [3, B, heads, S, head_dim]."""
    return projected.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def join_heads(queries: Tensor, keys: Tensor, values: Tensor) -> Heads:
    """A stack [3, B, heads, S, head_dim] of three [B, heads, S, head_dim]."""
    return torch.stack([queries, keys, values])


def attention(heads: Heads, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(head_dim) + mask) v (arXiv 1706.03762, eq. 1), [B, heads, S, head_dim].

    ``heads`` are q, k and v of that shape; ``mask`` [S, S] is 0 where attention is allowed, else -inf.
    """
    queries, keys, values = heads
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(queries.shape[-1]) + mask     # [B, heads, S, S]
    return scores.softmax(dim=-1) @ values


def attend(heads: Heads, mask: Tensor | None) -> Tensor:
    """The same, where there may be no mask."""
    return attention(heads, heads[0].new_zeros(()) if mask is None else mask.to(heads[0].dtype))


def rotate(heads: Heads, cosines: Tensor, sines: Tensor) -> Heads:
    """Turn each pair (i, i + head_dim / 2) of the queries and keys [..., S, head_dim] by its slot's angle.

    Values pass through. The tables [S, head_dim] are those of ``rotary_table``, whose sines carry signs.
    """
    def turned(inputs: Tensor) -> Tensor:
        half = inputs.shape[-1] // 2
        cosine, sine = cosines[..., :half], sines[..., half:]
        first, second = inputs.chunk(2, dim=-1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)

    queries, keys, values = heads
    return join_heads(turned(queries), turned(keys), values)


def squared_relu(inputs: Tensor) -> Tensor:
    """relu(x)^2 (arXiv 2109.08668)."""
    return inputs.relu().square()


def shift_slots(inputs: Tensor, first_below: int, width: int) -> Tensor:
    """The first quarter of the features from the previous slot, the second from the slot one image row above.

    ``inputs`` [B, S, dim] over image rows of ``width`` slots, of which the second begins at ``first_below``. A slot
    without such a neighbour (the first one; text slots and the first image row) keeps its own features.
    """
    quarter = inputs.shape[-1] // 4
    left, above, own = inputs.split([quarter, quarter, inputs.shape[-1] - 2 * quarter], dim=-1)
    left = torch.cat([left[:, :1], left[:, :-1]], dim=1)
    above = torch.cat([above[:, :first_below], above[:, first_below - width:-width]], dim=1)
    return torch.cat([left, above, own], dim=-1)


def token_losses(logits: Tensor, chosen: Tensor) -> Tensor:
    """-log softmax(logits)[chosen], at least fp32 [n, 1], from ``logits`` [n, V] and ``chosen`` int64 [n, 1]."""
    return -logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32)).gather(1, chosen)


def softmax_errors(logits: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`token_losses`, and their gradient by the logits in the type of these: softmax less one at ``chosen``.

    ``counts`` [n, 1] is 0 for the rows whose gradient is zero, else 1.
    """
    logs = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    one_hot = torch.arange(logits.shape[1], device=logits.device) == chosen
    return -logs.gather(1, chosen), ((logs.exp() - one_hot.to(logs.dtype)) * counts).to(logits.dtype)


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
