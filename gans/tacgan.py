"""TAC-GAN (Dash et al., arXiv 1703.06412): an AC-GAN that is conditioned on text, not on the class.

After the authors' TensorFlow code (``dashayushman/TAC-GAN``). Pictures are in [0, 1] between the two networks and in
[-1, 1] outside of them. A wrong picture is judged with the right text as not matching, and as of its own class.

Deviations. Any text encoder takes the place of the 4,800 numbers of Skip-Thought. The authors' normalisation always
uses the statistics of the batch, in sampling, too, since its moving averages are never updated; here sampling uses
running averages (PyTorch's, of decay 0.9), so that a picture does not depend on its company. Wrong pictures come from
the batch, not from the whole set, and are never the same picture.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, Section
from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single
from dalle.training.task import Batch, Loss, Networks
from gans.acgan import Verdict, doubling
from gans.classes import ClassCheck, class_accuracy
from gans.generator import Noise, Painter
from gans.layers import conv1, join, leaky, one_hot
from gans.losses import bce
from gans.sizes import ImageSize, NoiseDim, SentenceDim
from gans.task import GanBatch, GANRun, GANTask, filled, load_encoder
from gans.text import Text

DOUBLINGS = 4       # of the generator's first feature map; the discriminator halves as often
Norm = Literal["offset", "affine"]


# -- normalisation

class Offset(nn.Module):
    """x + b, an offset for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W]."""
        return x + self.bias[:, None, None]


def normalisation(channels: int, norm: Norm) -> nn.Module:
    """Batch normalisation, by default TF-slim's: eps 1e-3, an offset and no gain."""
    if norm == "affine":
        return nn.BatchNorm2d(channels, eps=1e-3)
    return nn.Sequential(nn.BatchNorm2d(channels, eps=1e-3, affine=False), Offset(channels))


def xavier_init(module: nn.Module) -> None:
    """Uniform Xavier weights and no biases in every convolution and linear layer."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)


def unit_halves(sentence: Tensor) -> Tensor:
    """[B, D] with each half of length 1, as uni-skip and bi-skip are put together: the whole has length sqrt(2)."""
    return torch.cat([F.normalize(at_least_single(half), dim=1) for half in sentence.chunk(2, dim=1)], dim=1)


class TextReader(nn.Module):
    """A sentence vector to ``text_dim`` numbers."""

    def __init__(self, sentence_dim: int, text_dim: int, halves: bool):
        super().__init__()
        self.halves = halves
        self.project = nn.Sequential(nn.Linear(sentence_dim, text_dim), leaky())

    def forward(self, sentence: Tensor) -> Tensor:
        """[B, sentence_dim] -> [B, text_dim]."""
        return self.project(unit_halves(sentence) if self.halves else sentence)


# -- the generator

class TACGANConfig(ModelConfig):
    """The paper's sizes for Oxford-102 at 128 pixels."""

    image_size: ImageSize = Field(default=128, ge=2 ** DOUBLINGS)
    width: int = Field(default=64, ge=1, description="gf: channels of the last feature map")
    noise_dim: NoiseDim = 100
    text_dim: int = Field(default=100, ge=1, description="t: numbers that the text is projected to; the code's default "
                          "is 256")
    sentence_dim: SentenceDim = 4800
    halves: bool = Field(default=True, description="scale each half of the sentence vector to length 1")
    norm: Norm = Field(default="offset", description="batch normalisation with an offset alone, as TF-slim has it, or "
                       "with a gain, too")

    @model_validator(mode="after")
    def _doubles_to_the_size(self) -> "TACGANConfig":
        if self.image_size % 2 ** DOUBLINGS:
            raise ValueError(f"image_size {self.image_size} is not a multiple of {2 ** DOUBLINGS}")
        if self.halves and self.sentence_dim % 2:
            raise ValueError(f"sentence_dim {self.sentence_dim} has no two halves: set halves to false")
        return self


class TACGANGenerator(Painter):
    """Noise and text to a picture."""

    model_type = "tacgan"
    Config = TACGANConfig
    config: TACGANConfig
    noise_law = "uniform"        # z ~ U(-1, 1)

    def __init__(self, config: TACGANConfig):
        super().__init__(config)
        self.side = config.image_size // 2 ** DOUBLINGS
        widths = [config.width * 2 ** power for power in (3, 2, 1, 0)]
        self.text = TextReader(config.sentence_dim, config.text_dim, config.halves)
        self.stem = nn.Linear(config.noise_dim + config.text_dim, widths[0] * self.side ** 2)
        self.first = nn.Sequential(normalisation(widths[0], config.norm), nn.ReLU())
        blocks = [nn.Sequential(doubling(inputs, outputs, bias=True), normalisation(outputs, config.norm), nn.ReLU())
                  for inputs, outputs in pairwise(widths)]
        self.body = nn.Sequential(*blocks, doubling(widths[-1], 3, bias=True))
        xavier_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.noise_dim}

    def forward(self, noise: Noise, text: Text) -> Tensor:
        """z [B, Z] and sentences [B, D] -> [B, 3, S, S] in [0, 1]."""
        condition = torch.cat([noise["z"], self.text(text.sentence)], dim=1)
        first = self.stem(condition).unflatten(1, (-1, self.side, self.side))
        return self.body(self.first(first)).tanh() / 2 + 0.5

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text) -> tuple[Tensor, dict[str, Tensor]]:
        """The pictures in [-1, 1]."""
        return 2 * self(noise, text) - 1, {}


def halving(inputs: int, outputs: int) -> nn.Conv2d:
    """[B, inputs, H, W] -> [B, outputs, H/2, W/2]; with a bias even before a normalisation, as the authors have it."""
    return nn.Conv2d(inputs, outputs, 5, stride=2, padding=2)


# -- the discriminator

class TACGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """The paper's sizes for Oxford-102."""

    width: int = Field(default=64, ge=1, description="df: channels of the first feature map")
    text_dim: int = Field(default=100, ge=1, description="numbers that the text is projected to")
    num_classes: int = Field(default=102, ge=1, description="number of classes; class_id counts from 0")
    norm: Norm = Field(default="offset", description="batch normalisation with an offset alone, as TF-slim has it, or "
                       "with a gain, too")


class TACGANDiscriminator(nn.Module):
    """A picture and a text to the source and the picture's class."""

    def __init__(self, config: TACGANDiscriminatorConfig, image_size: int, sentence_dim: int, halves: bool = True):
        super().__init__()
        widths = [config.width * 2 ** power for power in (0, 1, 2, 3)]
        blocks = [nn.Sequential(halving(inputs, outputs), normalisation(outputs, config.norm), leaky())
                  for inputs, outputs in pairwise(widths)]
        self.trunk = nn.Sequential(halving(3, widths[0]), leaky(), *blocks)
        self.text = TextReader(sentence_dim, config.text_dim, halves)
        self.joint = nn.Sequential(conv1(widths[-1] + config.text_dim, widths[-1], bias=True),
                                   normalisation(widths[-1], config.norm), leaky(), nn.Flatten())
        features = widths[-1] * (image_size // 2 ** DOUBLINGS) ** 2
        self.source = nn.Linear(features, 1)
        self.classes = nn.Linear(features, config.num_classes)
        xavier_init(self)

    def forward(self, image: Tensor, text: Text) -> Verdict:
        """[B, 3, S, S] in [0, 1] and sentences [B, D]."""
        features = self.joint(join(self.trunk(image), self.text(text.sentence)))
        return Verdict(self.source(features)[:, 0], self.classes(features))


# -- the losses: every term a mean of sigmoid cross-entropies, no weights

def discriminator_loss(real: Verdict, wrong: Verdict, fake: Verdict, real_class: Tensor,
                       wrong_class: Tensor) -> Tensor:
    """S(r, 1) + A(r, y_r) + S(w, 0) + A(w, y_w) + S(f, 0) + A(f, y_r)."""
    source = bce(real.source, 1) + bce(wrong.source, 0) + bce(fake.source, 0)
    return source + class_loss(real, real_class) + class_loss(wrong, wrong_class) + class_loss(fake, real_class)


def generator_loss(fake: Verdict, real_class: Tensor) -> Tensor:
    """S(f, 1) + A(f, y_r)."""
    return bce(fake.source, 1) + class_loss(fake, real_class)


def class_loss(verdict: Verdict, class_id: Tensor) -> Tensor:
    """Sigmoid cross-entropy of each class by itself, mean over samples and classes: labels, not a distribution."""
    logits = at_least_single(verdict.classes)
    return F.binary_cross_entropy_with_logits(logits, one_hot(class_id, logits.shape[1], logits.dtype))


# -- training

class TACGANRun(GANRun):
    """A TAC-GAN's run."""

    task: Literal["tacgan"] = Field(default="tacgan", description="the kind of run: a TAC-GAN")
    generator: TACGANConfig = Field(default=TACGANConfig(), description="sizes of the generator")
    discriminator: TACGANDiscriminatorConfig = Field(default=TACGANDiscriminatorConfig(),
                                                     description="sizes of the discriminator")


class TACGANTask(GANTask):
    """One step of the discriminator and two of the generator, all on the same noise; each paints for itself, as the
    authors' three runs of their graph do."""

    wrong_images = "other"
    needs_classes = capturable = True
    generator_repeats = 2
    config: TACGANRun

    def __init__(self, config: TACGANRun):
        encoder = load_encoder(config)
        settings = filled(config.generator, image_size=config.data.image_size, sentence_dim=encoder.sentence_dim)
        discriminator = TACGANDiscriminator(config.discriminator, settings.image_size, settings.sentence_dim,
                                            settings.halves)
        self.check = ClassCheck("TAC-GAN", "discriminator.num_classes", config.discriminator.num_classes)
        self.assemble(config, TACGANGenerator(settings), discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> GanBatch:
        """Pictures are in [0, 1]."""
        exchange = self.exchange(networks)
        everyones = self.check(exchange.everyone(batch["class_id"]))
        prepared = super().prepare({**batch, "class_id": exchange.mine(everyones)}, networks, step)
        return prepared | {name: (prepared[name] + 1) / 2 for name in ("image", "wrong_image")}

    def d_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        """Also the share of the real pictures' classes that are named right."""
        discriminator, text = networks["discriminator"], batch["text"]
        with torch.no_grad():
            painted = networks["generator"](batch["noise"], text)
        real = discriminator(batch["image"], text)
        wrong = discriminator(batch["wrong_image"], text)
        fake = discriminator(painted, text)
        total = discriminator_loss(real, wrong, fake, batch["class_id"], batch["wrong_class_id"])
        return Loss(total, {"real_accuracy": class_accuracy(real.classes, batch["class_id"])})

    def g_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        painted = networks["generator"](batch["noise"], batch["text"])
        fake = networks["discriminator"](painted, batch["text"])
        return Loss(generator_loss(fake, batch["class_id"]),
                    {"accuracy": class_accuracy(fake.classes, batch["class_id"])})

    def real_scores(self, discriminator: Callable[..., Any], batch: GanBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"]).source]
