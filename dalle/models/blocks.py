"""The pieces of a transformer block: token shift, feed-forward, and the residual block that joins them."""

from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.attention import AttentionConstants
from dalle.models.kernels import kernels_for
from dalle.models.layers import Dropout, Linear
from dalle.models.precision import compute_dtype

MlpName = Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"]
GATED = ("swiglu", "geglu")


class FeedForward(nn.Module):
    """dim -> hidden -> dim. The gated forms (arXiv 2002.05202) take value and gate from one product."""

    def __init__(self, dim: int, hidden: int, kind: MlpName, bias: bool):
        super().__init__()
        self.kind = kind
        self.up = Linear(dim, 2 * hidden if kind in GATED else hidden, bias=bias)
        self.down = Linear(hidden, dim, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self._activate(self.up(inputs)))

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.kind == "relu2":
            return kernels_for(hidden.device).squared_relu(hidden)
        if self.kind in GATED:
            value, gate = hidden.chunk(2, dim=-1)
            return value * (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate))
        return F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")


class TokenShift(nn.Module):
    """Mix each slot with its left and upper neighbour before a sub-layer (BlinkDL's token shift, on an image grid)."""

    def __init__(self, prefix: int, width: int):
        super().__init__()
        self.prefix, self.width = prefix, width

    @property
    def first_below(self) -> int:
        """The first slot that has another one above it."""
        return self.prefix + self.width

    def forward(self, inputs: Tensor) -> Tensor:
        return kernels_for(inputs.device).shift_slots(inputs, self.first_below, self.width)


class SubLayer(nn.Module):
    """x + norm_out(f(shift(norm(x)))): pre-norm, with the optional stages of sandwich norm and token shift."""

    def __init__(self, body: nn.Module, norm: nn.Module, norm_out: nn.Module | None, shift: TokenShift | None,
                 dropout: float):
        super().__init__()
        self.norm, self.shift, self.body, self.norm_out = norm, shift, body, norm_out
        self.dropout = Dropout(dropout) if dropout else None

    def forward(self, inputs: Tensor, *context: Any) -> Tensor:
        """``inputs`` [B, S, dim]; ``context`` is what the body takes besides them."""
        hidden = self.norm(inputs.to(compute_dtype(inputs)))
        if self.shift is not None:
            hidden = self.shift(hidden)
        return inputs + self.leave(self.body(hidden, *context))

    def leave(self, hidden: Tensor) -> Tensor:
        """What the body's output adds to the residual stream."""
        if self.norm_out is not None:
            hidden = self.norm_out(hidden)
        return hidden if self.dropout is None else self.dropout(hidden)


class Block(nn.Module):
    """Attention, then feed-forward, each a residual sub-layer. Input and output [B, S, dim]."""

    def __init__(self, attention: SubLayer, feed_forward: SubLayer):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, inputs: Tensor, constants: AttentionConstants) -> Tensor:
        return self.feed_forward(self.attention(inputs, constants))
