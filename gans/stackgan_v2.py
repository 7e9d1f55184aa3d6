"""StackGAN++ (arXiv 1710.10916): one generator that paints a picture at several sizes, and a discriminator for each.

With captions (section 4.1) every discriminator judges the picture alone and the picture with its caption, *jointly*;
without them (``generator.conditional: false``, section 4.2) only the picture alone, and the colours of neighbouring
sizes are tied together (section 4.3). Weights and the wrong pair, which eq. 11 leaves out, follow the authors' code.

The wrong picture is of another class, where the code draws again only once. A model without captions is asked for
pictures as any other, but a prompt is no more than a name there: the seed alone says what is painted.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single
from dalle.training.task import Batch, Loss, Networks
from gans.generator import Noise, Painter
from gans.layers import (
    ConditioningAugmentation,
    conv3,
    down,
    join,
    orthogonal_init,
    residual_glu,
    same,
    up_glu,
)
from gans.looking import seen
from gans.losses import bce
from gans.outputs import Painted, Scores
from gans.sizes import ConditionDim, NoiseDim, SentenceDim
from gans.task import GanBatch, GANOptimizer, GANRun, GANTask, filled, load_encoder, pyramid
from gans.text import Text

SMALLEST = 4             # the side at which the generator begins and the discriminators end


# -- the generator (section 4)

class StackGANv2Config(ModelConfig):
    """Sizes of the generator; the defaults are the paper's: 64, 128 and 256 pixels, with captions."""

    image_size: int = Field(default=256, ge=1, description="side of the last level's picture in pixels; each level has "
                            "half the side of the next")
    levels: int = Field(default=3, ge=1, description="pictures of different sizes, a discriminator each")
    width: int = Field(default=64, ge=2, description="channels at the first level; half of them at the next")
    residuals: int = Field(default=2, ge=0, description="residual blocks at each level but the first")
    z_dim: NoiseDim = 100
    conditional: bool = Field(default=True, description="paint after captions; false: after noise alone")
    condition_dim: ConditionDim = 128
    sentence_dim: SentenceDim = 1024

    @model_validator(mode="after")
    def _sizes_fit(self) -> "StackGANv2Config":
        if self.image_size & (self.image_size - 1) or self.sizes[0] < 2 * SMALLEST:
            raise ValueError(f"image_size is a power of two, and {self.levels} levels need {SMALLEST * 2**self.levels} "
                             f"or more, not {self.image_size}")
        if self.width % 2**(self.levels - 1):
            raise ValueError(f"width is halved at each of {self.levels} levels: {self.width} does not allow it")
        return self

    @property
    def sizes(self) -> list[int]:
        """The side of each level's picture, the smallest first."""
        return [self.image_size >> level for level in reversed(range(self.levels))]


class FirstLevel(nn.Module):
    """F0: a vector [B, D] to features [B, width, s, s]."""

    def __init__(self, inputs: int, width: int, size: int):
        super().__init__()
        count = int(math.log2(size // SMALLEST))
        widths = [width * 2**level for level in reversed(range(count + 1))]
        first = 2 * widths[0] * SMALLEST**2
        self.linear = nn.Sequential(nn.Linear(inputs, first, bias=False), nn.BatchNorm1d(first), nn.GLU(dim=1))
        self.ups = nn.Sequential(*(up_glu(wide, narrow) for wide, narrow in pairwise(widths)))

    def forward(self, vector: Tensor) -> Tensor:
        return self.ups(self.linear(vector).unflatten(1, (-1, SMALLEST, SMALLEST)))


class NextLevel(nn.Module):
    """F1, F2: features [B, width, s, s] and a vector to features [B, width / 2, 2s, 2s]."""

    def __init__(self, width: int, vector_dim: int, residuals: int):
        super().__init__()
        self.joint = nn.Sequential(conv3(width + vector_dim, 2 * width), nn.BatchNorm2d(2 * width), nn.GLU(dim=1))
        self.residuals = nn.Sequential(*(residual_glu(width) for _ in range(residuals)))
        self.up = up_glu(width, width // 2)

    def forward(self, features: Tensor, vector: Tensor) -> Tensor:
        return self.up(self.residuals(self.joint(join(features, vector))))


class StackGANv2Generator(Painter):
    """A tree: each level's features make that level's picture, and the next level's features."""

    model_type = "stackgan_v2"
    Config = StackGANv2Config
    config: StackGANv2Config

    def __init__(self, config: StackGANv2Config):
        super().__init__(config)
        widths = [config.width >> level for level in range(config.levels)]
        told = config.condition_dim if config.conditional else config.z_dim        # what later levels are told again
        self.augmentation = ConditioningAugmentation(config.sentence_dim, config.condition_dim, "glu") \
            if config.conditional else None
        self.first = FirstLevel(config.z_dim + (config.condition_dim if config.conditional else 0), config.width,
                                config.sizes[0])
        self.later = nn.ModuleList(NextLevel(width, told, config.residuals) for width in widths[:-1])
        self.images = nn.ModuleList(nn.Sequential(conv3(width, 3), nn.Tanh()) for width in widths)
        orthogonal_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        eps = {"eps": self.config.condition_dim} if self.config.conditional else {}
        return {"z": self.config.z_dim, **eps}

    def forward(self, noise: Noise, sentence: Tensor | None = None) -> Painted:
        if self.augmentation is None:
            return Painted(self.grow(noise["z"], noise["z"]), None)
        augmented = self.augmentation(sentence, noise["eps"])
        return Painted(self.grow(torch.cat([augmented.condition, noise["z"]], dim=1), augmented.condition), augmented)

    def mean(self, sentence: Tensor) -> Tensor:
        """[B, sentence_dim] -> [B, condition_dim]: where the augmentation is centred."""
        return self.augmentation.centre(sentence)

    def grow(self, root: Tensor, told: Tensor) -> list[Tensor]:
        """The pictures of all levels, from the first level's vector and what the later ones are told."""
        features = [self.first(root)]
        for level in self.later:
            features.append(level(features[-1], told))
        return [image(each) for image, each in zip(self.images, features, strict=True)]

    def paint(self, noise: Noise, text: Text | None, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        sentence = text.sentence if self.config.conditional else None
        painted = self(noise, sentence)
        return painted.image, seen(painted)


# -- the discriminators

class StackGANv2DiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminators; the rest follows from the pictures."""

    width: int = Field(default=64, ge=1, description="channels after the first halving")
    reads: Literal["mean", "sentence"] = Field(default="mean", description="what stands for the caption: the mean of "
                                               "the generator's augmentation, or the encoder's sentence itself")


class LevelDiscriminator(nn.Module):
    """Pictures of one size to 4 x 4, then to the channels of the first level's discriminator, then a logit a head."""

    def __init__(self, size: int, first_size: int, width: int, condition_dim: int | None, alone: bool):
        super().__init__()
        widths = [width * 2**level for level in range(int(math.log2(size // SMALLEST)))]
        channels = width * first_size // (2 * SMALLEST)
        self.trunk = nn.Sequential(down(3, width, norm=False), *(down(one, two) for one, two in pairwise(widths)))
        while widths[-1] > channels:
            widths.append(widths[-1] // 2)
            self.trunk.append(same(widths[-2], widths[-1]))
        self.joint = None if condition_dim is None else same(channels + condition_dim, channels)
        self.matched = None if condition_dim is None else nn.Conv2d(channels, 1, SMALLEST)
        self.alone = nn.Conv2d(channels, 1, SMALLEST) if alone else None

    def forward(self, image: Tensor, condition: Tensor | None) -> Scores:
        features = self.trunk(image)
        matched = None if self.joint is None else self.matched(self.joint(join(features, condition))).flatten()
        return Scores(matched, alone=None if self.alone is None else self.alone(features).flatten())


class Discriminators(nn.Module):
    """One for each level, independent of one another."""

    def __init__(self, sizes: Sequence[int], width: int, condition_dim: int | None, alone: bool = True):
        super().__init__()
        self.levels = nn.ModuleList(LevelDiscriminator(size, sizes[0], width, condition_dim, alone) for size in sizes)
        orthogonal_init(self)

    def forward(self, images: Sequence[Tensor], condition: Tensor | None = None) -> list[Scores]:
        """The pictures, the smallest first, and what stands for the captions [B, condition_dim]."""
        return [level(image, condition) for level, image in zip(self.levels, images, strict=True)]


# -- losses

class StackGANv2LossConfig(Section, json_schema_extra=FREE):
    """Weights and terms of the losses."""

    kl: float = Field(default=2.0, ge=0, description="weight of the augmentation's divergence, a mean over the "
                      "condition's numbers")
    joint: bool = Field(default=True, description="with captions: judge the picture alone, too (JCU)")
    colour: float | None = Field(default=None, ge=0, description="alpha of the colour consistency; null: 0 with "
                                                                 "captions, 50 without")


def conditional_loss(real: Scores, wrong: Scores, fake: Scores) -> Tensor:
    """One level's discriminator, eq. 11. A wrong picture is a real one to the head that sees it alone.

    Without that head the two kinds of wrong pairs share the weight of the right one.
    """
    if real.alone is None:
        return bce(real.matched, 1) + 0.5 * (bce(wrong.matched, 0) + bce(fake.matched, 0))
    return (bce(real.matched, 1) + bce(wrong.matched, 0) + bce(fake.matched, 0)
            + bce(real.alone, 1) + bce(wrong.alone, 1) + bce(fake.alone, 0))


def unconditional_loss(real: Scores, fake: Scores) -> Tensor:
    """One level's discriminator without captions, eq. 9."""
    return bce(real.alone, 1) + bce(fake.alone, 0)


def adversarial_loss(fakes: Sequence[Scores]) -> Tensor:
    """The generator's: at every level every head takes the fake for real, eqs. 10 and 12."""
    return sum(bce(logits, 1) for level in fakes for logits in level.heads())


def colour_statistics(image: Tensor) -> tuple[Tensor, Tensor]:
    """[B, 3, H, W] -> the mean colour [B, 3] and the covariance [B, 3, 3] of each picture's pixels."""
    pixels = at_least_single(image).flatten(2)
    mean = pixels.mean(dim=2)
    centred = pixels - mean[:, :, None]
    return mean, centred @ centred.transpose(1, 2) / pixels.shape[2]


def colour_consistency(images: Sequence[Tensor]) -> Tensor:
    """Eq. 13, lambda_1 = 1 and lambda_2 = 5, without alpha: each picture has the colours of the next smaller one.

    The smaller one is the standard and gets no gradient. Means over elements, where the paper has squared norms.
    """
    total = images[0].new_zeros(())
    for smaller, larger in pairwise(images):
        mean, covariance = colour_statistics(larger)
        target_mean, target_covariance = colour_statistics(smaller.detach())
        total = total + F.mse_loss(mean, target_mean) + 5 * F.mse_loss(covariance, target_covariance)
    return total


# -- training

class StackGANv2Run(GANRun):
    """A StackGAN++ run; without captions ``text_encoder`` is left out."""

    task: Literal["stackgan_v2"] = Field(default="stackgan_v2", description="the kind of run: a StackGAN++")
    generator: StackGANv2Config = Field(default=StackGANv2Config(), description="sizes of the generator")
    discriminator: StackGANv2DiscriminatorConfig = Field(default=StackGANv2DiscriminatorConfig(),
                                                         description="sizes of the discriminators, and what they read")
    generator_optimizer: GANOptimizer = Field(default=GANOptimizer(ema=0.999),
                                              description="how the generator's weights move")
    loss: StackGANv2LossConfig = Field(default=StackGANv2LossConfig(), description="weights and terms of the losses")

    @model_validator(mode="after")
    def _text_is_read(self) -> "StackGANv2Run":
        if not self.generator.conditional and self.text_encoder is not None:
            raise ValueError("without captions (generator.conditional: false) no text is read: leave text_encoder out")
        return self

    @property
    def reads_captions(self) -> bool:
        return self.generator.conditional

    @property
    def makes_pairs(self) -> bool:
        return self.generator.conditional


class StackGANv2Batch(GanBatch, total=False):
    """Pictures at every size, and what is read of the captions."""

    images: list[Tensor]             # [b, 3, s, s], the smallest first
    wrong_images: list[Tensor]
    sentence: Tensor | None          # [b, D]; None without captions
    condition: Tensor | None         # [b, ...]: what the discriminators read of it


class StackGANv2Task(GANTask):
    """One step of all discriminators, then one of the generator on the same fakes."""

    paints_once = capturable = True
    config: StackGANv2Run

    def __init__(self, config: StackGANv2Run):
        self.conditional = config.generator.conditional
        encoder = load_encoder(config) if self.conditional else None
        known = {"image_size": config.data.image_size}
        if encoder is not None:
            known["sentence_dim"] = encoder.sentence_dim
        sizes = filled(config.generator, **known)
        self.reads_mean = config.discriminator.reads == "mean"
        read = sizes.condition_dim if self.reads_mean else sizes.sentence_dim
        discriminators = Discriminators(sizes.sizes, config.discriminator.width, read if self.conditional else None,
                                        alone=config.loss.joint or not self.conditional)
        self.wrong_images = "other_class" if self.conditional else None
        usual = 0.0 if self.conditional else 50.0
        self.colour = usual if config.loss.colour is None else config.loss.colour
        self.assemble(config, StackGANv2Generator(sizes), discriminators, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> StackGANv2Batch:
        # data.caption may be none
        prepared: StackGANv2Batch = super().prepare({"caption": None, **batch}, networks, step)
        prepared["images"] = self.pyramid(prepared["image"])
        prepared["sentence"] = prepared["condition"] = None
        if self.conditional:
            prepared["wrong_images"] = self.pyramid(prepared["wrong_image"])
            prepared["sentence"] = prepared["condition"] = sentence = prepared["text"].sentence
            if self.reads_mean:
                with torch.no_grad():
                    prepared["condition"] = networks.bare("generator").mean(sentence)
        return prepared

    def pyramid(self, image: Tensor) -> list[Tensor]:
        return pyramid(image, self.network.config.sizes)

    def paint(self, networks: Networks, batch: StackGANv2Batch, step: int) -> Painted:
        return networks["generator"](batch["noise"], batch["sentence"])

    def d_loss(self, networks: Networks, batch: StackGANv2Batch, step: int) -> Loss:
        discriminator = networks["discriminator"]
        real = discriminator(batch["images"], batch["condition"])
        fake = discriminator(batch["painted"].images, batch["condition"])
        if self.conditional:
            wrong = discriminator(batch["wrong_images"], batch["condition"])
            losses = [conditional_loss(*scores) for scores in zip(real, wrong, fake, strict=True)]
        else:
            losses = [unconditional_loss(*scores) for scores in zip(real, fake, strict=True)]
        sizes = self.network.config.sizes
        return Loss(sum(losses), {f"at_{size}": loss.detach() for size, loss in zip(sizes, losses, strict=True)})

    def g_loss(self, networks: Networks, batch: StackGANv2Batch, step: int) -> Loss:
        """The mean keeps its gradient here: the augmentation learns from what the discriminators make of it, too."""
        painted = batch["painted"]
        augmented = painted.augmented
        condition = augmented.mean if self.conditional and self.reads_mean else batch["condition"]
        total = adversarial_loss(networks["discriminator"](painted.images, condition))
        parts = {"adversarial": total.detach()}
        if self.conditional:
            kl = self.network.augmentation.kl(augmented)
            total = total + self.config.loss.kl * kl
            parts["kl"] = kl.detach()
        if self.colour:
            colour = colour_consistency(painted.images)
            total = total + self.colour * colour
            parts["colour"] = colour.detach()
        return Loss(total, parts)

    def real_scores(self, discriminator: Callable[..., Any], batch: StackGANv2Batch, image: Tensor) -> list[Tensor]:
        scores = discriminator(self.pyramid(image), batch["condition"])
        return [logits for level in scores for logits in level.heads()]
