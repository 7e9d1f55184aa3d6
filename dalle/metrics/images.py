"""Distances between pictures."""

import torch
from torch import Tensor

SSIM_PADDING = 5      # half of the window of 11 pixels


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in decibels, float [B], for float [B, C, H, W] in [0, 1].

    Infinite for equal pictures. The mean over a set is the mean of these, not the PSNR of the mean error.
    """
    check_shapes("psnr", images, references)
    error = (images.float() - references.float()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each picture (Wang et al. 2004), float [B], for float [B, C, H, W] in [0, 1].

    torchmetrics' defaults: Gaussian window of 11 pixels with sigma 1.5, colour channels apart, reflected at the border.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    check_shapes("ssim", images, references)
    if min(images.shape[-2:]) <= SSIM_PADDING:
        raise ValueError(f"ssim needs pictures of more than {SSIM_PADDING} pixels a side, not {list(images.shape)}")
    # in fp32 the variance of a flat region is rounding, and comparable to the stabilising constant
    similarity = structural_similarity_index_measure(images.double(), references.double(), data_range=1.0,
                                                     reduction="none")
    return similarity.float()


def check_shapes(metric: str, images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(f"{metric} compares pictures of one shape, not {list(images.shape)} and "
                         f"{list(references.shape)}")
