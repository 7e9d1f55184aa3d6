"""How well the words of a caption fit the regions of a picture: DAMSM's scores and losses (arXiv 1711.10485, 3.2).

``gans/damsm.py`` trains its encoders by them, and a generator learns from them through the frozen ones. The code's form
of the equations, as that file says.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat
from torch import Tensor

from dalle.models.precision import at_least_single, full_precision
from dalle.training.gathering import in_global_order, in_global_order_with_gradient
from gans.text import Text

SMALLEST = 1e-8         # of the product of two lengths, in every cosine


class Gammas(NamedTuple):
    """How sharp attention, the sum over words and the softmax over pairs are (the code's values)."""

    attention: PositiveFloat = 4.0
    words: PositiveFloat = 5.0
    pairs: PositiveFloat = 10.0


GAMMAS = Gammas()


class MatchingLosses(NamedTuple):
    """Picture to captions and caption to pictures, of words and of sentences; the DAMSM loss is their sum."""

    words0: Tensor
    words1: Tensor
    sent0: Tensor
    sent1: Tensor


def func_attention(words: Tensor, regions: Tensor, gamma1: float = 4.0,
                   mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What each word of [B, D, T] sees of its picture's regions [B, D, h, w] (equations 8 and 9).

    The scores of a region are a softmax over the words first, then a word's weights one over the regions: contexts
    [B, D, T], weights [B, T, h, w]. ``mask`` bool [B, T]: which words there are; all, without it. The weights of a
    word that is not there mean nothing.
    """
    flat = regions.flatten(2)                                                       # [B, D, R]
    scores = words.transpose(1, 2) @ flat                                           # [B, T, R]
    if mask is not None:
        scores = scores.masked_fill(~mask[:, :, None], -math.inf)
    weights = (gamma1 * scores.softmax(dim=1)).softmax(dim=2)
    return flat @ weights.transpose(1, 2), weights.unflatten(2, regions.shape[2:])


def word_scores(regions: Tensor, words: Tensor, mask: Tensor, gamma1: float = 4.0, gamma2: float = 5.0,
                gamma3: float = 10.0) -> Tensor:
    """S [N, M] of the pictures' regions [N, D, h, w] and the captions' words [M, D, T], mask [M, T].

    S = gamma_3 ln sum_i exp(gamma_2 cos(c_i, e_i)): equation 10 without its exponent 1 / gamma_2, as released. All
    pairs at once, with what ``func_attention`` does for each of them.
    """
    words = words.transpose(1, 2)                                                   # [M, T, D]
    captions, length, dim = words.shape
    flat = regions.flatten(2)                                                       # [N, D, R]
    scores = (words.reshape(-1, dim) @ flat).unflatten(1, (captions, length))       # [N, M, T, R]
    scores = scores.masked_fill(~mask[None, :, :, None], -math.inf).softmax(dim=2)
    weights = (gamma1 * scores).softmax(dim=3).flatten(1, 2)              # [N, M T, R]
    contexts = (weights @ flat.transpose(1, 2)).unflatten(1, (captions, length))    # [N, M, T, D]
    lengths = contexts.norm(dim=3) * words.norm(dim=2)
    cosines = (contexts * words).sum(dim=3) / lengths.clamp(min=SMALLEST)           # [N, M, T]
    fits = (gamma2 * cosines).masked_fill(~mask, -math.inf).logsumexp(dim=2)
    return gamma3 * fits


def sentence_scores(pooled: Tensor, sentence: Tensor, gamma3: float = 10.0) -> Tensor:
    """S [pictures, captions] = gamma_3 cos of whole pictures [N, D] and sentences [M, D]."""
    lengths = pooled.norm(dim=1)[:, None] * sentence.norm(dim=1)[None, :]
    return gamma3 * (pooled @ sentence.T) / lengths.clamp(min=SMALLEST)


def pair_losses(scores: Tensor, class_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cross-entropy over rows and over columns of S [B, B] (equations 11 and 12; means, as released).

    Other samples of the same class are no mismatch and are left out; -1 is a class of its own.
    """
    if class_ids is not None:
        alike = (class_ids[:, None] == class_ids[None, :]) & (class_ids >= 0)
        scores = scores.masked_fill(alike.fill_diagonal_(False), -math.inf)
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, own), F.cross_entropy(scores.T, own)


def words_loss(regions: Tensor, words: Tensor, mask: Tensor, class_ids: Tensor | None = None,
               gamma1: float = 4.0, gamma2: float = 5.0, gamma3: float = 10.0) -> tuple[Tensor, Tensor]:
    """The word-level losses of B pairs: regions [B, D, h, w], words [B, D, T], mask bool [B, T]."""
    return pair_losses(word_scores(regions, words, mask, gamma1, gamma2, gamma3), class_ids)


def sent_loss(pooled: Tensor, sentence: Tensor, class_ids: Tensor | None = None,
              gamma3: float = 10.0) -> tuple[Tensor, Tensor]:
    """The sentence-level losses of B pairs [B, D], [B, D]."""
    return pair_losses(sentence_scores(pooled, sentence, gamma3), class_ids)


def damsm_losses(local: Tensor, pooled: Tensor, text: Text, class_ids: Tensor | None = None,
                 gammas: Gammas = GAMMAS, world_size: int = 1) -> MatchingLosses:
    """All four of the global batch: this rank's regions [b, D, h, w], wholes [b, D], texts and classes [b].

    Every process computes the same losses, with gradient to its own share; the engine's mean over the processes of
    their parameters' gradients is then that of one process.
    """
    with full_precision(local.device):
        local, pooled, sentence, words = (in_global_order_with_gradient(at_least_single(part), world_size)
                                          for part in (local, pooled, text.sentence, text.words))
        mask = in_global_order(text.mask, world_size)
        if class_ids is not None:
            class_ids = in_global_order(class_ids, world_size)
        return MatchingLosses(*words_loss(local, words, mask, class_ids, *gammas),
                              *sent_loss(pooled, sentence, class_ids, gammas.pairs))
