"""Where things are in a picture: the boxes or key points in the JSON of a sample, moved with the square that is cut.

Keys that are read, in pixels of the picture as it is shown (upright):

    boxes      [[x, y, width, height], ...], x and y of the top left corner
    keypoints  [[x, y, visible], ...], a row a part, in one order in the whole set; visible 0: the part is not seen

Where they are missing, what the pictures of ``shapes`` have: ``objects``, a list of objects with ``box`` [left, top,
right, bottom] in pixels and ``center`` [x, y] in shares of the sides; a key point an object.
"""

from typing import Any, Literal, NamedTuple

import numpy as np

from dalle.data.decode import BadSample
from dalle.data.transforms import Cut

Kind = Literal["boxes", "keypoints"]

NUMBERS: dict[Kind, int] = {"boxes": 4, "keypoints": 3}       # of each row
MOST_PLACES = 1000
FARTHEST = 1e6          # pixels: no picture has more, and float32 still tells halves apart


class Places(NamedTuple):
    """Rows of one kind, float64 [n, 4] (x, y, width, height) or [n, 3] (x, y, visible)."""

    rows: np.ndarray
    in_shares: bool = False      # of the picture's sides, not pixels


def read_places(meta: dict[str, Any], kind: Kind) -> Places:
    """What the JSON says. Raises :class:`BadSample` ``no_boxes``, ``no_keypoints``, ``damaged_boxes`` or
    ``damaged_keypoints``."""
    if kind in meta:
        return Places(_numbers(meta[kind], kind))
    objects = meta.get("objects")
    if objects is None:
        raise BadSample(f"no_{kind}")
    key = "box" if kind == "boxes" else "center"
    if not isinstance(objects, list) or not all(isinstance(one, dict) for one in objects):
        raise _damaged(kind, "objects is no list of objects")
    rows = [one.get(key) for one in objects]
    if kind == "boxes":
        corners = _numbers(rows, kind)
        return Places(_checked(np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1), kind))
    return Places(_numbers([[*row, 1] if isinstance(row, list) else row for row in rows], kind), in_shares=True)


def moved(places: Places, kind: Kind, size: tuple[int, int], cut: Cut) -> np.ndarray:
    """float32 [n, 4] or [n, 3]: of a picture of ``size`` (width, height), in shares of the square that was cut of it.

    A box may reach over the square's edges, or lie outside of it; a key point outside of it is not visible, and what is
    not visible is all 0. Raises :class:`BadSample` for a box or a visible point that lies outside the whole picture.
    """
    rows = places.rows.copy()
    if places.in_shares:
        rows[:, :2] *= size
    _check_inside(rows, kind, size)
    rows[:, :2] = (rows[:, :2] - (cut.left, cut.top)) / (cut.width, cut.height)
    if kind == "boxes":
        rows[:, 2:] /= (cut.width, cut.height)
        if cut.mirrored:
            rows[:, 0] = 1 - rows[:, 0] - rows[:, 2]
        return rows.astype(np.float32)
    if cut.mirrored:
        rows[:, 0] = 1 - rows[:, 0]
    seen = (rows[:, 2] > 0) & ((rows[:, :2] >= 0) & (rows[:, :2] <= 1)).all(axis=1)
    rows[:, 2] = 1
    return (rows * seen[:, None]).astype(np.float32)


def stacked(rows: list[np.ndarray]) -> np.ndarray:
    """float32 [B, n, 4 or 3], n that of the sample with the most; the rest of the others' rows is 0."""
    whole = np.zeros((len(rows), max(map(len, rows)), rows[0].shape[1]), np.float32)
    for into, own in zip(whole, rows, strict=True):
        into[:len(own)] = own
    return whole


def _numbers(value: Any, kind: Kind) -> np.ndarray:
    """The rows of a JSON's list, checked."""
    count = NUMBERS[kind]
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_PLACES:
        raise _damaged(kind, f"a list of 1 to {MOST_PLACES} rows is needed")
    for row in value:
        if not isinstance(row, list) or len(row) != count or not all(
                isinstance(number, (int, float)) and abs(number) <= FARTHEST for number in row):   # NaN is not
            raise _damaged(kind, f"{str(row)[:100]} in place of {count} numbers")
    return _checked(np.array(value, dtype=np.float64), kind)


def _checked(rows: np.ndarray, kind: Kind) -> np.ndarray:
    if kind == "boxes" and not (rows[:, 2:] > 0).all():
        raise _damaged(kind, "a box without width or height")
    return rows


def _check_inside(rows: np.ndarray, kind: Kind, size: tuple[int, int]) -> None:
    if kind == "boxes":
        inside = (rows[:, :2] < size).all(axis=1) & (rows[:, :2] + rows[:, 2:] > 0).all(axis=1)
    else:
        inside = ((rows[:, :2] >= 0) & (rows[:, :2] <= size)).all(axis=1) | (rows[:, 2] <= 0)
    if not inside.all():
        raise _damaged(kind, f"{rows[~inside][0].tolist()} lies outside of {size[0]} x {size[1]} pixels")


def _damaged(kind: Kind, what: str) -> BadSample:
    return BadSample(f"damaged_{kind}", what)
