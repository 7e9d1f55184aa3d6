"""AttnGAN (arXiv 1711.10485): every place of a picture looks for its words, and a matching model judges the last one.

A first picture grows out of the sentence; each refinement doubles its side, with the words weighted for every place.
One discriminator a picture judges it alone and with its sentence. The last picture must also find its own caption
among those of the batch, word by word, as the frozen DAMSM (``gans/damsm.py``) sees it. What later systems took over
as it is stands in ``gans/attention.py`` and ``gans/refining.py``: the attention, the first map, the discriminators, the
losses, the task.

Where paper and released code differ, the code's losses are followed: the offset by one as wrong pairs, means with the
weights of ``gans/refining.py``, gamma_1 4 for the paper's 5, KL with weight 1. The mask is the aligned one: the
released code weights the places of one picture with the padding of other captions (see ``gans/attention.py``).
"""

from typing import Literal

from pydantic import Field
from torch import nn

from gans.attention import Refinement
from gans.refining import (
    MatchingLossConfig,
    MatchingRun,
    MatchingTask,
    RefiningConfig,
    RefiningGenerator,
    ScaleDiscriminators,
)


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
