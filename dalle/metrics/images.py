"""Distances between pictures."""

import torch
from torch import Tensor

SSIM_PADDING = 5      # half of the window of 11 pixels
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)      # of the scales, the finest first


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


def ms_ssim_scales(side: int) -> int:
    """How many of the five scales a picture of this ``side`` has: five from 176 pixels, three at 64.

    The window of 11 pixels fits into the smallest scale, and torchmetrics does not refuse it.
    """
    fitting = [count for count in range(1, len(MS_SSIM_WEIGHTS) + 1)
               if min(side >> (count - 1), side // max(1, count - 1) ** 2) > 2 * SSIM_PADDING]
    if not fitting:
        raise ValueError(f"ms-ssim needs pictures of more than {2 * SSIM_PADDING} pixels a side, not {side}")
    return fitting[-1]


def ms_ssim(images: Tensor, references: Tensor) -> Tensor:
    """Multi-scale SSIM of each pair (Wang et al. 2003), float [B] in [0, 1], for float [B, C, H, W] in [0, 1].

    torchmetrics' with its defaults. Small pictures lack the coarsest of the five scales (:func:`ms_ssim_scales`); the
    weights of those that are left are scaled to the same sum.
    """
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

    check_shapes("ms-ssim", images, references)
    weights = MS_SSIM_WEIGHTS[:ms_ssim_scales(min(images.shape[-2:]))]
    scale = sum(MS_SSIM_WEIGHTS) / sum(weights)
    return multiscale_structural_similarity_index_measure(      # fp64 moves it by less than 0.001, in 20 times the time
        images.float(), references.float(), data_range=1.0, betas=tuple(scale * weight for weight in weights),
        reduction="none")


def check_shapes(metric: str, images: Tensor, references: Tensor) -> None:
    if images.shape != references.shape:
        raise ValueError(f"{metric} compares pictures of one shape, not {list(images.shape)} and "
                         f"{list(references.shape)}")
