"""What systems that edit a picture after a sentence share: what their networks take, and how a run shows it."""

import torch
from torch import Tensor

from dalle.data.index import ShardIndex
from dalle.errors import UserError
from dalle.evaluation.references import ShardReferences, read_pictures
from dalle.pictures import grid
from dalle.training.task import Networks
from gans.generator import Noise, Painter
from gans.layers import ConditioningAugmentation
from gans.outputs import Painted
from gans.task import GANTask
from gans.text import Text

MOST_LOOKED_AT = 64      # pictures, for enough that can be read


class Editor(Painter):
    """A generator that edits a picture; all its noise is that of its conditioning augmentation, ``augment``."""

    edits = True
    augment: ConditioningAugmentation

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"eps": self.config.condition_dim}

    def forward(self, noise: Noise, text: Text, source: Tensor) -> Painted:
        """``source`` [B, 3, S, S] in [-1, 1] edited after ``text``."""
        raise NotImplementedError

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text, source: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self(noise, text, source).image, {}


def halvings(image_size: int, side: int, least: int = 1) -> int:
    """How often a picture's side is halved until ``side`` is left; ``UserError`` for one that never gets there."""
    count = (image_size // side).bit_length() - 1
    if count < least or image_size != side << count:
        sides = ", ".join(str(side << level) for level in range(least, least + 4))
        raise UserError(f"data.image_size is {image_size}; this system's discriminator halves it down to {side}: set "
                        f"it to {sides}, ...")
    return count


class EditingTask(GANTask):
    """A GAN whose generator takes a picture, ``source``."""

    _sources: Tensor | None = None      # of the previews, once they were asked for

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """``samples``: held-out pictures in the first row, and below it, for each caption, what becomes of them."""
        settings = self.config.preview
        sources = self.preview_sources()
        if not settings.captions or not len(sources):
            return {}
        captions = [caption for caption in settings.captions for _ in sources]
        seeds = list(range(len(sources))) * len(settings.captions)
        edited = self.generator(networks).generate(captions, seeds,
                                                   sources=sources.repeat(len(settings.captions), 1, 1, 1))
        return {"samples": grid(torch.cat([sources, edited]), len(sources))}

    def preview_sources(self) -> Tensor:
        """uint8 [``columns``, 3, S, S]: the first pictures of ``data.validation``, or of the training set without."""
        if self._sources is None:
            data = self.config.data
            spec = data.validation or data.train
            index = ShardIndex.load(spec, data.bad_shards)
            numbers = list(range(min(index.num_samples, MOST_LOOKED_AT)))
            pictures, _, _ = read_pictures(ShardReferences(spec, index), numbers, data.image_size)
            self._sources = pictures[:self.config.preview.columns]
        return self._sources
