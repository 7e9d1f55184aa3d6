"""The cross-entropy of a head against torch's, of whole logits."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from dalle.models import kernels, losses, plain
from dalle.models.cpu import softmax
from dalle.models.losses import Head, linear_cross_entropy

TARGETS = torch.tensor([[3, -100, 0], [6, 6, -100]])


def inputs_of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 5, generator=source, dtype=dtype).requires_grad_(),
            torch.randn(7, 5, generator=source, dtype=dtype).requires_grad_())


def whole(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy((hidden @ weight.t()).flatten(0, 1), TARGETS.flatten(), reduction="sum")


@pytest.fixture(params=[1 << 24, 14, 1], ids=["at once", "rows by two", "row by row"])
def most_logits(monkeypatch, request):
    monkeypatch.setattr(losses, "MOST_LOGITS", request.param)


def test_value_and_gradients_are_those_of_whole_logits(most_logits):
    hidden, weight = inputs_of(torch.float64)
    found = linear_cross_entropy(hidden, weight, TARGETS)
    torch.testing.assert_close(found, whole(hidden, weight))
    for factor in (1.0, -0.3):
        torch.testing.assert_close(torch.autograd.grad(factor * found, (hidden, weight), retain_graph=True),
                                   torch.autograd.grad(factor * whole(hidden, weight), (hidden, weight)))


@pytest.mark.parametrize("learns", [(True, False), (False, True), (False, False)])
def test_only_what_learns_gets_a_gradient(most_logits, learns):
    inputs = [tensor.detach().requires_grad_(wanted)
              for tensor, wanted in zip(inputs_of(torch.float64), learns, strict=True)]
    found = linear_cross_entropy(*inputs, TARGETS)
    torch.testing.assert_close(found, whole(*inputs))
    assert found.requires_grad == any(learns)
    if any(learns):
        found.backward()
        whole_inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in inputs]
        whole(*whole_inputs).backward()
        for tensor, other in zip(inputs, whole_inputs, strict=True):
            torch.testing.assert_close(tensor.grad, other.grad)


def test_without_gradient_none_is_made(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "cpu", dataclasses.replace(
        kernels.KERNELS["cpu"], softmax_errors=lambda *inputs: pytest.fail("a gradient")))
    hidden, weight = inputs_of(torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, TARGETS), whole(hidden, weight))


def test_nothing_scored_is_zero():
    hidden, weight = inputs_of(torch.float32)
    total = linear_cross_entropy(hidden, weight, torch.full_like(TARGETS, -100))
    assert total == 0
    total.backward()
    assert hidden.grad.abs().sum() == weight.grad.abs().sum() == 0


def test_under_autocast_products_are_bf16_and_the_rest_is_single(most_logits):
    hidden, weight = inputs_of(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, TARGETS)
        logits = (hidden @ weight.t()).float()
        expected = F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), reduction="sum")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    for gradient, reference in zip(torch.autograd.grad(found, (hidden, weight)),
                                   torch.autograd.grad(expected, (hidden, weight)), strict=True):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, reference, atol=0.03, rtol=0.03)


def test_weights_in_bf16_get_gradients_in_bf16_that_were_added_up_in_single(monkeypatch):
    """512 parts, each of gradient 1: added up in bf16 they would stay at 256."""
    monkeypatch.setattr(losses, "MOST_LOGITS", 2)
    hidden, weight = torch.ones(512, 1, dtype=torch.bfloat16), torch.tensor([[60.0], [-60.0]], dtype=torch.bfloat16)
    weight.requires_grad_()
    linear_cross_entropy(hidden, weight, torch.ones(512, dtype=torch.long)).backward()
    assert weight.grad.dtype == torch.bfloat16
    assert weight.grad.tolist() == [[512.0], [-512.0]]


def test_no_tensor_holds_the_logits_of_all_rows(monkeypatch):
    """Every tensor that an operation makes, of 64 rows over 32 tokens, is at most a quarter of all logits."""
    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            made = function(*arguments, **(named or {}))
            if isinstance(made, torch.Tensor):
                self.elements = max(self.elements, made.numel())
            return made

    monkeypatch.setattr(losses, "MOST_LOGITS", 16 * 32)
    head = Head(4, 32)
    hidden, targets = torch.randn(64, 4, requires_grad=True), torch.randint(32, (64,))
    with Largest() as seen:
        head(hidden, targets).backward()
    assert seen.elements == 16 * 32
    assert head.weight.grad is not None
    assert hidden.grad is not None


def test_a_head_gives_logits_or_their_loss():
    head, hidden, targets = Head(4, 9), torch.randn(2, 3, 4), torch.randint(9, (2, 3))
    expected = F.cross_entropy(head(hidden).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(head(hidden, targets), expected)


@pytest.mark.parametrize("block", [1 << 18, 14, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_softmax_in_blocks_is_the_plain_one(monkeypatch, block, dtype):
    monkeypatch.setattr(softmax, "BLOCK", block)
    logits, chosen = torch.randn(6, 7, dtype=dtype) * 3, torch.randint(7, (6, 1))
    counts = torch.tensor([1, 1, 0, 1, 0, 1], dtype=dtype)[:, None]
    expected = plain.softmax_errors(logits, chosen, counts)
    wide = logits.detach().to(expected[0].dtype).requires_grad_()
    gradient, = torch.autograd.grad((plain.token_losses(wide, chosen) * counts).sum(), wide)
    torch.testing.assert_close(softmax.softmax_errors(logits, chosen, counts), expected)
    torch.testing.assert_close(expected[1], gradient.to(dtype))
    assert expected[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
