"""A decoded picture to a square of uint8 pixels: which square is cut, how it is scaled, whether it is mirrored.

Scaling down is area averaging: an exact box mean where the ratio is a whole number, otherwise Pillow's HAMMING filter,
which stays closest to it (its BOX filter drops or doubles rows at ratios such as 9/8: mean error 4.1 against 1.8 grey
levels from the exact area average on a test chart). A square smaller than asked for is scaled up with BICUBIC and then
used whole. A picture that already has the size is not resampled.

The released GANs resize to 76/64 of the size and cut at random, whatever size the pictures have: ``crop_from``.
"""

from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

Picture = Image.Image | np.ndarray          # RGB; an array: uint8 [H, W, 3]
Crop = Literal["none", "center", "random", "dvae", "transformer"]

# The sides that a square may be scaled to before its random cut, as multiples of the image size (in eighths).
EIGHTHS = {"none": (8, 8), "center": (8, 8), "random": (8, 8), "dvae": (9, 12), "transformer": (8, 9)}


class Cut(NamedTuple):
    """Which part of a picture a square shows, in pixels of the picture; then it may have been mirrored."""

    left: float
    top: float
    width: float
    height: float
    mirrored: bool


def needed_sides(image_size: int, crop: Crop, crop_from: float = 1.0) -> tuple[int, int]:
    """The least and the largest side in pixels that a large picture's shorter side is scaled to: its further resolution
    is thrown away."""
    if crop_from > 1:
        return (round(image_size * crop_from),) * 2
    low, high = EIGHTHS[crop]
    return round(image_size * low / 8), round(image_size * high / 8)


def size_of(image: Picture) -> tuple[int, int]:
    """Width and height."""
    return (image.shape[1], image.shape[0]) if isinstance(image, np.ndarray) else image.size


def as_image(image: Picture) -> Image.Image:
    return Image.fromarray(image) if isinstance(image, np.ndarray) else image


def to_square(image: Picture, size: int, crop: Crop, flip: bool, rng: np.random.Generator | None,
              crop_from: float = 1.0) -> np.ndarray:
    """uint8 [size, size, 3] of a picture, see :func:`cut_square`."""
    return cut_square(image, size, crop, flip, rng, crop_from)[0]


def cut_square(image: Picture, size: int, crop: Crop, flip: bool, rng: np.random.Generator | None,
               crop_from: float = 1.0) -> tuple[np.ndarray, Cut]:
    """uint8 [size, size, 3] of a picture, and what it shows of it.

    ``none``: the whole picture, its aspect not kept. ``center``, ``random``: the largest square in the middle, or at a
    random place. ``dvae``, ``transformer``: the recipes of DALL-E (arXiv 2102.12092, its appendices on both trainings),
    their numbers for 256 pixels scaled to ``size``; the first is meant with ``flip``, the second without (text would be
    mirrored).
    ``crop_from`` above 1, of ``none`` and ``random``: the picture is resized to so many times ``size``, the whole of it
    or its shorter side, and a square is cut out of that at a random place.
    ``flip`` mirrors half of the pictures. ``rng`` may be None for ``none`` and ``center`` without ``flip`` and
    ``crop_from``.
    """
    width, height = size_of(image)
    box: tuple[float, float, float, float] = (0, 0, width, height)
    if crop_from > 1:
        pixels, box = _cut(as_image(image), _resized(width, height, round(size * crop_from), crop), size, rng)
    elif crop == "none":
        pixels = _whole(image, size)
    else:
        side = min(width, height)
        left, top = _corner(width - side, height - side, crop, rng)
        target = _target(side, size, crop, rng)
        pixels, box = _resize(image, (left, top, left + side, top + side), target), (left, top, side, side)
        if target > size:
            x, y = (int(rng.integers(target - size + 1)) for _ in range(2))
            pixels = pixels[y:y + size, x:x + size]
            box = (left + x * side / target, top + y * side / target, size * side / target, size * side / target)
    mirrored = flip and rng.random() < 0.5
    return pixels[:, ::-1] if mirrored else pixels, Cut(*box, mirrored)


def _corner(free_x: int, free_y: int, crop: Crop, rng: np.random.Generator | None) -> tuple[int, int]:
    """Left and top of the square that is cut; ``free_x``, ``free_y``: how far it can move."""
    if crop == "center":
        return free_x // 2, free_y // 2
    if crop == "transformer":                 # near the middle: offsets in [3/8, 5/8) of the free room
        return tuple(int(rng.integers(3 * free // 8, max(3 * free // 8 + 1, 5 * free // 8)))
                     for free in (free_x, free_y))
    return int(rng.integers(free_x + 1)), int(rng.integers(free_y + 1))


def _target(side: int, size: int, crop: Crop, rng: np.random.Generator | None) -> int:
    """The side the square is scaled to, at least ``size``; larger where a random cut follows."""
    if crop == "dvae":
        low, high = min(side, round(size * 9 / 8)), min(side, round(size * 12 / 8))
    elif crop == "transformer":
        low, high = size, min(side, round(size * 9 / 8))
    else:
        return size
    low, high = max(low, size), max(high, size)
    return int(rng.integers(low, high + 1))


def _resized(width: int, height: int, side: int, crop: Crop) -> tuple[int, int]:
    """What a picture of ``width`` x ``height`` is resized to before it is cut: a square, or ``side`` is its shorter."""
    if crop == "none":
        return side, side
    shorter = min(width, height)
    return side * width // shorter, side * height // shorter


def _cut(image: Image.Image, resized: tuple[int, int], size: int, rng: np.random.Generator
         ) -> tuple[np.ndarray, tuple[float, float, float, float]]:
    """``size`` x ``size`` pixels from a random place of the picture in its ``resized`` form; only they are made.

    Also where they were: left, top, width and height in pixels of the picture.
    """
    x, y = (int(rng.integers(length - size + 1)) for length in resized)
    if resized == image.size:
        return np.asarray(image.crop((x, y, x + size, y + size))), (x, y, size, size)
    across, down = (before / after for before, after in zip(image.size, resized, strict=True))
    smaller = min(across, down) >= 1
    pixels = image.resize((size, size), Image.Resampling.HAMMING if smaller else Image.Resampling.BICUBIC,
                          box=(x * across, y * down, (x + size) * across, (y + size) * down), reducing_gap=2.0)
    return np.asarray(pixels), (x * across, y * down, size * across, size * down)


def _resize(image: Picture, box: tuple[int, int, int, int], target: int) -> np.ndarray:
    """The square ``box`` of the picture at ``target`` x ``target`` pixels."""
    left, top, right, bottom = box
    side = right - left
    if side == target:
        if isinstance(image, np.ndarray):
            return image[top:bottom, left:right]
        return np.asarray(image if box == (0, 0, *image.size) else image.crop(box))
    if side > target and side % target == 0:
        if isinstance(image, np.ndarray):                       # the box alone is copied
            return np.asarray(Image.fromarray(image[top:bottom, left:right]).reduce(side // target))
        return np.asarray(image.reduce(side // target, box=box))
    image = as_image(image)                                     # its filters reach beyond the box
    if side < target:
        return np.asarray(image.resize((target, target), Image.Resampling.BICUBIC, box=box))
    return np.asarray(image.resize((target, target), Image.Resampling.HAMMING, box=box, reducing_gap=2.0))


def _whole(image: Picture, size: int) -> np.ndarray:
    width, height = size_of(image)
    if width == height:
        return _resize(image, (0, 0, width, height), size)
    larger = min(width, height) >= size
    return np.asarray(as_image(image).resize(
        (size, size), Image.Resampling.HAMMING if larger else Image.Resampling.BICUBIC, reducing_gap=2.0))
