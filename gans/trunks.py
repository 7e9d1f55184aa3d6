"""Image trunks: networks that turn a picture into features by region and one vector, before anything is learnt on top.

``build_trunk`` knows them by name:

    small, small:WIDTH           a ConvNeXt for 64-pixel pictures, trained together with what stands on it
    inception_v3[:FILE|:random]  arXiv 1512.00567, frozen: Mixed_6e [768, 17, 17] and the pool over Mixed_7c [2048]
    googlenet[:FILE|:random]     arXiv 1409.4842, frozen: inception4e [832, 14, 14] and the last pool [1024]
    vgg16[:FILE|:random]         arXiv 1409.1556, frozen: conv5_3 [512, 14, 14] and fc7 [4096]
    resnet152[:FILE|:random]     arXiv 1512.03385, frozen: conv5_x [2048, 7, 7] and the pool over it [2048]

Without FILE the ImageNet weights of torchvision's hub are fetched; ``random`` needs neither network nor file.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.models.foreign import read_foreign_state
from dalle.models.precision import at_least_single

SMALL, RANDOM = "small", "random"
SMALL_WIDTH = 32
HUB = "https://download.pytorch.org/models/"
# what ImageNet's classifiers of VGG expect, for pixels in [0, 1]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Trunk(nn.Module):
    """float [B, 3, H, W] in [-1, 1], of any size -> (regions [B, local_dim, h, w], one vector [B, pooled_dim])."""

    local_dim: int
    pooled_dim: int
    trained: bool = False     # whether its weights move with what stands on it


class SmallTrunk(Trunk):
    """ConvNeXt (arXiv 2201.03545) on 64 x 64 pictures: 8 x 8 regions, and a 4 x 4 grid laid out as one vector.

    Two coordinates stand beside the colours, and the grid is laid out instead of averaged, because "above" and "left
    of" are told from where things are. No batch norm: what one picture gives does not depend on the others. The first
    convolution overlaps itself, for the sake of a generator that learns through it.
    """

    size: ClassVar[int] = 64
    trained = True

    def __init__(self, width: int = SMALL_WIDTH):
        super().__init__()
        if width < 1:
            raise UserError(f"trunk {SMALL}:{width}: the width is a whole number of 1 or more")
        self.stem = nn.Sequential(nn.Conv2d(5, width, 4, stride=2, padding=1), halving(width, 2 * width),
                                  ConvNeXtBlock(2 * width))                                # [B, 2W, 16, 16]
        self.regions = nn.Sequential(halving(2 * width, 4 * width), ConvNeXtBlock(4 * width))      # [B, 4W, 8, 8]
        self.grid = nn.Sequential(halving(4 * width, 8 * width), ConvNeXtBlock(8 * width))         # [B, 8W, 4, 4]
        self.local_norm, self.pooled_norm = nn.GroupNorm(1, 4 * width), nn.GroupNorm(1, 8 * width)
        self.local_dim, self.pooled_dim = 4 * width, 16 * 8 * width

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        pixels = resized(images, self.size, antialias=True)
        regions = self.regions(self.stem(torch.cat([pixels, coordinates(pixels)], dim=1)))
        return self.local_norm(regions), self.pooled_norm(self.grid(regions)).flatten(1)


class ConvNeXtBlock(nn.Module):
    """x + two pointwise layers over a depthwise convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.GroupNorm(1, channels),
            nn.Conv2d(channels, 4 * channels, 1), nn.GELU(), nn.Conv2d(4 * channels, channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.body(features)


def halving(inputs: int, outputs: int) -> nn.Sequential:
    """[B, inputs, H, W] -> [B, outputs, H/2, W/2]."""
    return nn.Sequential(nn.GroupNorm(1, inputs), nn.Conv2d(inputs, outputs, 2, stride=2))


class PretrainedTrunk(Trunk):
    """A network of torchvision without its classifiers; pictures are resized to ``size``."""

    size: ClassVar[int]
    left_out: ClassVar[tuple[str, ...]]     # how the names of the classifiers' weights begin
    network: nn.Module


class GoogleTrunk(PretrainedTrunk):
    """One whose weights are Google's and want [-1, 1] as it is: the regions are behind ``before``, the vector is the
    mean behind ``after``."""

    before: ClassVar[tuple[str, ...]]
    after: ClassVar[tuple[str, ...]]
    resizing: ClassVar[Mapping[str, bool]]

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.network.fc = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        local = through(self.network, self.before, resized(images, self.size, **self.resizing))
        return local, through(self.network, self.after, local).mean(dim=(2, 3))


class InceptionTrunk(GoogleTrunk):
    """Inception-v3."""

    local_dim, pooled_dim = 768, 2048
    size = 299
    left_out = ("fc.", "AuxLogits.")
    before = (
        "Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "maxpool1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "maxpool2",
        "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e")
    after = ("Mixed_7a", "Mixed_7b", "Mixed_7c")
    resizing = {"align_corners": True}      # what PyTorch did when the models that stand on this trunk were made

    def __init__(self):
        # torchvision's own initialisation takes half a minute, and is for training from scratch
        super().__init__(torchvision.models.inception_v3(aux_logits=False, init_weights=False, transform_input=False))


class GoogLeNetTrunk(GoogleTrunk):
    """GoogLeNet."""

    local_dim, pooled_dim = 832, 1024
    size = 224
    left_out = ("fc.", "aux1.", "aux2.")
    before = (
        "conv1", "maxpool1", "conv2", "conv3", "maxpool2", "inception3a", "inception3b", "maxpool3",
        "inception4a", "inception4b", "inception4c", "inception4d", "inception4e")
    after = ("maxpool4", "inception5a", "inception5b")
    resizing = {"antialias": True}

    def __init__(self):
        super().__init__(torchvision.models.googlenet(aux_logits=False, init_weights=False, transform_input=False))


class NormalisedTrunk(PretrainedTrunk):
    """One whose weights want 224 pixels, by ImageNet's mean and deviation."""

    size = 224

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def pixels(self, images: Tensor) -> Tensor:
        return ((resized(images, self.size, antialias=True) + 1) / 2 - self.mean) / self.std


class VGGTrunk(NormalisedTrunk):
    """VGG-16 up to fc7, its ReLU and its dropout, which acts in training mode."""

    local_dim, pooled_dim = 512, 4096
    left_out = ("classifier.6.",)

    def __init__(self):
        super().__init__(torchvision.models.vgg16(init_weights=False))
        self.network.classifier = self.network.classifier[:-1]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        local = self.network.features[:-1](self.pixels(images))                            # before the last max-pool
        features = self.network.avgpool(self.network.features[-1](local))
        return local, self.network.classifier(features.flatten(1))


class ResNetTrunk(NormalisedTrunk):
    """ResNet-152."""

    local_dim, pooled_dim = 2048, 2048
    left_out = ("fc.",)
    layers = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")

    def __init__(self):
        super().__init__(torchvision.models.resnet152())
        self.network.fc = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        local = through(self.network, self.layers, self.pixels(images))
        return local, local.mean(dim=(2, 3))


# name -> (class, torchvision's name of the ImageNet weights)
PRETRAINED: dict[str, tuple[type[PretrainedTrunk], str]] = {
    "inception_v3": (InceptionTrunk, "Inception_V3_Weights.IMAGENET1K_V1"),
    "googlenet": (GoogLeNetTrunk, "GoogLeNet_Weights.IMAGENET1K_V1"),
    "vgg16": (VGGTrunk, "VGG16_Weights.IMAGENET1K_V1"),
    "resnet152": (ResNetTrunk, "ResNet152_Weights.IMAGENET1K_V1"),
}


def build_trunk(spec: str, load: bool = True) -> Trunk:
    """The trunk that ``spec`` names; a pretrained one has its weights (unless not to ``load``) and is frozen.

    Raises ``UserError`` in one line for an unknown name and for weights that cannot be had.
    """
    name, _, rest = spec.partition(":")
    if name == SMALL:
        if rest and not rest.isdecimal():
            raise UserError(f"trunk {spec!r}: write {SMALL} or {SMALL}:WIDTH, such as {SMALL}:{SMALL_WIDTH}")
        return SmallTrunk(int(rest or SMALL_WIDTH))
    if name not in PRETRAINED:
        raise UserError(f"unknown trunk {spec!r}; known: {SMALL}, {SMALL}:WIDTH, and each of "
                        f"{', '.join(PRETRAINED)} with nothing, :FILE or :{RANDOM} behind it")
    kind, weights = PRETRAINED[name]
    trunk = kind()
    if load and rest != RANDOM:
        load_weights(trunk, weights, rest, spec)
    return trunk.requires_grad_(False)


def load_weights(trunk: PretrainedTrunk, weights: str, file: str, spec: str) -> None:
    """Fill ``trunk`` from ``file`` or, without one, from torchvision's hub; its classifiers' weights are left out."""
    try:
        state = read_foreign_state(Path(file)) if file else hub_state(weights)
        kept = {name: tensor for name, tensor in state.items() if not name.startswith(trunk.left_out)}
        trunk.network.load_state_dict(kept)
    except Exception as error:      # the hub's client and a file of other weights fail in many ways
        name = spec.partition(":")[0]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the weights of the trunk {spec} could not be had ({reason}); without a network give "
                        f"{name}:FILE, torchvision's {weights} from {HUB}, or {name}:{RANDOM} for a trial") from error


def hub_state(weights: str) -> Mapping[str, Tensor]:
    """torchvision's weights by their full name, from its cache or the network."""
    return torchvision.models.get_weight(weights).get_state_dict(progress=False, check_hash=True)


def resized(images: Tensor, size: int, antialias: bool = False, align_corners: bool = False) -> Tensor:
    """Bilinear to ``size`` x ``size``; what has the size already is left as it is.

    What is narrow is resized in fp32: on a CPU there is no antialiasing in bf16.
    """
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(at_least_single(images), (size, size), mode="bilinear", align_corners=align_corners,
                         antialias=antialias)


def coordinates(images: Tensor) -> Tensor:
    """[B, 2, H, W]: how far right and how far down each pixel is, from -1 to 1."""
    batch, _, height, width = images.shape
    options = {"device": images.device, "dtype": images.dtype}
    down, right = torch.linspace(-1, 1, height, **options), torch.linspace(-1, 1, width, **options)
    return torch.stack(torch.meshgrid(right, down, indexing="xy")).expand(batch, 2, height, width)


def through(network: nn.Module, names: tuple[str, ...], features: Tensor) -> Tensor:
    for name in names:
        features = network.get_submodule(name)(features)
    return features
