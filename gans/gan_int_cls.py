"""GAN-CLS, GAN-INT and GAN-INT-CLS (Reed et al., arXiv 1605.05396); their style encoder is in ``gans/style.py``.

A DCGAN conditioned on a sentence vector. GAN-CLS shows the discriminator real pictures with captions of others and
calls them fake (section 4.2); GAN-INT trains the generator on points between captions, too (section 4.3); GAN-INT-CLS
does both. ``loss.mismatched`` and ``loss.interpolated`` choose.

Architecture and weights follow the authors' code. It pairs the *wrong picture* with the right caption where the paper
writes the wrong caption; it averages four captions of a picture (``num_captions``) where the paper takes one.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.training.task import Batch, Loss, Networks
from gans.generator import Noise, Painter
from gans.layers import bottleneck, conv1, dcgan_init, deconv, down, join, leaky, relu
from gans.losses import bce
from gans.sizes import ImageSize, NoiseDim, SentenceDim
from gans.task import GanBatch, GANRun, GANTask, filled, load_encoder
from gans.text import Text

# -- networks


class GANINTCLSConfig(ModelConfig):
    """Sizes of the generator; the paper's for birds and flowers (COCO: ``width`` 196)."""

    image_size: ImageSize = Field(default=64, ge=16)
    sentence_dim: SentenceDim = 1024
    text_dim: int = Field(default=128, ge=1, description="numbers that the sentence is projected to")
    noise_dim: NoiseDim = 100
    width: int = Field(default=128, ge=2, description="ngf: channels at half of the picture's side")
    large: bool = Field(default=False, description="use two bottlenecks in the place of each")

    @model_validator(mode="after")
    def _power_of_two(self) -> "GANINTCLSConfig":
        if self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size is {self.image_size}; it must be a power of two")
        return self


def widths(base: int, image_size: int) -> list[int]:
    """Channels at 4x4, 8x8, ... up to half of the side: 8, 4, 2, 1 times ``base`` at 64 pixels."""
    levels = image_size.bit_length() - 3
    return [base * max(8 >> level, 1) for level in range(levels)]


def bottlenecks(channels: int, middle: int, large: bool) -> nn.Sequential:
    return nn.Sequential(*(bottleneck(channels, middle, relu, nn.ReLU()) for _ in range(2 if large else 1)))


class GANINTCLSGenerator(Painter):
    """[z; projected sentence] to a picture, by transposed convolutions with bottlenecks at 4x4 and 8x8."""

    model_type = "gan_int_cls"
    Config = GANINTCLSConfig
    config: GANINTCLSConfig

    def __init__(self, config: GANINTCLSConfig):
        super().__init__(config)
        channels = widths(config.width, config.image_size)
        self.text = nn.Sequential(nn.Linear(config.sentence_dim, config.text_dim), leaky())
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(config.noise_dim + config.text_dim, channels[0], 4, bias=False),
            nn.BatchNorm2d(channels[0]), bottlenecks(channels[0], channels[0] // 4, config.large),
            deconv(channels[0], channels[1]), nn.BatchNorm2d(channels[1]),
            bottlenecks(channels[1], channels[1] // 4, config.large)]
        for inputs, outputs in zip(channels[1:], channels[2:], strict=False):
            layers += [deconv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, deconv(channels[-1], 3), nn.Tanh())
        dcgan_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.noise_dim}

    def forward(self, noise: Noise, sentence: Tensor) -> Tensor:
        """z [B, Z] and sentence [B, D] -> [B, 3, S, S] in [-1, 1]."""
        return self.layers(torch.cat([noise["z"], self.text(sentence)], dim=1)[:, :, None, None])

    def paint(self, noise: Noise, text: Text, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self(noise, text.sentence), {}


class GANINTCLSDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminator; the paper's for birds and flowers (COCO: ``width`` 196, ``variant`` cls)."""

    width: int = Field(default=64, ge=2, description="ndf: channels after the first halving")
    text_dim: int = Field(default=128, ge=1, description="numbers that the sentence is projected to")
    variant: Literal["cls_int", "cls"] = Field(default="cls_int", description="the code's for birds and flowers, with "
                                               "BatchNorm on the text and no activation at 8x8, or that for COCO")


def trunk(width: int, image_size: int, activation_at_8: bool) -> nn.Sequential:
    """A picture to [8 width, 4, 4]."""
    channels = widths(width, image_size)[::-1]
    layers = [down(3, channels[0], norm=False)]
    for index, (inputs, outputs) in enumerate(zip(channels, channels[1:], strict=False), start=1):
        side = image_size >> (index + 1)
        bare = side == 4 or (side == 8 and not activation_at_8)
        layers.append(down(inputs, outputs, activation=None if bare else leaky))
    return nn.Sequential(*layers, bottleneck(channels[-1], channels[-1] // 4, leaky, leaky()))


class GANINTCLSDiscriminator(nn.Module):
    """Whether a picture is real *and* fits its caption: the sentence joins the features at 4x4."""

    def __init__(self, config: GANINTCLSDiscriminatorConfig, image_size: int, sentence_dim: int):
        super().__init__()
        features = widths(config.width, image_size)[0]
        self.trunk = trunk(config.width, image_size, activation_at_8=config.variant == "cls")
        norm = [nn.BatchNorm1d(config.text_dim)] if config.variant == "cls_int" else []
        self.text = nn.Sequential(nn.Linear(sentence_dim, config.text_dim), *norm, leaky())
        self.head = nn.Sequential(conv1(features + config.text_dim, features), nn.BatchNorm2d(features), leaky(),
                                  nn.Conv2d(features, 1, 4, bias=False))
        dcgan_init(self)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[B, 3, S, S] and [B, D] -> logits [B]."""
        return self.head(join(self.trunk(image), self.text(sentence))).flatten()


# -- losses

def discriminator_loss(real: Tensor, wrong: Tensor | None, fake: Tensor, weight: float) -> Tensor:
    """BCE(real, 1) + w BCE(wrong, 0) + (1 - w) BCE(fake, 0): Algorithm 1's loss with w = 1/2. w = 0: a plain GAN."""
    loss = bce(real, 1) + (1 - weight) * bce(fake, 0)
    return loss if wrong is None else loss + weight * bce(wrong, 0)


def generator_loss(plain: Tensor, interpolated: Tensor, weight: float) -> Tensor:
    """The non-saturating loss over captions and points between them, eq. 5: a sum over both, by their number."""
    count = len(plain) + len(interpolated)
    loss = bce(plain, 1) * len(plain)
    return (loss if not len(interpolated) else loss + weight * bce(interpolated, 1) * len(interpolated)) / count


# -- config and task

class GANINTCLSLoss(Section, json_schema_extra=FREE):
    """Which of the three systems it is: both 0 is a plain conditional GAN."""

    mismatched: float = Field(default=0.5, ge=0, le=1, description="CLS: weight of the wrong picture among the fakes")
    interpolated: float = Field(default=1.0, ge=0, description="INT: weight of the points between captions")
    beta: float = Field(default=0.5, ge=0, le=1, description="where between two captions; the paper's is 1/2")
    wrong: Literal["other_class", "other"] = Field(default="other_class", description="which picture is a wrong one; "
                                                   "COCO, without classes: any other")


class GANINTCLSRun(GANRun):
    """A GAN-INT-CLS run."""

    task: Literal["gan_int_cls"] = Field(default="gan_int_cls", description="the kind of run: a GAN-INT-CLS")
    generator: GANINTCLSConfig = Field(default=GANINTCLSConfig(), description="sizes of the generator")
    discriminator: GANINTCLSDiscriminatorConfig = Field(default=GANINTCLSDiscriminatorConfig(),
                                                        description="sizes of the discriminator")
    loss: GANINTCLSLoss = Field(default=GANINTCLSLoss(), description="which of the three systems it is, and how "
                                "strongly")

    @model_validator(mode="after")
    def _captions_are_paired(self) -> "GANINTCLSRun":
        if self.loss.interpolated and self.train.batch_size % 2:
            raise ValueError(f"GAN-INT pairs the captions of a batch: train.batch_size {self.train.batch_size} must be "
                             "even (loss.interpolated: 0 pairs none)")
        return self

    @property
    def makes_pairs(self) -> bool:
        return bool(self.loss.mismatched or self.loss.interpolated)


class GANINTCLSBatch(GanBatch, total=False):
    """With GAN-INT; ``noise_g`` then goes on with the noise of these."""

    between: Tensor         # [b/2, D]: points between the captions of the global batch's halves


class GANINTCLSTask(GANTask):
    """One step of the discriminator, then one of the generator with noise of its own."""

    fresh_noise = capturable = True
    config: GANINTCLSRun

    def __init__(self, config: GANINTCLSRun):
        encoder = load_encoder(config)
        generator = GANINTCLSGenerator(filled(config.generator, image_size=config.data.image_size,
                                              sentence_dim=encoder.sentence_dim))
        discriminator = GANINTCLSDiscriminator(config.discriminator, config.data.image_size, encoder.sentence_dim)
        self.wrong_images = config.loss.wrong if config.loss.mismatched else None
        self.assemble(config, generator, discriminator, encoder)

    def check_share(self, samples: int, world_size: int) -> None:
        super().check_share(samples, world_size)
        if self.config.loss.interpolated and samples % 2:
            raise UserError(f"GAN-INT pairs the captions of a batch: over {world_size} processes train.batch_size "
                            f"{samples * world_size} must be a multiple of {2 * world_size}")

    def prepare(self, batch: Batch, networks: Networks, step: int) -> GANINTCLSBatch:
        prepared: GANINTCLSBatch = super().prepare(batch, networks, step)
        if not self.config.loss.interpolated:
            return prepared
        exchange = self.exchange(networks)
        whole = exchange.everyone(prepared["text"].sentence)
        first, second = whole.chunk(2)
        beta = self.config.loss.beta
        prepared["between"] = exchange.mine(beta * first + (1 - beta) * second)
        noise = self.draw(exchange, len(prepared["between"]), step, 2, whole.device)
        prepared["noise_g"] = {name: torch.cat([values, noise[name]]) for name, values in prepared["noise_g"].items()}
        return prepared

    def d_loss(self, networks: Networks, batch: GANINTCLSBatch, step: int) -> Loss:
        discriminator, sentence = networks["discriminator"], batch["text"].sentence
        with torch.no_grad():
            painted = networks["generator"](batch["noise"], sentence)
        real, fake = discriminator(batch["image"], sentence), discriminator(painted, sentence)
        wrong = discriminator(batch["wrong_image"], sentence) if "wrong_image" in batch else None
        loss = discriminator_loss(real, wrong, fake, self.config.loss.mismatched)
        parts = {"real": real.mean(), "fake": fake.mean()} | ({} if wrong is None else {"wrong": wrong.mean()})
        return Loss(loss, {name: value.detach() for name, value in parts.items()})

    def g_loss(self, networks: Networks, batch: GANINTCLSBatch, step: int) -> Loss:
        sentence = batch["text"].sentence
        conditions = torch.cat([sentence, batch["between"]]) if "between" in batch else sentence
        painted = networks["generator"](batch["noise_g"], conditions)
        logits = networks["discriminator"](painted, conditions)
        plain, interpolated = logits[:len(sentence)], logits[len(sentence):]
        return Loss(generator_loss(plain, interpolated, self.config.loss.interpolated))

    def real_scores(self, discriminator: Callable[..., Any], batch: GANINTCLSBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence)]
