"""Linear layers in fp32 by oneDNN.

torch has MKL multiply matrices in fp32, and MKL takes its AVX-512 code on Intel's own processors alone: on others with
AVX-512 it reaches some 45 % of what oneDNN, which torch brings along, does in the same fp32 (nothing is narrowed).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

AVAILABLE = (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
             and torch.backends.cpu.get_cpu_capability() == "AVX512" and hasattr(torch.ops.mkldnn, "_linear_pointwise"))
FEWEST_PRODUCTS = 1 << 20      # below, the longer way to oneDNN costs more than it saves


class OneDnnLinear(torch.autograd.Function):
    """x w^T + b for ``inputs`` [..., K], ``weight`` [N, K] and ``bias`` [N] or None, all fp32: [..., N]."""

    @staticmethod
    def forward(context, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        context.save_for_backward(inputs, weight)
        return product(inputs, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        inputs, weight = context.saved_tensors
        grad_inputs = grad_weight = grad_bias = None
        flat = grad.reshape(-1, grad.shape[-1])
        if context.needs_input_grad[0]:
            grad_inputs = product(flat, weight.t()).view(inputs.shape)
        if context.needs_input_grad[1]:
            grad_weight = _of_weight(flat, inputs.reshape(-1, inputs.shape[-1]))
        if context.needs_input_grad[2]:
            grad_bias = flat.sum(dim=0)
        return grad_inputs, grad_weight, grad_bias


def product(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x w^T + b."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


def _of_weight(grad: Tensor, inputs: Tensor) -> Tensor:
    """grad^T inputs, [N, K] of [M, N] and [M, K]; with the longer side as columns, which takes a fifth less time."""
    if grad.shape[1] >= inputs.shape[1]:
        return product(inputs.t(), grad.t()).t().contiguous()
    return product(grad.t(), inputs.t())


def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; by oneDNN where all is fp32, autocast is off and the product is a large one."""
    if torch.compiler.is_compiling() or not _is_for_onednn(inputs, weight, bias):
        return F.linear(inputs, weight, bias)
    return (OneDnnLinear.apply if torch.is_grad_enabled() else product)(inputs, weight, bias)


def _is_for_onednn(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (AVAILABLE and inputs.numel() * len(weight) >= FEWEST_PRODUCTS
            and inputs.dtype == weight.dtype == torch.float32 and (bias is None or bias.dtype == torch.float32)
            and not torch.is_autocast_enabled("cpu"))
