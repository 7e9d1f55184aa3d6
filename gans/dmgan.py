"""DM-GAN (arXiv 1904.01310): a picture is refined out of a memory of its words, written after what is painted so far.

The stages are AttnGAN's (``gans/refining.py``). In each, a gate decides for every word how much of it and how much of
the picture goes into that word's place of the memory; every place of the picture finds words by their keys and reads
their values; a second gate decides for every place how much of what was read takes the place of what stood there. The
discriminators have AttnGAN's shape with spectral norms in the place of batch normalisation.

Where paper and released code differ, the code is followed: ReLUs behind every embedding of the memory, a picture's
description that hands no gradient back, and the gated response twice side by side, so that what follows is as wide as
for the paper's first form, the concatenation. Losses are AttnGAN's. The mask is the aligned one, as there.

Not as in the code: the spectral norm is PyTorch's. Its power iteration starts with u = W v where the code's starts
with v = W^T u, has 15 rounds behind it when training begins, and rests in evaluation mode. Both begin with normalised
normal vectors and make one round each time that a weight is used; the gradient goes through W in sigma = u^T W v alone.

The parts of the memory can be switched off one by one, as in the paper's comparison: ``generator.writing``,
``addressing``, ``reading`` and ``response`` say what takes their place. With words, keys and concatenated it is
AttnGAN's attention with one hidden layer more.
"""

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from gans.attention import global_attention
from gans.layers import conv1, relu, residual_glu, up_glu
from gans.refining import (
    MatchingLossConfig,
    MatchingRun,
    MatchingTask,
    RefiningConfig,
    RefiningGenerator,
    ScaleDiscriminators,
    ScaleDiscriminatorsConfig,
)
from gans.text import Text

Writing = Literal["gated", "even", "words"]
Addressing = Literal["keys", "even"]
Reading = Literal["values", "keys"]
Response = Literal["gated", "concatenated", "added"]


# -- the generator

class DMGANConfig(RefiningConfig):
    """Sizes of the generator; the defaults are the paper's for CUB (COCO: residuals 3)."""

    width: int = Field(default=64, ge=1, description="channels of the maps that pictures are made of (ngf)")
    memory_dim: int | None = Field(default=None, ge=1, description="numbers in a word's place of the memory; null: "
                                   "twice the width")
    writing: Writing = Field(default="gated", description="what a word's place of the memory holds: gated: word and "
                             "picture, as its gate says; even: half of each; words: the word alone, the paper's first "
                             "form")
    addressing: Addressing = Field(default="keys", description="where words are looked for: keys: where their keys "
                                   "fit; even: everywhere alike")
    reading: Reading = Field(default="values", description="what is read of a word: values: an embedding of its own; "
                             "keys: its key")
    response: Response = Field(default="gated", description="what was read, and the map: gated: one in the place of "
                               "the other, as each place's gate says; concatenated: side by side, the paper's first "
                               "form; added: their sum")


class DMGANGenerator(RefiningGenerator):
    """z and a caption's sentence and words to pictures of growing side."""

    model_type = "dmgan"
    Config = DMGANConfig
    config: DMGANConfig

    def refinement(self, level: int) -> nn.Module:
        return Refinement(self.config)


class Refinement(nn.Module):
    """[B, width, S, S] and the words to [B, width, 2S, 2S] and the attention [B, T, S, S]."""

    def __init__(self, config: DMGANConfig):
        super().__init__()
        width = config.width
        self.memory = Memory(config.word_dim, width, config.memory_dim or 2 * width, config.writing,
                             config.addressing, config.reading, config.response)
        self.residual = nn.Sequential(*(residual_glu(2 * width) for _ in range(config.residuals)))
        self.grow = up_glu(2 * width, width)

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor]:
        remembered = self.memory(h, text.words, text.mask)
        fused = remembered.fused
        wide = fused if fused.shape[1] == 2 * h.shape[1] else torch.cat([fused, fused], dim=1)
        return self.grow(self.residual(wide)), remembered.attention


class Remembered(NamedTuple):
    """Everything on the way through a memory of T words; None for what was switched off."""

    gate: Tensor | None         # [B, 1, T] in (0, 1): how much of a word is written, the rest is the picture
    memory: Tensor              # [B, M, T] >= 0
    key: Tensor | None          # [B, C, T] >= 0
    value: Tensor               # [B, C, T] >= 0
    attention: Tensor           # [B, T, H, W]
    read: Tensor                # [B, C, H, W]
    response: Tensor | None     # [B, 1, H, W] in (0, 1): how much of what was read stands in the place of the map
    fused: Tensor               # [B, C, H, W]; [B, 2C, H, W] where concatenated


class Memory(nn.Module):
    """The dynamic memory: a map [B, C, H, W] and words [B, E, T] to the map after them.

    ``released_mask`` as in :func:`gans.attention.global_attention`.
    """

    def __init__(self, word_dim: int, width: int, memory_dim: int, writing: Writing = "gated",
                 addressing: Addressing = "keys", reading: Reading = "values", response: Response = "gated",
                 released_mask: bool = False):
        super().__init__()
        self.writing, self.response, self.released_mask = writing, response, released_mask
        self.word_gate = conv1(word_dim, 1) if writing == "gated" else None                     # A
        self.map_gate = conv1(width, 1) if writing == "gated" else None                         # B
        self.write_word = embedding(word_dim, memory_dim)                                       # M_w
        self.write_map = embedding(width, memory_dim) if writing != "words" else None           # M_r
        self.to_key = embedding(memory_dim, width) if "keys" in (addressing, reading) else None             # phi_K
        self.to_value = embedding(memory_dim, width) if reading == "values" else None           # phi_V
        self.addressed = addressing == "keys"
        self.respond = conv1(2 * width, 1, bias=True) if response == "gated" else None

    def forward(self, h: Tensor, words: Tensor, mask: Tensor) -> Remembered:
        """``words`` [B, E, T], ``mask`` bool [B, T], True for a word."""
        gate, memory = self.write(h, words)
        key = self.to_key(memory)[..., 0] if self.to_key else None
        value = self.to_value(memory)[..., 0] if self.to_value else key
        sought = key if self.addressed else torch.zeros_like(value)
        read, attention = global_attention(h, sought, mask, self.released_mask, value)
        response, fused = self.answer(h, read)
        return Remembered(gate if gate is None else gate[..., 0], memory[..., 0], key, value, attention, read,
                          response, fused)

    def write(self, h: Tensor, words: Tensor) -> tuple[Tensor | None, Tensor]:
        """The writing gate [B, 1, T, 1] and the memory [B, M, T, 1]."""
        words = words[..., None]
        written = self.write_word(words)
        if self.writing == "words":
            return None, written
        described = h.mean(dim=(2, 3), keepdim=True).detach()                                   # [B, C, 1, 1]
        gate = (self.word_gate(words) + self.map_gate(described)).sigmoid() if self.word_gate else None
        share = 0.5 if gate is None else gate
        return gate, share * written + (1 - share) * self.write_map(described)

    def answer(self, h: Tensor, read: Tensor) -> tuple[Tensor | None, Tensor]:
        """The response gate [B, 1, H, W] and the map after the words."""
        if self.response == "concatenated":
            return None, torch.cat([read, h], dim=1)
        if self.response == "added":
            return None, read + h
        gate = self.respond(torch.cat([h, read], dim=1)).sigmoid()
        return gate, gate * read + (1 - gate) * h


def embedding(inputs: int, outputs: int) -> nn.Sequential:
    """[B, inputs, T, 1] -> [B, outputs, T, 1]: the same of every word; not below 0."""
    return nn.Sequential(conv1(inputs, outputs, bias=True), relu())


# -- training

class DMGANDiscriminatorsConfig(ScaleDiscriminatorsConfig):
    """Sizes of the discriminators; the defaults are the paper's, for both sets."""

    width: int = Field(default=32, ge=1, description="channels after the first convolution (ndf)")
    spectral: bool = Field(default=True, description="spectral norms and biases; false: AttnGAN's batch normalisation")


class DMGANRun(MatchingRun):
    """A DM-GAN run."""

    task: Literal["dmgan"] = Field(default="dmgan", description="the kind of run: a DM-GAN")
    generator: DMGANConfig = Field(default=DMGANConfig(), description="sizes of the generator")
    discriminator: DMGANDiscriminatorsConfig = Field(default=DMGANDiscriminatorsConfig(),
                                                     description="sizes of the discriminators")
    loss: MatchingLossConfig = Field(default=MatchingLossConfig(), description="the generator's terms beside the "
                                     "adversarial one")


class DMGANTask(MatchingTask):
    """AttnGAN's objective: L_G + lambda_2 L_DAMSM + lambda_1 KL."""

    Generator = DMGANGenerator
    config: DMGANRun

    def make_discriminator(self, config: DMGANRun, sizes: DMGANConfig) -> nn.Module:
        return ScaleDiscriminators(sizes.picture_sides, sizes.sentence_dim, config.discriminator.width,
                                   spectral=config.discriminator.spectral)
