"""Every loss of the family follows the type that it is given: in doubles its gradient is that of differences."""

import inspect
import math
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from gans import (
    SYSTEMS,
    acgan,
    attngan,
    damsm,
    ds_sje,
    gan_int_cls,
    hdgan,
    losses,
    sisgan,
    stackgan,
    stackgan_v2,
    tacgan,
    tagan,
    vse,
)
from gans.layers import ConditioningAugmentation
from gans.text import Text

CLASSES, MASK = torch.tensor([0, 2, 1]), torch.ones(3, 4, dtype=torch.bool)
OF_THE_NAME = ("loss", "losses", "hinge", "hinges", "penalty", "consistency", "error", "score", "bce", "mse")


def verdict(source: Tensor, classes: Tensor) -> acgan.Verdict:
    return acgan.Verdict(source, classes)


def scores(kind: type, *logits: Tensor) -> list:
    """Of one picture size."""
    return [kind(*logits)]


VERDICT, PATCHES = ((3,), (3, 3)), ((3,), (3, 1, 2, 2))       # shapes of what two kinds of discriminators give

# function -> (its shapes, a call of it on tensors of these shapes)
CASES: dict[Callable, tuple[tuple, Callable[..., Tensor]]] = {
    losses.bce: (((3,),), lambda a: losses.bce(a, 1)),
    losses.mse: (((3,),), lambda a: losses.mse(a, 1)),
    losses.kl_log_sigma: (((3, 2),) * 2, losses.kl_log_sigma),
    losses.kl_logvar: (((3, 2),) * 2, losses.kl_logvar),
    losses.r1_penalty: (((3, 3, 2, 2),), lambda x: losses.r1_penalty(x.pow(3).flatten(2).mean(dim=2), x)),
    gan_int_cls.discriminator_loss: (((3,),) * 3, lambda a, b, c: gan_int_cls.discriminator_loss(a, b, c, 0.5)),
    gan_int_cls.generator_loss: (((3,), (2,)), lambda a, b: gan_int_cls.generator_loss(a, b, 0.7)),
    acgan.discriminator_loss: (VERDICT * 2, lambda a, b, c, d: acgan.discriminator_loss(
        verdict(a, b), verdict(c, d), CLASSES, CLASSES.flip(0))),
    acgan.generator_loss: (VERDICT, lambda a, b: acgan.generator_loss(verdict(a, b), CLASSES)),
    acgan.class_loss: (VERDICT[1:], lambda b: acgan.class_loss(verdict(b, b), CLASSES)),
    tacgan.discriminator_loss: (VERDICT * 3, lambda a, b, c, d, e, f: tacgan.discriminator_loss(
        verdict(a, b), verdict(c, d), verdict(e, f), CLASSES, CLASSES.flip(0))),
    tacgan.generator_loss: (VERDICT, lambda a, b: tacgan.generator_loss(verdict(a, b), CLASSES)),
    tacgan.class_loss: (VERDICT[1:], lambda b: tacgan.class_loss(verdict(b, b), CLASSES)),
    stackgan.discriminator_loss: (((3,),) * 3, stackgan.discriminator_loss),
    stackgan.two_headed_discriminator_loss: (((3,),) * 5, lambda a, b, c, d, e: stackgan.two_headed_discriminator_loss(
        stackgan.Scores(a, b, c), stackgan.Scores(d, None, e))),
    stackgan_v2.conditional_loss: (((3,),) * 6, lambda a, b, c, d, e, f: stackgan_v2.conditional_loss(
        *(stackgan_v2.Scores(*pair) for pair in ((a, b), (c, d), (e, f))))),
    stackgan_v2.unconditional_loss: (((3,),) * 2, lambda a, b: stackgan_v2.unconditional_loss(
        stackgan_v2.Scores(None, a), stackgan_v2.Scores(None, b))),
    stackgan_v2.adversarial_loss: (((3,),) * 2, lambda a, b: stackgan_v2.adversarial_loss(
        scores(stackgan_v2.Scores, a, b))),
    stackgan_v2.colour_consistency: (((2, 3, 4, 4),), lambda large: stackgan_v2.colour_consistency(
        [torch.linspace(-1, 1, 24, dtype=large.dtype).view(2, 3, 2, 2), large])),
    sisgan.discriminator_loss: (((3,),) * 3, sisgan.discriminator_loss),
    sisgan.generator_loss: (((3,), ()), sisgan.generator_loss),
    tagan.conditional_log_score: (((3, 4, 2), (3, 4, 2), (3, 4)), tagan.conditional_log_score),
    tagan.conditional_score: (((3, 4, 2), (3, 4, 2), (3, 4)), tagan.conditional_score),
    tagan.discriminator_loss: (((3,),) * 4, tagan.discriminator_loss),
    tagan.generator_loss: (((3,), (3,), (), (), ()), tagan.generator_loss),
    tagan.reconstruction_error: (((2, 3, 2, 2),) * 2, tagan.reconstruction_error),
    hdgan.discriminator_loss: (PATCHES * 3, lambda a, b, c, d, e, f: hdgan.discriminator_loss(
        *(scores(hdgan.Scores, *pair) for pair in ((a, b), (c, d), (e, f))))),
    hdgan.adversarial_loss: (PATCHES, lambda a, b: hdgan.adversarial_loss(scores(hdgan.Scores, a, b))),
    hdgan.generator_loss: ((*PATCHES, ()), lambda a, b, kl: hdgan.generator_loss(scores(hdgan.Scores, a, b), kl)),
    hdgan.extension_loss: ((*PATCHES, (2, 3, 4, 4)), lambda a, b, large: hdgan.extension_loss(
        scores(hdgan.Scores, a, b), [torch.zeros(2, 3, 2, 2, dtype=large.dtype), large])),
    attngan.discriminator_loss: (((3,),) * 5, lambda a, b, c, d, e: attngan.discriminator_loss(
        attngan.Scores(a, b, c), attngan.Scores(d, e, None))),
    attngan.adversarial_loss: (((3,),) * 2, lambda a, b: attngan.adversarial_loss(scores(attngan.Scores, a, b, None))),
    attngan.generator_loss: (((3,), (3,), (), ()), lambda a, b, matching, kl: attngan.generator_loss(
        scores(attngan.Scores, a, b, None), matching, kl)),
    damsm.pair_losses: (((3, 3),), lambda a: sum(damsm.pair_losses(a))),
    damsm.words_loss: (((3, 2, 2, 2), (3, 2, 4)), lambda r, w: sum(damsm.words_loss(r, w, MASK))),
    damsm.sent_loss: (((3, 2),) * 2, lambda a, b: sum(damsm.sent_loss(a, b))),
    damsm.damsm_losses: (((3, 2, 2, 2), (3, 2), (3, 2), (3, 2, 4)), lambda local, pooled, sentence, words: sum(
        damsm.damsm_losses(local, pooled, Text(sentence, words, MASK)))),
    ds_sje.structured_hinge: (((3, 3),), ds_sje.structured_hinge),
    vse.hinges: (((3, 3),), lambda a: sum(map(torch.sum, vse.hinges(a, 0.2)))),
    vse.sum_of_hinges: (((3, 3),), vse.sum_of_hinges),
    vse.max_of_hinges: (((3, 3),), vse.max_of_hinges),
}


def drawn(shapes: tuple, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=source, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("function", CASES, ids=lambda function: f"{function.__module__[5:]}-{function.__name__}")
def test_a_loss_of_doubles_is_a_double_with_the_gradient_of_differences(function):
    shapes, call = CASES[function]
    inputs = drawn(shapes)
    assert call(*inputs).dtype == torch.float64
    assert gradcheck(call, inputs, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_every_loss_of_a_system_is_among_them():
    modules = {import_module(system.module) for system in SYSTEMS.values()} | {losses}
    found = {function for module in modules for name, function in inspect.getmembers(module, inspect.isfunction)
             if name.split("_")[-1] in OF_THE_NAME and function.__module__ == module.__name__}
    assert found - CASES.keys() == set()


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
