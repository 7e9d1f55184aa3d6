"""AC-GAN (Odena, Olah, Shlens, arXiv 1610.09585): a class-conditional GAN whose discriminator also names the class.

The authors published no code. The layer table is the one that two independent reimplementations agree on; its "linear
768" is read as 8x8x768, the only start from which four doublings reach 128 pixels.

The class comes from the sample's ``class_id``; the discriminator never sees it. A caption is painted as the class whose
prototype is the nearest, ``class:12`` as class 12 itself (``gans/classes.py``).
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig, named_preset
from dalle.models.precision import at_least_single
from dalle.training.task import Batch, Loss, Networks
from gans.classes import LITERAL, ClassCheck, ClassPrototypes, class_accuracy, named_classes
from gans.generator import Noise, Painter
from gans.layers import dcgan_init, leaky, one_hot
from gans.losses import bce
from gans.sizes import ImageSize, NoiseDim
from gans.task import GanBatch, GANRun, GANTask, filled, load_encoder, step_generator
from gans.text import Text

FEWEST = 2                                         # side of the first feature map


# -- the generator

class ACGANConfig(ModelConfig):
    """``preset`` names an entry of :data:`PRESETS`; the other keys given beside it replace its values."""

    image_size: ImageSize = Field(default=128, ge=4)
    num_classes: int = Field(default=10, ge=1, description="number of classes K; class_id counts from 0")
    noise_dim: NoiseDim = 100
    channels: tuple[PositiveInt, ...] = Field(default=(768, 384, 256, 192), min_length=1,
                                              description="channels of the feature maps; each map has twice the side "
                                              "of the one before")
    sentence_dim: int = Field(default=1024, ge=1, description="numbers in the prototype of a class; follows from the "
                              "text encoder")

    @property
    def start_size(self) -> int:
        """The side of the first feature map."""
        return self.image_size // 2 ** len(self.channels)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        preset = named_preset(values, PRESETS, "AC-GAN")
        return values if preset is None else preset | {key: value for key, value in values.items() if key != "preset"}

    @model_validator(mode="after")
    def _doubles_to_the_size(self) -> "ACGANConfig":
        if self.start_size < FEWEST or self.start_size * 2 ** len(self.channels) != self.image_size:
            raise ValueError(f"{len(self.channels)} channels double the first map {len(self.channels)} times, which "
                             f"does not end at {self.image_size} pixels: give a multiple of "
                             f"{FEWEST * 2 ** len(self.channels)}, or another number of channels")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    "imagenet": {"image_size": 128, "channels": (768, 384, 256, 192)},
    "cifar": {"image_size": 32, "channels": (384, 192, 96)},
}


class ACGANGenerator(Painter):
    """Noise and a class to a picture; with the prototypes that give a caption its class."""

    model_type = "acgan"
    Config = ACGANConfig
    config: ACGANConfig

    def __init__(self, config: ACGANConfig):
        super().__init__(config)
        self.stem = nn.Linear(config.noise_dim + config.num_classes, config.start_size ** 2 * config.channels[0])
        blocks = [nn.Sequential(doubling(*widths, bias=False), nn.BatchNorm2d(widths[1]), nn.ReLU())
                  for widths in pairwise(config.channels)]
        self.body = nn.Sequential(*blocks, doubling(config.channels[-1], 3, bias=True), nn.Tanh())
        self.prototypes = ClassPrototypes(config.num_classes, config.sentence_dim)
        dcgan_init(self, linear=True)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.noise_dim}

    def forward(self, noise: Noise, class_id: Tensor) -> Tensor:
        """z [B, Z] and classes [B] -> [B, 3, S, S] in [-1, 1]."""
        condition = one_hot(class_id, self.config.num_classes, noise["z"].dtype)
        side = self.config.start_size
        first = F.relu(self.stem(torch.cat([noise["z"], condition], dim=1)))
        return self.body(first.unflatten(1, (self.config.channels[0], side, side)))

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text | None,
              class_id: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures of the classes [B]; without them, of the classes that the text is nearest to."""
        return self(noise, self.prototypes.nearest(text.sentence) if class_id is None else class_id), {}

    def conditions(self, captions: Sequence[str], text: Text | None) -> dict[str, Tensor]:
        """``class_id``: what a prompt names, otherwise the class of the nearest prototype."""
        named = named_classes(captions, self.config.num_classes).to(self.stem.weight.device)
        if not (named < 0).any():
            return {"class_id": named}
        if text is None or not self.prototypes.count.any():
            raise UserError("this AC-GAN has seen no captions, so it knows its classes by number alone: ask for "
                            f"class:0 to class:{self.config.num_classes - 1}, or train it with a text_encoder")
        return {"class_id": torch.where(named < 0, self.prototypes.nearest(text.sentence), named)}


def doubling(inputs: int, outputs: int, bias: bool) -> nn.ConvTranspose2d:
    """[B, inputs, H, W] -> [B, outputs, 2H, 2W]."""
    return nn.ConvTranspose2d(inputs, outputs, 5, stride=2, padding=2, output_padding=1, bias=bias)


# -- the discriminator

class ACGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Six 3x3 convolutions of strides 2, 1, 2, 1, 2, 1 at the paper's sizes."""

    channels: tuple[PositiveInt, ...] = Field(default=(16, 32, 64, 128, 256, 512), min_length=1,
                                              description="output channels of the convolutions, every other of which "
                                              "halves the side")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of the activations set to 0, in every layer",
                           json_schema_extra=FREE)
    activation_noise: float = Field(default=0.0, ge=0, description="deviation of what is added to every layer's input; "
                                                                   "the paper tried 0, 0.1 and 0.2",
                                    json_schema_extra=FREE)

    @property
    def downsampling(self) -> int:
        return 2 ** -(-len(self.channels) // 2)


class Verdict(NamedTuple):
    """Logits of the source (real or not) [B] and of the classes [B, K]."""

    source: Tensor
    classes: Tensor


class ActivationNoise(nn.Module):
    """Normal noise on the activations, in training."""

    def __init__(self, deviation: float):
        super().__init__()
        self.deviation = deviation

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.deviation == 0:
            return x
        return x + self.deviation * torch.randn_like(x)


class ACGANDiscriminator(nn.Module):
    """A picture to its source and its class."""

    def __init__(self, config: ACGANDiscriminatorConfig, image_size: int, num_classes: int):
        super().__init__()
        side = image_size // config.downsampling
        widths = (3, *config.channels)
        self.trunk = nn.Sequential(*(self.block(config, index, *pair) for index, pair in enumerate(pairwise(widths))))
        self.head = nn.Linear(side * side * widths[-1], 1 + num_classes)
        dcgan_init(self, linear=True)

    @staticmethod
    def block(config: ACGANDiscriminatorConfig, index: int, inputs: int, outputs: int) -> nn.Sequential:
        first = index == 0
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2 - index % 2, padding=1, bias=first)
        norm = nn.Identity() if first else nn.BatchNorm2d(outputs)
        return nn.Sequential(ActivationNoise(config.activation_noise), convolution, norm, leaky(),
                             nn.Dropout(config.dropout))

    def forward(self, image: Tensor) -> Verdict:
        """[B, 3, S, S]; the class is not among the arguments."""
        logits = self.head(self.trunk(image).flatten(1))
        return Verdict(logits[:, 0], logits[:, 1:])


# -- the losses, as what is minimised

def discriminator_loss(real: Verdict, fake: Verdict, real_class: Tensor, fake_class: Tensor,
                       class_weight: float = 1.0) -> Tensor:
    """-(L_S + L_C), eqs. 2 and 3: the class of the fakes, too, is the discriminator's to name."""
    source = bce(real.source, 1) + bce(fake.source, 0)
    return source + class_weight * (class_loss(real, real_class) + class_loss(fake, fake_class))


def generator_loss(fake: Verdict, fake_class: Tensor, class_weight: float = 1.0) -> Tensor:
    """-L_C on the fakes, and the non-saturating form of L_S."""
    return bce(fake.source, 1) + class_weight * class_loss(fake, fake_class)


def class_loss(verdict: Verdict, class_id: Tensor) -> Tensor:
    """Softmax cross-entropy of the classes, mean."""
    return F.cross_entropy(at_least_single(verdict.classes), class_id)


# -- training

class ACGANLossConfig(Section, json_schema_extra=FREE):
    """The paper's sum has no weights."""

    class_weight: float = Field(default=1.0, ge=0, description="weight of the class loss L_C beside the source loss "
                                "L_S")


class ACGANRun(GANRun):
    """An AC-GAN's run. ``text_encoder`` is optional: without one, the model takes ``class:N`` alone."""

    task: Literal["acgan"] = Field(default="acgan", description="the kind of run: an AC-GAN")
    generator: ACGANConfig = Field(default=ACGANConfig(), description="sizes of the generator")
    discriminator: ACGANDiscriminatorConfig = Field(default=ACGANDiscriminatorConfig(),
                                                    description="sizes of the discriminator")
    loss: ACGANLossConfig = Field(default=ACGANLossConfig(), description="weights of the loss's terms")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "ACGANRun":
        factor = self.discriminator.downsampling
        if self.data.image_size % factor:
            raise ValueError(f"the discriminator halves {self.data.image_size} pixels (data.image_size) until they "
                             f"are {factor} times fewer: give a multiple of {factor}")
        captions = [caption for caption in self.preview.captions if not LITERAL.fullmatch(caption)]
        if self.text_encoder is None and self.train.preview_every and captions:
            raise ValueError("without a text_encoder the model takes no captions: set preview.captions to class:0, "
                             "class:1 and the like")
        if self.train.preview_every:
            try:
                named_classes(self.preview.captions, self.generator.num_classes)
            except UserError as error:
                raise ValueError(f"preview.captions: {error}") from error
        return self

    @property
    def reads_captions(self) -> bool:
        return self.text_encoder is not None

    @property
    def makes_pairs(self) -> bool:
        return False


class ACGANBatch(GanBatch, total=False):
    """The classes that are painted, uniform: each phase draws its own."""

    fake_class: Tensor          # int64 [b]
    fake_class_g: Tensor


class ACGANTask(GANTask):
    """One step of each player; each draws noise and classes of its own."""

    fresh_noise = needs_classes = capturable = True
    config: ACGANRun
    class_streams: ClassVar[dict[str, int]] = {"fake_class": 200, "fake_class_g": 201}

    def __init__(self, config: ACGANRun):
        encoder = load_encoder(config) if config.text_encoder is not None else None
        length = {} if encoder is None else {"sentence_dim": encoder.sentence_dim}
        settings = filled(config.generator, image_size=config.data.image_size, **length)
        discriminator = ACGANDiscriminator(config.discriminator, settings.image_size, settings.num_classes)
        self.check = ClassCheck("AC-GAN", "generator.num_classes", settings.num_classes)
        self.assemble(config, ACGANGenerator(settings), discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> ACGANBatch:
        """Also takes the captions into the class prototypes."""
        exchange, settings = self.exchange(networks), self.network.config
        everyones = self.check(exchange.everyone(batch["class_id"]))
        prepared: ACGANBatch = super().prepare({**batch, "class_id": exchange.mine(everyones)}, networks, step)
        for name, stream in self.class_streams.items():
            source = step_generator(self.config.seed, step, stream)
            drawn = torch.randint(settings.num_classes, everyones.shape, generator=source)
            prepared[name] = exchange.mine(drawn).to(everyones.device, non_blocking=True)
        if "text" in prepared:
            # of the whole batch: the same sums on every rank
            self.network.prototypes.add(exchange.everyone(prepared["text"].sentence), everyones)
        return prepared

    def d_loss(self, networks: Networks, batch: ACGANBatch, step: int) -> Loss:
        """Also the shares of the classes that are named right, of real pictures and of fakes."""
        discriminator = networks["discriminator"]
        with torch.no_grad():
            painted = networks["generator"](batch["noise"], batch["fake_class"])
        real, fake = discriminator(batch["image"]), discriminator(painted)
        total = discriminator_loss(real, fake, batch["class_id"], batch["fake_class"], self.config.loss.class_weight)
        return Loss(total, {"real_accuracy": class_accuracy(real.classes, batch["class_id"]),
                            "fake_accuracy": class_accuracy(fake.classes, batch["fake_class"])})

    def g_loss(self, networks: Networks, batch: ACGANBatch, step: int) -> Loss:
        fake = networks["discriminator"](networks["generator"](batch["noise_g"], batch["fake_class_g"]))
        return Loss(generator_loss(fake, batch["fake_class_g"], self.config.loss.class_weight),
                    {"accuracy": class_accuracy(fake.classes, batch["fake_class_g"])})

    def real_scores(self, discriminator: Callable[..., Any], batch: ACGANBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image).source]
