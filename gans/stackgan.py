"""StackGAN (arXiv 1612.03242): a first stage sketches a caption in few pixels, a second one paints over the sketch.

Both published forms are here. ``variant: tf`` is the paper's (birds, flowers): residual blocks, a discriminator that
projects the caption itself and looks at (wrong picture, right caption). ``variant: pytorch`` is that of COCO: a plain
first generator, discriminators that are told the mean of the conditioning augmentation and look at (right picture,
wrong caption), and in stage II a second head for pictures alone.

Differences: the wrong picture is drawn from the batch and of another class wherever there is one; several captions of
a picture may repeat; ``pytorch`` gives the last picture of a batch the first caption as its wrong one, where the code
leaves that pair out; inside stage II, stage I normalises by its running statistics unless ``stage1_train`` is set (the
code left it in training mode).
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.store import load_model, model_folder, model_kind
from dalle.training.task import Batch, Companion, Loss, Networks
from gans.generator import TEXT_FOLDER, Noise, Painter
from gans.layers import (
    ConditioningAugmentation,
    bottleneck,
    conv1,
    conv3,
    dcgan_init,
    down,
    join,
    leaky,
    residual_relu,
    same,
    sequence,
    up,
)
from gans.losses import bce
from gans.task import GANRun, GANTask, filled, load_encoder
from gans.text import Text, load_text_encoder

SMALLEST = 4             # the side at which generators begin and discriminators end
PROBES = ("a small red circle", "this bird has wings that are brown and has a white belly", "two people on a beach")
TRUNCATION = 2.0         # of the augmentation's noise, in deviations (tf)

Variant = Literal["tf", "pytorch"]
Stage = Literal[1, 2]


def doublings(size: int) -> int:
    """How often the smallest side is doubled to give ``size``."""
    return int(math.log2(size // SMALLEST))


def power_of_two(size: int, least: int, name: str) -> None:
    if size < least or size & (size - 1):
        raise ValueError(f"{name} is a power of two, {least} or more, not {size}")


# -- section 3.2: conditioning augmentation

class Painted(NamedTuple):
    """``image`` [B, 3, S, S] in [-1, 1], the ``mean`` of the augmentation [B, condition_dim] and its KL term, 0-d."""

    image: Tensor
    mean: Tensor
    kl: Tensor


def truncated_normal(normal: Tensor) -> Tensor:
    """Standard normal numbers -> normal numbers within two deviations: each moves to the same quantile of that law."""
    low = torch.special.ndtr(torch.full_like(normal, -TRUNCATION))
    quantile = low + torch.special.ndtr(normal) * (1 - 2 * low)
    return torch.special.ndtri(quantile).clamp(-TRUNCATION, TRUNCATION)


def augmentation(variant: Variant, sentence_dim: int, condition_dim: int) -> ConditioningAugmentation:
    return ConditioningAugmentation(sentence_dim, condition_dim, "lrelu" if variant == "tf" else "relu")


def augmentation_noise(variant: Variant, eps: Tensor) -> Tensor:
    return truncated_normal(eps) if variant == "tf" else eps


def start(module: nn.Module, variant: Variant) -> None:
    """First weights: N(0, 0.02) everywhere, cut off at two deviations in the convolutions of ``tf``."""
    dcgan_init(module, linear=True)
    if variant == "tf":
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.trunc_normal_(part.weight, 0.0, 0.02, -TRUNCATION * 0.02, TRUNCATION * 0.02)


# -- section 3.3: stage I

class StackGAN1Config(ModelConfig):
    """Sizes of the first generator; the defaults are the paper's. COCO's: variant pytorch, width 192."""

    variant: Variant = "tf"
    image_size: int = Field(default=64, ge=1)
    width: int = Field(default=128, ge=2, description="channels at half of the picture's side")
    z_dim: int = Field(default=100, ge=1)
    condition_dim: int = Field(default=128, ge=1)
    sentence_dim: int = Field(default=1024, ge=1)

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


class StackGAN1Generator(Painter):
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
        return Painted(image, augmented.mean, self.augmentation.kl(augmented))

    def paint(self, noise: Noise, text: Text, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self(noise, text.sentence).image, {}


# -- section 3.4: stage II

class StackGAN2Config(ModelConfig):
    """Sizes of the second generator; the defaults are the paper's. COCO's: variant pytorch, width 192, residuals 2."""

    variant: Variant = "tf"
    image_size: int = Field(default=256, ge=1)
    width: int = Field(default=128, ge=2, description="channels of the first convolution over the small picture")
    residuals: int = Field(default=4, ge=0)
    condition_dim: int = Field(default=128, ge=1)
    sentence_dim: int = Field(default=1024, ge=1)
    stage1: StackGAN1Config = Field(default=StackGAN1Config(), description="follows from the run of stage I")
    stage1_train: bool = Field(default=False, description="stage I normalises by the statistics of the batch")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "StackGAN2Config":
        power_of_two(self.image_size, self.stage1.image_size, "image_size")
        if self.sentence_dim != self.stage1.sentence_dim:
            raise ValueError(f"both stages read the same captions: sentence_dim {self.sentence_dim} is "
                             f"{self.stage1.sentence_dim} in stage I")
        return self


class StackGAN2Generator(Painter):
    """Stage II: the picture of the frozen stage I, encoded, joined with the caption, and painted at the full size."""

    model_type = "stackgan2"
    Config = StackGAN2Config
    config: StackGAN2Config

    def __init__(self, config: StackGAN2Config):
        super().__init__(config)
        width, top = config.width, 4 * config.width
        self.augmentation = augmentation(config.variant, config.sentence_dim, config.condition_dim)
        self.encoder = nn.Sequential(conv3(3, width), nn.ReLU(), down(width, 2 * width, activation=nn.ReLU),
                                     down(2 * width, top, activation=nn.ReLU))
        self.joint = same(top + config.condition_dim, top, activation=nn.ReLU)
        self.residuals = nn.Sequential(*(residual_relu(top) for _ in range(config.residuals)))
        count = int(math.log2(4 * config.image_size // config.stage1.image_size))
        widths = [top // 2**level for level in range(count + 1)]
        self.painter = nn.Sequential(*(up(wide, narrow) for wide, narrow in zip(widths, widths[1:], strict=False)),
                                     conv3(widths[-1], 3), nn.Tanh())
        start(self, config.variant)
        self.stage1 = StackGAN1Generator(config.stage1).requires_grad_(False)
        self.train()

    @property
    def noise_dims(self) -> dict[str, int]:
        """Stage I's, and ``eps2`` for the second augmentation."""
        return {**self.stage1.noise_dims, "eps2": self.config.condition_dim}

    def train(self, mode: bool = True) -> "StackGAN2Generator":
        super().train(mode)
        if hasattr(self, "stage1"):
            self.stage1.train(mode and self.config.stage1_train)
        return self

    def forward(self, noise: Noise, sentence: Tensor) -> Painted:
        with torch.no_grad():
            small = self.stage1(noise, sentence).image
        eps = augmentation_noise(self.config.variant, noise["eps2"])
        augmented = self.augmentation(sentence, eps)
        hidden = self.joint(join(self.encoder(small), augmented.condition))       # [B, 4 width, s/4, s/4]
        return Painted(self.painter(self.residuals(hidden)), augmented.mean, self.augmentation.kl(augmented))

    def paint(self, noise: Noise, text: Text, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self(noise, text.sentence).image, {}


# -- the discriminators

class DiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of a discriminator; the others follow from the picture. COCO's width is 96."""

    width: int = Field(default=64, ge=2, description="channels after the first halving")
    text_dim: int = Field(default=128, ge=1, description="of its own projection of the caption (tf)")


class Scores(NamedTuple):
    """Logits [B]: of the pictures with their conditions, with wrong ones, and of the pictures alone."""

    matched: Tensor
    mismatched: Tensor | None
    alone: Tensor | None


def trunk_widths(width: int, image_size: int, stage: Stage) -> tuple[list[int], list[int]]:
    """Channels after each halving down to 4 x 4; and from the last on to the head, which stage II keeps at 8 widths."""
    halvings = [width * 2**level for level in range(doublings(image_size))]
    head = halvings[-1] if stage == 1 else min(8 * width, halvings[-1])
    narrowing = [halvings[-1] // 2**level for level in range(int(math.log2(halvings[-1] // head)) + 1)]
    return halvings, narrowing


def halving(widths: list[int], unactivated: int = 0) -> nn.Sequential:
    """[B, 3, S, S] -> [B, widths[-1], 4, 4]; no activation after the last ``unactivated`` layers."""
    activated = len(widths) - unactivated
    later = (down(narrow, wide, activation=leaky if level < activated else None)
             for level, (narrow, wide) in enumerate(zip(widths, widths[1:], strict=False), start=1))
    return nn.Sequential(down(3, widths[0], norm=False), *later)


class SentenceDiscriminator(nn.Module):
    """The paper's: a trunk with one residual block, and the caption's vector by a projection of its own."""

    def __init__(self, image_size: int, sentence_dim: int, config: DiscriminatorConfig, stage: Stage):
        super().__init__()
        halvings, narrowing = trunk_widths(config.width, image_size, stage)
        head = narrowing[-1]
        unactivated = 2 if stage == 1 else int(head == halvings[-1])      # the residual block adds to plain features
        self.trunk = halving(halvings, unactivated)
        self.narrow = nn.Sequential(*(
            sequence(conv1(wide, thin), nn.BatchNorm2d(thin), leaky() if thin > head else None)
            for wide, thin in zip(narrowing, narrowing[1:], strict=False)))
        self.residual = bottleneck(head, head // 4, leaky, leaky())
        self.project = nn.Sequential(nn.Linear(sentence_dim, config.text_dim), leaky())
        self.head = nn.Sequential(conv1(head + config.text_dim, head), nn.BatchNorm2d(head), leaky(),
                                  nn.Conv2d(head, 1, SMALLEST, bias=False))
        start(self, "tf")

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[B, 3, S, S] and [B, sentence_dim] -> logits [B]."""
        features = self.residual(self.narrow(self.trunk(image)))
        return self.head(join(features, self.project(sentence))).flatten()


class MeanDiscriminator(nn.Module):
    """COCO's: told the mean of the generator's augmentation; in stage II also a head for the picture alone."""

    def __init__(self, image_size: int, condition_dim: int, config: DiscriminatorConfig, stage: Stage):
        super().__init__()
        halvings, narrowing = trunk_widths(config.width, image_size, stage)
        head = narrowing[-1]
        self.trunk = nn.Sequential(halving(halvings), *(same(wide, thin) for wide, thin in
                                                        zip(narrowing, narrowing[1:], strict=False)))
        self.head = nn.Sequential(same(head + condition_dim, head), nn.Conv2d(head, 1, SMALLEST))
        self.alone = nn.Conv2d(head, 1, SMALLEST) if stage == 2 else None
        start(self, "pytorch")

    def forward(self, image: Tensor, mean: Tensor, wrong_mean: Tensor | None = None) -> Scores:
        """[B, 3, S, S] and [B, condition_dim]; a wrong mean is judged with the same features."""
        features = self.trunk(image)
        matched = self.head(join(features, mean)).flatten()
        mismatched = None if wrong_mean is None else self.head(join(features, wrong_mean)).flatten()
        return Scores(matched, mismatched, None if self.alone is None else self.alone(features).flatten())


# -- losses (eqs. 3-6; both codes add the wrong pair that the equations leave out)

class StackGANLossConfig(Section, json_schema_extra=FREE):
    """Weights of the losses."""

    kl: float = Field(default=2.0, ge=0, description="of the mean over the condition's dimensions, not their sum")


def discriminator_loss(real: Tensor, wrong: Tensor, fake: Tensor) -> Tensor:
    """Both stages of ``tf``, stage I of ``pytorch``."""
    return bce(real, 1) + 0.5 * (bce(wrong, 0) + bce(fake, 0))


def two_headed_discriminator_loss(real: Scores, fake: Scores) -> Tensor:
    """Stage II of ``pytorch``: what is real in halves, what is not in thirds."""
    return ((bce(real.matched, 1) + bce(real.alone, 1)) / 2
            + (bce(fake.matched, 0) + bce(real.mismatched, 0) + bce(fake.alone, 0)) / 3)


# -- training

class StackGANRun(GANRun):
    """What the runs of both stages have."""

    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: StackGANLossConfig = StackGANLossConfig()


class StackGAN1Run(StackGANRun):
    """A run of stage I. The paper's condition is the mean of 4 captions (``data.num_captions``); COCO's is one."""

    task: Literal["stackgan1"] = "stackgan1"
    generator: StackGAN1Config = StackGAN1Config()


class StackGAN2Run(StackGANRun):
    """A run of stage II. ``text_encoder`` may be left out: captions are read as stage I reads them."""

    task: Literal["stackgan2"] = "stackgan2"
    stage1: str = Field(description="the run or model folder of stage I, which paints what is painted over; frozen",
                        json_schema_extra=FREE)
    generator: StackGAN2Config = StackGAN2Config()


class StackGANTask(GANTask):
    """Either stage: the phases are those of the generator's ``variant``."""

    config: StackGANRun

    def set_up(self, config: StackGANRun, generator: Painter, encoder: nn.Module, stage: Stage) -> None:
        """Assemble with the discriminator, pairs and noise of the variant."""
        self.form = FORMS[generator.config.variant]
        self.fresh_noise, self.wrong_images = self.form.fresh_noise, self.form.wrong_images
        self.paints_once = not self.form.fresh_noise
        discriminator = self.form.discriminator(generator.config, config.discriminator, stage)
        self.assemble(config, generator, discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> Batch:
        """For ``pytorch`` also ``mean`` and ``wrong_mean`` [b, condition_dim]: the augmentation's, and that of the next
        caption."""
        prepared = super().prepare(batch, networks, step)
        if self.form is MeanForm:
            exchange = self.exchange(networks)
            prepared["mean"] = centre(networks.bare("generator"), prepared["text"].sentence)
            prepared["wrong_mean"] = exchange.mine(exchange.everyone(prepared["mean"]).roll(-1, 0))
        return prepared

    def paint(self, networks: Networks, batch: Batch, step: int) -> Painted:
        return networks["generator"](batch["noise"], batch["text"].sentence)

    def d_loss(self, networks: Networks, batch: Batch, step: int) -> Loss:
        if self.paints_once:
            painted = batch["painted"]
        else:
            with torch.no_grad():
                painted = self.paint(networks, batch, step)
        return self.form.d_loss(networks["discriminator"], batch, painted.image)

    def g_loss(self, networks: Networks, batch: Batch, step: int) -> Loss:
        fake = batch["painted"] if self.paints_once else networks["generator"](batch["noise_g"], batch["text"].sentence)
        adversarial = self.form.g_loss(networks["discriminator"], batch, fake.image)
        return Loss(adversarial + self.config.loss.kl * fake.kl,
                    {"adversarial": adversarial.detach(), "kl": fake.kl.detach()})

    def real_scores(self, discriminator: Callable[..., Any], batch: Batch, image: Tensor) -> list[Tensor]:
        return self.form.real_scores(discriminator, batch, image)


class SentenceForm:
    """``tf``: fresh noise for each player; the wrong pair is another picture with the right caption."""

    fresh_noise, wrong_images = True, "other_class"

    @staticmethod
    def discriminator(sizes: ModelConfig, config: DiscriminatorConfig, stage: Stage) -> nn.Module:
        return SentenceDiscriminator(sizes.image_size, sizes.sentence_dim, config, stage)

    @staticmethod
    def d_loss(discriminator: Callable[..., Tensor], batch: Batch, fake: Tensor) -> Loss:
        sentence = batch["text"].sentence
        real, wrong, made = (discriminator(image, sentence) for image in (batch["image"], batch["wrong_image"], fake))
        return Loss(discriminator_loss(real, wrong, made), taken_for_real(real, wrong, made))

    @staticmethod
    def g_loss(discriminator: Callable[..., Tensor], batch: Batch, fake: Tensor) -> Tensor:
        return bce(discriminator(fake, batch["text"].sentence), 1)

    @staticmethod
    def real_scores(discriminator: Callable[..., Tensor], batch: Batch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence)]


class MeanForm:
    """``pytorch``: the same fakes for both players; the wrong pair is the right picture with the next caption, from the
    same pass.

    The means are constants here, so that the augmentation learns through the pictures (and its KL term) alone.
    """

    fresh_noise, wrong_images = False, None

    @staticmethod
    def discriminator(sizes: ModelConfig, config: DiscriminatorConfig, stage: Stage) -> nn.Module:
        return MeanDiscriminator(sizes.image_size, sizes.condition_dim, config, stage)

    @staticmethod
    def d_loss(discriminator: Callable[..., Scores], batch: Batch, fake: Tensor) -> Loss:
        real = discriminator(batch["image"], batch["mean"], batch["wrong_mean"])
        made = discriminator(fake, batch["mean"])
        total = discriminator_loss(real.matched, real.mismatched, made.matched) if real.alone is None \
            else two_headed_discriminator_loss(real, made)
        return Loss(total, taken_for_real(real.matched, real.mismatched, made.matched))

    @staticmethod
    def g_loss(discriminator: Callable[..., Scores], batch: Batch, fake: Tensor) -> Tensor:
        return sum(bce(logits, 1) for logits in heads(discriminator(fake, batch["mean"])))

    @staticmethod
    def real_scores(discriminator: Callable[..., Scores], batch: Batch, image: Tensor) -> list[Tensor]:
        return heads(discriminator(image, batch["mean"]))


FORMS = {"tf": SentenceForm, "pytorch": MeanForm}


def heads(scores: Scores) -> list[Tensor]:
    """The logits of every head for the picture with its condition."""
    return [scores.matched] if scores.alone is None else [scores.matched, scores.alone]


@torch.no_grad()
def centre(generator: Painter, sentence: Tensor) -> Tensor:
    """[B, sentence_dim] -> [B, condition_dim]: the mean of the generator's augmentation."""
    eps = sentence.new_zeros(len(sentence), generator.config.condition_dim)
    return generator.augmentation(sentence, eps).mean


def taken_for_real(real: Tensor, wrong: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """For the log: the mean probability that each kind of pair is given."""
    return {name: logits.detach().sigmoid().mean() for name, logits in
            (("real", real), ("wrong", wrong), ("fake", fake))}


class StackGAN1Task(StackGANTask):
    """Stage I (section 3.3)."""

    def __init__(self, config: StackGAN1Run):
        encoder = load_encoder(config)
        sizes = filled(config.generator, sentence_dim=encoder.sentence_dim, image_size=config.data.image_size)
        self.set_up(config, StackGAN1Generator(sizes), encoder, stage=1)


class StackGAN2Task(StackGANTask):
    """Stage II (section 3.4); its export holds stage I, too."""

    companion_settings = {"text": "text_encoder", "stage1": "stage1"}
    unpacked = frozenset({"stage1"})       # its weights are in the checkpoint

    def __init__(self, config: StackGAN2Run):
        stage1, encoder = load_stage1(config)
        sizes = filled(config.generator, sentence_dim=encoder.sentence_dim, image_size=config.data.image_size,
                       stage1=stage1.config)
        generator = StackGAN2Generator(sizes)
        generator.stage1.load_state_dict(stage1.state_dict())
        self.set_up(config, generator, encoder, stage=2)

    def companions(self) -> dict[str, Companion]:
        return {**super().companions(), "stage1": Companion(self.network.stage1, "stage1")}


def load_stage1(config: StackGAN2Run) -> tuple[StackGAN1Generator, nn.Module]:
    """The finished first stage and its text encoder, which must be the run's own where that names one."""
    folder = model_folder(config.stage1)
    if model_kind(folder) != StackGAN1Generator.model_type:
        raise UserError(f"stage1: {config.stage1} holds a {model_kind(folder)!r} model: give a run of stackgan1")
    stage1, encoder = load_model(StackGAN1Generator, folder, "cpu"), load_text_encoder(str(folder / TEXT_FOLDER))
    if config.text_encoder is not None and not same_encoder(load_encoder(config), encoder):
        raise UserError(f"text_encoder {config.text_encoder} is not the one that stage1 {config.stage1} was trained "
                        "with: leave it out to read captions as stage I does")
    return stage1, encoder


def same_encoder(one: nn.Module, other: nn.Module) -> bool:
    """Whether two text encoders are of one kind, with the same weights, and read captions alike."""
    first, second = one.state_dict(), other.state_dict()
    if type(one) is not type(other) or first.keys() != second.keys():
        return False
    if not all(torch.equal(first[name], second[name]) for name in first):
        return False
    with torch.no_grad():
        return torch.allclose(one(PROBES).sentence, other(PROBES).sentence, atol=1e-5)
