"""Every loss of the family follows the type that it is given: in doubles its gradient is that of differences."""

import inspect
import math
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
from published import Case, file_of
from torch import Tensor
from torch.autograd import gradcheck

import gans
from gans import acgan, losses, stackgan_v2, tacgan, tagan
from gans.layers import ConditioningAugmentation

OF_THE_NAME = ("loss", "losses", "hinge", "hinges", "penalty", "consistency", "error", "score", "bce", "mse")


def losses_of(module: str) -> list[Callable[..., Tensor]]:
    """The functions of a module of ``gans`` that are losses by their name."""
    return [function for name, function in inspect.getmembers(import_module(module), inspect.isfunction)
            if name.split("_")[-1] in OF_THE_NAME and function.__module__ == module]


MODULES = [f"gans.{module.name}" for module in iter_modules(gans.__path__) if module.name != "__main__"]
# function -> (its shapes, a call of it on tensors of these shapes): DOUBLES of its module's test file
CASES: dict[Callable, Case] = {function: case for module in MODULES if losses_of(module)
                               for function, case in file_of(module).DOUBLES.items()}


def drawn(shapes: tuple, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("function", CASES, ids=lambda function: f"{function.__module__[5:]}-{function.__name__}")
def test_a_loss_of_doubles_is_a_double_with_the_gradient_of_differences(function):
    shapes, call = CASES[function]
    inputs = drawn(shapes)
    assert call(*inputs).dtype == torch.float64
    assert gradcheck(call, inputs, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_every_loss_of_the_family_is_among_them():
    assert {function for module in MODULES for function in losses_of(module)} - CASES.keys() == set()


@pytest.mark.parametrize("function", [losses.bce, losses.mse, acgan.class_loss, tacgan.class_loss,
                                      tagan.conditional_log_score, stackgan_v2.colour_consistency])
def test_what_is_narrow_is_still_compared_in_fp32(function):
    shapes, call = CASES[function]
    assert call(*drawn(shapes, torch.bfloat16)).dtype == torch.float32


def test_cross_entropy_agrees_with_its_definition_to_ten_digits():
    logits = drawn(((5,),))[0].detach()
    expected = -sum(math.log(1 / (1 + math.exp(-value))) for value in logits.tolist()) / 5
    assert float(losses.bce(logits, 1)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("form", ["lrelu", "relu", "glu"])
def test_the_divergence_of_an_augmentation_in_doubles(form):
    augment = ConditioningAugmentation(3, 2, form).double()
    sentence, eps = (one.detach() for one in drawn(((4, 3), (4, 2))))
    found = augment.kl(augment(sentence, eps))
    mean, spread = augment(sentence, eps)[1:]
    log_sigma = spread if form == "lrelu" else spread / 2
    expected = [-s + (math.exp(2 * s) + m * m - 1) / 2
                for m, s in zip(mean.flatten().tolist(), log_sigma.flatten().tolist(), strict=True)]
    assert found.dtype == torch.float64 and found.item() == pytest.approx(sum(expected) / 8, abs=1e-12)
