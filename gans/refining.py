"""What the systems share that paint in stages and look for a caption's words (AttnGAN, arXiv 1711.10485, and on).

A first picture grows out of the sentence; each refinement doubles its side, after the words. One discriminator for each
picture judges it alone and with its sentence. A system says what its refinement is
(:meth:`RefiningGenerator.refinement`) and what its generator learns from beside the discriminators
(:meth:`RefiningTask.terms`). :class:`MatchingTask` adds what a frozen matching model (``gans/damsm.py``) says of the
last picture, word by word.

As in the released code of all of them: the offset by one as wrong pairs, means with the weights below.
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.models.base import ModelConfig
from dalle.training.task import Batch, Companion, Loss, Networks
from gans.damsm import Damsm
from gans.generator import Noise, Painter
from gans.layers import (
    ConditioningAugmentation,
    conv3,
    down,
    join,
    orthogonal_init,
    same,
    spectrally_normalised,
    up_glu,
)
from gans.looking import seen
from gans.losses import bce
from gans.matching import Gammas, damsm_losses
from gans.outputs import Painted, Scores
from gans.sizes import ConditionDim, NoiseDim, SentenceDim, WordDim
from gans.task import GanBatch, GANOptimizer, GANRun, GANTask, filled, load_encoder, pyramid
from gans.text import Text, load_text_encoder

STEM_SIDE = 4       # of the first map of the generator and the last of a discriminator


# -- the generator

class RefiningConfig(ModelConfig):
    """Sizes of the generator; the defaults are AttnGAN's for CUB."""

    image_size: int = Field(default=256, ge=8, description="side of the last picture in pixels; each refinement "
                            "doubles the side")
    refinements: int = Field(default=2, ge=1, description="how often a map is refined after its words, and doubled in "
                             "side")
    sentence_dim: SentenceDim = 256
    word_dim: WordDim = 256
    z_dim: NoiseDim = 100
    condition_dim: ConditionDim = 100
    width: int = Field(default=32, ge=1, description="channels of the maps that pictures are made of (ngf)")
    residuals: int = Field(default=2, ge=0, description="residual blocks of a refinement")

    @model_validator(mode="after")
    def _sides_are_powers_of_two(self) -> "RefiningConfig":
        first = self.image_size >> self.refinements
        if first < 2 * STEM_SIDE or self.image_size != first << self.refinements or first & (first - 1):
            raise ValueError(f"image_size {self.image_size} with {self.refinements} refinements: the first picture's "
                             f"side must be a power of two of at least {2 * STEM_SIDE}")
        return self

    @property
    def sides(self) -> list[int]:
        """The sides of the maps, from the first to the last."""
        return [self.image_size >> (self.refinements - level) for level in range(self.refinements + 1)]

    @property
    def picture_sides(self) -> list[int]:
        """The sides of the pictures; each is made of the map of its side."""
        return self.sides


class RefiningGenerator(Painter):
    """z and a caption's sentence and words to pictures of growing side (AttnGAN's equation 1)."""

    Config = RefiningConfig
    config: RefiningConfig

    def __init__(self, config: RefiningConfig):
        super().__init__(config)
        self.augmentation = ConditioningAugmentation(config.sentence_dim, config.condition_dim, "glu")
        self.start = self.beginning()
        self.refine = nn.ModuleList(self.refinement(level) for level in range(config.refinements))
        self.heads = nn.ModuleList(nn.Sequential(conv3(config.width, 3), nn.Tanh()) for _ in config.picture_sides)
        orthogonal_init(self)

    def beginning(self) -> nn.Module:
        """What makes the first map in :meth:`first_map`."""
        return Start(self.config.condition_dim + self.config.z_dim, self.config.width, self.config.sides[0])

    def refinement(self, level: int) -> nn.Module:
        """(map [B, width, S, S], text, condition [B, condition_dim]) -> (map [B, width, 2S, 2S], [B, T, S, S]: where
        each word was looked for); ``level`` counts from 0, S is ``config.sides[level]``."""
        raise NotImplementedError

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.z_dim, "eps": self.config.condition_dim}

    def first_map(self, condition: Tensor, noise: Noise, text: Text) -> Tensor:
        """h_0 [B, width, S, S]."""
        return self.start(torch.cat([condition, noise["z"]], dim=1))

    def forward(self, noise: Noise, text: Text) -> Painted:
        augmented = self.augmentation(text.sentence, noise["eps"])
        maps = [self.first_map(augmented.condition, noise, text)]
        attention = []
        for refine in self.refine:
            h, weights = refine(maps[-1], text, augmented.condition)
            maps.append(h)
            attention.append(weights)
        shown = maps[-len(self.heads):]
        return Painted([head(h) for head, h in zip(self.heads, shown, strict=True)], augmented, attention)

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text) -> tuple[Tensor, dict[str, Tensor]]:
        """The last pictures; all of them, and the attention of each refinement."""
        painted = self(noise, text)
        return painted.image, seen(painted)


class Start(nn.Module):
    """F_0: condition and noise [B, D] to the first map [B, width, side, side]; half the channels at twice the side.

    ``up``: (channels, channels) -> what doubles the side.
    """

    def __init__(self, inputs: int, width: int, side: int, up: Callable[[int, int], nn.Module] = up_glu):
        super().__init__()
        doublings = (side // STEM_SIDE).bit_length() - 1
        channels = width << doublings
        numbers = channels * STEM_SIDE ** 2
        self.project = nn.Sequential(nn.Linear(inputs, 2 * numbers, bias=False), nn.BatchNorm1d(2 * numbers),
                                     nn.GLU(dim=1), nn.Unflatten(1, (channels, STEM_SIDE, STEM_SIDE)))
        self.grow = nn.Sequential(*(up(channels >> step, channels >> (step + 1)) for step in range(doublings)))

    def forward(self, x: Tensor) -> Tensor:
        return self.grow(self.project(x))


# -- the discriminators

class ScaleDiscriminators(nn.Module):
    """One discriminator for each side of picture, as one player."""

    def __init__(self, sides: Sequence[int], sentence_dim: int, width: int = 64, unconditional: bool = True,
                 spectral: bool = False):
        super().__init__()
        self.scales = nn.ModuleList(ScaleDiscriminator(side, sentence_dim, width, unconditional, spectral)
                                    for side in sides)

    def forward(self, images: Sequence[Tensor], sentence: Tensor, other_sentence: Tensor | None = None) \
            -> list[Scores]:
        """``other_sentence`` [N, D], N <= B: the first N pictures are also judged with these."""
        return [scale(image, sentence, other_sentence) for scale, image in zip(self.scales, images, strict=True)]


class ScaleDiscriminator(nn.Module):
    """Pictures [B, 3, side, side] to features [B, 8 width, 4, 4] and up to three questions about them.

    ``spectral``: in the place of batch normalisation, so that a sample is judged whatever the others are, biases and
    the spectral norm of every weight but those of the questions.
    """

    def __init__(self, side: int, sentence_dim: int, width: int, unconditional: bool, spectral: bool = False):
        super().__init__()
        self.features = image_features(side, width, norm=not spectral)
        self.joint = same(8 * width + sentence_dim, 8 * width, norm=not spectral, bias=spectral)
        self.conditional = score_head(8 * width)
        self.unconditional = score_head(8 * width) if unconditional else None
        orthogonal_init(self)
        if spectral:        # behind the first weights: a norm that is held cannot be set
            spectrally_normalised(self.features)
            spectrally_normalised(self.joint)

    def forward(self, image: Tensor, sentence: Tensor, other_sentence: Tensor | None = None) -> Scores:
        return self.scores(self.features(image), sentence, other_sentence)

    def scores(self, features: Tensor, sentence: Tensor, other_sentence: Tensor | None = None) -> Scores:
        """The answers, of features."""
        alone = self.unconditional(features) if self.unconditional else None
        matched = self.judge(features, sentence)
        mismatched = None if other_sentence is None else self.judge(features[:len(other_sentence)], other_sentence)
        return Scores(matched, mismatched, alone)

    def judge(self, features: Tensor, sentence: Tensor) -> Tensor:
        return self.conditional(self.joint(join(features, sentence)))


def image_features(side: int, width: int, norm: bool = True) -> nn.Sequential:
    """Halves the side down to 4 and doubles the channels up to 8 width; larger pictures go beyond, and back.

    Without ``norm``, which is batch normalisation, the convolutions have biases.
    """
    options = {"norm": norm, "bias": not norm}
    halvings = (side // STEM_SIDE).bit_length() - 1
    channels = [width << step for step in range(halvings)]
    layers = [down(3, width, norm=False, bias=not norm)]
    layers += [down(before, after, **options) for before, after in zip(channels, channels[1:], strict=False)]
    last = channels[-1]
    while last > 8 * width:
        layers.append(same(last, last // 2, **options))
        last //= 2
    if last < 8 * width:        # a picture of less than 64 pixels
        layers.append(same(last, 8 * width, **options))
    return nn.Sequential(*layers)


def score_head(channels: int) -> nn.Sequential:
    """[B, channels, 4, 4] -> logits [B]."""
    return nn.Sequential(nn.Conv2d(channels, 1, STEM_SIDE, stride=STEM_SIDE), nn.Flatten(0))


# -- the losses

def discriminator_loss(real: Scores, fake: Scores, share: float = 1.0) -> Tensor:
    """One discriminator's loss, as released: the mean over what is real plus the mean over what is not.

    (BCE(u(x), 1) + BCE(c(x, e), 1)) / 2 + (BCE(u(x^), 0) + BCE(c(x^, e), 0) + BCE(c(x, e'), 0)) / 3. Without an
    unconditional head (AttnDCGAN): BCE(c(x, e), 1) + (BCE(c(x^, e), 0) + BCE(c(x, e'), 0)) / 2. ``real.mismatched`` are
    the real pictures with other sentences; ``share`` is what their mean counts where processes hold different numbers.
    """
    genuine = [bce(logits, 1) for logits in (real.alone, real.matched) if logits is not None]
    wrong = [bce(logits, 0) for logits in (fake.alone, fake.matched) if logits is not None]
    if real.mismatched is not None:
        wrong.append(share * bce(real.mismatched, 0))
    return sum(genuine) / len(genuine) + sum(wrong) / len(wrong)


def adversarial_loss(fakes: Sequence[Scores]) -> Tensor:
    """The generator's: sum over the pictures of BCE(u(x^), 1) + BCE(c(x^, e), 1)."""
    return sum(bce(logits, 1) for scores in fakes for logits in (scores.alone, scores.matched)
               if logits is not None)


def generator_loss(fakes: Sequence[Scores], *terms: tuple[float, Tensor]) -> Tensor:
    """The adversarial sum, and each further term times its weight."""
    return adversarial_loss(fakes) + sum(weight * term for weight, term in terms)


# -- training

class ScaleDiscriminatorsConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminators; the defaults are AttnGAN's for CUB (COCO: width 96)."""

    width: int = Field(default=64, ge=1, description="channels after the first convolution (ndf)")


class RefiningLossConfig(Section, json_schema_extra=FREE):
    """Weights of the generator's terms beside the adversarial one; each is called as in :meth:`RefiningTask.terms`."""

    kl: float = Field(default=1.0, ge=0, description="weight of the conditioning augmentation's divergence")


class MatchingLossConfig(RefiningLossConfig):
    """With the matching model's term."""

    damsm: float = Field(default=5.0, ge=0, description="weight of the matching loss, lambda (COCO: 50)")
    gammas: Gammas | None = Field(default=None, description="of the matching scores: attention, words, pairs; null: "
                                  "those that the matching model was trained with (the code's 4, 5, 10)")
    same_class: Literal["left_out", "mismatched"] = Field(
        default="left_out", description="what another caption of one's own class is to the matching model")


class RefiningRun(GANRun):
    """What the runs of all of them have; a system adds ``task``, ``generator`` and ``loss``."""

    discriminator: ScaleDiscriminatorsConfig = Field(default=ScaleDiscriminatorsConfig(),
                                                     description="sizes of the discriminators")
    generator_optimizer: GANOptimizer = Field(default=GANOptimizer(ema=0.999),
                                              description="how the generator's weights move")

    @property
    def reads_several_captions(self) -> bool:
        return False


class MatchingRun(RefiningRun):
    """With a matching model. Without ``text_encoder`` its own reads the captions, as in the papers."""

    damsm: str = Field(description="run or model folder of the matching model; frozen", json_schema_extra=FREE)


class RefiningTask(GANTask):
    """The same fakes for both players, as released; wrong pairs are the batch's own, shifted by one."""

    paints_once = capturable = True
    wrong_texts = "rolled"
    Generator: ClassVar[type[RefiningGenerator]]
    config: RefiningRun

    def __init__(self, config: RefiningRun):
        encoder, self.frozen = self.readers(config)
        sizes = filled(config.generator, sentence_dim=encoder.sentence_dim, word_dim=encoder.word_dim,
                       image_size=config.data.image_size)
        self.assemble(config, self.Generator(sizes), self.make_discriminator(config, sizes), encoder, self.frozen)

    def readers(self, config: RefiningRun) -> tuple[nn.Module, dict[str, nn.Module]]:
        """The text encoder, and the frozen networks beside it."""
        return load_encoder(config), {}

    def make_discriminator(self, config: RefiningRun, sizes: RefiningConfig) -> nn.Module:
        """As :class:`ScaleDiscriminators` is called; the frozen networks of :meth:`readers` are there."""
        return ScaleDiscriminators(sizes.picture_sides, sizes.sentence_dim, config.discriminator.width)

    def terms(self, networks: Networks, batch: GanBatch) -> dict[str, Tensor]:
        """What the generator learns from beside the discriminators, each with the weight ``loss.NAME``."""
        return {"kl": self.network.augmentation.kl(batch["painted"].augmented)}

    def paint(self, networks: Networks, batch: GanBatch, step: int) -> Painted:
        return networks["generator"](batch["noise"], batch["text"])

    def d_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        discriminator, sentence, fakes = networks["discriminator"], batch["text"].sentence, batch["painted"].images
        other, share = self.shifted(networks, batch)
        reals = pyramid(batch["image"], self.network.config.picture_sides)
        real, fake = discriminator(reals, sentence, other), discriminator(fakes, sentence)
        return self.d_loss_of(real, fake, share)

    def d_loss_of(self, real: Sequence[Scores], fake: Sequence[Scores], share: float) -> Loss:
        """The discriminators' losses, each logged by the side of its pictures; as :func:`discriminator_loss` takes it.
        """
        losses = [discriminator_loss(right, made, share) for right, made in zip(real, fake, strict=True)]
        return Loss(sum(losses), {f"{side}": loss.detach() for side, loss in
                                  zip(self.network.config.picture_sides, losses, strict=True)})

    def shifted(self, networks: Networks, batch: GanBatch) -> tuple[Tensor, float]:
        """The sentences one sample on, for this rank's share of the first B - 1 samples, and what their mean counts."""
        exchange, own = self.exchange(networks), len(batch["caption"])
        pairs = exchange.size(own) - 1
        mine = len(exchange.mine(torch.arange(pairs)))
        # the last sample has nothing after it; a rank with no other still makes the pass, for nothing
        return batch["wrong_text"].sentence[:max(mine, 1)], mine * exchange.size(1) / pairs

    def g_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        return self.g_loss_of(networks, batch, networks["discriminator"](batch["painted"].images,
                                                                         batch["text"].sentence))

    def g_loss_of(self, networks: Networks, batch: GanBatch, fakes: Sequence[Scores]) -> Loss:
        """The generator's loss with the discriminators' scores of the batch's painted pictures."""
        terms = self.terms(networks, batch)
        weighted = [(getattr(self.config.loss, name), term) for name, term in terms.items()]
        return Loss(generator_loss(fakes, *weighted), {"adversarial": adversarial_loss(fakes).detach(),
                                                       **{name: term.detach() for name, term in terms.items()}})

    def real_scores(self, discriminator: Any, batch: GanBatch, image: Tensor) -> list[Tensor]:
        reals = pyramid(image, self.network.config.picture_sides)
        return [logits for scores in discriminator(reals, batch["text"].sentence)
                for logits in (scores.alone, scores.matched) if logits is not None]


class MatchingBatch(GanBatch, total=False):
    """With the captions for the matching model."""

    matching_text: Text         # as its own encoder reads them


class MatchingTask(RefiningTask):
    """The last picture must also find its own caption among those of the batch (AttnGAN's equation 12)."""

    companion_settings = {"text": "text_encoder", "damsm": "damsm", "damsm_text": "damsm"}
    unpacked = frozenset({"damsm", "damsm_text"})
    config: MatchingRun

    def readers(self, config: MatchingRun) -> tuple[nn.Module, dict[str, nn.Module]]:
        frozen: dict[str, nn.Module] = {"damsm": Damsm.load(config.damsm)}
        if config.text_encoder not in (None, config.damsm) or config.standardise_text:
            frozen["damsm_text"] = load_text_encoder(config.damsm)
        return load_encoder(config, default=config.damsm), frozen

    def companions(self) -> dict[str, Companion]:
        """Also ``damsm_text`` where one encoder reads the captions for all."""
        found = super().companions()
        return {**found, "damsm_text": found.get("damsm_text", Companion(self.frozen["text"], "damsm"))}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> MatchingBatch:
        prepared = super().prepare(batch, networks, step)
        own = networks.bare("damsm_text")(batch["caption"]) if "damsm_text" in self.frozen else prepared["text"]
        return {**prepared, "matching_text": own}

    def terms(self, networks: Networks, batch: MatchingBatch) -> dict[str, Tensor]:
        return {"damsm": self.matching(networks, batch["painted"].image, batch), **super().terms(networks, batch)}

    def matching(self, networks: Networks, image: Tensor, batch: MatchingBatch) -> Tensor:
        """L_DAMSM of the global batch, the same on every process, with gradient to ``image``."""
        return self.matching_of(networks, networks["damsm"].image(image), batch)

    def matching_of(self, networks: Networks, codes: tuple[Tensor, Tensor], batch: MatchingBatch) -> Tensor:
        """The same, of the regions and wholes that the matching model made of pictures."""
        return sum(damsm_losses(*codes, batch["matching_text"], self.alike(batch), self.gammas(networks),
                                networks.world_size))

    def alike(self, batch: MatchingBatch) -> Tensor | None:
        """int64 [b]: samples with the same number, but for -1, are no mismatch to each other; None: all are."""
        return batch["class_id"] if self.config.loss.same_class == "left_out" else None

    def gammas(self, networks: Networks) -> Gammas:
        """How sharp the matching scores are."""
        return self.config.loss.gammas or networks["damsm"].config.gammas
