"""How different two pictures look, without a pretrained network."""

import torch.nn.functional as F
from torch import Tensor


def edge_distance(images: Tensor, others: Tensor, levels: int = 3) -> Tensor:
    """Mean absolute difference of the bands of a Laplacian pyramid (Lap1 of arXiv 1707.05776), per picture: [B].

    A squared error hardly notices a thin line that has been smeared away; the finest bands hold little else. ``images``
    and ``others`` are float [B, C, H, W] with H and W multiples of ``2**levels``; every band counts equally.
    """
    difference = images - others      # the pyramid is linear: that of the difference is the difference of the two
    total = images.new_zeros(images.shape[0])
    for _ in range(levels):
        coarse = F.avg_pool2d(difference, 2)
        blurred = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        total = total + (difference - blurred).abs().mean(dim=(1, 2, 3))
        difference = coarse
    return total + difference.abs().mean(dim=(1, 2, 3))
