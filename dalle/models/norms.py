"""The norms of a transformer."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

NormName = Literal["layernorm", "rmsnorm"]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain (arXiv 1910.07467), in the type of x: torch has a fused kernel only where the types agree."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


def make_norm(name: NormName, dim: int, bias: bool) -> nn.Module:
    return nn.LayerNorm(dim, bias=bias) if name == "layernorm" else RMSNorm(dim)
