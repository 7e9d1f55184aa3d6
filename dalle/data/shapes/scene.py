"""What a `shapes` picture shows: one to three coloured objects on a ground, before it is drawn or put into words.

Lengths are fractions of the picture's side, positions (x, y) run from the top left corner, so that a scene can be drawn
at any size. Whether a scene belongs to training or validation is a hash of its attributes alone: 5 % of the attribute
tuples are never seen in training, whatever the seed.
"""

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dalle.data.shapes.geometry import SHAPES, box, outline

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (250, 220, 40),
    "green": (40, 160, 60),
    "cyan": (40, 200, 220),
    "blue": (40, 80, 220),
    "purple": (150, 40, 190),
    "pink": (250, 120, 180),
}
GROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "gray": (128, 128, 128),
    "black": (20, 20, 20),
    "brown": (100, 66, 34),
}
SIZES: dict[str, float] = {"small": 8 / 64, "large": 13 / 64}
RADIUS_JITTER = 0.06
NEAR, WIDE = 1 / 64, 2 / 64  # jitter of the position: along an axis on which objects are laid out, and across it

PLACES: dict[str, tuple[float, float]] = {
    "center": (0.5, 0.5),
    "left": (0.25, 0.5),
    "right": (0.75, 0.5),
    "top": (0.5, 0.25),
    "bottom": (0.5, 0.75),
}
# Where the first of two neighbours is, seen from the second.
DIRECTIONS: dict[str, tuple[int, int]] = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
INVERSE = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}
PLACE_BY_RELATION = {"above": "top", "below": "bottom", "left of": "left", "right of": "right"}
RELATION_BY_PLACE = {place: relation for relation, place in PLACE_BY_RELATION.items()}
MAX_OBJECTS = 3

HELD_OUT_FRACTION = 0.05
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class SceneObject:
    """One object; ``center`` (x, y) and ``radius`` are fractions of the picture's side."""

    colour: str
    shape: str
    size: str
    center: tuple[float, float]
    radius: float

    def to_meta(self, size: int) -> dict[str, Any]:
        """All fields, with the box and the mask's outline in pixels of a picture of ``size``."""
        x, y = self.center
        pixels = (self.shape, (x * size, y * size), self.radius * size)
        return {"colour": self.colour, "shape": self.shape, "size": self.size, "center": [x, y],
                "radius": self.radius, "box": box(*pixels), "mask": outline(*pixels)}


@dataclass(frozen=True)
class Scene:
    """Objects in the order in which a caption names them, on a ground.

    One object has a ``place``. Of several, ``relations[i]`` says where object i is, seen from object i + 1: two stand
    opposite each other, three stand in an L whose elbow is the middle one (one relation vertical, one horizontal).
    """

    objects: tuple[SceneObject, ...]
    ground: str
    place: str | None
    relations: tuple[str, ...] = ()

    def reversed(self) -> "Scene":
        """The same picture, its objects named in the opposite order."""
        relations = tuple(INVERSE[relation] for relation in reversed(self.relations))
        return replace(self, objects=tuple(reversed(self.objects)), relations=relations)

    def attributes(self) -> tuple:
        """What the picture shows without its jitter, equal for both orders of naming."""
        return min(_attributes(self), _attributes(self.reversed()))

    def split(self) -> str:
        """``train`` or ``validation``, by a hash of :meth:`attributes`."""
        digest = hashlib.blake2b(repr(self.attributes()).encode(), digest_size=8).digest()
        return SPLITS[int.from_bytes(digest, "big") < HELD_OUT_FRACTION * 2**64]

    def class_id(self) -> int:
        """Colour and shape of the first-named object as one of 48 classes, for class-conditional models."""
        first = self.objects[0]
        return list(COLOURS).index(first.colour) * len(SHAPES) + SHAPES.index(first.shape)

    def to_meta(self, size: int) -> dict[str, Any]:
        """The sample's JSON: all of the scene, with boxes and masks in pixels of a picture of ``size``."""
        return {
            "class_id": self.class_id(),
            "split": self.split(),
            "ground": self.ground,
            "place": self.place,
            "relations": list(self.relations),
            "objects": [item.to_meta(size) for item in self.objects],
        }

    @staticmethod
    def from_meta(meta: dict[str, Any]) -> "Scene":
        """The scene whose :meth:`to_meta` is ``meta``."""
        objects = tuple(SceneObject(item["colour"], item["shape"], item["size"], tuple(item["center"]), item["radius"])
                        for item in meta["objects"])
        return Scene(objects, meta["ground"], meta["place"], tuple(meta["relations"]))


def _attributes(scene: Scene) -> tuple:
    objects = tuple((item.colour, item.shape, item.size) for item in scene.objects)
    return objects, scene.ground, scene.place or "", scene.relations


class Draws:
    """Uniform numbers taken from ``rng`` in one call, because a call per choice is slow.

    Only ``Generator.random`` is used: its stream is the one that numpy promises not to change.
    """

    def __init__(self, rng: np.random.Generator, count: int = 64) -> None:
        self._rng, self._count = rng, count
        self._values: list[float] = []

    def uniform(self) -> float:
        """A number in [0, 1)."""
        if not self._values:
            self._values = self._rng.random(self._count).tolist()
        return self._values.pop()

    def choice(self, options: Any) -> Any:
        """One of a sequence."""
        return options[int(self.uniform() * len(options))]

    def jitter(self, amount: float) -> float:
        """A number in [-amount, amount)."""
        return (2 * self.uniform() - 1) * amount


_COLOUR_NAMES, _GROUND_NAMES, _SIZE_NAMES = tuple(COLOURS), tuple(GROUNDS), tuple(SIZES)
_PLACE_NAMES, _RELATION_NAMES = tuple(PLACES), tuple(DIRECTIONS)
_VERTICAL, _HORIZONTAL = ("above", "below"), ("left of", "right of")


def make_scene(rng: np.random.Generator, max_objects: int = 2, split: str | None = None,
               num_objects: int | None = None) -> Scene:
    """A random scene of one to ``max_objects`` objects (each number equally often), or of exactly ``num_objects``.

    With ``split`` the attributes are drawn again until they belong to that split. No two objects of a scene have both
    colour and shape in common, so that "the red circle" names one of them.
    """
    if not 1 <= (num_objects or max_objects) <= MAX_OBJECTS:
        raise ValueError(f"a scene has 1 to {MAX_OBJECTS} objects, not {num_objects or max_objects}")
    draws = Draws(rng)
    count = num_objects or 1 + int(draws.uniform() * max_objects)
    while True:
        scene = _draw(draws, count)
        if split is None or scene.split() == split:
            return scene


def _draw(draws: Draws, count: int) -> Scene:
    ground = draws.choice(_GROUND_NAMES)
    if count == 1:
        place, relations = draws.choice(_PLACE_NAMES), ()
    elif count == 2:
        place, relations = None, (draws.choice(_RELATION_NAMES),)
    else:
        axes = draws.choice(((_VERTICAL, _HORIZONTAL), (_HORIZONTAL, _VERTICAL)))
        place, relations = None, tuple(draws.choice(axis) for axis in axes)
    objects: list[SceneObject] = []
    for position in layout(place, relations):
        item = draw_object(draws, position)
        while any((item.colour, item.shape) == (other.colour, other.shape) for other in objects):
            item = draw_object(draws, position)
        objects.append(item)
    return Scene(tuple(objects), ground, place, relations)


def draw_object(draws: Draws, position: tuple[float, float]) -> SceneObject:
    """A random object near ``position``."""
    colour, shape, size = draws.choice(_COLOUR_NAMES), draws.choice(SHAPES), draws.choice(_SIZE_NAMES)
    radius = round(SIZES[size] * (1 + draws.jitter(RADIUS_JITTER)), 5)
    return SceneObject(colour, shape, size, jittered(draws, position), radius)


def layout(place: str | None, relations: tuple[str, ...]) -> list[tuple[float, float]]:
    """Where the objects stand before jitter, (x, y) each."""
    if place is not None:
        return [PLACES[place]]
    if len(relations) == 1:
        return [PLACES[PLACE_BY_RELATION[relations[0]]], PLACES[PLACE_BY_RELATION[INVERSE[relations[0]]]]]
    before, after = DIRECTIONS[relations[0]], DIRECTIONS[INVERSE[relations[1]]]
    elbow = (0.5 - 0.25 * (before[0] + after[0]), 0.5 - 0.25 * (before[1] + after[1]))
    return [(elbow[0] + before[0] / 2, elbow[1] + before[1] / 2), elbow,
            (elbow[0] + after[0] / 2, elbow[1] + after[1] / 2)]


def jittered(draws: Draws, position: tuple[float, float]) -> tuple[float, float]:
    """``position`` moved a little: less along an axis on which it is off centre, so that neighbours never touch."""
    x, y = (round(value + draws.jitter(WIDE if math.isclose(value, 0.5) else NEAR), 5) for value in position)
    return x, y
