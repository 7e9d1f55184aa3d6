"""The norms of a transformer: they read and write the type of their input, and compute in fp32 between.

Autocast would have it otherwise on CUDA alone: there it makes ``layer_norm`` (in later versions ``rms_norm``, too) read
and write fp32, so that each norm moves twice the bytes and each product after it begins with a cast. So they run
outside of autocast, on every device, with gains in the type of the input: torch's fused kernels want the types to
agree.
"""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.precision import full_precision

NormName = Literal["layernorm", "rmsnorm"]


class LayerNorm(nn.LayerNorm):
    """(x - mean) / deviation * gain + bias (arXiv 1607.06450), in the type of x."""

    def forward(self, inputs: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(inputs.dtype)
        with full_precision(inputs.device):
            return F.layer_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), bias, self.eps)


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain (arXiv 1910.07467), in the type of x."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, inputs: Tensor) -> Tensor:
        with full_precision(inputs.device):
            return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


def make_norm(name: NormName, dim: int, bias: bool) -> nn.Module:
    return LayerNorm(dim, bias=bias) if name == "layernorm" else RMSNorm(dim)
