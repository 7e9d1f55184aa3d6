"""Causal multi-head attention over the text-and-image stream: one softmax over all permitted keys.

Source: arXiv 2102.12092, appendix B.1. How the products are computed is not said here: ``dalle/models/kernels.py``
chooses their form by device, pattern and length.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dalle.models.kernels import ATTENTION, Backend, choose_backend, kernels_for
from dalle.models.layers import Linear
from dalle.models.norms import RMSNorm
from dalle.models.patterns import AttentionPattern
from dalle.models.rotary import rotary_table


@dataclass(frozen=True, eq=False)
class AttentionConstants:
    """What one layer's attention over a stream of fixed length needs besides its weights."""

    backend: str                               # the form of attention
    mask: Any                                  # as that form takes it
    rotary: tuple[Tensor, Tensor] | None       # cosines and signed sines [S, head_dim]


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

    def constants(self, length: int, device: torch.device, dtype: torch.dtype) -> AttentionConstants:
        """The constants for the first ``length`` slots computed in ``dtype``; call it outside of a compiled region."""
        backend = choose_backend(self.backend, self.pattern, length, device)
        mask = ATTENTION[backend].mask(self.pattern, length, device, dtype)
        return AttentionConstants(backend, mask, self.turns(0, length, device, dtype))

    def turns(self, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Cosines and signed sines of the slots from ``start`` to ``stop``; None without rotary positions."""
        if not self.rotary:
            return None
        cosines, sines = rotary_table(self.pattern.prefix, self.pattern.grid, self.head_dim, device, dtype)
        return cosines[start:stop], sines[start:stop]

    def forward(self, inputs: Tensor, constants: AttentionConstants) -> Tensor:
        """Attend within ``inputs`` [B, S, dim], the first S slots of the stream."""
        return self.attend(self.project(inputs, constants.rotary), constants)

    def project(self, inputs: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Queries, keys and values of ``inputs`` [B, S, dim], stacked as [3, B, heads, S, head_dim]."""
        batch, length, _ = inputs.shape
        stacked = self.qkv(inputs).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.position(stacked, rotary)

    def attend(self, stacked: Tensor, constants: AttentionConstants) -> Tensor:
        """[B, S, dim]: the heads' values, each weighted over the slots that the pattern permits, and projected."""
        _, batch, _, length, _ = stacked.shape
        attended = ATTENTION[constants.backend].attend(stacked, constants.mask)
        return self.out(attended.transpose(1, 2).reshape(batch, length, -1))

    def position(self, stacked: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Normalise and rotate the queries and keys of ``stacked`` [3, B, heads, S, head_dim]."""
        if self.query_norm is not None:
            queries, keys, values = stacked
            stacked = torch.stack([self.query_norm(queries), self.key_norm(keys), values])
        return stacked if rotary is None else kernels_for(stacked.device).rotate(stacked, *rotary)
