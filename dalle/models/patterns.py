"""Which slots may look at which: the attention patterns of DALL-E over one stream of text and image slots.

The stream is a *prefix* (the text slots and one start token, causal among themselves) followed by the image slots in
raster order. An image slot sees the whole prefix and, among the image slots up to itself, those its pattern names.
Source: arXiv 2102.12092, appendix B.1 and figure 11.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

PatternName = Literal["full", "row", "column", "conv"]
ConvMode = Literal["flat", "clamp", "torus"]
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]     # (batch, head, query, key) -> bool


def layer_patterns(attention: str | Sequence[PatternName], depth: int) -> list[PatternName]:
    """The pattern of each of ``depth`` layers.

    ``"dalle"`` is the paper's order: the last layer is ``conv``, layer i (counted from 1) is ``column`` when
    ``(i - 2) % 4 == 0`` and ``row`` otherwise. One name is used for all layers; a sequence is repeated.
    """
    if attention == "dalle":
        order: list[PatternName] = ["column" if (layer - 2) % 4 == 0 else "row" for layer in range(1, depth)]
        return [*order, "conv"]
    names = [attention] if isinstance(attention, str) else list(attention)
    return [names[layer % len(names)] for layer in range(depth)]


@dataclass(frozen=True)
class AttentionPattern:
    """One pattern over a stream of ``prefix`` slots and a ``grid`` of (rows, columns) image slots."""

    name: PatternName
    prefix: int
    grid: tuple[int, int]
    conv_kernel: int = 11
    conv_mode: ConvMode = "flat"

    @property
    def length(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def mask(self) -> Tensor:
        """bool [length, length], True where the query (row) may attend to the key (column); on the CPU."""
        return _mask(self)

    def pairs(self, length: int) -> int:
        """How many (query, key) pairs the first ``length`` slots compute."""
        return int(self.mask()[:length, :length].sum())

    def visible_image_slots(self, slot: int) -> slice | Tensor:
        """The image slots, counted in the whole stream, that the image query at ``slot`` attends to.

        A slice where they are evenly spaced (``full``, ``row``, ``column``), indices otherwise (``conv``).
        """
        return _visible_image_slots(self, slot)


@lru_cache(maxsize=32)
def _mask(pattern: AttentionPattern) -> Tensor:
    with torch.inference_mode(False), torch.device("cpu"):  # the cached tensor may later take part in training
        mask = torch.ones(pattern.length, pattern.length, dtype=torch.bool).tril()
        if pattern.name != "full":
            mask[pattern.prefix:, pattern.prefix:] &= image_to_image(pattern)
        return mask


def image_to_image(pattern: AttentionPattern) -> Tensor:
    """bool [image slots, image slots]: the pattern among the image slots alone, causality left to the caller."""
    rows, width = pattern.grid
    slots = torch.arange(rows * width)
    distance = slots[:, None] - slots[None, :]
    if pattern.name == "row":  # the last `width` slots and itself: it wraps, the furthest is straight above
        return (distance >= 0) & (distance <= width)
    if pattern.name == "column":
        return distance % width == 0
    reach = pattern.conv_kernel // 2
    if pattern.conv_mode == "flat":  # the window in flat index arithmetic, so it runs over the ends of a row
        offsets = [above * width + left for above in range(reach + 1) for left in range(-reach, reach + 1)]
        return torch.isin(distance, torch.tensor(offsets)) & (distance >= 0)
    rows_above = slots[:, None] // width - slots[None, :] // width
    columns_left = slots[:, None] % width - slots[None, :] % width
    if pattern.conv_mode == "torus":  # over both edges, as ru-dalle's: the last row reaches round to the first
        rows_above, columns_left = shortest(rows_above, rows), shortest(columns_left, width)
    return (rows_above.abs() <= reach) & (columns_left.abs() <= reach)


def shortest(steps: Tensor, around: int) -> Tensor:
    """The shortest way to go ``steps`` on a ring of ``around`` places: from -around / 2 on, below around / 2."""
    return (steps + around // 2) % around - around // 2


# -- the same as arithmetic on indices: what a kernel evaluates for a score, where a table would be read from memory


@lru_cache(maxsize=64)
def mask_function(pattern: AttentionPattern, by_columns: bool = False) -> MaskFunction:
    """``pattern.mask()[query, key]`` as integer arithmetic on tensors of slots, of any shapes that broadcast.

    ``by_columns`` (``column`` alone): of a stream whose image slots stand column after column, where they see what
    they see in blocks of neighbours.
    """
    prefix, image_to_image = pattern.prefix, _image_function(pattern, by_columns)
    if image_to_image is None:
        return lambda batch, head, query, key: key <= query
    return lambda batch, head, query, key: (key <= query) & (
        (key < prefix) | image_to_image(query - prefix, key - prefix))


def _image_function(pattern: AttentionPattern, by_columns: bool) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Whether an image slot sees an earlier one, both counted from the first image slot; None: it always does."""
    rows, width = pattern.grid
    if by_columns:
        if pattern.name != "column":
            raise ValueError(f"only the pattern 'column' is computed column after column, not {pattern.name!r}")
        column_of, _ = _divided_by(rows)
        return lambda query, key: column_of(query) == column_of(key)
    if pattern.name == "full":
        return None
    if pattern.name == "row":
        return lambda query, key: query - key <= width
    row_of, column_of = _divided_by(width)
    if pattern.name == "column":
        return lambda query, key: column_of(query - key) == 0
    reach = pattern.conv_kernel // 2
    if pattern.conv_mode == "flat":
        furthest = reach * width + reach
        return lambda query, key: (query - key <= furthest) & (column_of(query - key + reach) <= 2 * reach)

    def near(query: Tensor, key: Tensor) -> Tensor:
        rows_above, columns_left = row_of(query) - row_of(key), column_of(query) - column_of(key)
        if pattern.conv_mode == "torus":
            rows_above, columns_left = shortest(rows_above, rows), shortest(columns_left, width)
        return (rows_above.abs() <= reach) & (columns_left.abs() <= reach)

    return near


def _divided_by(width: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Quotient, rounded down, and remainder; by bits where they do, for a division costs a kernel some ten steps."""
    bits = width.bit_length() - 1
    if width == 1 << bits:
        return lambda slots: slots >> bits, lambda slots: slots & (width - 1)
    return lambda slots: slots // width, lambda slots: slots % width


@lru_cache(maxsize=16384)
def _visible_image_slots(pattern: AttentionPattern, slot: int) -> slice | Tensor:
    image, width = slot - pattern.prefix, pattern.grid[1]
    if pattern.name == "full":
        return slice(pattern.prefix, slot + 1)
    if pattern.name == "row":
        return slice(pattern.prefix + max(0, image - width), slot + 1)
    if pattern.name == "column":
        return slice(pattern.prefix + image % width, slot + 1, width)
    with torch.inference_mode(False):
        return pattern.mask()[slot, pattern.prefix:].nonzero().squeeze(1) + pattern.prefix
