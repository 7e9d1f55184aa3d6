"""A second codec, as small as one can be: a code is the colour of a patch, on a palette of ``levels`` a channel."""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from dalle.models.codec import Codec, CodecConfig


class ToyConfig(CodecConfig):
    patch: int = Field(4, ge=1, description="side of a patch, pixels")
    levels: int = Field(3, ge=2, description="brightnesses of a channel")


class ToyCodec(Codec):
    model_type = "toy"
    Config = ToyConfig
    config: ToyConfig

    def __init__(self, config: ToyConfig):
        super().__init__(config)
        shades = torch.linspace(0, 1, config.levels)
        self.palette = torch.nn.Parameter(torch.cartesian_prod(shades, shades, shades))      # [K, 3]

    @property
    def num_codes(self) -> int:
        return self.config.levels**3

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.patch
        return side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        means = F.avg_pool2d(images, self.config.patch).flatten(2).transpose(1, 2)           # [B, N, 3]
        return torch.cdist(means, self.palette.expand(len(means), -1, -1)).argmin(dim=2)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        colours = self.palette[codes].transpose(1, 2).unflatten(2, self.grid)                # [B, 3, h, w]
        return F.interpolate(colours, scale_factor=self.config.patch)
