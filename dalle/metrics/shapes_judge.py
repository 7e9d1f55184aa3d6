"""Reads a `shapes` picture back and scores it against its caption: no network, no training, one answer.

1. The ground is the median of the border. 2. Each pixel is unmixed into ground and the object colour that lies in its
direction from the ground; pixels of at least half an object form components. 3. A component's colour is the nearest of
the palette to its core. 4. Its shape is the one whose drawing, of the same area and at the same middle, is nearest to
it; the radius of that drawing gives the size. A blob of at least ``MIN_AREA`` counts as an object, so something extra
fails the picture.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from dalle.data.shapes.geometry import SHAPES, area
from dalle.data.shapes.grammar import Statement, parse_caption
from dalle.data.shapes.render import coverage
from dalle.data.shapes.scene import COLOURS, DIRECTIONS, GROUNDS, PLACES, SIZES, Scene

READING_SIZE = 64  # larger pictures are shrunk to about this before they are read
MIN_AREA = 25 / 64**2  # of the picture; the smallest object covers 2.5 times as much
SIZE_BORDER = math.sqrt(SIZES["small"] * SIZES["large"])

_COLOUR_NAMES = tuple(COLOURS)
_COLOUR_VALUES = np.array(list(COLOURS.values()), dtype=np.float32)
_GROUND_NAMES = tuple(GROUNDS)
_GROUND_VALUES = np.array(list(GROUNDS.values()), dtype=np.float32)
_UNIT_AREAS = {shape: area(shape) for shape in SHAPES}


@dataclass(frozen=True)
class ReadObject:
    """One object as seen; ``center`` (x, y) and ``radius`` are fractions of the picture's side.

    ``misfit`` is the share of the object's area in which it differs from a perfect ``shape``.
    """

    colour: str
    shape: str
    size: str
    center: tuple[float, float]
    radius: float
    misfit: float


@dataclass(frozen=True)
class Reading:
    """What the judge sees in a picture."""

    objects: tuple[ReadObject, ...]
    ground: str


def judge(image: np.ndarray) -> Reading:
    """Read one picture, uint8 [H, W, 3] with H = W of at least 16."""
    return _read(image)[0]


def judge_with_masks(image: np.ndarray) -> tuple[Reading, tuple[np.ndarray, ...]]:
    """The same, and for each object, bool [H, W], the pixels that show it, its soft edge included."""
    reading, labels, numbers = _read(image)
    side = len(image)
    places = np.arange(side) * len(labels) // side         # a picture that was averaged down gets its pixels back
    return reading, tuple(_with_edge(labels, number)[np.ix_(places, places)] for number in numbers)


def _read(image: np.ndarray) -> tuple[Reading, np.ndarray, list[int]]:
    """The reading, a number for each pixel (0: ground), and the numbers of the objects in their order."""
    picture = _at_reading_size(image)
    ground = _border_colour(picture)
    alpha = _unmix(picture - ground, _COLOUR_VALUES - ground)
    labels, count = ndimage.label(alpha > 0.5, structure=np.ones((3, 3)))
    areas = np.bincount(labels.ravel(), minlength=count + 1)
    regions = {number: region for number, region in enumerate(ndimage.find_objects(labels), start=1)
               if areas[number] >= MIN_AREA * labels.size}
    objects = tuple(_read_object(picture, ground, alpha, labels, number, region)
                    for number, region in regions.items())
    return Reading(objects, _nearest(ground, _GROUND_NAMES, _GROUND_VALUES)), labels, list(regions)


def _with_edge(labels: np.ndarray, number: int) -> np.ndarray:
    """The component and the two pixels around it, but not those of another."""
    core = labels == number
    return ndimage.binary_dilation(core, np.ones((3, 3)), iterations=2) & (core | (labels == 0))


def _at_reading_size(image: np.ndarray) -> np.ndarray:
    """float32 [S, S, 3]; a picture of more than twice the reading size is averaged down."""
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.shape[0] != image.shape[1]:
        raise ValueError(f"the judge reads square uint8 [H, H, 3] pictures, not {image.dtype} {list(image.shape)}")
    if image.shape[0] >= 2 * READING_SIZE:
        return np.asarray(Image.fromarray(image).resize((READING_SIZE, READING_SIZE), Image.Resampling.BOX), np.float32)
    return image.astype(np.float32)


def _border_colour(picture: np.ndarray) -> np.ndarray:
    border = np.concatenate([picture[0], picture[-1], picture[1:-1, 0], picture[1:-1, -1]])
    return np.median(border, axis=0)


def _unmix(difference: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """How much of an object each pixel shows, from its difference to the ground: float [H, W], about 0 to 1.

    A blend of the ground and a colour lies on the line between them, so the colour is the one of nearest direction
    and the share is the distance along its line.
    """
    lengths = np.linalg.norm(colours, axis=1)
    projections = difference @ (colours / lengths[:, None]).T             # [H, W, colours]
    nearest = projections.argmax(axis=-1)
    return np.take_along_axis(projections, nearest[..., None], axis=-1)[..., 0] / lengths[nearest]


def _nearest(colour: np.ndarray, names: Sequence[str], values: np.ndarray) -> str:
    return names[int(((values - colour) ** 2).sum(axis=1).argmin())]


def _read_object(picture: np.ndarray, ground: np.ndarray, unmixed: np.ndarray, labels: np.ndarray, number: int,
                 region: tuple[slice, slice]) -> ReadObject:
    side = picture.shape[0]
    rows, columns = (slice(max(0, part.start - 2), part.stop + 2) for part in region)
    core, belongs = labels[rows, columns] == number, _with_edge(labels[rows, columns], number)
    pixels = picture[rows, columns]
    colour = _core_colour(pixels[core], unmixed[rows, columns][core])
    toward = colour - ground
    alpha = np.clip((pixels - ground) @ toward / (toward @ toward), 0, 1) * belongs
    total = alpha.sum()
    y = rows.start + 0.5 + (alpha.sum(axis=1) @ np.arange(alpha.shape[0])) / total
    x = columns.start + 0.5 + (alpha.sum(axis=0) @ np.arange(alpha.shape[1])) / total
    center = (float(x / side), float(y / side))
    whole = np.zeros((side, side), dtype=np.float32)
    whole[rows, columns] = alpha
    shape, radius, misfit = _fit_shape(whole, center, float(total))
    size = "small" if radius < SIZE_BORDER else "large"
    return ReadObject(_nearest(colour, _COLOUR_NAMES, _COLOUR_VALUES), shape, size, center, radius, misfit)


def _core_colour(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The median colour of the half of a component's pixels that are least blended with the ground."""
    return np.median(pixels[alpha >= np.median(alpha)], axis=0)


def _fit_shape(alpha: np.ndarray, center: tuple[float, float], total: float) -> tuple[str, float, float]:
    """The shape whose drawing of area ``total`` around ``center`` is nearest to ``alpha``: name, radius, misfit."""
    side = alpha.shape[0]
    squared = float((alpha**2).sum())
    fits = []
    for shape in SHAPES:
        radius = math.sqrt(total / _UNIT_AREAS[shape]) / side
        rows, columns, drawn = coverage(shape, center, radius, side)
        here = alpha[rows, columns]
        error = float(((here - drawn) ** 2).sum()) + squared - float((here**2).sum())
        fits.append((error / total, shape, radius))
    misfit, shape, radius = min(fits)
    return shape, radius, misfit


def score(reading: Reading, caption: str | Statement | Scene) -> dict[str, bool | None]:
    """Whether the picture shows what its caption says; None for what the caption does not say.

    ``colour_shape``: the multiset of (colour, shape) is exactly right, the main score. ``count``: how many objects.
    ``size``, ``place`` (place or relations) and ``ground``: all that is said of it holds, False where an object that it
    is said of is missing. A :class:`Scene` says everything.
    """
    said = _statement(caption)
    wanted = [(mention.colour, mention.shape) for mention in said.mentions]
    right = Counter(wanted) == Counter((item.colour, item.shape) for item in reading.objects)
    size = place = None
    says_size = any(mention.size for mention in said.mentions)
    says_place = bool(said.place or said.relations)
    if says_size or says_place:
        size, place = _best_assignment(reading, said) if right else (False, False)
    return {
        "colour_shape": right,
        "count": len(reading.objects) == len(wanted),
        "size": size if says_size else None,
        "place": place if says_place else None,
        "ground": None if said.ground is None else reading.ground == said.ground,
    }


def _statement(caption: str | Statement | Scene) -> Statement:
    if isinstance(caption, str):
        return parse_caption(caption)
    if isinstance(caption, Scene):
        return Statement(caption.objects, caption.place, caption.relations, caption.ground)
    return caption


def _best_assignment(reading: Reading, said: Statement) -> tuple[bool, bool]:
    """Size and place right, for the assignment of read objects to mentions that gets most right.

    Only a caption that names the same coloured shape twice leaves a choice.
    """
    results = []
    for seen in itertools.permutations(reading.objects):
        if all((item.colour, item.shape) == (mention.colour, mention.shape)
               for item, mention in zip(seen, said.mentions, strict=True)):
            size = all(mention.size in (None, item.size) for item, mention in zip(seen, said.mentions, strict=True))
            results.append((size, _placed(seen, said)))
    return max(results, key=sum)


def _placed(seen: Sequence[ReadObject], said: Statement) -> bool:
    if said.place is not None:
        return said.place == min(PLACES, key=lambda place: math.dist(PLACES[place], seen[0].center))
    return all(relation == direction(first, second)
               for relation, (first, second) in zip(said.relations, itertools.pairwise(seen), strict=False))


def direction(first: ReadObject, second: ReadObject) -> str:
    """Where ``first`` is, seen from ``second``: the direction that it lies most along."""
    x, y = first.center[0] - second.center[0], first.center[1] - second.center[1]
    return max(DIRECTIONS, key=lambda name: x * DIRECTIONS[name][0] + y * DIRECTIONS[name][1])


def colour_shape_right(images: Any, captions: Sequence[str]) -> np.ndarray:
    """The main score of each picture, bool [N], for uint8 [N, 3, H, W] (array or tensor)."""
    return np.array([score(judge(image), caption)["colour_shape"]
                     for image, caption in zip(channels_last(images), captions, strict=True)], dtype=bool)


def accuracy(images: Any, captions: Sequence[str]) -> dict[str, float]:
    """The share of right pictures by attribute, for uint8 [N, 3, H, W] (array or tensor) and their captions.

    ``size``, ``place`` and ``ground`` are over the captions that say them and absent if none does; also the main score
    by number of objects: ``colour_shape_1`` for captions that name one, and so on. Raises ValueError for a caption
    outside the grammar.
    """
    answers: dict[str, list[bool]] = {}
    for image, caption in zip(channels_last(images), captions, strict=True):
        said = parse_caption(caption)
        scores: Mapping[str, bool | None] = score(judge(image), said)
        for name, value in (*scores.items(), (f"colour_shape_{len(said.mentions)}", scores["colour_shape"])):
            if value is not None:
                answers.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in answers.items()}


def channels_last(images: Any) -> np.ndarray:
    images = np.asarray(images.cpu() if hasattr(images, "cpu") else images)
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"the judge reads uint8 [N, 3, H, W] pictures, not {images.dtype} {list(images.shape)}")
    return images.transpose(0, 2, 3, 1)
