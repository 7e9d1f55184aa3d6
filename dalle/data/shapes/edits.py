"""(source, instruction, target) triples of `shapes`, for models that edit a picture by words.

A sample is ``KEY.png`` (the target), ``KEY.txt`` (three wordings of the instruction, one a line) and ``KEY.json``:
``source_png`` (the source picture, base64), ``source`` and ``target`` (:meth:`Scene.to_meta`), ``source_caption``,
``target_caption``, ``edit`` (kind, the object's colour and shape, the new value), ``class_id`` and ``split`` of the
target. A triple is one sample, so it stays whole in any reading order. What the instruction does not name stays where
it was, to the pixel. In training both pictures have training attributes; in validation the target's are held out.
"""

import base64
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dalle.data.building import Sample
from dalle.data.shapes.geometry import SHAPES
from dalle.data.shapes.grammar import canonical_caption
from dalle.data.shapes.render import encode_png, render
from dalle.data.shapes.scene import (
    COLOURS,
    GROUNDS,
    INVERSE,
    PLACE_BY_RELATION,
    PLACES,
    RELATION_BY_PLACE,
    SIZES,
    Draws,
    Scene,
    SceneObject,
    draw_object,
    jittered,
    layout,
    make_scene,
)


@dataclass(frozen=True)
class Edit:
    """A change of one thing: its kind, the object it concerns ("red circle", None for the ground), what it becomes."""

    kind: str
    target: str | None
    value: str | None
    instructions: tuple[str, ...]


Editor = Callable[[Scene, Draws], tuple[Scene, Edit] | None]  # None: this scene cannot be changed in this way


def edit_sample(rng: np.random.Generator, split: str, size: int, max_objects: int) -> Sample:
    """One triple of ``split``."""
    source, target, edit = make_edit(rng, split, max_objects)
    meta = {
        "class_id": target.class_id(),
        "split": split,
        "edit": {"kind": edit.kind, "object": edit.target, "value": edit.value},
        "source_caption": canonical_caption(source),
        "target_caption": canonical_caption(target),
        "source": source.to_meta(size),
        "target": target.to_meta(size),
        "source_png": base64.b64encode(encode_png(render(source, size))).decode("ascii"),
    }
    return Sample(split, encode_png(render(target, size)), "png", list(edit.instructions), meta)


def make_edit(rng: np.random.Generator, split: str, max_objects: int) -> tuple[Scene, Scene, Edit]:
    """A random source scene, a target that differs in one thing, and that thing."""
    draws = Draws(rng)
    while True:
        source = make_scene(rng, max_objects, "train" if split == "train" else None)
        changed = draws.choice(_EDITORS)(source, draws)
        if changed is not None and len(changed[0].objects) <= max_objects and changed[0].split() == split:
            return source, *changed


def _name(item: SceneObject) -> str:
    return f"{item.colour} {item.shape}"


def _other(draws: Draws, options: Any, current: str) -> str:
    return draws.choice([option for option in options if option != current])


def _with(scene: Scene, number: int, **changes: Any) -> Scene | None:
    """``scene`` with one object changed; None when two would have both colour and shape in common."""
    objects = list(scene.objects)
    objects[number] = replace(objects[number], **changes)
    if len({_name(item) for item in objects}) < len(objects):
        return None
    return replace(scene, objects=tuple(objects))


def _recolour(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    number = draws.choice(range(len(scene.objects)))
    item = scene.objects[number]
    colour = _other(draws, tuple(COLOURS), item.colour)
    target = _with(scene, number, colour=colour)
    name = _name(item)
    return target and (target, Edit("colour", name, colour, (
        f"make the {name} {colour}", f"change the colour of the {name} to {colour}", f"paint the {name} {colour}")))


def _reshape(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    number = draws.choice(range(len(scene.objects)))
    item = scene.objects[number]
    shape = _other(draws, SHAPES, item.shape)
    target = _with(scene, number, shape=shape)
    name = _name(item)
    return target and (target, Edit("shape", name, shape, (
        f"turn the {name} into a {shape}", f"change the {name} to a {shape}", f"make the {name} a {shape}")))


def _resize(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    number = draws.choice(range(len(scene.objects)))
    item = scene.objects[number]
    size = _other(draws, tuple(SIZES), item.size)
    radius = round(item.radius * SIZES[size] / SIZES[item.size], 5)
    target = _with(scene, number, size=size, radius=radius)
    name, verb = _name(item), "enlarge" if size == "large" else "shrink"
    return target and (target, Edit("size", name, size, (
        f"make the {name} {size}", f"{verb} the {name}", f"change the {name} to a {size} one")))


def _reground(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    ground = _other(draws, tuple(GROUNDS), scene.ground)
    return replace(scene, ground=ground), Edit("ground", None, ground, (
        f"make the background {ground}", f"change the background to {ground}", f"paint the background {ground}"))


def _move(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    if scene.place is None:
        return None
    place = _other(draws, tuple(PLACES), scene.place)
    item = scene.objects[0]
    moved = replace(item, center=jittered(draws, PLACES[place]))
    name = _name(item)
    return replace(scene, objects=(moved,), place=place), Edit("move", name, place, (
        f"move the {name} to the {place}", f"put the {name} at the {place}", f"shift the {name} to the {place}"))


def _add(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    """A second object opposite the first; there is no room beside one in the center."""
    if scene.place not in RELATION_BY_PLACE:
        return None
    (item,) = scene.objects
    relation = INVERSE[RELATION_BY_PLACE[scene.place]]  # of the new one, seen from the old one
    position = layout(None, (relation,))[0]
    added = draw_object(draws, position)
    if _name(added) == _name(item):
        return None
    noun = f"{added.size} {_name(added)}"
    target = replace(scene, objects=(added, item), place=None, relations=(relation,))
    return target, Edit("add", _name(item), noun, (
        f"add a {noun} {relation} the {_name(item)}", f"put a {noun} {relation} the {_name(item)}",
        f"draw a {noun} {relation} the {_name(item)}"))


def _remove(scene: Scene, draws: Draws) -> tuple[Scene, Edit] | None:
    """One of two goes; the other stands where a single object would."""
    if len(scene.objects) != 2:
        return None
    number = draws.choice(range(2))
    relation = scene.relations[0] if number == 1 else INVERSE[scene.relations[0]]  # of the one that stays
    target = replace(scene, objects=(scene.objects[1 - number],), place=PLACE_BY_RELATION[relation], relations=())
    name = _name(scene.objects[number])
    return target, Edit("remove", name, None, (f"remove the {name}", f"take away the {name}", f"erase the {name}"))


_EDITORS: tuple[Editor, ...] = (_recolour, _reshape, _resize, _reground, _move, _add, _remove)
