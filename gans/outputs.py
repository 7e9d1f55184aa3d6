"""What generators and discriminators hand to the losses: the tuples that several systems share."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from gans.layers import Augmented


class Painted(NamedTuple):
    """Pictures [B, 3, S, S] in [-1, 1], the smallest first, and what they were made with.

    ``augmented`` is None where no caption was read; ``attention`` holds [B, T, s, s] for each refinement that looked
    for its words.
    """

    images: list[Tensor]
    augmented: Augmented | None
    attention: Sequence[Tensor] = ()

    @property
    def image(self) -> Tensor:
        """The largest picture."""
        return self.images[-1]


class Scores(NamedTuple):
    """A discriminator's logits [B], one question each; None for what was not asked or has no head."""

    matched: Tensor | None = None       # is the picture real and its caption's?
    mismatched: Tensor | None = None    # the same of the pictures with other captions
    alone: Tensor | None = None         # is the picture real?

    def heads(self) -> list[Tensor]:
        """What each head says of the pictures as they were given."""
        return [logits for logits in (self.matched, self.alone) if logits is not None]
