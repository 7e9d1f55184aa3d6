"""StackGAN (arXiv 1612.03242), what both stages share: conditioning augmentation, discriminators, losses, phases.

A first stage (``gans/stackgan1.py``) sketches a caption in few pixels, a second one (``gans/stackgan2.py``) paints over
the sketch. Both published forms are here. ``variant: tf`` is the paper's (birds, flowers): residual blocks, a
discriminator that projects the caption itself and looks at (wrong picture, right caption). ``variant: pytorch`` is that
of COCO: a plain first generator, discriminators that are told the mean of the conditioning augmentation and look at
(right picture, wrong caption), and in stage II a second head for pictures alone.

Differences: the wrong picture is drawn from the batch and of another class wherever there is one; several captions of
a picture may repeat; ``pytorch`` gives the last picture of a batch the first caption as its wrong one, where the code
leaves that pair out.
"""

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.models.base import ModelConfig
from dalle.training.task import Batch, Loss, Networks
from gans.generator import Noise, Painter
from gans.layers import ConditioningAugmentation, bottleneck, conv1, dcgan_init, down, join, leaky, same, sequence
from gans.looking import seen
from gans.losses import bce
from gans.outputs import Painted, Scores
from gans.task import GanBatch, GANRun, GANTask
from gans.text import Text

SMALLEST = 4             # the side at which generators begin and discriminators end
TRUNCATION = 2.0         # of the augmentation's noise, in deviations (tf)

Variant = Annotated[Literal["tf", "pytorch"], Field(
    description="the published form: the paper's (birds, flowers), or that of COCO")]
Stage = Literal[1, 2]


def doublings(size: int) -> int:
    """How often the smallest side is doubled to give ``size``."""
    return int(math.log2(size // SMALLEST))


def power_of_two(size: int, least: int, name: str) -> None:
    if size < least or size & (size - 1):
        raise ValueError(f"{name} is a power of two, {least} or more, not {size}")


# -- section 3.2: conditioning augmentation

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


class StackGANGenerator(Painter):
    """Either stage: a sentence, by its ``augmentation`` (section 3.2), and noise to one picture."""

    augmentation: ConditioningAugmentation

    def forward(self, noise: Noise, sentence: Tensor) -> Painted:
        raise NotImplementedError

    def paint(self, noise: Noise, text: Text, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        painted = self(noise, text.sentence)
        return painted.image, seen(painted)


# -- the discriminators

class StackGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of a discriminator; the others follow from the picture. COCO's width is 96."""

    width: int = Field(default=64, ge=2, description="channels after the first halving")
    text_dim: int = Field(default=128, ge=1, description="numbers that the caption is projected to (tf)")


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

    def __init__(self, image_size: int, sentence_dim: int, config: StackGANDiscriminatorConfig, stage: Stage):
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

    def __init__(self, image_size: int, condition_dim: int, config: StackGANDiscriminatorConfig, stage: Stage):
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

    kl: float = Field(default=2.0, ge=0, description="weight of the augmentation's divergence, a mean over the "
                      "condition's numbers, not their sum")


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

    discriminator: StackGANDiscriminatorConfig = Field(default=StackGANDiscriminatorConfig(),
                                                       description="sizes of the discriminator")
    loss: StackGANLossConfig = Field(default=StackGANLossConfig(), description="weights of the loss's terms")


class StackGANBatch(GanBatch, total=False):
    """With ``pytorch``, what the discriminator is told of the captions."""

    mean: Tensor              # [b, condition_dim]: of the augmentation
    wrong_mean: Tensor        # that of the next caption


class SentenceForm:
    """``tf``: fresh noise for each player; the wrong pair is another picture with the right caption."""

    fresh_noise, wrong_images = True, "other_class"

    @staticmethod
    def discriminator(sizes: ModelConfig, config: StackGANDiscriminatorConfig, stage: Stage) -> nn.Module:
        return SentenceDiscriminator(sizes.image_size, sizes.sentence_dim, config, stage)

    @staticmethod
    def d_loss(discriminator: Callable[..., Tensor], batch: StackGANBatch, fake: Tensor) -> Loss:
        sentence = batch["text"].sentence
        real, wrong, made = (discriminator(image, sentence) for image in (batch["image"], batch["wrong_image"], fake))
        return Loss(discriminator_loss(real, wrong, made), taken_for_real(real, wrong, made))

    @staticmethod
    def g_loss(discriminator: Callable[..., Tensor], batch: StackGANBatch, fake: Tensor) -> Tensor:
        return bce(discriminator(fake, batch["text"].sentence), 1)

    @staticmethod
    def real_scores(discriminator: Callable[..., Tensor], batch: StackGANBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence)]


class MeanForm:
    """``pytorch``: the same fakes for both players; the wrong pair is the right picture with the next caption, from the
    same pass.

    The means are constants here, so that the augmentation learns through the pictures (and its KL term) alone.
    """

    fresh_noise, wrong_images = False, None

    @staticmethod
    def discriminator(sizes: ModelConfig, config: StackGANDiscriminatorConfig, stage: Stage) -> nn.Module:
        return MeanDiscriminator(sizes.image_size, sizes.condition_dim, config, stage)

    @staticmethod
    def d_loss(discriminator: Callable[..., Scores], batch: StackGANBatch, fake: Tensor) -> Loss:
        real = discriminator(batch["image"], batch["mean"], batch["wrong_mean"])
        made = discriminator(fake, batch["mean"])
        total = discriminator_loss(real.matched, real.mismatched, made.matched) if real.alone is None \
            else two_headed_discriminator_loss(real, made)
        return Loss(total, taken_for_real(real.matched, real.mismatched, made.matched))

    @staticmethod
    def g_loss(discriminator: Callable[..., Scores], batch: StackGANBatch, fake: Tensor) -> Tensor:
        return sum(bce(logits, 1) for logits in discriminator(fake, batch["mean"]).heads())

    @staticmethod
    def real_scores(discriminator: Callable[..., Scores], batch: StackGANBatch, image: Tensor) -> list[Tensor]:
        return discriminator(image, batch["mean"]).heads()


FORMS = {"tf": SentenceForm, "pytorch": MeanForm}


def taken_for_real(real: Tensor, wrong: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """For the log: the mean probability that each kind of pair is given."""
    return {name: logits.detach().sigmoid().mean() for name, logits in
            (("real", real), ("wrong", wrong), ("fake", fake))}


class StackGANTask(GANTask):
    """Either stage: the phases are those of the generator's ``variant``."""

    capturable = True
    config: StackGANRun
    form: type[SentenceForm] | type[MeanForm]

    def set_up(self, config: StackGANRun, generator: StackGANGenerator, encoder: nn.Module, stage: Stage) -> None:
        """Assemble with the discriminator, pairs and noise of the variant."""
        self.form = FORMS[generator.config.variant]
        self.fresh_noise, self.wrong_images = self.form.fresh_noise, self.form.wrong_images
        self.paints_once = not self.form.fresh_noise
        discriminator = self.form.discriminator(generator.config, config.discriminator, stage)
        self.assemble(config, generator, discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> StackGANBatch:
        prepared: StackGANBatch = super().prepare(batch, networks, step)
        if self.form is MeanForm:
            exchange = self.exchange(networks)
            with torch.no_grad():
                prepared["mean"] = networks.bare("generator").augmentation.centre(prepared["text"].sentence)
            prepared["wrong_mean"] = exchange.mine(exchange.everyone(prepared["mean"]).roll(-1, 0))
        return prepared

    def paint(self, networks: Networks, batch: StackGANBatch, step: int) -> Painted:
        return networks["generator"](batch["noise"], batch["text"].sentence)

    def d_loss(self, networks: Networks, batch: StackGANBatch, step: int) -> Loss:
        if self.paints_once:
            painted = batch["painted"]
        else:
            with torch.no_grad():
                painted = self.paint(networks, batch, step)
        return self.form.d_loss(networks["discriminator"], batch, painted.image)

    def g_loss(self, networks: Networks, batch: StackGANBatch, step: int) -> Loss:
        fake = batch["painted"] if self.paints_once else networks["generator"](batch["noise_g"], batch["text"].sentence)
        adversarial = self.form.g_loss(networks["discriminator"], batch, fake.image)
        kl = self.network.augmentation.kl(fake.augmented)
        return Loss(adversarial + self.config.loss.kl * kl, {"adversarial": adversarial.detach(), "kl": kl.detach()})

    def real_scores(self, discriminator: Callable[..., Any], batch: StackGANBatch, image: Tensor) -> list[Tensor]:
        return self.form.real_scores(discriminator, batch, image)
