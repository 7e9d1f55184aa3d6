"""Distances between pictures."""

import torch
from torch import Tensor


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in decibels, float [B], for float [B, C, H, W] in [0, 1].

    Infinite for equal pictures. The mean over a set is the mean of these, not the PSNR of the mean error.
    """
    if images.shape != references.shape:
        raise ValueError(f"psnr compares pictures of one shape, not {list(images.shape)} and {list(references.shape)}")
    error = (images.float() - references.float()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)
