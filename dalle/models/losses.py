"""The cross-entropy of a head, without its logits ever being whole in memory.

A head over V tokens makes V logits for each slot: in fp32, and again as their gradient, they are the largest tensors of
a training step. Here they live for some rows at a time, and the gradients of the head's input and weights are made at
once, while the logits are there: three products a head, as many as with whole logits, and nothing is computed twice
(the idea of Liger-Kernel, arXiv 2410.10989, section 3.2).
"""

import torch
from torch import Tensor, nn

from dalle.models import plain
from dalle.models.kernels import kernels_for
from dalle.models.precision import at_least_single, compute_dtype

IGNORED_TARGET = -100          # what `cross_entropy` leaves out
MOST_LOGITS = 1 << 24          # that are in memory at once: 32 MiB in bf16


class Head(nn.Linear):
    """A projection to the logits of V tokens, without bias, that can score them where it makes them."""

    def __init__(self, dim: int, num_tokens: int):
        super().__init__(dim, num_tokens, bias=False)

    def forward(self, hidden: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits in fp32 [..., V] of ``hidden`` [..., dim]; with ``targets`` [...] their cross-entropy alone: its sum,
        as :func:`linear_cross_entropy` gives it."""
        if targets is None:
            return at_least_single(super().forward(hidden))
        return linear_cross_entropy(hidden, self.weight, targets)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum (fp32, a scalar) of the cross-entropies of ``hidden @ weight.T`` against ``targets``, -100 left out.

    ``hidden`` [..., dim], ``weight`` [V, dim], ``targets`` int64 [...]. Products are in autocast's type where it is on,
    the softmax in fp32. It can be differentiated once.
    """
    rows, targets = hidden.flatten(0, -2), targets.flatten()
    if torch.is_grad_enabled():
        return LinearCrossEntropy.apply(rows, weight, targets)
    return _sum_and_gradients(rows, weight, targets, False, False)[0]


class LinearCrossEntropy(torch.autograd.Function):
    """The gradients are those of the sum, kept until the backward says what it is multiplied by."""

    @staticmethod
    def forward(context, rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        total, *gradients = _sum_and_gradients(rows, weight, targets, *context.needs_input_grad[:2])
        context.save_for_backward(*gradients)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = (None if gradient is None else gradient.to(grad.dtype) * grad
                        for gradient in context.saved_tensors)
        return rows, weight, None


def _sum_and_gradients(rows: Tensor, weight: Tensor, targets: Tensor, of_rows: bool,
                       of_weight: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and where asked for its gradients by ``rows`` [n, dim] and by ``weight`` [V, dim]; autograd rounds both
    to the types of these."""
    dtype = compute_dtype(rows)
    matrix, linear = weight.to(dtype), kernels_for(rows.device).linear
    scored = (targets != IGNORED_TARGET)[:, None]
    chosen = torch.where(scored, targets[:, None], 0)
    parts = min(len(rows), -(-len(rows) * len(weight) // MOST_LOGITS))
    summed = weight.dtype if parts == 1 else torch.promote_types(weight.dtype, torch.float32)
    total, row_gradients, weight_gradient = 0.0, [], None
    for part, token, counts in zip(rows.to(dtype).tensor_split(parts), chosen.tensor_split(parts),
                                   scored.to(dtype).tensor_split(parts), strict=True):
        logits = linear(part, matrix, None)                                                  # [some rows, V]
        if not (of_rows or of_weight):
            total = total + (plain.token_losses(logits, token) * counts).sum()
            continue
        losses, errors = kernels_for(rows.device).softmax_errors(logits, token, counts)
        total = total + (losses * counts).sum()
        if of_rows:
            row_gradients.append(linear(errors, matrix.t(), None))
        if of_weight:
            product = linear(errors.t(), part.t(), None).to(summed)
            weight_gradient = product if weight_gradient is None else weight_gradient.add_(product)
    row_gradient = None if not of_rows else row_gradients[0] if parts == 1 else torch.cat(row_gradients)
    # `total` as it is: a `to` that changes nothing, returned by a function that torch 2.11 compiles, has no gradient
    return total, row_gradient, weight_gradient
