"""Attention by two plain products and a softmax, with the backward written out.

On a CPU the fused kernel's backward is slow, half of a whole bf16 step at short lengths; the plain products take half
the time there.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MATH_LONGEST = 512   # above this the kept scores (S^2 a head) cost more memory than the CPU's fused backward costs time
CHUNK = 96           # queries that share the keys before the last of them; fewer make the products too small


class MathAttention(torch.autograd.Function):
    """softmax(q k^T / sqrt(head_dim) + mask) v from q, k, v stacked as [3, B * heads, S, head_dim].

    Autograd would stack the three gradients in a further copy and pass over the scores twice; here they are written
    into one tensor. ``ends`` cuts the queries into chunks, each of which sees the keys before its own end alone: under
    a causal mask the scores behind are all -inf, and leaving them out saves a third of the work at 288 slots.
    """

    @staticmethod
    def forward(context, stacked: Tensor, mask: Tensor | None, ends: tuple[int, ...] | None = None) -> Tensor:
        context.ends = ends = ends or (stacked.shape[2],)
        queries, keys, values = stacked
        scale = stacked.shape[-1] ** -0.5
        attended, weights = torch.empty_like(queries), []
        for start, end in chunks(ends):
            scores = _scores(queries[:, start:end], keys[:, :end], mask, start, scale)
            weights.append(_softmax(scores))
            attended[:, start:end] = torch.bmm(weights[-1], values[:, :end])
        context.save_for_backward(stacked, *weights)
        return attended

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor, None, None]:
        stacked, *weights = context.saved_tensors
        queries, keys, values = stacked
        scale = stacked.shape[-1] ** -0.5
        grad = grad.contiguous()
        grads = torch.empty_like(stacked)
        for (start, end), part in reversed(list(zip(chunks(context.ends), weights, strict=True))):
            grad_part = grad[:, start:end]
            grad_weights = torch.bmm(grad_part, values[:, :end].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weights, part, -1, part.dtype).mul_(scale)
            grads[0][:, start:end] = torch.bmm(grad_scores, keys[:, :end])
            grad_keys = torch.bmm(grad_scores.transpose(1, 2), queries[:, start:end])
            grad_values = torch.bmm(part.transpose(1, 2), grad_part)
            if end == stacked.shape[2]:      # the last chunk sees all keys, and is the first here: the others add to it
                grads[1], grads[2] = grad_keys, grad_values
            else:
                grads[1][:, :end] += grad_keys
                grads[2][:, :end] += grad_values
        return grads, None, None


def _scores(queries: Tensor, keys: Tensor, mask: Tensor | None, start: int, scale: float) -> Tensor:
    if mask is None:
        return torch.bmm(queries, keys.transpose(1, 2)).mul_(scale)
    part = mask[start:start + queries.shape[1], :keys.shape[1]]
    return torch.baddbmm(part.expand(len(queries), -1, -1), queries, keys.transpose(1, 2), alpha=scale)


def _softmax(scores: Tensor) -> Tensor:
    # The CPU's 16-bit softmax takes 2.5 times as long on rows that are not whole vectors (32 values).
    ragged = scores.dtype.itemsize == 2 and scores.shape[-1] % 32 != 0
    return (scores.softmax(dim=-1, dtype=torch.float32) if ragged else scores.softmax(dim=-1)).to(scores.dtype)


def chunks(ends: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """(start, end) of each chunk."""
    return zip((0, *ends), ends, strict=False)


def causal_ends(length: int) -> tuple[int, ...]:
    """Where the chunks of a causal sequence end; a last one of less than half is the end of the one before."""
    return (*range(CHUNK, length - CHUNK // 2, CHUNK), length)


def math_attention(stacked: Tensor, mask: Tensor) -> Tensor:
    """[B, heads, S, head_dim] from q, k, v stacked as [3, B, heads, S, head_dim] and an additive ``mask`` [S, S] that
    hides from a slot all behind it."""
    flat = stacked.flatten(1, 2).contiguous()
    return MathAttention.apply(flat, mask, causal_ends(flat.shape[2])).unflatten(0, stacked.shape[1:3])


def attend(stacked: Tensor, mask: Tensor | None) -> Tensor:
    """The same with any additive ``mask`` [S, S], or with none; by the fused kernel where the scores would be large."""
    mask = None if mask is None else mask.to(stacked.dtype)
    if stacked.shape[3] > MATH_LONGEST:
        queries, keys, values = stacked
        return F.scaled_dot_product_attention(queries, keys, values, mask)
    return MathAttention.apply(stacked.flatten(1, 2).contiguous(), mask).unflatten(0, stacked.shape[1:3])


def without_fused_kernels() -> AbstractContextManager[None]:
    """Plain products in networks whose attention is their own: the fused kernel's bf16 backward costs more than the
    whole rest of a small block."""
    return sdpa_kernel(SDPBackend.MATH)
