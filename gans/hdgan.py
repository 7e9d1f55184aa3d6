"""HDGAN (arXiv 1802.09178): pictures at several depths of one generator, each with a discriminator of its own.

Every discriminator asks two things: do picture and caption belong together, and does each patch look real. A last
scale (512) can be trained by itself on top of a finished generator.

Where paper and released code differ, the code is followed: squared errors on raw logits, log sigma (not its square)
from the conditioning, and a picture of another class counts as real where patches are judged. The released way to 512
pictures cannot be trained; here its discriminator has one more halving, with the patches of the 256 level, and only
the new layers of both players learn.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.store import load_model, model_folder
from dalle.training.task import Companion, Loss, Networks
from gans.generator import Painter
from gans.layers import ConditioningAugmentation, Residual, conv1, dcgan_init, join, leaky
from gans.looking import seen
from gans.losses import mse
from gans.outputs import Painted
from gans.sizes import ConditionDim, NoiseDim, SentenceDim
from gans.task import GanBatch, GANRun, GANTask, filled, load_encoder, pyramid
from gans.text import Text

STEM_SIDE = 4                       # of the generator's first map
HALVED_AT = (8, 32, 128, 256, 512)  # sides at which the generator's channels halve
CODE_SIDE = 8                       # of a discriminator's map before its 5x5 convolution
PATCHES_FROM = 2                    # the third level on judges 5 x 5 patches, those before it the whole picture

Error = Callable[[Tensor, float], Tensor]       # of scores against one target for all


# -- the generator

class HierarchyConfig(ModelConfig):
    """Sizes of a generator of pictures at several depths; the defaults are the paper's."""

    image_size: int = Field(default=256, ge=1, description="side of the largest picture in pixels; follows from "
                            "data.image_size")
    levels: int = Field(default=3, ge=1, description="pictures of the generator, each of twice the side before")
    sentence_dim: SentenceDim = 1024
    z_dim: NoiseDim = 100
    condition_dim: ConditionDim = 128
    width: int = Field(default=128, ge=4, description="an eighth of the first map's channels")
    residuals: int = Field(default=1, ge=0, description="residual blocks a scale")

    @model_validator(mode="after")
    def _sides_are_powers_of_two(self) -> "HierarchyConfig":
        size, first = self.image_size, self.sides[0]
        if size & (size - 1) or first < CODE_SIDE or size > HALVED_AT[-1]:
            raise ValueError(f"image_size {size} with {len(self.sides)} pictures: it must be a power of two, the "
                             f"smallest picture's side {CODE_SIDE} or more, the largest's at most {HALVED_AT[-1]}")
        return self

    @property
    def sides(self) -> list[int]:
        """Of the pictures, smallest first."""
        return [self.image_size >> (self.levels - 1 - level) for level in range(self.levels)]

    def channels(self, side: int) -> int:
        """Of the generator's map of this side."""
        return 8 * self.width >> sum(side >= halved for halved in HALVED_AT)


class HDGANConfig(HierarchyConfig):
    """Sizes of the generator; the defaults are the paper's."""

    extended: bool = Field(default=False, description="the largest picture is made by a further stage, trained alone")
    extension_residuals: int = Field(default=2, ge=0, description="residual blocks of the further stage")

    @property
    def sides(self) -> list[int]:
        """Also of the further stage's picture."""
        count = self.levels + self.extended
        return [self.image_size >> (count - 1 - level) for level in range(count)]

    @property
    def trained_sides(self) -> list[int]:
        """Of the pictures that this run's discriminators see."""
        return self.sides[-1:] if self.extended else self.sides


class HDGANGenerator(Painter):
    """z and a sentence vector to pictures of growing side (section 3.1 and figure 2)."""

    model_type = "hdgan"
    Config = HDGANConfig
    config: HDGANConfig

    def __init__(self, config: HDGANConfig):
        super().__init__(config)
        self.base = Hierarchy(config)
        self.extension = Extension(config) if config.extended else None
        dcgan_init(self)
        if self.extension is not None:
            self.base.requires_grad_(False)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.z_dim, "eps": self.config.condition_dim}

    def train(self, mode: bool = True) -> "HDGANGenerator":
        super().train(mode)
        if self.extension is not None:
            self.base.eval()       # finished: its statistics are those that its weights were trained with
        return self

    def forward(self, noise: dict[str, Tensor], text: Text) -> Painted:
        if self.extension is None:
            return self.base(noise, text.sentence)[0]
        with torch.no_grad():
            painted, features = self.base(noise, text.sentence)
        return Painted([*painted.images, self.extension(features)], painted.augmented)

    @torch.no_grad()
    def paint(self, noise: dict[str, Tensor], text: Text) -> tuple[Tensor, dict[str, Tensor]]:
        painted = self(noise, text)
        return painted.image, seen(painted)


class Hierarchy(nn.Module):
    """Conditioning, stem, a scale for each side from 4 on, and a head for each of the last ``levels``."""

    def __init__(self, config: HierarchyConfig):
        super().__init__()
        pictures = config.sides[:config.levels]
        stem = config.channels(STEM_SIDE)
        numbers = stem * STEM_SIDE ** 2
        self.augmentation = ConditioningAugmentation(config.sentence_dim, config.condition_dim, "lrelu")
        self.stem = nn.Sequential(nn.Linear(config.condition_dim + config.z_dim, numbers), nn.BatchNorm1d(numbers),
                                  nn.Unflatten(1, (stem, STEM_SIDE, STEM_SIDE)))
        self.scales = nn.ModuleDict({str(STEM_SIDE): residuals(stem, config.residuals)})
        side = STEM_SIDE
        while side < pictures[-1]:
            before, side = config.channels(side), 2 * side
            after = config.channels(side)
            self.scales[str(side)] = nn.Sequential(grow(before, after), residuals(after, config.residuals))
        self.heads = nn.ModuleDict({str(side): compress(config.channels(side)) for side in pictures})

    def forward(self, noise: dict[str, Tensor], sentence: Tensor) -> tuple[Painted, Tensor]:
        """The pictures, and the map behind the last one."""
        augmented = self.augmentation(sentence, noise["eps"])
        features = self.stem(torch.cat([augmented.condition, noise["z"]], dim=1))
        images = []
        for side, scale in self.scales.items():
            features = scale(features)
            if side in self.heads:
                images.append(self.heads[side](features))       # a side output: nothing of it flows on
        return Painted(images, augmented), features


class Extension(nn.Module):
    """The map behind the last picture [B, C, S, S] -> a picture [B, 3, 2S, 2S]."""

    def __init__(self, config: HDGANConfig):
        super().__init__()
        before, after = config.channels(config.sides[-2]), config.channels(config.sides[-1])
        self.refine = residuals(before, config.extension_residuals)
        self.grow = grow(before, after)
        self.head = compress(after)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.grow(self.refine(features)))


def reflected(inputs: int, outputs: int) -> list[nn.Module]:
    """A 3x3 convolution that sees the picture mirrored beyond its edge."""
    return [nn.ReflectionPad2d(1), nn.Conv2d(inputs, outputs, 3, bias=False)]


def residuals(channels: int, count: int) -> nn.Sequential:
    """Residual blocks with nothing after the sum."""
    return nn.Sequential(*(Residual(nn.Sequential(
        *reflected(channels, channels), nn.BatchNorm2d(channels), nn.ReLU(),
        *reflected(channels, channels), nn.BatchNorm2d(channels))) for _ in range(count)))


def grow(inputs: int, outputs: int) -> nn.Sequential:
    """[B, inputs, S, S] -> [B, outputs, 2S, 2S]; a convolution only where the number of channels changes."""
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2)]
    if inputs != outputs:
        layers += [*reflected(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


def compress(channels: int) -> nn.Sequential:
    """[B, channels, S, S] -> a picture [B, 3, S, S] in [-1, 1]."""
    return nn.Sequential(*reflected(channels, 3), nn.Tanh())


# -- the discriminators

class PatchScores(NamedTuple):
    """Raw scores of one discriminator, squared errors' targets 0 and 1."""

    pair: Tensor     # [B]: do picture and caption belong together?
    local: Tensor    # [B, 1, h, w]: is each patch real?


class Looked(NamedTuple):
    """What a discriminator sees of a picture."""

    map: Tensor      # [B, width, 8, 8]
    code: Tensor     # [B, width, 4, 4]


class HDGANDiscriminator(nn.Module):
    """One discriminator for each picture, as one player; nothing is shared. ``levels``: their places in the pyramid."""

    def __init__(self, sides: Sequence[int], levels: Sequence[int], sentence_dim: int, width: int = 512,
                 text_dim: int = 128):
        super().__init__()
        self.scales = nn.ModuleList(ScaleDiscriminator(side, sentence_dim, width, text_dim, level >= PATCHES_FROM)
                                    for side, level in zip(sides, levels, strict=True))
        dcgan_init(self)

    def forward(self, images: Sequence[Tensor], sentence: Tensor) -> list[PatchScores]:
        return [scale(image, sentence) for scale, image in zip(self.scales, images, strict=True)]


class ScaleDiscriminator(nn.Module):
    """Pictures [B, 3, side, side] and sentences [B, D] to :class:`PatchScores`: section 3.2.

    ``patches``: the local head looks at the 8x8 code (5 x 5 patches), otherwise at the 4x4 code (all at once).
    """

    def __init__(self, side: int, sentence_dim: int, width: int, text_dim: int, patches: bool):
        super().__init__()
        self.patches = patches
        self.features = nn.Sequential(*halvings(side, width))
        self.code = nn.Sequential(nn.Conv2d(width, width, 5, bias=False), nn.BatchNorm2d(width), leaky())   # 8 -> 4
        self.text = nn.Sequential(nn.Linear(sentence_dim, text_dim), leaky())
        self.pair = nn.Sequential(conv1(width + text_dim, width), nn.BatchNorm2d(width), leaky(),
                                  nn.Conv2d(width, 1, 4), nn.Flatten(0))
        self.local = nn.Conv2d(width, 1, 4)

    def forward(self, image: Tensor, sentence: Tensor) -> PatchScores:
        looked = self.look(image)
        return PatchScores(self.match(looked, sentence), self.patch_scores(looked))

    def look(self, image: Tensor) -> Looked:
        features = self.features(image)
        return Looked(features, self.code(features))

    def match(self, looked: Looked, sentence: Tensor) -> Tensor:
        """[B]: do picture and caption belong together?"""
        return self.pair(join(looked.code, self.text(sentence)))

    def patch_scores(self, looked: Looked) -> Tensor:
        """[B, 1, h, w]: is each patch real?"""
        return self.local(looked.map if self.patches else looked.code)


def halvings(side: int, width: int) -> list[nn.Module]:
    """Down to 8x8 at ``width`` channels, twice as many at each step: 128 of 512 first at 64, 64 at 128, 32 from 256."""
    stride = 2 if side > CODE_SIDE else 1       # a picture of 8 pixels has nothing to halve
    count = max((side // CODE_SIDE).bit_length() - 1, 1)
    first = max(width >> (count - 1), width // 16)
    channels = [3, *(min(first << step, width) for step in range(count))]
    layers: list[nn.Module] = []
    for step, (before, after) in enumerate(zip(channels, channels[1:], strict=False)):
        layers.append(nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False))
        if step:
            layers.append(nn.BatchNorm2d(after))
        layers.append(leaky())
    return layers


# -- the losses

def discriminator_loss(real: Sequence[PatchScores], wrong: Sequence[PatchScores], fake: Sequence[PatchScores],
                       error: Error = mse) -> Tensor:
    """Sum over the levels of both heads' errors (equations 4-6, here least squares).

    ``wrong``: real pictures of another class with the caption. Where patches are judged they are as real as ``real``.
    """
    total = 0.0
    for right, other, made in zip(real, wrong, fake, strict=True):
        total = total + error(right.pair, 1) + 0.5 * (error(other.pair, 0) + error(made.pair, 0))
        total = total + error(made.local, 0) + 0.5 * (error(right.local, 1) + error(other.local, 1))
    return total


def adversarial_loss(fake: Sequence[PatchScores], error: Error = mse) -> Tensor:
    """The generator's: sum over the levels of both heads' errors against 1."""
    return sum(error(made.pair, 1) + error(made.local, 1) for made in fake)


def generator_loss(fake: Sequence[PatchScores], kl: Tensor, lambda_kl: float = 4.0) -> Tensor:
    """The adversarial sum and lambda KL."""
    return adversarial_loss(fake) + lambda_kl * kl


def extension_loss(fake: Sequence[PatchScores], images: Sequence[Tensor], weight: float = 1.0) -> Tensor:
    """The further stage's: adversarial, and the mean distance of its picture to the enlarged one before it."""
    before = F.interpolate(images[-2].detach(), scale_factor=2, mode="bilinear", align_corners=False)
    return adversarial_loss(fake) + weight * (images[-1] - before).abs().mean()


# -- the run

class HDGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminators; the defaults are the paper's."""

    width: int = Field(default=512, ge=16, description="channels of the codes")
    text_dim: int = Field(default=128, ge=1, description="numbers that the sentence is projected to")


class HDGANLossConfig(Section, json_schema_extra=FREE):
    """Weights of the generator's further terms."""

    kl: float = Field(default=4.0, ge=0, description="weight of the conditioning augmentation's divergence (COCO: 2)")
    pixels: float = Field(default=1.0, ge=0, description="weight of a further stage's distance to the picture before "
                          "it")


class HDGANRun(GANRun):
    """An HDGAN run; with ``base`` the further stage on top of that run's generator. The paper averages 4 captions."""

    task: Literal["hdgan"] = Field(default="hdgan", description="the kind of run: an HDGAN")
    base: str | None = Field(default=None, description="run or model folder of the finished generator that "
                             "generator.extended builds on", json_schema_extra=FREE)
    generator: HDGANConfig = Field(default=HDGANConfig(), description="sizes of the generator")
    discriminator: HDGANDiscriminatorConfig = Field(default=HDGANDiscriminatorConfig(),
                                                    description="sizes of the discriminators")
    loss: HDGANLossConfig = Field(default=HDGANLossConfig(), description="weights of the generator's terms beside the "
                                  "adversarial one")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "HDGANRun":
        if self.generator.extended != (self.base is not None):
            raise ValueError("a further stage needs both: generator.extended: true, and base, the run whose generator "
                             "it continues")
        return self


class HDGANTask(GANTask):
    """The same fakes for both players, as released; wrong pictures are of another class."""

    paints_once = capturable = True
    wrong_images = "other_class"
    companion_settings = {"text": "text_encoder", "base": "base"}
    unpacked = frozenset({"base"})         # its weights are in the checkpoint
    config: HDGANRun

    def __init__(self, config: HDGANRun):
        encoder = load_encoder(config)
        values: dict[str, Any] = {"sentence_dim": encoder.sentence_dim, "image_size": config.data.image_size}
        if config.base is not None:
            base = load_base(config.base, config.data.image_size)
            values |= base.config.model_dump(exclude={"image_size", "extended", "extension_residuals"})
        sizes = filled(config.generator, **values)
        generator = HDGANGenerator(sizes)
        if config.base is not None:
            generator.base.load_state_dict(base.base.state_dict())
        self.sides = sizes.trained_sides
        levels = range(len(sizes.sides))[-len(self.sides):]
        discriminator = HDGANDiscriminator(self.sides, levels, encoder.sentence_dim, config.discriminator.width,
                                           config.discriminator.text_dim)
        self.assemble(config, generator, discriminator, encoder)

    def companions(self) -> dict[str, Companion]:
        """Also ``base``, of a further stage."""
        base = {} if self.config.base is None else {"base": Companion(self.network.base, "base")}
        return {**super().companions(), **base}

    def judged(self, images: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of the generator's pictures that learn."""
        return images[-len(self.sides):]

    def paint(self, networks: Networks, batch: GanBatch, step: int) -> Painted:
        return networks["generator"](batch["noise"], batch["text"])

    def d_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        discriminator, sentence = networks["discriminator"], batch["text"].sentence
        real = discriminator(pyramid(batch["image"], self.sides), sentence)
        wrong = discriminator(pyramid(batch["wrong_image"], self.sides), sentence)
        fake = discriminator(self.judged(batch["painted"].images), sentence)
        return Loss(discriminator_loss(real, wrong, fake), {
            "real": real[-1].pair.mean().detach(), "wrong": wrong[-1].pair.mean().detach(),
            "fake": fake[-1].pair.mean().detach()})

    def g_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        painted = batch["painted"]
        fake = networks["discriminator"](self.judged(painted.images), batch["text"].sentence)
        parts = {"adversarial": adversarial_loss(fake).detach()}
        if self.config.base is not None:
            return Loss(extension_loss(fake, painted.images, self.config.loss.pixels), parts)
        kl = self.network.base.augmentation.kl(painted.augmented)
        return Loss(generator_loss(fake, kl, self.config.loss.kl), {**parts, "kl": kl.detach()})

    def real_scores(self, discriminator: Any, batch: GanBatch, image: Tensor) -> list[Tensor]:
        scores = discriminator(pyramid(image, self.sides), batch["text"].sentence)
        return [score for level in scores for score in level]


def load_base(name: str, image_size: int) -> HDGANGenerator:
    """The finished generator of half the run's side; ``UserError`` for any other."""
    base = load_model(HDGANGenerator, model_folder(name), "cpu")
    if base.config.extended or 2 * base.config.image_size != image_size:
        raise UserError(f"base: {name} paints pictures of {base.config.image_size}"
                        f"{', by a further stage already' if base.config.extended else ''}; "
                        f"data.image_size must be twice that of a generator without one, and is {image_size}")
    return base
