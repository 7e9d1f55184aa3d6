"""The losses that two or more systems share, as functions of logits and pictures.

A discriminator gives logits. A system's own sum of these terms, with the paper's weights, stands in its file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.models.precision import at_least_single


def bce(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against one ``target`` for all, mean."""
    logits = at_least_single(logits)
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def mse(logits: Tensor, target: float) -> Tensor:
    """The squared distance to one ``target`` for all, mean: the least-squares GAN (arXiv 1611.04076)."""
    return (at_least_single(logits) - target).square().mean()


def kl_log_sigma(mean: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)), mean over batch and dimensions: -ls + (exp(2 ls) + mu^2 - 1) / 2."""
    return (-log_sigma + 0.5 * ((2 * log_sigma).exp() + mean.square() - 1)).mean()


def kl_logvar(mean: Tensor, logvar: Tensor) -> Tensor:
    """The same, told by log sigma^2: -(1 + lv - mu^2 - exp(lv)) / 2."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).mean()


def r1_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """E ||d score / d image||^2 of one head on real pictures (arXiv 1801.04406, eq. 9, without gamma / 2).

    ``scores`` [B] or, of patches, [B, ...], whose mean is then the picture's score: the sum over N patches would be N
    squared times as strong. ``images`` [B, 3, H, W] must have entered them with ``requires_grad``.
    """
    own = scores.flatten(1).mean(dim=1) if scores.ndim > 1 else scores
    (gradient,) = torch.autograd.grad(own.sum(), images, create_graph=True)
    return at_least_single(gradient).square().flatten(1).sum(dim=1).mean()


def perceptual_loss(features: Tensor, others: Tensor) -> Tensor:
    """||phi - phi'||^2 / (C H W), mean over the batch (arXiv 1603.08155, eq. 2): features [B, C, H, W] of two pictures
    each."""
    return (at_least_single(features) - at_least_single(others)).square().mean()
