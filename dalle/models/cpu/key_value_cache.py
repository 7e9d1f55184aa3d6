"""Keys and values laid out for the two plain products of a step on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.models.patterns import AttentionPattern

BUCKET = 32     # slots: room grows by so many, so that a product has one shape for as many steps


class KeyValueCache:
    """Keys and values of one layer for B sequences, each [B * heads, room, head_dim] and dense.

    The room grows with the slots, by whole buckets. A product over the filled part of a larger tensor would have a new
    shape at every slot, and oneDNN, which computes bf16, would first copy that part: both products took twice as long.
    What is not filled yet is zero and masked.
    """

    def __init__(self, batch: int, heads: int, head_dim: int, length: int, device: torch.device, dtype: torch.dtype):
        self.batch, self.heads = batch, heads
        self.keys = torch.zeros(batch * heads, 0, head_dim, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.mask = torch.zeros(1, 1, 0, device=device, dtype=dtype)      # 0 where filled, else -inf
        self._prefix: tuple[Tensor, Tensor] | None = None                 # a dense copy, for sparse patterns

    def _make_room(self, length: int) -> None:
        more = -(-length // BUCKET) * BUCKET - self.keys.shape[1]
        if more > 0:
            self.keys, self.values = F.pad(self.keys, (0, 0, 0, more)), F.pad(self.values, (0, 0, 0, more))
            self.mask = F.pad(self.mask, (0, more), value=float("-inf"))

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store the first S slots; both [B, heads, S, head_dim]."""
        length, self._prefix = keys.shape[2], None
        self._make_room(length)
        self.keys[:, :length] = keys.flatten(0, 1)
        self.values[:, :length] = values.flatten(0, 1)
        self.mask[:, :, :length] = 0

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store one slot; both [B, heads, 1, head_dim]."""
        if slot >= self.keys.shape[1]:
            self._make_room(slot + 1)
        self.keys.select(1, slot).unflatten(0, (self.batch, self.heads)).copy_(keys.squeeze(2))
        self.values.select(1, slot).unflatten(0, (self.batch, self.heads)).copy_(values.squeeze(2))
        self.mask.select(2, slot).zero_()

    def copy_rows(self, source: "KeyValueCache", rows: Tensor, length: int, first: int) -> None:
        """Take the first ``length`` slots of the sequences ``rows`` of ``source`` as sequences ``first`` and on."""
        self._prefix = None
        self._make_room(length)
        flat = (rows[:, None] * self.heads + torch.arange(self.heads, device=rows.device)).flatten()
        target = slice(first * self.heads, first * self.heads + len(flat))
        self.keys[target, :length] = source.keys[flat, :length]
        self.values[target, :length] = source.values[flat, :length]
        self.mask[:, :, :length] = 0

    def filled(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``length`` slots, each [B, heads, length, head_dim]."""
        heads = (self.batch, self.heads)
        return self.keys[:, :length].unflatten(0, heads), self.values[:, :length].unflatten(0, heads)

    def attend(self, queries: Tensor, pattern: AttentionPattern, slot: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v over the permitted, filled slots, the heads side by side.

        Queries [B, heads, 1, head_dim] -> [B, heads * head_dim].

        Two plain products: the CPU's fused attention is seven times slower for a single bf16 query. A sparse pattern
        reads the prefix in place and gathers only the image slots that it names.
        """
        batch, _, _, head_dim = queries.shape
        return self._attend(queries.reshape(-1, 1, head_dim), pattern, slot).view(batch, -1)

    def _attend(self, queries: Tensor, pattern: AttentionPattern, slot: int) -> Tensor:
        """The same from [B * heads, 1, head_dim] to the same."""
        scale = queries.shape[-1] ** -0.5
        if pattern.name == "full":
            scores = torch.baddbmm(self.mask, queries, self.keys.transpose(1, 2), alpha=scale)
            return torch.bmm(scores.softmax(dim=-1), self.values)
        prefix = pattern.prefix
        if self._prefix is None:
            self._prefix = self.keys[:, :prefix].contiguous(), self.values[:, :prefix].contiguous()
        keys, values = self._prefix
        image_keys, image_values = self._select(pattern.visible_image_slots(slot))
        scores = torch.cat([torch.bmm(queries, keys.transpose(1, 2)),
                            torch.bmm(queries, image_keys.transpose(1, 2))], dim=-1)
        weights = scores.mul_(scale).softmax(dim=-1)
        return torch.bmm(weights[:, :, :prefix], values).baddbmm_(weights[:, :, prefix:], image_values)

    def _select(self, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(slots, slice):
            return self.keys[:, slots], self.values[:, slots]
        slots = slots.to(self.keys.device)
        return self.keys.index_select(1, slots), self.values.index_select(1, slots)
