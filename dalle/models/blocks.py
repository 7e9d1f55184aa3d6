"""The pieces of a transformer block: norm, token shift, feed-forward, and the residual block that joins them."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.attention import Attention, AttentionConstants, KeyValueCache, RMSNorm

NormName = Literal["layernorm", "rmsnorm"]
MlpName = Literal["gelu", "gelu_tanh", "relu2", "swiglu", "geglu"]
GATED = ("swiglu", "geglu")


def make_norm(name: NormName, dim: int, bias: bool) -> nn.Module:
    return nn.LayerNorm(dim, bias=bias) if name == "layernorm" else RMSNorm(dim)


class SquaredRelu(torch.autograd.Function):
    """relu(x)^2 (arXiv 2109.08668) that keeps one tensor for its backward instead of two."""

    @staticmethod
    def forward(context, inputs: Tensor) -> Tensor:
        positive = inputs.relu()
        context.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> Tensor:
        return (grad * context.saved_tensors[0]).mul_(2)


class FeedForward(nn.Module):
    """dim -> hidden -> dim. The gated forms (arXiv 2002.05202) take value and gate from one product."""

    def __init__(self, dim: int, hidden: int, kind: MlpName, bias: bool):
        super().__init__()
        self.kind = kind
        self.up = nn.Linear(dim, 2 * hidden if kind in GATED else hidden, bias=bias)
        self.down = nn.Linear(hidden, dim, bias=bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.down(self._activate(self.up(inputs)))

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.kind == "relu2":
            return SquaredRelu.apply(hidden)
        if self.kind in GATED:
            value, gate = hidden.chunk(2, dim=-1)
            return value * (F.silu(gate) if self.kind == "swiglu" else F.gelu(gate))
        return F.gelu(hidden, approximate="tanh" if self.kind == "gelu_tanh" else "none")


class ShiftSlots(torch.autograd.Function):
    """The first quarter of the features from the previous slot, the second from the slot one image row above.

    A slot without such a neighbour (the first one; text slots and the first image row) keeps its own features.
    """

    @staticmethod
    def forward(context, inputs: Tensor, first_below: int, width: int) -> Tensor:
        context.first_below, context.width = first_below, width
        quarter = inputs.shape[-1] // 4
        shifted = inputs.clone()
        shifted[:, 1:, :quarter] = inputs[:, :-1, :quarter]
        if inputs.shape[1] > first_below:
            shifted[:, first_below:, quarter:2 * quarter] = inputs[:, first_below - width:-width, quarter:2 * quarter]
        return shifted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        first_below, width = context.first_below, context.width
        quarter = grad.shape[-1] // 4
        moved = grad.clone()
        moved[:, :-1, :quarter] = grad[:, 1:, :quarter]
        moved[:, -1, :quarter] = 0
        moved[:, 0, :quarter] += grad[:, 0, :quarter]    # the first slot kept its own
        if grad.shape[1] > first_below:
            above = slice(quarter, 2 * quarter)
            moved[:, first_below:, above] = 0
            moved[:, first_below - width:-width, above] += grad[:, first_below:, above]
        return moved, None, None


class TokenShift(nn.Module):
    """Mix each slot with its left and upper neighbour before a sub-layer (BlinkDL's token shift, on an image grid)."""

    def __init__(self, prefix: int, width: int):
        super().__init__()
        self.prefix, self.width = prefix, width

    def forward(self, inputs: Tensor, cache: "ShiftCache | None" = None) -> Tensor:
        if cache is not None:
            cache.fill(inputs)
        return ShiftSlots.apply(inputs, self.prefix + self.width, self.width)

    def step(self, inputs: Tensor, cache: "ShiftCache", slot: int) -> Tensor:
        """Shift the one slot ``inputs`` [B, dim] and remember it."""
        quarter = inputs.shape[-1] // 4
        left = cache.recent[(slot - 1) % self.width, :, :quarter]
        has_above = slot >= self.prefix + self.width
        above = (cache.recent[slot % self.width] if has_above else inputs)[:, quarter:2 * quarter]
        shifted = torch.cat([left, above, inputs[:, 2 * quarter:]], dim=1)
        cache.recent[slot % self.width] = inputs[:, :2 * quarter]
        return shifted


class ShiftCache:
    """The shifted half of the features of the last ``width`` slots, slot s at s % width: [width, B, dim / 2]."""

    def __init__(self, batch: int, dim: int, width: int, device: torch.device, dtype: torch.dtype):
        self.recent = torch.zeros(width, batch, dim // 4 * 2, device=device, dtype=dtype)

    def fill(self, inputs: Tensor) -> None:
        """Remember the last slots of ``inputs`` [B, S, dim], the first S slots of the stream."""
        width, _, kept = self.recent.shape
        first = max(0, inputs.shape[1] - width)
        places = torch.arange(first, inputs.shape[1], device=inputs.device) % width
        self.recent[places] = inputs[:, first:, :kept].transpose(0, 1)

    def copy_rows(self, source: "ShiftCache", rows: Tensor, first: int) -> None:
        self.recent[:, first:first + len(rows)] = source.recent[:, rows]


class SubLayer(nn.Module):
    """x + norm_out(f(shift(norm(x)))): pre-norm, with the optional stages of sandwich norm and token shift."""

    def __init__(self, body: nn.Module, norm: nn.Module, norm_out: nn.Module | None, shift: TokenShift | None,
                 dropout: float):
        super().__init__()
        self.norm, self.shift, self.body, self.norm_out = norm, shift, body, norm_out
        self.dropout = nn.Dropout(dropout) if dropout else None

    def forward(self, inputs: Tensor, shift_cache: ShiftCache | None, *context: Any) -> Tensor:
        """``inputs`` [B, S, dim]; ``context`` is what the body takes besides them."""
        hidden = self.norm(inputs.to(compute_dtype(inputs)))
        if self.shift is not None:
            hidden = self.shift(hidden, shift_cache)
        return inputs + self._leave(self.body(hidden, *context))

    def step(self, inputs: Tensor, slot: int, shift_cache: ShiftCache | None, *context: Any) -> Tensor:
        """The same for the one slot ``inputs`` [B, dim]; a body without ``context`` has no memory."""
        hidden = self.norm(inputs)
        if self.shift is not None:
            hidden = self.shift.step(hidden, shift_cache, slot)
        hidden = self.body.step(hidden, slot, *context) if context else self.body(hidden)
        return inputs + self._leave(hidden)

    def _leave(self, hidden: Tensor) -> Tensor:
        if self.norm_out is not None:
            hidden = self.norm_out(hidden)
        return hidden if self.dropout is None else self.dropout(hidden)


def compute_dtype(inputs: Tensor) -> torch.dtype:
    """The type of the products (autocast's): rounding before the norm halves the bytes that it reads and writes."""
    device = inputs.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype


class Block(nn.Module):
    """Attention, then feed-forward, each a residual sub-layer. Input and output [B, S, dim]."""

    def __init__(self, attention: SubLayer, feed_forward: SubLayer):
        super().__init__()
        self.attention, self.feed_forward = attention, feed_forward

    def forward(self, inputs: Tensor, constants: AttentionConstants, cache: "BlockCache | None" = None) -> Tensor:
        if cache is None:
            return self.feed_forward(self.attention(inputs, None, constants), None)
        hidden = self.attention(inputs, cache.attention_shift, constants, cache.keys_values)
        return self.feed_forward(hidden, cache.feed_forward_shift)

    def step(self, inputs: Tensor, slot: int, cache: "BlockCache") -> Tensor:
        hidden = self.attention.step(inputs, slot, cache.attention_shift, cache.keys_values)
        return self.feed_forward.step(hidden, slot, cache.feed_forward_shift)


class BlockCache:
    """What a block remembers of B sequences while decoding: keys and values, and recent slots where it shifts."""

    def __init__(self, block: Block, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        body: Attention = block.attention.body
        dim = body.out.out_features
        self.keys_values = KeyValueCache(batch, body.heads, body.head_dim, length, device, dtype)
        self.attention_shift, self.feed_forward_shift = (
            None if layer.shift is None else ShiftCache(batch, dim, layer.shift.width, device, dtype)
            for layer in (block.attention, block.feed_forward))

    def copy_rows(self, source: "BlockCache", rows: Tensor, length: int, first: int) -> None:
        """Take the sequences ``rows`` of ``source`` after ``length`` slots as sequences ``first`` and on."""
        self.keys_values.copy_rows(source.keys_values, rows, length, first)
        if self.attention_shift is not None:
            self.attention_shift.copy_rows(source.attention_shift, rows, first)
            self.feed_forward_shift.copy_rows(source.feed_forward_shift, rows, first)
