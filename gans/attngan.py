"""AttnGAN (arXiv 1711.10485): every place of a picture looks for its words, and a matching model judges the last one.

A first picture grows out of the sentence; each refinement doubles its side, with the words weighted for every place.
One discriminator a picture judges it alone and with its sentence. The last picture must also find its own caption
among those of the batch, word by word, as the frozen DAMSM (``gans/damsm.py``) sees it. What later systems took over
as it is stands in ``gans/refining.py``: the first map, the discriminators, the losses, the task.

Where paper and released code differ, the code's losses are followed: the offset by one as wrong pairs, means with the
weights of ``gans/refining.py``, gamma_1 4 for the paper's 5, KL with weight 1. The mask is the aligned one: the
released code weights the places of one picture with the padding of other captions (see ``global_attention``).
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from gans.layers import conv1, residual_glu, up_glu
from gans.refining import (
    MatchingLossConfig,
    MatchingRun,
    MatchingTask,
    RefiningConfig,
    RefiningGenerator,
    ScaleDiscriminators,
    global_attention,
)
from gans.text import Text


class AttnGANConfig(RefiningConfig):
    """Sizes of the generator; the defaults are the paper's for CUB (COCO: width 48, residuals 3)."""

    last_only: bool = Field(default=False, description="AttnDCGAN: only the last picture is made")

    @property
    def picture_sides(self) -> list[int]:
        return self.sides[-1:] if self.last_only else self.sides


class AttnGANGenerator(RefiningGenerator):
    """z and a caption's sentence and words to pictures of growing side (section 3.1, equations 1-4)."""

    model_type = "attngan"
    Config = AttnGANConfig
    config: AttnGANConfig

    def refinement(self, level: int) -> nn.Module:
        return Refinement(self.config.width, self.config.word_dim, self.config.residuals)


class Refinement(nn.Module):
    """F_attn and F: [B, width, S, S] and the words to [B, width, 2S, 2S] and the attention [B, T, S, S]."""

    def __init__(self, width: int, word_dim: int, residuals: int):
        super().__init__()
        self.to_values = conv1(word_dim, width)      # U
        self.residual = nn.Sequential(*(residual_glu(2 * width) for _ in range(residuals)))
        self.grow = up_glu(2 * width, width)

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor]:
        values = self.to_values(text.words[..., None])[..., 0]                      # [B, width, T]
        context, attention = global_attention(h, values, text.mask)
        return self.grow(self.residual(torch.cat([h, context], dim=1))), attention


class AttnGANRun(MatchingRun):
    """An AttnGAN run. Of ``loss``: AttnDCGAN has ``damsm`` 1."""

    task: Literal["attngan"] = Field(default="attngan", description="the kind of run: an AttnGAN")
    generator: AttnGANConfig = Field(default=AttnGANConfig(), description="sizes of the generator")
    loss: MatchingLossConfig = Field(default=MatchingLossConfig(), description="the generator's terms beside the "
                                     "adversarial one")


class AttnGANTask(MatchingTask):
    """Equation 12 with the KL term of the released code: L_G + lambda L_DAMSM + KL."""

    Generator = AttnGANGenerator
    config: AttnGANRun

    def make_discriminator(self, config: AttnGANRun, sizes: AttnGANConfig) -> nn.Module:
        return ScaleDiscriminators(sizes.picture_sides, sizes.sentence_dim, config.discriminator.width,
                                   unconditional=not sizes.last_only)
