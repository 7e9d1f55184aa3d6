"""StackGAN's stage I (arXiv 1612.03242, section 3.3): noise and a caption to a small picture.

The form of the paper and that of COCO, as ``gans/stackgan.py`` has them.
"""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.models.base import ModelConfig
from gans.generator import Noise
from gans.layers import bottleneck, conv3, sequence, up
from gans.outputs import Painted
from gans.sizes import ConditionDim, ImageSize, NoiseDim, SentenceDim
from gans.stackgan import (
    SMALLEST,
    StackGANGenerator,
    StackGANRun,
    StackGANTask,
    Variant,
    augmentation,
    augmentation_noise,
    doublings,
    power_of_two,
    start,
)
from gans.task import filled, load_encoder


class StackGAN1Config(ModelConfig):
    """Sizes of the first generator; the defaults are the paper's. COCO's: variant pytorch, width 192."""

    variant: Variant = "tf"
    image_size: ImageSize = Field(default=64, ge=1)
    width: int = Field(default=128, ge=2, description="channels at half of the picture's side")
    z_dim: NoiseDim = 100
    condition_dim: ConditionDim = 128
    sentence_dim: SentenceDim = 1024

    @model_validator(mode="after")
    def _sizes_fit(self) -> "StackGAN1Config":
        power_of_two(self.image_size, 16, "image_size")
        return self


class FromVector(nn.Module):
    """[B, D] -> [B, width, 4, 4]: a linear layer and one normalisation over all its outputs."""

    def __init__(self, inputs: int, width: int, bias: bool, activation: nn.Module | None):
        super().__init__()
        size = width * SMALLEST**2
        self.layers = sequence(nn.Linear(inputs, size, bias=bias), nn.BatchNorm1d(size), activation)

    def forward(self, vector: Tensor) -> Tensor:
        return self.layers(vector).unflatten(1, (-1, SMALLEST, SMALLEST))


def residual_trunk(inputs: int, width: int, image_size: int) -> nn.Sequential:
    """[B, inputs] -> [B, 3, S, S] with residual blocks at the two smallest sides (the paper's)."""
    count = doublings(image_size)
    top = width * 2**(count - 1)
    widths = [top // 2**level for level in range(count)]
    return nn.Sequential(
        FromVector(inputs, top, bias=True, activation=None), bottleneck(top, top // 4, nn.ReLU, nn.ReLU()),
        up(top, top // 2, activation=None), bottleneck(top // 2, top // 8, nn.ReLU, nn.ReLU()),
        *(up(wide, narrow) for wide, narrow in zip(widths[1:], widths[2:], strict=False)),
        nn.Upsample(scale_factor=2), conv3(width, 3), nn.Tanh())


def plain_trunk(inputs: int, width: int, image_size: int) -> nn.Sequential:
    """[B, inputs] -> [B, 3, S, S] without residual blocks (COCO's)."""
    count = doublings(image_size)
    widths = [width * 2**(count - 1) // 2**level for level in range(count + 1)]
    return nn.Sequential(
        FromVector(inputs, widths[0], bias=False, activation=nn.ReLU()),
        *(up(wide, narrow) for wide, narrow in zip(widths, widths[1:], strict=False)),
        conv3(widths[-1], 3), nn.Tanh())


class StackGAN1Generator(StackGANGenerator):
    """Stage I: noise and a caption's vector to a small picture."""

    model_type = "stackgan1"
    Config = StackGAN1Config
    config: StackGAN1Config

    def __init__(self, config: StackGAN1Config):
        super().__init__(config)
        self.augmentation = augmentation(config.variant, config.sentence_dim, config.condition_dim)
        trunk = residual_trunk if config.variant == "tf" else plain_trunk
        self.trunk = trunk(config.condition_dim + config.z_dim, config.width, config.image_size)
        start(self, config.variant)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.z_dim, "eps": self.config.condition_dim}

    def forward(self, noise: Noise, sentence: Tensor) -> Painted:
        eps = augmentation_noise(self.config.variant, noise["eps"])
        augmented = self.augmentation(sentence, eps)
        parts = [augmented.condition, noise["z"]]
        image = self.trunk(torch.cat(parts if self.config.variant == "tf" else parts[::-1], dim=1))
        return Painted([image], augmented)


class StackGAN1Run(StackGANRun):
    """A run of stage I. The paper's condition is the mean of 4 captions (``data.num_captions``); COCO's is one."""

    task: Literal["stackgan1"] = Field(default="stackgan1", description="the kind of run: stage I of a StackGAN")
    generator: StackGAN1Config = Field(default=StackGAN1Config(), description="sizes of the generator")


class StackGAN1Task(StackGANTask):
    """Stage I (section 3.3)."""

    def __init__(self, config: StackGAN1Run):
        encoder = load_encoder(config)
        sizes = filled(config.generator, sentence_dim=encoder.sentence_dim, image_size=config.data.image_size)
        self.set_up(config, StackGAN1Generator(sizes), encoder, stage=1)
