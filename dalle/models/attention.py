"""Causal multi-head attention over the text-and-image stream, for training and for cached decoding.

One softmax over all permitted keys (arXiv 2102.12092, appendix B.1). Three implementations of the same product:

- ``sdpa``: ``scaled_dot_product_attention``; no [S, S] scores are kept per head.
- ``math``: two matrix products and a softmax with a hand-written backward. On a CPU the fused kernel's backward is
  slow (half of a whole bf16 step at short lengths); there the plain products take half the time.
- ``flex``: FlexAttention with block masks, CUDA only: blocks that a pattern forbids are not computed.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models.patterns import AttentionPattern

Backend = Literal["auto", "sdpa", "math", "flex"]
MATH_LONGEST = 512   # above this the kept scores (S^2 a head) cost more memory than the CPU's fused backward costs time
ROTARY_BASE = 10_000.0


def choose_backend(backend: Backend, pattern: AttentionPattern, length: int, device: torch.device) -> Backend:
    """What ``auto`` stands for, by device, pattern and length.

    Raises ``ValueError`` for ``flex`` off CUDA: it has no backward there.
    """
    if backend == "flex" and device.type != "cuda":
        raise ValueError(f"attention_backend 'flex' needs a CUDA device, not {device.type}; use 'auto'")
    if backend != "auto":
        return backend
    if device.type == "cuda":
        return "sdpa" if pattern.name == "full" else "flex"
    return "math" if device.type == "cpu" and length <= MATH_LONGEST else "sdpa"


# Constants of a pattern, built once for each (length, device, dtype). They are kept here and not as buffers, so that a
# model built on the meta device, cast by an engine or copied for an average carries nothing to be lost or rounded.

@lru_cache(maxsize=64)
def boolean_mask(pattern: AttentionPattern, length: int, device: torch.device) -> Tensor:
    """bool [length, length] on ``device``, True where attention is allowed."""
    with torch.inference_mode(False):
        return pattern.mask()[:length, :length].to(device)


@lru_cache(maxsize=64)
def additive_mask(pattern: AttentionPattern, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[length, length]: 0 where attention is allowed, -inf elsewhere."""
    with torch.inference_mode(False):
        allowed = boolean_mask(pattern, length, device)
        return torch.zeros(length, length, dtype=dtype, device=device).masked_fill_(~allowed, float("-inf"))


@lru_cache(maxsize=64)
def block_mask(pattern: AttentionPattern, length: int, device: torch.device):
    """The pattern as FlexAttention's block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    with torch.inference_mode(False):
        allowed = boolean_mask(pattern, length, device)
        return create_block_mask(lambda batch, head, query, key: allowed[query, key],
                                 None, None, length, length, device=str(device))


@lru_cache(maxsize=8)
def rotary_table(prefix: int, grid: tuple[int, int], head_dim: int, device: torch.device,
                 dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each [prefix + image slots, head_dim], in the layout of :func:`rotate_`.

    A text slot is rotated by its index with all frequencies (1-D, arXiv 2104.09864); an image slot by its row with the
    first half of the pairs and by its column with the second half (2-D), so that the product of two text slots, or of
    two image slots, depends only on their displacement.
    """
    with torch.inference_mode(False):
        pairs = head_dim // 2
        text_angles = torch.outer(torch.arange(prefix).double(), _frequencies(pairs))
        rows = torch.arange(grid[0]).double().repeat_interleave(grid[1])
        columns = torch.arange(grid[1]).double().repeat(grid[0])
        half = _frequencies(pairs // 2)
        image_angles = torch.cat([torch.outer(rows, half), torch.outer(columns, half)], dim=1)
        angles = torch.cat([text_angles, image_angles]).repeat(1, 2)
        signs = torch.tensor([-1.0, 1.0]).double().repeat_interleave(pairs)
        return angles.cos().to(device, dtype), (angles.sin() * signs).to(device, dtype)


def _frequencies(count: int) -> Tensor:
    return ROTARY_BASE ** (-torch.arange(count).double() / count)


class Rotate(torch.autograd.Function):
    """Turn each pair (i, i + head_dim / 2) of the queries and keys in [3, ..., S, head_dim] by its slot's angle.

    Values pass through, so that one copy serves as the contiguous input of the products. The gradient is turned back.
    """

    @staticmethod
    def forward(context, stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        context.save_for_backward(cosines, sines)
        return rotate_(stacked.clone(memory_format=torch.contiguous_format), cosines, sines)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = context.saved_tensors
        return rotate_(grad.clone(memory_format=torch.contiguous_format), cosines, -sines), None, None


def rotate_(stacked: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    # Whole contiguous rows, x cos + swap(x) sin with the signs in the sines: halves would be strided, and slow.
    turned = stacked[:2]
    swapped = torch.cat(turned.chunk(2, dim=-1)[::-1], dim=-1)
    turned.mul_(cosines).addcmul_(swapped, sines)
    return stacked


@dataclass(frozen=True, eq=False)
class AttentionConstants:
    """What one layer's attention over a stream of fixed length needs besides its weights."""

    backend: Backend
    mask: Any                                  # additive (math), boolean or none (sdpa), block mask (flex)
    rotary: tuple[Tensor, Tensor] | None       # cosines and signed sines [S, head_dim]


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * gain (arXiv 1910.07467), in the type of x: torch has a fused kernel only where the types agree."""

    def __init__(self, dim: int):
        super().__init__(dim, eps=1e-6)

    def forward(self, inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs, self.normalized_shape, self.weight.to(inputs.dtype), self.eps)


class MathAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(head_dim) + mask) v from q, k, v stacked as [3, B * heads, S, head_dim].

    Autograd would stack the three gradients in a further copy and pass over the scores twice; here they are written
    into one tensor.
    """

    @staticmethod
    def forward(context, stacked: Tensor, mask: Tensor) -> Tensor:
        queries, keys, values = stacked
        scale = stacked.shape[-1] ** -0.5
        scores = torch.baddbmm(mask.expand(len(queries), -1, -1), queries, keys.transpose(1, 2), alpha=scale)
        # The CPU's 16-bit softmax takes 2.5 times as long on rows that are not whole vectors (32 values).
        ragged = scores.dtype.itemsize == 2 and scores.shape[-1] % 32 != 0
        weights = (scores.softmax(dim=-1, dtype=torch.float32) if ragged else scores.softmax(dim=-1)).to(scores.dtype)
        context.save_for_backward(stacked, weights)
        return torch.bmm(weights, values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None]:
        stacked, weights = context.saved_tensors
        queries, keys, values = stacked
        scale = stacked.shape[-1] ** -0.5
        grad = grad.contiguous()
        grad_weights = torch.bmm(grad, values.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, weights, -1, weights.dtype).mul_(scale)
        grads = torch.empty_like(stacked)
        torch.bmm(grad_scores, keys, out=grads[0])
        torch.bmm(grad_scores.transpose(1, 2), queries, out=grads[1])
        torch.bmm(weights.transpose(1, 2), grad, out=grads[2])
        return grads, None


def math_attention(stacked: Tensor, mask: Tensor) -> Tensor:
    """[B, heads, S, head_dim] from q, k, v stacked as [3, B, heads, S, head_dim]."""
    return MathAttention.apply(stacked.flatten(1, 2).contiguous(), mask).unflatten(0, stacked.shape[1:3])


def sdpa_attention(stacked: Tensor, mask: Tensor | None) -> Tensor:
    """The same through ``scaled_dot_product_attention``; bool ``mask`` [S, S], none for plain causal attention."""
    queries, keys, values = stacked
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, is_causal=mask is None)


@lru_cache(maxsize=1)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)  # uncompiled it would hold all scores


def flex_attention(stacked: Tensor, mask: Any) -> Tensor:
    """The same through FlexAttention and a block mask."""
    queries, keys, values = stacked
    return _compiled_flex()(queries, keys, values, block_mask=mask)


ATTEND = {"math": math_attention, "sdpa": sdpa_attention, "flex": flex_attention}


class Attention(nn.Module):
    """Multi-head self-attention with one pattern. Input and output [B, S, dim]."""

    def __init__(self, dim: int, heads: int, head_dim: int, pattern: AttentionPattern, *, bias: bool = True,
                 qk_norm: bool = False, rotary: bool = False, backend: Backend = "auto"):
        super().__init__()
        self.heads, self.head_dim, self.pattern = heads, head_dim, pattern
        self.rotary, self.backend = rotary, backend
        self.qkv = nn.Linear(dim, 3 * heads * head_dim, bias=bias)
        self.out = nn.Linear(heads * head_dim, dim, bias=bias)
        self.query_norm = RMSNorm(head_dim) if qk_norm else None
        self.key_norm = RMSNorm(head_dim) if qk_norm else None

    def constants(self, length: int, device: torch.device, dtype: torch.dtype) -> AttentionConstants:
        """The constants for the first ``length`` slots computed in ``dtype``; call it outside of a compiled region."""
        backend = choose_backend(self.backend, self.pattern, length, device)
        if backend == "math":
            mask = additive_mask(self.pattern, length, device, dtype)
        elif backend == "flex":
            mask = block_mask(self.pattern, length, device)
        else:
            mask = None if self.pattern.name == "full" else boolean_mask(self.pattern, length, device)
        return AttentionConstants(backend, mask, self._rotary(0, length, device, dtype))

    def _rotary(self, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        if not self.rotary:
            return None
        cosines, sines = rotary_table(self.pattern.prefix, self.pattern.grid, self.head_dim, device, dtype)
        return cosines[start:stop], sines[start:stop]

    def forward(self, inputs: Tensor, constants: AttentionConstants, cache: "KeyValueCache | None" = None) -> Tensor:
        """Attend within ``inputs`` [B, S, dim], the first S slots of the stream; ``cache`` takes keys and values."""
        batch, length, _ = inputs.shape
        stacked = self.qkv(inputs).view(batch, length, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        stacked = self._position(stacked, constants.rotary)
        if cache is not None:
            cache.fill(stacked[1], stacked[2])
        attended = ATTEND[constants.backend](stacked, constants.mask)
        return self.out(attended.transpose(1, 2).reshape(batch, length, -1))

    def _position(self, stacked: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Normalise and rotate the queries and keys of ``stacked`` [3, B, heads, S, head_dim]."""
        if self.query_norm is not None:
            queries, keys, values = stacked
            stacked = torch.stack([self.query_norm(queries), self.key_norm(keys), values])
        return stacked if rotary is None else Rotate.apply(stacked, *rotary)

    def step(self, inputs: Tensor, slot: int, cache: "KeyValueCache") -> Tensor:
        """Attend from the one slot ``inputs`` [B, dim] to everything cached that the pattern allows, and itself."""
        batch = len(inputs)
        stacked = self.qkv(inputs).view(batch, 3, self.heads, 1, self.head_dim).transpose(0, 1)
        queries, keys, values = self._position(stacked, self._rotary(slot, slot + 1, inputs.device, inputs.dtype))
        cache.put(slot, keys, values)
        attended = cache.attend(queries.reshape(-1, 1, self.head_dim), self.pattern, slot)
        return self.out(attended.view(batch, -1))


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
        """softmax(q k^T / sqrt(head_dim)) v over the permitted, filled slots; queries [B * heads, 1, head_dim].

        Two plain products: the CPU's fused attention is seven times slower for a single bf16 query. A sparse pattern
        reads the prefix in place and gathers only the image slots that it names; nothing is masked.
        """
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
