"""The losses that two or more systems share, as functions of logits and pictures.

A discriminator gives logits. A system's own sum of these terms, with the paper's weights, stands in its file.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def bce(logits: Tensor, target: float) -> Tensor:
    """Binary cross-entropy of sigmoid(logits) against one ``target`` for all, mean."""
    logits = logits.float()
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def mse(logits: Tensor, target: float) -> Tensor:
    """The squared distance to one ``target`` for all, mean: the least-squares GAN (arXiv 1611.04076)."""
    return (logits.float() - target).square().mean()


def kl_log_sigma(mean: Tensor, log_sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, 1)), mean over batch and dimensions: -ls + (exp(2 ls) + mu^2 - 1) / 2."""
    return (-log_sigma + 0.5 * ((2 * log_sigma).exp() + mean.square() - 1)).mean()


def kl_logvar(mean: Tensor, logvar: Tensor) -> Tensor:
    """The same, told by log sigma^2: -(1 + lv - mu^2 - exp(lv)) / 2."""
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).mean()


def r1_penalty(scores: Tensor, images: Tensor) -> Tensor:
    """E ||d scores / d images||^2 on real pictures (arXiv 1801.04406, eq. 9, without gamma / 2).

    ``images`` [B, 3, H, W] must have entered ``scores`` with ``requires_grad``.
    """
    (gradient,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
    return gradient.float().square().flatten(1).sum(dim=1).mean()
