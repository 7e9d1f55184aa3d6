"""Attention by two plain products and a softmax, with the backward written out.

On a CPU the fused kernel's backward is slow, half of a whole bf16 step at short lengths; the plain products take half
the time there.
"""

from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

MATH_LONGEST = 512   # above this the kept scores (S^2 a head) cost more memory than the CPU's fused backward costs time


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
    """[B, heads, S, head_dim] from q, k, v stacked as [3, B, heads, S, head_dim] and an additive ``mask`` [S, S]."""
    return MathAttention.apply(stacked.flatten(1, 2).contiguous(), mask).unflatten(0, stacked.shape[1:3])


def without_fused_kernels() -> AbstractContextManager[None]:
    """Plain products in networks whose attention is their own: the fused kernel's bf16 backward costs more than the
    whole rest of a small block."""
    return sdpa_kernel(SDPBackend.MATH)
