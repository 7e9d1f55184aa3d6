"""What AttnGAN's line shares: its losses by hand. Its networks are tested with AttnGAN's."""

import math

import pytest
import torch
from torch import Tensor

import gans.refining as refining
from gans.outputs import Scores
from gans.refining import adversarial_loss, discriminator_loss, generator_loss

DOUBLES = {
    refining.discriminator_loss: (((3,),) * 5, lambda a, b, c, d, e: refining.discriminator_loss(
        Scores(b, c, a), Scores(e, alone=d))),
    refining.adversarial_loss: (((3,),) * 2, lambda a, b: refining.adversarial_loss([Scores(b, alone=a)])),
    refining.generator_loss: (((3,), (3,), (), ()), lambda a, b, matching, kl: refining.generator_loss(
        [Scores(b, alone=a)], (5.0, matching), (1.0, kl))),
}


def logits(probability: float, count: int = 4) -> Tensor:
    return torch.full((count,), math.log(probability / (1 - probability)), dtype=torch.float64)


def test_losses_of_discriminators_that_cannot_tell():
    even = Scores(logits(0.5), logits(0.5, 3), logits(0.5))
    assert discriminator_loss(even, even).item() == pytest.approx(2 * math.log(2))
    assert adversarial_loss([even] * 3).item() == pytest.approx(6 * math.log(2))


def test_the_discriminators_loss_by_hand():
    real = Scores(logits(0.8), logits(0.3, 3), logits(0.9))
    fake = Scores(logits(0.4), alone=logits(0.2))
    expected = -(math.log(0.9) + math.log(0.8)) / 2 - (math.log(0.8) + math.log(0.6) + math.log(0.7)) / 3
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    only = [Scores(scores.matched, scores.mismatched) for scores in (real, fake)]
    expected = -math.log(0.8) - (math.log(0.6) + math.log(0.7)) / 2
    assert discriminator_loss(*only).item() == pytest.approx(expected)


def test_the_generators_loss_by_hand():
    fakes = [Scores(logits(0.8), alone=logits(0.9)), Scores(logits(0.5))]
    adversarial = -math.log(0.9) - math.log(0.8) - math.log(0.5)
    total = generator_loss(fakes, (5.0, torch.tensor(0.3)), (1.0, torch.tensor(0.07)))
    assert total.item() == pytest.approx(adversarial + 5 * 0.3 + 0.07)
    total = generator_loss(fakes, (50.0, torch.tensor(0.3)), (2.0, torch.tensor(0.07)))
    assert total.item() == pytest.approx(adversarial + 50 * 0.3 + 0.14)
