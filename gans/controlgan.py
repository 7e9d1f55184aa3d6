"""ControlGAN (arXiv 1909.07083): a word of the caption moves what it names, and little else.

AttnGAN with three additions. In each refinement the channels, too, look for their words (section 3.1). A word-level
discriminator says which words a picture shows (section 3.2). Each picture is drawn near the real one of its sample, as
a frozen network sees both (section 3.3). The pictures of two captions that differ in one word, painted with the same z
and the same eps, which one seed gives, are an edit (``dalle/metrics/edits.py`` measures them).

Paper and released code differ in two places, and so does this:

Channels. The paper gives them the hidden map; the code, followed here, the context that the places found
(``generator.channels_read``: ``context`` or ``h``). Padding is masked here; in the code it has the score 0, adds
nothing and thins out the weights. The code builds both sizes of F_k in every attention; here only what is used.

The word-level discriminator. In the released code it is a constant: its inputs are frozen and its outcome is taken out
of the graph, so no network learns from it. ``mode: released`` leaves it out, which is what that code computes. The
paper's objective cannot be had as written: its L_corre is a sum of L values in [0.27, 0.73], and it takes
log(1 - L_corre), which is of a negative number for four words or more. ``mode: paper`` is a repair of ours, not the
authors': a trainable F' (1 x 1, the identity at first) belongs to the discriminators, p = sigmoid(ln sum_i exp(gamma_2
cos_i)) has its gradient, and both players learn from it by cross-entropy. gamma', the paper's weights of the words,
cancels inside the cosine and is left out.

The caption S' that a picture is not of is the one of the next sample of the global batch, as with the sentences; the
code draws one from the training set. Neither asks for another class.
"""

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from dalle.config import FIXED, FREE
from dalle.models.precision import at_least_single, full_precision
from dalle.training.task import Batch, Loss, Networks
from gans.attention import global_attention
from gans.layers import conv1, residual_glu, up_glu
from gans.losses import bce, perceptual_loss
from gans.matching import SMALLEST, func_attention
from gans.perceptual import load_features
from gans.refining import (
    MatchingBatch,
    MatchingLossConfig,
    MatchingRun,
    MatchingTask,
    RefiningConfig,
    RefiningGenerator,
    RefiningTask,
    ScaleDiscriminators,
)
from gans.task import pyramid
from gans.text import Text

# -- the generator

class ControlGANConfig(RefiningConfig):
    """Sizes of the generator; the defaults are the paper's for CUB (COCO: width 48, residuals 3)."""

    channels_read: Literal["context", "h"] = Field(
        default="context", description="what the channels look for their words with: the context that the places "
                                       "found, as released, or the hidden map, as in the paper")


class ControlGANGenerator(RefiningGenerator):
    """z and a caption's sentence and words to pictures of growing side; a network of one size of picture."""

    model_type = "controlgan"
    Config = ControlGANConfig
    config: ControlGANConfig

    def refinement(self, level: int) -> nn.Module:
        sizes = self.config
        return Refinement(sizes.width, sizes.word_dim, sizes.residuals, sizes.sides[level], sizes.channels_read)


class Refinement(nn.Module):
    """Places and channels look for their words: [B, width, S, S] to [B, width, 2S, 2S] and [B, T, S, S]."""

    def __init__(self, width: int, word_dim: int, residuals: int, side: int,
                 channels_read: Literal["context", "h"] = "context"):
        super().__init__()
        self.channels_read = channels_read
        self.to_values = conv1(word_dim, width)                                     # U
        self.to_places = conv1(word_dim, side ** 2)                                 # F_k
        self.residual = nn.Sequential(*(residual_glu(3 * width) for _ in range(residuals)))
        self.grow = up_glu(3 * width, width)

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor]:
        words = text.words[..., None]
        context, attention = global_attention(h, self.to_values(words)[..., 0], text.mask)
        read = context if self.channels_read == "context" else h
        channels, _ = channel_attention(read, self.to_places(words)[..., 0], text.mask)
        return self.grow(self.residual(torch.cat([h, context, channels], dim=1))), attention


def channel_attention(features: Tensor, words: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every channel's own mixture of the words (equations 2 to 4), and its weights.

    ``features`` [B, C, H, W], ``words`` [B, H W, T]: each word as a map; ``mask`` bool [B, T], True for a word ->
    [B, C, H, W] and attention [B, C, T], which sums to 1 over the words (0 everywhere for a caption without any).
    Without a mask padding is weighted like a word, as in the released code.
    """
    scores = features.flatten(2) @ words                                            # [B, C, T]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
    attention = scores.softmax(dim=-1)
    if mask is not None:
        attention = attention * mask[:, None]
    found = attention.to(words.dtype) @ words.transpose(1, 2)                       # [B, C, H W]
    return found.unflatten(2, features.shape[2:]), attention


# -- the word-level discriminator

class WordDiscriminators(ScaleDiscriminators):
    """One discriminator for each side of picture and F', as one player."""

    def __init__(self, sides: list[int], sentence_dim: int, width: int, region_dim: int):
        super().__init__(sides, sentence_dim, width)
        self.regions = conv1(region_dim, region_dim)                                # F'
        nn.init.dirac_(self.regions.weight)     # at first the words are found as the matching model finds them

    def forward(self, seen: list[Tensor] | Tensor, *sentences: Tensor | None):
        """Scores of a list of pictures, as its parent has it; or regions [B, D, h, w] as F' sees them."""
        return self.regions(seen) if isinstance(seen, Tensor) else super().forward(seen, *sentences)


def word_level_correlation(regions: Tensor, words: Tensor, mask: Tensor, gamma1: float = 4.0,
                           gamma2: float = 5.0) -> Tensor:
    """How well each caption's words fit its own picture: logits [B] of the released p = sigmoid(ln sum_i exp(gamma_2
    r_i)), r_i the cosine of word i and what it sees of the picture.

    ``regions`` [B, D, h, w], ``words`` [B, D, T], ``mask`` bool [B, T].
    """
    with full_precision(regions.device):
        words = at_least_single(words)
        contexts, _ = func_attention(words, at_least_single(regions), gamma1, mask)
        fits = gamma2 * word_cosines(contexts, words)
        return fits.masked_fill(~mask, -math.inf).logsumexp(dim=1)


def word_cosines(contexts: Tensor, words: Tensor) -> Tensor:
    """[B, T] of contexts and words [B, D, T]; a positive weight of a word's context cancels."""
    lengths = contexts.norm(dim=1) * words.norm(dim=1)
    return (contexts * words).sum(dim=1) / lengths.clamp(min=SMALLEST)


def word_discriminator_loss(matched: Tensor, mismatched: Tensor) -> Tensor:
    """0.5 (BCE(p(x, S), 1) + BCE(p(x, S'), 0)), of logits [B]."""
    return 0.5 * (bce(matched, 1) + bce(mismatched, 0))


# -- training

class ControlGANLossConfig(MatchingLossConfig):
    """The released weights."""

    perceptual: float = Field(default=1.0, ge=0, description="weight of the distance to the real picture of the same "
                              "sample, the mean over the scales")
    words: float = Field(default=1.0, ge=0, description="weight of the word-level discriminator, for both players; "
                         "mode released has none")


class ControlGANRun(MatchingRun):
    """A ControlGAN run."""

    task: Literal["controlgan"] = Field(default="controlgan", description="the kind of run: a ControlGAN")
    mode: Literal["released", "paper"] = Field(
        default="released", description="released: the word-level discriminator teaches nothing, as in the released "
                                        "code; paper: a repair of it, with an F' that is trained",
        json_schema_extra=FIXED)
    features: str = Field(default="vgg16_relu2_2", description="what sees real and painted pictures, as in "
                          "gans/perceptual.py; pixels go into VGG without ImageNet's mean and deviation, as released",
                          json_schema_extra=FREE)
    generator: ControlGANConfig = Field(default=ControlGANConfig(), description="sizes of the generator")
    loss: ControlGANLossConfig = Field(default=ControlGANLossConfig(), description="the generator's terms beside the "
                                       "adversarial one")


class ControlGANBatch(MatchingBatch, total=False):
    """With the captions that the pictures are not of, in mode paper."""

    wrong_matching_text: Text       # as the matching model's own encoder reads them


class ControlGANTask(MatchingTask):
    """AttnGAN's losses, the perceptual one at every scale and, in mode paper, the word-level ones."""

    Generator = ControlGANGenerator
    companion_settings = {**MatchingTask.companion_settings, "features": "features"}
    unpacked = MatchingTask.unpacked | {"features"}
    config: ControlGANRun

    def readers(self, config: ControlGANRun) -> tuple[nn.Module, dict[str, nn.Module]]:
        encoder, frozen = super().readers(config)
        return encoder, {**frozen, "features": load_features(config.features, normalise=False)}

    def make_discriminator(self, config: ControlGANRun, sizes: ControlGANConfig) -> nn.Module:
        if config.mode == "released":
            return super().make_discriminator(config, sizes)
        return WordDiscriminators(sizes.picture_sides, sizes.sentence_dim, config.discriminator.width,
                                  self.frozen["damsm"].config.dim)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> ControlGANBatch:
        prepared: ControlGANBatch = super().prepare(batch, networks, step)
        if self.config.mode == "paper":
            prepared["wrong_matching_text"] = self.roll_text(self.exchange(networks), prepared["matching_text"])
        return prepared

    def d_loss(self, networks: Networks, batch: ControlGANBatch, step: int) -> Loss:
        loss = super().d_loss(networks, batch, step)
        if self.config.mode == "released":
            return loss
        with torch.no_grad():
            regions, _ = networks["damsm"].image(batch["image"])
        words = word_discriminator_loss(*self.correlations(networks, regions, batch["matching_text"],
                                                           batch["wrong_matching_text"]))
        return Loss(loss.total + self.config.loss.words * words, {**loss.parts, "words": words.detach()})

    def terms(self, networks: Networks, batch: ControlGANBatch) -> dict[str, Tensor]:
        codes = networks["damsm"].image(batch["painted"].image)
        terms = {"damsm": self.matching_of(networks, codes, batch), "perceptual": self.perceptual(networks, batch),
                 **RefiningTask.terms(self, networks, batch)}
        if self.config.mode == "paper":
            (matched,) = self.correlations(networks, codes[0], batch["matching_text"])
            terms["words"] = bce(matched, 1)
        return terms

    def correlations(self, networks: Networks, regions: Tensor, *texts: Text) -> list[Tensor]:
        """Logits [B] of regions with each of the texts, seen through F'."""
        seen, gammas = networks["discriminator"](regions), self.gammas(networks)
        return [word_level_correlation(seen, text.words, text.mask, gammas.attention, gammas.words) for text in texts]

    def perceptual(self, networks: Networks, batch: ControlGANBatch) -> Tensor:
        """The mean over the scales of the distance to the real picture of the same sample."""
        features, fakes = networks["features"], batch["painted"].images
        reals = pyramid(batch["image"], self.network.config.picture_sides)
        return sum(perceptual_loss(features(fake), features(real))
                   for fake, real in zip(fakes, reals, strict=True)) / len(fakes)
