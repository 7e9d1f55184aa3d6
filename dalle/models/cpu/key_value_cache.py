"""Keys and values laid out for the two plain products of a step on a CPU."""

import torch
from torch import Tensor

from dalle.models.patterns import AttentionPattern


class KeyValueCache:
    """Keys and values of one layer for B sequences, allocated once for ``length`` slots.

    Keys are kept transposed, [B * heads, head_dim, length], so that both products of a step read along rows; values
    are [B * heads, length, head_dim].
    """

    def __init__(self, batch: int, heads: int, head_dim: int, length: int, device: torch.device, dtype: torch.dtype):
        self.heads = heads
        self.keys = torch.zeros(batch * heads, head_dim, length, device=device, dtype=dtype)
        self.values = torch.zeros(batch * heads, length, head_dim, device=device, dtype=dtype)

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store the first S slots; both [B, heads, S, head_dim]."""
        length = keys.shape[2]
        self.keys[:, :, :length] = keys.flatten(0, 1).transpose(1, 2)
        self.values[:, :length] = values.flatten(0, 1)

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store one slot; both [B, heads, 1, head_dim]."""
        self.keys[:, :, slot] = keys.reshape(-1, keys.shape[-1])
        self.values[:, slot] = values.reshape(-1, values.shape[-1])

    def copy_rows(self, source: "KeyValueCache", rows: Tensor, length: int, first: int) -> None:
        """Take the first ``length`` slots of the sequences ``rows`` of ``source`` as sequences ``first`` and on."""
        flat = (rows[:, None] * self.heads + torch.arange(self.heads, device=rows.device)).flatten()
        target = slice(first * self.heads, first * self.heads + len(flat))
        self.keys[target, :, :length] = source.keys[flat, :, :length]
        self.values[target, :length] = source.values[flat, :length]

    def attend(self, queries: Tensor, pattern: AttentionPattern, slot: int) -> Tensor:
        """softmax(q k^T / sqrt(head_dim)) v over the permitted, filled slots, the heads side by side.

        Queries [B, heads, 1, head_dim] -> [B, heads * head_dim].

        Two plain products: the CPU's fused attention is seven times slower for a single bf16 query. A sparse pattern
        reads the prefix in place and gathers only the image slots that it names; nothing is masked.
        """
        batch, _, _, head_dim = queries.shape
        return self._attend(queries.reshape(-1, 1, head_dim), pattern, slot).view(batch, -1)

    def _attend(self, queries: Tensor, pattern: AttentionPattern, slot: int) -> Tensor:
        """The same from [B * heads, 1, head_dim] to the same."""
        scale = queries.shape[-1] ** -0.5
        image = pattern.visible_image_slots(slot)
        if isinstance(image, slice) and image.step is None and image.start == pattern.prefix:  # nothing is left out
            weights = torch.bmm(queries, self.keys[:, :, :slot + 1]).mul_(scale).softmax(dim=-1)
            return torch.bmm(weights, self.values[:, :slot + 1])
        prefix = pattern.prefix
        image_keys, image_values = self._select(image)
        scores = torch.cat([torch.bmm(queries, self.keys[:, :, :prefix]), torch.bmm(queries, image_keys)], dim=-1)
        weights = scores.mul_(scale).softmax(dim=-1)
        attended = torch.bmm(weights[:, :, :prefix], self.values[:, :prefix])
        return attended.baddbmm_(weights[:, :, prefix:], image_values)

    def _select(self, slots: slice | Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(slots, slice):
            return self.keys[:, :, slots], self.values[:, slots]
        slots = slots.to(self.keys.device)
        return self.keys.index_select(2, slots), self.values.index_select(1, slots)
