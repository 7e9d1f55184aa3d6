"""Frozen features of pictures for perceptual losses: VGG-16's, or those of a network that was trained here.

``load_features`` knows them by name:

    vgg16_relu2_2[:FILE|:random]     arXiv 1409.1556: behind a layer of VGG-16 (relu1_2,
                                     relu3_3, relu4_3 and relu5_3 likewise)
    RUN                              the first two halvings of the picture side of a damsm run, trunk small: no download

Without FILE the ImageNet weights of torchvision's hub are fetched; ``random`` needs neither network nor file.
"""

from typing import ClassVar

import torch
import torchvision
from torch import Tensor, nn

from dalle.errors import UserError
from gans.damsm import Damsm
from gans.trunks import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    RANDOM,
    PretrainedTrunk,
    SmallTrunk,
    coordinates,
    load_weights,
    resized,
)

VGG = "vgg16_"
# layer -> modules of torchvision's ``features`` up to its ReLU
VGG_LAYERS = {"relu1_2": 4, "relu2_2": 9, "relu3_3": 16, "relu4_3": 23, "relu5_3": 30}
VGG_WEIGHTS = "VGG16_Weights.IMAGENET1K_V1"


class VGGFeatures(PretrainedTrunk):
    """Pictures float [B, 3, H, W] in [-1, 1] of any size -> [B, C, h, w] behind ``layer``; nothing is resized.

    ``normalise``: by ImageNet's mean and deviation, as the weights were trained; else pixels go in as they are, as the
    released ControlGAN has it.
    """

    left_out: ClassVar[tuple[str, ...]] = ("classifier.",)

    def __init__(self, layer: str, normalise: bool):
        super().__init__()
        count = VGG_LAYERS[layer]
        self.normalise = normalise
        self.network = torchvision.models.vgg16(init_weights=False)
        whole = len(self.network.features)
        self.network.features = self.network.features[:count]
        self.network.classifier = nn.Identity()
        self.left_out = ("classifier.", *(f"features.{place}." for place in range(count, whole)))
        for part in self.network.modules():
            if isinstance(part, nn.ReLU):
                part.inplace = False
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network.features(((images + 1) / 2 - self.mean) / self.std if self.normalise else images)


class SmallFeatures(nn.Module):
    """Pictures float [B, 3, H, W] in [-1, 1] -> [B, 2 W, 16, 16]: what the trunk ``small:W`` of a damsm run sees first.

    Resized to the trunk's 64 pixels.
    """

    def __init__(self, trunk: SmallTrunk):
        super().__init__()
        self.stem = trunk.stem

    def forward(self, images: Tensor) -> Tensor:
        pixels = resized(images, SmallTrunk.size, antialias=True)
        return self.stem(torch.cat([pixels, coordinates(pixels)], dim=1))


def load_features(spec: str, normalise: bool = True) -> nn.Module:
    """The frozen features that ``spec`` names, in evaluation mode; ``UserError`` for others and for missing weights.

    ``normalise``: see :class:`VGGFeatures`; a network trained here takes pictures as it was trained with.
    """
    if not spec.startswith(VGG):
        trunk = Damsm.load(spec).image.trunk
        if not isinstance(trunk, SmallTrunk):
            raise UserError(f"{spec} sees pictures through another trunk than small, which lends no features: give "
                            f"{VGG}relu2_2 or the like")
        return SmallFeatures(trunk).requires_grad_(False).eval()
    layer, _, rest = spec.removeprefix(VGG).partition(":")
    if layer not in VGG_LAYERS:
        raise UserError(f"unknown features {spec!r}; known: {', '.join(VGG + name for name in VGG_LAYERS)}, each with "
                        f"nothing, :FILE or :{RANDOM} behind it, and the folder of a damsm run")
    features = VGGFeatures(layer, normalise)
    if rest != RANDOM:
        load_weights(features, VGG_WEIGHTS, rest, f"vgg16{':' * bool(rest)}{rest}")
    return features.requires_grad_(False).eval()
