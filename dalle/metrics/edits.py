"""What a changed word of a caption changes in a picture: two pictures painted with the same noise, before and after.

Pictures are uint8 [N, 3, H, W], arrays or tensors. How much changed, and where, is told of any pictures; where the
object is and which colour it has, by the judge of `shapes`, for captions of its language that differ in the colour of
one object. A model that hears no colours changes nothing: read the shares beside ``colour_changed``.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dalle.data.shapes.grammar import canonical_caption, parse_caption
from dalle.data.shapes.scene import COLOURS, make_scene
from dalle.metrics.judge_report import assign
from dalle.metrics.shapes_judge import ReadObject, channels_last, judge, judge_with_masks

THRESHOLD = 16      # of 255 in some channel: a pixel that differs by more has changed


@dataclass(frozen=True)
class Swap:
    """Two captions of `shapes` that differ in the colour of mention ``number``."""

    before: str
    after: str
    number: int

    @property
    def colours(self) -> tuple[str, str]:
        """The said colour, before and after."""
        return tuple(parse_caption(caption).mentions[self.number].colour for caption in (self.before, self.after))


def swap_of(before: str, after: str) -> Swap | None:
    """The captions as a :class:`Swap`; None where they are not in the language of `shapes` or differ in another way."""
    try:
        first, second = parse_caption(before), parse_caption(after)
    except ValueError:
        return None
    if (first.place, first.relations, first.ground) != (second.place, second.relations, second.ground):
        return None
    if [(one.shape, one.size) for one in first.mentions] != [(one.shape, one.size) for one in second.mentions]:
        return None
    different = [number for number, (one, other) in enumerate(zip(first.mentions, second.mentions, strict=True))
                 if one.colour != other.colour]
    return Swap(before, after, different[0]) if len(different) == 1 else None


def colour_swaps(count: int, seed: int = 0, split: str = "validation") -> list[Swap]:
    """``count`` pairs: the fullest caption of a random scene of ``split``, and the same with one colour word swapped.

    The new colour makes no two objects alike, so that both captions name each object by itself.
    """
    rng = np.random.default_rng(seed)
    swaps = []
    while len(swaps) < count:
        caption = canonical_caption(make_scene(rng, split=split))
        mentions = parse_caption(caption).mentions
        number = int(rng.integers(len(mentions)))
        taken = {one.colour for one in mentions if one.shape == mentions[number].shape}
        free = [colour for colour in COLOURS if colour not in taken]
        swaps.append(Swap(caption, with_colour(caption, number, free[int(rng.integers(len(free)))]), number))
    return swaps


def with_colour(caption: str, number: int, colour: str) -> str:
    """``caption`` with its colour word ``number`` replaced; nothing else changes, not even an article."""
    words = list(re.finditer(rf"\b({'|'.join(COLOURS)})\b", caption, re.IGNORECASE))
    return caption[:words[number].start()] + colour + caption[words[number].end():]


# -- what changed

def differences(before: Any, after: Any) -> np.ndarray:
    """int [N, H, W]: by how much of 255 each pixel differs, in the channel in which it does most."""
    one, other = (channels_last(images).astype(np.int16) for images in (before, after))
    return np.abs(one - other).max(axis=-1)


def l2_errors(before: Any, after: Any) -> np.ndarray:
    """float [N]: the root of the mean squared difference over pixels and channels, of pictures in [0, 1]."""
    one, other = (channels_last(images).astype(np.float64) / 255 for images in (before, after))
    return np.sqrt(np.square(one - other).mean(axis=(1, 2, 3)))


def edit_figures(before: Any, after: Any, swaps: Sequence[Swap | None], threshold: int = THRESHOLD) -> dict[str, float]:
    """Means over the pairs of pictures.

    ``changed``: share of the pixels that differ by more than ``threshold``. ``l2``: see :func:`l2_errors`. And of pairs
    whose captions are a swap: ``changed_outside``, the share of the pixels outside the object that did, the object
    being the one that the judge reads for its mention in the first picture, with its soft edge (``outside_pairs``: in
    how many it reads one); ``colour_before`` and ``colour_after``, how often the object of the mention has the said
    colour, and ``colour_changed``, how often it has both.
    """
    far = differences(before, after) > threshold
    figures = {"pairs": float(len(far)), "changed": float(far.mean()), "l2": float(l2_errors(before, after).mean())}
    outside, before_right, after_right = [], [], []
    for one, other, changed, swap in zip(channels_last(before), channels_last(after), far, swaps, strict=True):
        if swap is None:
            continue
        old, new = swap.colours
        item, mask = said_object(one, swap.before, swap.number)
        if mask is not None and not mask.all():
            outside.append(changed[~mask].mean())
        painted = assign(parse_caption(swap.after), judge(other).objects)[swap.number]
        before_right.append(item is not None and item.colour == old)
        after_right.append(painted is not None and painted.colour == new)
    if before_right:
        figures |= {"colour_before": float(np.mean(before_right)), "colour_after": float(np.mean(after_right)),
                    "colour_changed": float(np.mean(np.logical_and(before_right, after_right))),
                    "outside_pairs": float(len(outside))}
    if outside:
        figures["changed_outside"] = float(np.mean(outside))
    return figures


def said_object(image: np.ndarray, caption: str, number: int) -> tuple[ReadObject | None, np.ndarray | None]:
    """The object of uint8 [H, W, 3] that the judge reads for mention ``number``, and its pixels, bool [H, W]."""
    reading, masks = judge_with_masks(image)
    item = assign(parse_caption(caption), reading.objects)[number]
    if item is None:
        return None, None
    return item, masks[next(place for place, one in enumerate(reading.objects) if one is item)]
