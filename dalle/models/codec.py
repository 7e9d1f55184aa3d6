"""What a codec is: a picture into a grid of codes and back. Each is one file beside this one, and a line in the store.
"""

from pydantic import Field
from torch import Tensor

from dalle.models.base import ModelConfig, PretrainedModel


class CodecConfig(ModelConfig):
    """What every codec's config says."""

    image_size: int = Field(ge=1, description="side of a picture, pixels")


class Codec(PretrainedModel):
    """What a transformer writes for, a CLIP looks through and an evaluation measures; the base of every codec.

    ``forward`` is the codec's own, for its losses.
    """

    config: CodecConfig

    @property
    def num_codes(self) -> int:
        """K: a code is a whole number from 0 to K - 1."""
        raise NotImplementedError

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of codes in a picture."""
        raise NotImplementedError

    def encode(self, images: Tensor) -> Tensor:
        """The codes of ``images`` (float [B, 3, H, W] on [0, 1]), row after row: int64 [B, rows * columns]."""
        raise NotImplementedError

    def decode(self, codes: Tensor) -> Tensor:
        """The pictures of ``codes`` int64 [B, rows * columns]: float [B, 3, H, W] on [0, 1].

        Raises ``ValueError`` when the number of codes is not the grid's, or a code is not the codec's.
        """
        raise NotImplementedError
