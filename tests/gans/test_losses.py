"""The shared losses against closed forms."""

import math

import pytest
import torch

from gans import losses
from gans.losses import bce, kl_log_sigma, kl_logvar, mse, r1_penalty

DOUBLES = {
    losses.bce: (((3,),), lambda a: losses.bce(a, 1)),
    losses.mse: (((3,),), lambda a: losses.mse(a, 1)),
    losses.kl_log_sigma: (((3, 2),) * 2, losses.kl_log_sigma),
    losses.kl_logvar: (((3, 2),) * 2, losses.kl_logvar),
    losses.perceptual_loss: (((2, 3, 2, 2),) * 2, losses.perceptual_loss),
    losses.r1_penalty: (((3, 3, 2, 2),), lambda x: losses.r1_penalty(x.pow(3).flatten(2).mean(dim=2), x)),
}


def test_undecided_logits_cost_ln_2():
    zeros = torch.zeros(5)
    assert float(bce(zeros, 1)) == pytest.approx(math.log(2))
    assert float(bce(zeros, 0)) == pytest.approx(math.log(2))


def test_cross_entropy_of_probabilities():
    logits = torch.tensor([2.0, -1.0])
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]
    assert float(bce(logits, 1)) == pytest.approx(-(math.log(p[0]) + math.log(p[1])) / 2)
    assert float(bce(logits, 0)) == pytest.approx(-(math.log(1 - p[0]) + math.log(1 - p[1])) / 2)


def test_narrow_logits_are_compared_in_fp32():
    assert bce(torch.zeros(3, dtype=torch.bfloat16), 1).dtype == torch.float32
    assert mse(torch.zeros(3, dtype=torch.bfloat16), 1).dtype == torch.float32


def test_least_squares():
    assert float(mse(torch.tensor([1.0, 3.0]), 1)) == 2


def test_divergence_is_zero_at_the_standard_normal_and_a_half_one_away():
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    for divergence in (kl_log_sigma, kl_logvar):
        assert float(divergence(zeros, zeros)) == 0
        assert float(divergence(ones, zeros)) == pytest.approx(0.5)
    sigma = 1.7
    expected = 0.5 * (sigma**2 - 1) - math.log(sigma)
    assert float(kl_log_sigma(zeros, torch.full((2, 3), math.log(sigma)))) == pytest.approx(expected, rel=1e-5)
    assert float(kl_logvar(zeros, torch.full((2, 3), 2 * math.log(sigma)))) == pytest.approx(expected, rel=1e-5)


def test_r1_of_a_linear_score_is_the_square_of_its_weights():
    weights = torch.randn(3, 4, 4)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    penalty = r1_penalty((images * weights).sum(dim=(1, 2, 3)), images)
    assert float(penalty) == pytest.approx(float(weights.square().sum()), rel=1e-5)


@pytest.mark.parametrize("patches", [(), (1, 1, 1), (1, 5, 5)])
def test_r1_of_patches_is_that_of_their_mean(patches):
    weights = torch.randn(3, 4, 4)
    images = torch.randn(5, 3, 4, 4, requires_grad=True)
    score = (images * weights).sum(dim=(1, 2, 3))
    same = score.view(-1, *(1 for _ in patches)).expand(-1, *patches)
    assert float(r1_penalty(same, images)) == pytest.approx(float(weights.square().sum()), rel=1e-5)


def test_r1_of_a_quadratic_score_reaches_its_weight():
    scale = torch.tensor(0.5, requires_grad=True)
    images = torch.randn(2, 3, 2, 2, requires_grad=True)
    r1_penalty(scale * images.square().sum(dim=(1, 2, 3)), images).backward()
    # E ||2 s x||^2 = 4 s^2 E ||x||^2, whose derivative is 8 s E ||x||^2
    assert float(scale.grad) == pytest.approx(4 * float(images.detach().square().flatten(1).sum(1).mean()), rel=1e-5)


def test_features_are_compared_by_the_mean_of_their_squares():
    features = torch.randn(2, 3, 4, 4)
    assert float(losses.perceptual_loss(features, features)) == 0
    assert float(losses.perceptual_loss(features, features + 2)) == pytest.approx(4, rel=1e-5)
