"""SISGAN (Dong et al., arXiv 1707.06873): a picture is edited after a sentence, and what the sentence leaves out stays.

There is no reconstruction term and no path from the source around the generator: the picture is kept because half of
the fakes are asked for their own sentence. The networks are those of a public port made with the first author's advice.

Known differences: the last block of VGG-16 is dilated, as the paper has it (the port meant to and did not: that is
``dilation: 1``); the halvings of the discriminator follow the picture's side, so that any side leads to 4 x 4.
"""

from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.models.foreign import read_foreign_state
from dalle.training.task import Batch, Loss, Networks
from gans.editing import EditingTask, Editor, halvings
from gans.generator import Noise
from gans.layers import (
    ConditioningAugmentation,
    bottleneck,
    conv1,
    conv3,
    conv4,
    dcgan_init,
    down,
    join,
    leaky,
    relu,
    residual_relu,
    same,
    sequence,
    up,
)
from gans.losses import bce
from gans.outputs import Painted
from gans.sizes import ConditionDim, ImageSize, SentenceDim
from gans.task import Exchange, GanBatch, GANRun, filled, load_encoder
from gans.text import Text
from gans.trunks import HUB, IMAGENET_MEAN, IMAGENET_STD, hub_state

VGG_WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, 512, 512, 512)    # up to conv4_3, one pool left out
VGG_LEFT_OUT = 23                # torchvision's number of that pool among the layers
LAST_SIDE = 4            # of the discriminator's features
VGG_WEIGHTS = "VGG16_BN_Weights.IMAGENET1K_V1"
RANDOM = "random"


# -- the generator

class SISGANConfig(ModelConfig):
    """The paper's sizes. ``channels`` are those of the first convolution; the bottleneck has four times as many."""

    image_size: ImageSize = Field(default=64, ge=16)
    sentence_dim: SentenceDim = 300
    condition_dim: ConditionDim = 128
    channels: int = Field(default=128, ge=1, description="channels of the first convolution; the bottleneck has four "
                          "times as many")
    residual_blocks: int = Field(default=4, ge=0, description="residual blocks of the bottleneck")
    encoder: Literal["vgg16", "plain"] = Field(default="vgg16", description="vgg16: frozen, up to conv4_3; plain: "
                                               "three convolutions, learnt")
    dilation: int = Field(default=2, ge=1, description="spacing in pixels of what conv4_1 to conv4_3 of vgg16 see; 1: "
                          "their neighbours")

    @model_validator(mode="after")
    def _fits(self) -> "SISGANConfig":
        if self.image_size % 4:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 4, by which the encoder divides it")
        if self.encoder == "vgg16" and 4 * self.channels != VGG_WIDTHS[-1]:
            raise ValueError(f"vgg16 gives {VGG_WIDTHS[-1]} channels, 4 times channels {self.channels} are "
                             f"{4 * self.channels}: set channels to {VGG_WIDTHS[-1] // 4} or encoder to plain")
        return self


class VGGEncoder(nn.Module):
    """VGG-16 with batch normalisation (arXiv 1409.1556) up to conv4_3, without its third pool: fixed features.

    It never learns, and its normalisation is always that of evaluation. The weights are random until they are loaded.
    """

    def __init__(self, dilation: int):
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in VGG_WIDTHS:
            if width == "pool":
                layers.append(nn.MaxPool2d(2))
                continue
            spread = dilation if width == VGG_WIDTHS[-1] else 1
            layers += [nn.Conv2d(inputs, width, 3, padding=spread, dilation=spread), nn.BatchNorm2d(width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        for part in self.layers:
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.bias)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "VGGEncoder":
        return super().train(False)

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> [B, 512, S/4, S/4]."""
        return self.layers(((image + 1) / 2 - self.mean) / self.std)

    def load_imagenet(self, weights: str | None) -> None:
        """Take torchvision's weights from the file ``weights``, or without one from its hub."""
        try:
            state = read_foreign_state(Path(weights)) if weights else hub_state(VGG_WEIGHTS)
            self.layers.load_state_dict(own_names(state))
        except Exception as error:      # the hub's client and a file of other weights fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"vgg_weights: VGG-16's weights could not be had ({reason}); without a network give the "
                            f"file of torchvision's {VGG_WEIGHTS} from {HUB}, {RANDOM} for a trial, or set "
                            "generator.encoder to plain") from error


def own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's ``features.N.*`` by the numbers of :class:`VGGEncoder`'s layers, without the layers behind them."""
    last = VGG_LEFT_OUT + 9      # of the ReLU after conv4_3
    named = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        number, _, parameter = rest.partition(".")
        if part == "features" and int(number) <= last:
            named[f"{int(number) - (int(number) > VGG_LEFT_OUT)}.{parameter}"] = tensor
    return named


def plain_encoder(channels: int) -> nn.Sequential:
    """[B, 3, S, S] -> [B, 4 channels, S/4, S/4]."""
    return sequence(conv3(3, channels, bias=True), relu(), down(channels, 2 * channels, activation=relu),
                    down(2 * channels, 4 * channels, activation=relu))


class SISGANGenerator(Editor):
    """Encoder, conditioning augmentation, residual blocks and decoder (section 3.1)."""

    model_type = "sisgan"
    Config = SISGANConfig
    config: SISGANConfig

    def __init__(self, config: SISGANConfig):
        super().__init__(config)
        channels, wide = config.channels, 4 * config.channels
        self.augment = ConditioningAugmentation(config.sentence_dim, config.condition_dim, "lrelu", bias=False)
        self.merge = same(wide + config.condition_dim, wide, activation=None)
        self.residual = nn.Sequential(*(residual_relu(wide) for _ in range(config.residual_blocks)))
        self.decoder = nn.Sequential(up(wide, 2 * channels), up(2 * channels, channels),
                                     conv3(channels, 3, bias=True), nn.Tanh())
        self.encoder = plain_encoder(channels) if config.encoder == "plain" else nn.Identity()
        dcgan_init(self, linear=True)
        if config.encoder == "vgg16":
            self.encoder = VGGEncoder(config.dilation)

    def forward(self, noise: Noise, text: Text, source: Tensor) -> Painted:
        augmented = self.augment(text.sentence, noise["eps"])
        features = self.encoder(source)                                         # [B, 4C, S/4, S/4]
        merged = self.residual(self.merge(join(features, augmented.condition)))
        return Painted([self.decoder(merged)], augmented)


# -- the discriminator

class SISGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """The paper's sizes; the channels double from layer to layer, up to eight times the first."""

    channels: int = Field(default=64, ge=1, description="channels of the first convolution; they double up to eight "
                          "times as many")
    text_dim: int = Field(default=128, ge=1, description="length of the projected sentence")


class SISGANDiscriminator(nn.Module):
    """A picture and a sentence to one logit: real and matching, or not (section 3.2)."""

    def __init__(self, config: SISGANDiscriminatorConfig, image_size: int, sentence_dim: int):
        super().__init__()
        widths = [config.channels * min(2**level, 8) for level in range(halvings(image_size, LAST_SIDE, least=2))]
        wide = widths[-1]
        self.trunk = sequence(
            conv4(3, widths[0], bias=True), leaky(),
            *(down(inputs, outputs) for inputs, outputs in pairwise(widths[:-1])),
            down(widths[-2], wide, activation=None),
            bottleneck(wide, max(1, wide // 4), leaky, after=leaky()))
        self.text = nn.Sequential(nn.Linear(sentence_dim, config.text_dim), leaky())
        self.head = sequence(conv1(wide + config.text_dim, wide), nn.BatchNorm2d(wide), leaky(),
                             nn.Conv2d(wide, 1, 4))
        dcgan_init(self, linear=True)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] and [B, D] -> [B]."""
        return self.head(join(self.trunk(image), self.text(sentence))).flatten()


# -- the losses, as functions of logits

class SISGANLossConfig(Section, json_schema_extra=FREE):
    """The port's weights; ``negative_weight: 1`` and ``kl: 0`` are the paper's eq. 3 to the letter."""

    negative_weight: float = Field(default=0.5, ge=0, description="weight of the mismatched and of the edited pairs")
    kl: float = Field(default=1.0, ge=0, description="weight of the conditioning augmentation's divergence")


def discriminator_loss(real: Tensor, wrong: Tensor, fake: Tensor, negative_weight: float = 0.5) -> Tensor:
    """Eq. 3, first line: real pictures with their sentence, with another one, and edited ones with what was asked."""
    return bce(real, 1) + negative_weight * bce(wrong, 0) + negative_weight * bce(fake, 0)


def generator_loss(fake: Tensor, divergence: Tensor, kl: float = 1.0) -> Tensor:
    """Eq. 3, second line, and the divergence."""
    return bce(fake, 1) + kl * divergence


def relevant(everyone: Tensor) -> Tensor:
    """[B, ...] -> [B, ...]: the first half of the batch gets the next one within it, the second half keeps its own."""
    half = len(everyone) // 2
    return torch.cat([everyone[:half].roll(-1, 0), everyone[half:]])


# -- the run

class SISGANRun(GANRun):
    """A SISGAN run."""

    task: Literal["sisgan"] = Field(default="sisgan", description="the kind of run: a SISGAN")
    generator: SISGANConfig = Field(default=SISGANConfig(), description="sizes of the generator")
    discriminator: SISGANDiscriminatorConfig = Field(default=SISGANDiscriminatorConfig(),
                                                     description="sizes of the discriminator")
    loss: SISGANLossConfig = Field(default=SISGANLossConfig(), description="weights of the loss's terms")
    vgg_weights: str | None = Field(default=None, description=f"file of torchvision's {VGG_WEIGHTS}, or {RANDOM}; "
                                    "null: from torchvision's hub", json_schema_extra=FREE)


class SISGANBatch(GanBatch, total=False):
    """With what the pictures are edited after."""

    relevant_text: Text         # half the samples' own text, half that of others


class SISGANTask(EditingTask):
    """Real, mismatched and edited pairs; the generator's step draws a condition of its own."""

    fresh_noise = capturable = True
    wrong_texts = "rolled"

    def __init__(self, config: SISGANRun):
        encoder = load_encoder(config)
        halvings(config.data.image_size, LAST_SIDE, least=2)      # before a network of another side is built
        generator = SISGANGenerator(filled(config.generator, image_size=config.data.image_size,
                                           sentence_dim=encoder.sentence_dim))
        if config.generator.encoder == "vgg16" and config.vgg_weights != RANDOM:
            generator.encoder.load_imagenet(config.vgg_weights)
        discriminator = SISGANDiscriminator(config.discriminator, config.data.image_size, encoder.sentence_dim)
        self.assemble(config, generator, discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> SISGANBatch:
        prepared = super().prepare(batch, networks, step)
        return {**prepared, "relevant_text": relevant_text(self.exchange(networks), prepared["text"])}

    def d_loss(self, networks: Networks, batch: SISGANBatch, step: int) -> Loss:
        discriminator, asked = networks["discriminator"], batch["relevant_text"]
        with torch.no_grad():
            edited = networks["generator"](batch["noise"], asked, batch["image"]).image
        real = discriminator(batch["image"], batch["text"].sentence)
        wrong = discriminator(batch["image"], batch["wrong_text"].sentence)
        fake = discriminator(edited, asked.sentence)
        total = discriminator_loss(real, wrong, fake, self.config.loss.negative_weight)
        return Loss(total, {name: scores.detach().sigmoid().mean() for name, scores in
                            (("real", real), ("wrong", wrong), ("fake", fake))})

    def g_loss(self, networks: Networks, batch: SISGANBatch, step: int) -> Loss:
        asked = batch["relevant_text"]
        edited = networks["generator"](batch["noise_g"], asked, batch["image"])
        divergence = self.network.augment.kl(edited.augmented)
        fake = networks["discriminator"](edited.image, asked.sentence)
        return Loss(generator_loss(fake, divergence, self.config.loss.kl), {"kl": divergence.detach()})

    def real_scores(self, discriminator: nn.Module, batch: SISGANBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence)]


def relevant_text(exchange: Exchange, text: Text) -> Text:
    """:func:`relevant` over the global batch."""
    return Text(*(exchange.mine(relevant(exchange.everyone(part))) for part in text))
