"""Pictures to change, for a generator that edits: each caption is asked of the picture of another sample."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dalle.errors import UserError
from dalle.evaluation.captions import Drawn
from dalle.evaluation.protocol import digest
from dalle.evaluation.references import References, read_pictures

PROTOCOL = "edits: pictures of other samples"
STREAM = 0x50_1C_E5     # no candidate has this number: a picture's source and its noise are drawn apart
MOST_TRIED = 100


class Sources:
    """For caption i of the list the picture of a sample of the same split, drawn by the seed; never the caption's own.

    ``references`` are the pictures of the split that the captions were drawn from.
    """

    def __init__(self, references: References, drawn: Sequence[Drawn], seed: int):
        if len(references) < 2:
            raise UserError(f"{references.name} holds {len(references)} picture: an edit starts from another sample's")
        self.references = references
        self.own = [one.position for one in drawn]
        self.numbers = [other_than(own, len(references), seed, place) for place, own in enumerate(self.own)]

    @property
    def digest(self) -> str:
        return digest({"numbers": self.numbers, "fingerprint": self.references.fingerprint})

    def pictures(self, places: Sequence[int], size: int) -> Tensor:
        """uint8 [n, 3, size, size] for the captions at ``places``."""
        return torch.cat([self._picture(place, size) for place in places])

    def _picture(self, place: int, size: int) -> Tensor:
        """The drawn one, or the next that can be read."""
        total, left_out = len(self.references), []
        for step in range(min(total, MOST_TRIED)):
            number = (self.numbers[place] + step) % total
            if number == self.own[place]:
                continue
            picture, good, bad = read_pictures(self.references, [number], size)
            if good:
                return picture
            left_out += bad
        raise UserError(f"{self.references.name}: no picture to edit can be read among {len(left_out)} in a row "
                        f"({left_out[0]})")


def other_than(own: int, count: int, *key: int) -> int:
    """A number below ``count`` that is not ``own``, by ``key`` alone; raw Philox, as in the drawing of captions."""
    raw = int(np.random.Philox(np.random.SeedSequence((*key, STREAM))).random_raw())
    number = raw % (count - 1)
    return number + (number >= own)
