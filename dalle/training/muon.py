"""Muon: the momentum of a matrix, orthogonalised (Jordan et al., 2024), over many matrices at once.

Numerically ``torch.optim.Muon`` to rounding, which takes one matrix after the other: here matrices of one shape lie in
one stack, so that a model of many blocks costs as many kernels as it has shapes. The host reads nothing of the device:
a step that is to be skipped is undone by a choice on the device, and the rate may be a tensor.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Scaling = Literal["original", "match_rms_adamw"]
# (rows [n, ...], what is made of each of them) -> all of them made; several processes may each make a part
Share = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]

COEFFICIENTS = (3.4445, -4.775, 2.0315)     # of the quintic, whose slope at 0 is as large as it can be
ITERATIONS = 5
SMALLEST = 1e-7                              # norm that a matrix is divided by at least
STACKED = 2**26                              # most elements of a stack: what a step needs beside the state stays small


def alone(rows: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """The share of a process that has no other to share with."""
    return work(rows)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum of matrices [a, b], orthogonalised; decay apart from it (Loshchilov and Hutter).

    ``scaling``: the step is lr sqrt(max(1, a / b)) ("original"), or 0.2 lr sqrt(max(a, b)), which is as large as
    AdamW's. Before a step ``grad_scale`` (0-d, what gradients are divided by) and ``found_inf`` (0-d, 1 leaves all as
    it is) may be set, as torch's fused optimisers have them. State: ``momentum_buffer`` of each matrix, as in torch.
    """

    def __init__(self, matrices: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95,
                 scaling: Scaling = "original", share: Share = alone):
        matrices = list(matrices)
        wrong = next((tuple(matrix.shape) for matrix in matrices if matrix.ndim != 2), None)
        if wrong is not None:
            raise ValueError(f"Muon moves matrices; one of the parameters is {wrong}")
        self.share = share
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "scaling": scaling})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for group in self.param_groups:
            for stack in stacks([matrix for matrix in group["params"] if matrix.grad is not None]):
                self._move(stack, group)

    def _move(self, matrices: list[nn.Parameter], group: dict[str, Any]) -> None:
        """One step of matrices of one shape."""
        lr, momentum = group["lr"], group["momentum"]
        kept = [self._momentum(matrix) for matrix in matrices]
        gradients = torch.stack([matrix.grad for matrix in matrices])                     # [n, a, b]
        if self.grad_scale is not None:
            gradients.div_(self.grad_scale)
        before = torch.stack(kept)
        after = before.lerp(gradients, 1 - momentum)
        updates = self.share(gradients.lerp_(after, momentum).bfloat16(), orthogonal).float()
        updates.mul_(lr * step_length(group["scaling"], *matrices[0].shape))
        decay = 1 - lr * group["weight_decay"]
        if self.found_inf is not None:
            skip = self.found_inf.bool()
            after = torch.where(skip, before, after)
            updates = updates.masked_fill_(skip, 0.0)
            decay = torch.where(skip, 1.0, decay)
        torch._foreach_copy_(kept, list(after.unbind()))
        torch._foreach_mul_(matrices, decay)
        torch._foreach_sub_(matrices, list(updates.unbind()))

    def _momentum(self, matrix: nn.Parameter) -> Tensor:
        state = self.state[matrix]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(matrix, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


def step_length(scaling: Scaling, rows: int, columns: int) -> float:
    """What the learning rate is multiplied by for a matrix of this shape."""
    if scaling == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def stacks(matrices: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """The matrices in lists of one shape, device and type, none of more than ``STACKED`` elements (or of one matrix).
    """
    found: dict[Any, list[nn.Parameter]] = {}
    for matrix in matrices:
        found.setdefault((matrix.shape, matrix.device, matrix.dtype), []).append(matrix)
    return [alike[start:start + size] for alike in found.values()
            for size in [max(1, STACKED // alike[0].numel())] for start in range(0, len(alike), size)]


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest matrix with orthonormal rows (or columns) to each of bf16 [n, a, b]: Newton-Schulz's quintic.

    It stops while the singular values still lie between about 0.7 and 1.2, which does no harm.
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=SMALLEST)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
