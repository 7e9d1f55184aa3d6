"""TAGAN (Nam, Kim, Kim, arXiv 1810.11919): a picture is edited after a sentence, judged word by word.

Each word of the sentence becomes a small classifier of the picture's features at three scales; the score of a pair is
the product of what they find, each to the power of the word's attention. Generator and discriminator read the words
through recurrent networks of their own.

Where the paper and its authors' code differ, this is the code: the layers are summed before the power is taken (eq. 5
has it inside the sum), the conditional term of the discriminator is halved, the reconstruction weighs 0.2.

Known differences: the score is computed from logarithms, so that it and its gradient stay finite; the halvings before
the first of the three scales follow the picture's side, so that the last is 4 x 4 for any (128 pixels: the paper's).
"""

import math
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single
from dalle.training.task import Batch, Loss, Networks
from gans.editing import EditingTask, Editor, halvings
from gans.generator import Noise
from gans.layers import (
    ConditioningAugmentation,
    Residual,
    conv3,
    conv4,
    dcgan_init,
    down,
    join,
    leaky,
    relu,
    same,
    sequence,
    up,
)
from gans.losses import bce
from gans.outputs import Painted
from gans.sizes import ConditionDim, ImageSize, WordDim
from gans.task import GanBatch, GANRun, filled, load_encoder
from gans.text import Text

SCORE_EPS = 1e-7         # added to a word's score before its logarithm
SCALES = 3               # 16 x 16, 8 x 8 and 4 x 4
FIRST_SIDE = 16
RECONSTRUCTION_STREAM = 2


# -- the words

class Sentence(NamedTuple):
    """Words in their context ``words`` [B, T, H], zeros where there is none, and their mean ``whole`` [B, H]."""

    words: Tensor
    whole: Tensor


class WordReader(nn.Module):
    """A recurrent network in each direction over the word vectors; their outputs are averaged, not concatenated."""

    def __init__(self, word_dim: int, hidden: int):
        super().__init__()
        self.forwards = nn.GRU(word_dim, hidden, batch_first=True)
        self.backwards = nn.GRU(word_dim, hidden, batch_first=True)

    def forward(self, words: Tensor, mask: Tensor) -> Sentence:
        """[B, E, T] and bool [B, T]."""
        order = (~mask).int().argsort(dim=1, stable=True)                       # the words first: some leave gaps
        inputs = taken(words.transpose(1, 2), order)                            # [B, T, E]
        lengths = mask.sum(dim=1, keepdim=True)                                 # [B, 1]
        mirrored = mirrored_positions(lengths, mask.shape[1])
        with torch.autocast(words.device.type, enabled=False):                  # so small that casts cost more
            ahead, _ = self.forwards(inputs)
            back, _ = self.backwards(taken(inputs, mirrored))                   # from the last word to the first
        read = taken((ahead + taken(back, mirrored)) / 2, order.argsort(dim=1)) * mask.unsqueeze(2)
        return Sentence(read, read.sum(dim=1) / lengths.clamp(min=1))


def mirrored_positions(lengths: Tensor, count: int) -> Tensor:
    """int64 [B, T]: the first ``lengths`` [B, 1] positions from the last to the first; what is behind them stays."""
    positions = torch.arange(count, device=lengths.device).expand(len(lengths), count)
    return torch.where(positions < lengths, lengths - 1 - positions, positions)


def taken(sequences: Tensor, positions: Tensor) -> Tensor:
    """[B, T, C] in the order of ``positions`` [B, T]."""
    return sequences.gather(1, positions.unsqueeze(2).expand(-1, -1, sequences.shape[2]))


# -- the generator

class TAGANConfig(ModelConfig):
    """The paper's sizes. ``channels`` are those of the first convolution; the bottleneck has eight times as many."""

    image_size: ImageSize = Field(default=128, ge=32)
    word_dim: WordDim = 300
    hidden: int = Field(default=512, ge=1, description="numbers in the states of the recurrent networks over the words")
    condition_dim: ConditionDim = 128
    channels: int = Field(default=64, ge=1, description="channels of the first convolution; the bottleneck has eight "
                          "times as many")
    residual_blocks: int = Field(default=4, ge=0, description="residual blocks of the bottleneck")

    @model_validator(mode="after")
    def _halves(self) -> "TAGANConfig":
        if self.image_size % 8:
            raise ValueError(f"image_size {self.image_size} is not a multiple of 8, by which the encoder divides it")
        return self


class TAGANGenerator(Editor):
    """Encoder, conditioning augmentation, residual blocks, and a decoder that also gets what the encoder gave."""

    model_type = "tagan"
    Config = TAGANConfig
    config: TAGANConfig

    def __init__(self, config: TAGANConfig):
        super().__init__(config)
        channels = config.channels
        wide = 8 * channels
        self.reader = WordReader(config.word_dim, config.hidden)
        self.augment = ConditioningAugmentation(config.hidden, config.condition_dim, "lrelu")
        self.encoder = sequence(conv3(3, channels, bias=True), relu(),
                                *(down(channels * scale, channels * scale * 2, activation=relu) for scale in (1, 2, 4)))
        self.merge = sequence(same(wide + config.condition_dim, wide, activation=relu),
                              *(residual_linear(wide) for _ in range(config.residual_blocks)))
        self.decoder = sequence(*(up(channels * scale * 2, channels * scale) for scale in (4, 2, 1)),
                                conv3(channels, 3, bias=True), nn.Tanh())
        dcgan_init(self, linear=True)

    def forward(self, noise: Noise, text: Text, source: Tensor) -> Painted:
        augmented = self.augment(self.reader(text.words, text.mask).whole, noise["eps"])
        features = self.encoder(source)                                         # [B, 8C, S/8, S/8]
        image = self.decoder(features + self.merge(join(features, augmented.condition)))
        return Painted([image], augmented)


def residual_linear(channels: int) -> Residual:
    """Two 3x3 convolutions at one width; nothing after the sum."""
    return Residual(nn.Sequential(same(channels, channels, activation=relu),
                                  same(channels, channels, activation=None)))


# -- the score of a picture and a sentence, as functions of what the networks give

def word_attention(sentence: Sentence, mask: Tensor) -> Tensor:
    """alpha [B, T]: softmax over the words of u_t . m; 0 where there is none."""
    scores = (at_least_single(sentence.words) @ at_least_single(sentence.whole).unsqueeze(2)).squeeze(2)
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1) * mask


def conditional_log_score(layer_logits: Tensor, layer_weights: Tensor, attention: Tensor) -> Tensor:
    """log D(x, t) [B] = sum_t alpha_t log min(1, sum_j beta_tj sigmoid(logit_tj) + 1e-7).

    ``layer_logits``, ``layer_weights`` [B, T, J]: what word t finds in layer j, and beta before its softmax over j.
    """
    found = F.logsigmoid(at_least_single(layer_logits)) + at_least_single(layer_weights).log_softmax(dim=2)
    words = torch.logaddexp(found.logsumexp(dim=2), found.new_full((), math.log(SCORE_EPS))).clamp(max=0)
    return (attention * words).sum(dim=1)


def conditional_score(layer_logits: Tensor, layer_weights: Tensor, attention: Tensor) -> Tensor:
    """D(x, t) [B] in (0, 1]: see :func:`conditional_log_score`."""
    return conditional_log_score(layer_logits, layer_weights, attention).exp()


def logit_of(log_score: Tensor) -> Tensor:
    """log D - log(1 - D) of log D; what is nearer to certain than 1e-7 counts as that."""
    log_score = log_score.clamp(max=-SCORE_EPS)
    return log_score - (-torch.expm1(log_score)).log()


# -- the discriminator

class TAGANDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """The paper's sizes."""

    channels: int = Field(default=64, ge=1, description="a quarter of the channels at 16 x 16 pixels, an eighth of "
                          "those below")
    hidden: int = Field(default=512, ge=1, description="numbers in the states of the recurrent networks over the words")


class TextScores(NamedTuple):
    """Logits [B] of a picture by itself, and with each of the texts that were given."""

    image: Tensor
    pairs: tuple[Tensor, ...]


class TAGANDiscriminator(nn.Module):
    """Whether a picture is real, and how well each word of a sentence fits it."""

    def __init__(self, config: TAGANDiscriminatorConfig, image_size: int, word_dim: int):
        super().__init__()
        channels = config.channels
        widths = scale_widths(channels)
        self.first = first_scale(channels, halvings(image_size, FIRST_SIDE))                  # [B, 4C, 16, 16]
        self.further = nn.ModuleList(down(*pair) for pair in pairwise(widths))               # 8C at 8 x 8, 4 x 4
        self.head = nn.Conv2d(widths[-1], 1, 4)
        self.look = nn.ModuleList(same(width, width) for width in widths)
        self.reader = WordReader(word_dim, config.hidden)
        self.filters = nn.ModuleList(nn.Linear(config.hidden, width + 1) for width in widths)
        self.layer_weights = nn.Linear(config.hidden, SCALES)
        dcgan_init(self, linear=True)

    def forward(self, image: Tensor, *texts: Text) -> TextScores:
        """[B, 3, S, S] in [-1, 1]; without texts only the picture itself is judged."""
        scales = [self.first(image)]
        for layer in self.further:
            scales.append(layer(scales[-1]))
        single = self.head(scales[-1]).flatten()
        if not texts:
            return TextScores(single, ())
        vectors = [look(scale).mean(dim=(2, 3)).repeat(len(texts), 1)
                   for look, scale in zip(self.look, scales, strict=True)]
        together = Text(*(torch.cat(parts) for parts in zip(*texts, strict=True)))      # the words are read once
        return TextScores(single, logit_of(self.pair_log_score(vectors, together)).chunk(len(texts)))

    def pair_log_score(self, vectors: list[Tensor], text: Text) -> Tensor:
        """The three scales' features [B, C_j] and a text -> log D(x, t) [B]."""
        sentence = self.reader(text.words, text.mask)
        logits = [self.applied(filters(sentence.words), vector)
                  for filters, vector in zip(self.filters, vectors, strict=True)]
        return conditional_log_score(torch.stack(logits, dim=2), self.layer_weights(sentence.words),
                                     word_attention(sentence, text.mask))

    @staticmethod
    def applied(filters: Tensor, vector: Tensor) -> Tensor:
        """Each word's weights and offset [B, T, C + 1] on the picture's features [B, C] -> [B, T]."""
        return (filters[:, :, :-1] @ vector.unsqueeze(2)).squeeze(2) + filters[:, :, -1]


def scale_widths(channels: int) -> tuple[int, ...]:
    return 4 * channels, 8 * channels, 8 * channels


def first_scale(channels: int, halvings: int) -> nn.Sequential:
    """[B, 3, S, S] -> [B, 4 channels, 16, 16]: channels double from layer to layer and end at four times ``channels``.
    """
    widths = [max(1, 4 * channels >> left) for left in reversed(range(halvings))]
    return sequence(conv4(3, widths[0], bias=True), leaky(), *(down(*pair) for pair in pairwise(widths)))


# -- the losses, as functions of logits

class TAGANLossConfig(Section, json_schema_extra=FREE):
    """The authors' weights."""

    conditional: float = Field(default=10.0, ge=0, description="lambda 1: weight of the sentence's score")
    reconstruction: float = Field(default=0.2, ge=0, description="lambda 2: weight of what the picture's own sentence "
                                  "should not change")
    reconstruction_norm: Literal["l1", "l2"] = Field(default="l1", description="that difference: absolute or squared, "
                                                     "mean over pixels")
    kl: float = Field(default=0.5, ge=0, description="weight of the conditioning augmentation's divergence")


def discriminator_loss(real: Tensor, matching: Tensor, mismatching: Tensor, fake: Tensor,
                       conditional: float = 10.0) -> Tensor:
    """L_D: eq. 1 with its conditional terms halved; edited pictures are judged without their sentence."""
    pairs = 0.5 * (bce(matching, 1) + bce(mismatching, 0))
    return bce(real, 1) + conditional * pairs + bce(fake, 0)


def generator_loss(fake: Tensor, fake_pair: Tensor, divergence: Tensor, own_divergence: Tensor,
                   reconstruction: Tensor, weights: TAGANLossConfig | None = None) -> Tensor:
    """L_G: eq. 2; ``own_`` and ``reconstruction`` are those of the pass with the picture's own sentence."""
    weights = weights or TAGANLossConfig()
    asked = bce(fake, 1) + weights.conditional * bce(fake_pair, 1) + weights.kl * divergence
    return asked + weights.reconstruction * reconstruction + weights.kl * own_divergence


def reconstruction_error(edited: Tensor, source: Tensor, norm: Literal["l1", "l2"] = "l1") -> Tensor:
    """The mean absolute or squared difference."""
    difference = at_least_single(edited) - at_least_single(source)
    return difference.abs().mean() if norm == "l1" else difference.square().mean()


# -- the run

class TAGANRun(GANRun):
    """A TAGAN run."""

    task: Literal["tagan"] = Field(default="tagan", description="the kind of run: a TAGAN")
    generator: TAGANConfig = Field(default=TAGANConfig(), description="sizes of the generator")
    discriminator: TAGANDiscriminatorConfig = Field(default=TAGANDiscriminatorConfig(),
                                                    description="sizes of the discriminator")
    loss: TAGANLossConfig = Field(default=TAGANLossConfig(), description="weights of the loss's terms")

    @property
    def reads_several_captions(self) -> bool:
        return False


class TAGANBatch(GanBatch, total=False):
    """With noise for one more pass."""

    noise_own: Noise        # of the pass with the picture's own sentence


class TAGANTask(EditingTask):
    """Pictures with their own sentence and with the one before it in the batch, which is what they are edited after.

    The generator's step draws new conditions, and one more for the pass with the own sentence.
    """

    fresh_noise = capturable = True
    wrong_texts = "rolled"
    wrong_text_shift = -1

    def __init__(self, config: TAGANRun):
        encoder = load_encoder(config)
        discriminator = TAGANDiscriminator(config.discriminator, config.data.image_size, encoder.word_dim)
        generator = TAGANGenerator(filled(config.generator, image_size=config.data.image_size,
                                          word_dim=encoder.word_dim))
        self.assemble(config, generator, discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> TAGANBatch:
        prepared = super().prepare(batch, networks, step)
        own = self.draw(self.exchange(networks), len(batch["image"]), step, RECONSTRUCTION_STREAM,
                        batch["image"].device)
        return {**prepared, "noise_own": own}

    def d_loss(self, networks: Networks, batch: TAGANBatch, step: int) -> Loss:
        discriminator, source, asked = networks["discriminator"], batch["image"], batch["wrong_text"]
        with torch.no_grad():
            edited = networks["generator"](batch["noise"], asked, source).image
        real = discriminator(source, batch["text"], asked)
        matching, mismatching = real.pairs
        fake = discriminator(edited).image          # nothing is learnt about sentences from edited pictures
        total = discriminator_loss(real.image, matching, mismatching, fake, self.config.loss.conditional)
        return Loss(total, {name: scores.detach().sigmoid().mean() for name, scores in
                            (("real", real.image), ("fake", fake), ("matching", matching),
                             ("mismatching", mismatching))})

    def g_loss(self, networks: Networks, batch: TAGANBatch, step: int) -> Loss:
        generator, weights, source = networks["generator"], self.config.loss, batch["image"]
        edited = generator(batch["noise_g"], batch["wrong_text"], source)
        fake = networks["discriminator"](edited.image, batch["wrong_text"])
        kept = generator(batch["noise_own"], batch["text"], source)
        error = reconstruction_error(kept.image, source, weights.reconstruction_norm)
        divergences = [self.network.augment.kl(one.augmented) for one in (edited, kept)]
        (pair,) = fake.pairs
        return Loss(generator_loss(fake.image, pair, *divergences, error, weights),
                    {"kl": divergences[0].detach(), "reconstruction": error.detach(),
                     "asked": pair.detach().sigmoid().mean()})

    def real_scores(self, discriminator: nn.Module, batch: TAGANBatch, image: Tensor) -> list[Tensor]:
        scores = discriminator(image, batch["text"])
        return [scores.image, *scores.pairs]
