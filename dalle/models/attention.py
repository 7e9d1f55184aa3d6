"""Causal multi-head attention over the text-and-image stream: one softmax over all permitted keys.

Source: arXiv 2102.12092, appendix B.1. How the products are computed is not said here: ``dalle/models/kernels.py``
chooses their form by device, pattern and length.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.kernels import ATTENTION, Backend, choose_backend, kernels_for
from dalle.models.layers import Linear
from dalle.models.norms import RMSNorm
from dalle.models.patterns import AttentionPattern
from dalle.models.plain import Heads
from dalle.models.rotary import rotary_table


@dataclass(frozen=True, eq=False)
class AttentionConstants:
    """What one layer's attention over a stream of fixed length needs besides its weights."""

    backend: str                               # the form of attention
    mask: Any                                  # as that form takes it
    rotary: tuple[Tensor, Tensor] | None       # cosines and signed sines [S, head_dim]
    by_columns: bool = False                   # of image slots that stand column after column


class Attention(nn.Module):
    """Multi-head self-attention with one pattern. Input and output [B, S, dim]."""

    def __init__(self, dim: int, heads: int, head_dim: int, pattern: AttentionPattern, *, bias: bool = True,
                 qk_norm: bool = False, rotary: bool = False, backend: Backend = "auto"):
        super().__init__()
        self.heads, self.head_dim, self.pattern = heads, head_dim, pattern
        self.rotary, self.backend = rotary, backend
        self.qkv = Linear(dim, 3 * heads * head_dim, bias=bias)
        self.out = Linear(heads * head_dim, dim, bias=bias)
        self.query_norm = RMSNorm(head_dim) if qk_norm else None
        self.key_norm = RMSNorm(head_dim) if qk_norm else None

    def constants(self, length: int, device: torch.device, dtype: torch.dtype,
                  whole: bool = False) -> AttentionConstants:
        """The constants for the first ``length`` slots computed in ``dtype``; call it outside of a compiled region.

        ``whole``: for ``forward`` alone, which may put the slots into an order of its own; :meth:`project` and
        :meth:`attend` take them as they come.
        """
        backend = choose_backend(self.backend, self.pattern, length, device)
        form = ATTENTION[backend]
        if whole and form.mask_by_columns is not None and self._lacks_only_the_last_slot(length):
            mask = form.mask_by_columns(self.pattern, length, device, dtype)
            return AttentionConstants(backend, mask, self.turns(length, device, dtype, by_columns=True), True)
        mask = form.mask(self.pattern, length, device, dtype)
        return AttentionConstants(backend, mask, self.turns(length, device, dtype))

    def _lacks_only_the_last_slot(self, length: int) -> bool:
        """Whether a stream of the column pattern can be put in the order of columns: its grid is whole but for the last
        slot, which is the last in both orders."""
        return self.pattern.name == "column" and length == self.pattern.length - 1

    def turns(self, length: int, device: torch.device, dtype: torch.dtype,
              by_columns: bool = False) -> tuple[Tensor, Tensor] | None:
        """Cosines and signed sines of the first ``length`` slots; None without rotary positions."""
        if not self.rotary:
            return None
        cosines, sines = rotary_table(self.pattern.prefix, self.pattern.grid, self.head_dim, device, dtype, by_columns)
        return cosines[:length], sines[:length]

    def forward(self, inputs: Tensor, constants: AttentionConstants) -> Tensor:
        """Attend within ``inputs`` [B, S, dim], the first S slots of the stream."""
        if not constants.by_columns:
            return self.attend(self.project(inputs, constants.rotary), constants)
        prefix, (rows, columns) = self.pattern.prefix, self.pattern.grid
        inputs = turn_grid(inputs, prefix, rows, columns)
        return turn_grid(self.attend(self.project(inputs, constants.rotary), constants), prefix, columns, rows)

    def project(self, inputs: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Heads:
        """Queries, keys and values of ``inputs`` [B, S, dim], each [B, heads, S, head_dim]: a stack or a tuple."""
        return self.position(kernels_for(inputs.device).split_heads(self.qkv(inputs), self.heads), rotary)

    def attend(self, heads: Heads, constants: AttentionConstants) -> Tensor:
        """[B, S, dim]: the heads' values, each weighted over the slots that the pattern permits, and projected."""
        attended = ATTENTION[constants.backend].attend(heads, constants.mask)      # [B, heads, S, head_dim]
        return self.out(attended.transpose(1, 2).flatten(2))

    def position(self, heads: Heads, rotary: tuple[Tensor, Tensor] | None) -> Heads:
        """Normalise and rotate the queries and keys."""
        kernels = kernels_for(heads[0].device)
        if self.query_norm is not None:
            queries, keys, values = heads
            heads = kernels.join_heads(in_order_of_slots(self.query_norm, queries),
                                       in_order_of_slots(self.key_norm, keys), values)
        return heads if rotary is None else kernels.rotate(heads, *rotary)


def in_order_of_slots(norm: nn.Module, inputs: Tensor) -> Tensor:
    """``norm`` of [B, heads, S, head_dim], whose memory has the slots before the heads and keeps that order."""
    return norm(inputs.transpose(1, 2)).transpose(1, 2)


def turn_grid(stream: Tensor, prefix: int, rows: int, columns: int) -> Tensor:
    """``stream`` [B, prefix + rows * columns - 1, dim] with its image slots, but for the last, column after column.

    Views and copies only, no index: what is read where is known to a compiler, forward and backward.
    """
    grid = F.pad(stream[:, prefix:], (0, 0, 0, 1)).unflatten(1, (rows, columns))
    return torch.cat([stream[:, :prefix], grid.transpose(1, 2).flatten(1, 2)[:, :-1]], dim=1)
