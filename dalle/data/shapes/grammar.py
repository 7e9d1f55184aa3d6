"""The language of `shapes`: captions of a scene, and a parser that reads one back into what it says.

    [a picture of] [a [large] red circle] [above] [a small blue square] [on a white background]

Colour and shape are always said; size, place (or relation) and ground are left out now and then, so a picture is
judged only by what its caption says. 48 words, at most 19 in a caption of two objects.
"""

import re
from dataclasses import dataclass

import numpy as np

from dalle.data.shapes.geometry import SHAPES
from dalle.data.shapes.scene import COLOURS, GROUNDS, PLACES, Draws, Scene

OMIT_SIZE, OMIT_PLACE, OMIT_GROUND = 0.20, 0.10, 0.25
CAPTIONS_PER_PICTURE = 10

_SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
_PLACE_WORDS = {
    "center": ("in the center", "in the middle"),
    "left": ("on the left", "at the left"),
    "right": ("on the right", "at the right"),
    "top": ("at the top", "near the top"),
    "bottom": ("at the bottom", "near the bottom"),
}
_RELATION_WORDS = {
    "above": ("above", "over"),
    "below": ("below", "under"),
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
}
_INTRODUCTIONS = ("", "", "", "", "a picture of", "an image of", "there is", "here is")
_GROUND_FIRST = 0.25  # share of the captions that begin with the ground


def canonical_caption(scene: Scene) -> str:
    """The caption that says everything, in the plainest words."""
    places = (scene.place,) if scene.place else scene.relations
    words = {**_PLACE_WORDS, **_RELATION_WORDS}
    joints = [words[place][0] for place in places]
    nouns = [_noun(item.size, item.colour, item.shape) for item in scene.objects]
    return f"{_interleave(nouns, joints)} on a {scene.ground} background"


def captions(scene: Scene, rng: np.random.Generator, count: int = CAPTIONS_PER_PICTURE) -> list[str]:
    """``count`` different captions; the first is :func:`canonical_caption`."""
    chosen = [canonical_caption(scene)]
    draws = Draws(rng, 256)
    while len(chosen) < count:
        caption = _paraphrase(scene, draws)
        if caption not in chosen:
            chosen.append(caption)
    return chosen


def _paraphrase(scene: Scene, draws: Draws) -> str:
    if draws.uniform() < 0.5:
        scene = scene.reversed()
    nouns = [_noun(_said_size(item.size, draws), item.colour, item.shape) for item in scene.objects]
    body = _interleave(nouns, _joints(scene, draws))
    introduction = draws.choice(_INTRODUCTIONS)
    if draws.uniform() < OMIT_GROUND:
        return f"{introduction} {body}".strip()
    if draws.uniform() < _GROUND_FIRST:
        middle = draws.choice(("", "there is "))
        return f"on a {scene.ground} background {middle}{body}"
    before, after = draws.choice((("on a", " background"), ("on", ""), ("with a", " background")))
    return f"{introduction} {body} {before} {scene.ground}{after}".strip()


def _said_size(size: str, draws: Draws) -> str:
    return "" if draws.uniform() < OMIT_SIZE else draws.choice(_SIZE_WORDS[size])


def _joints(scene: Scene, draws: Draws) -> list[str]:
    """The words after each object: one place, or what stands between neighbours."""
    omitted = draws.uniform() < OMIT_PLACE
    if scene.place:
        return [] if omitted else [draws.choice(_PLACE_WORDS[scene.place])]
    return ["and" if omitted else draws.choice(_RELATION_WORDS[relation]) for relation in scene.relations]


def _noun(size: str, colour: str, shape: str) -> str:
    words = " ".join(word for word in (size, colour, shape) if word)
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _interleave(nouns: list[str], joints: list[str]) -> str:
    pieces = []
    for number, noun in enumerate(nouns):
        pieces += [noun, *joints[number:number + 1]]
    return " ".join(pieces)


@dataclass(frozen=True)
class Mention:
    """One object as a caption names it; ``size`` is None when it is not said."""

    colour: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Statement:
    """What a caption says: None and () where it says nothing.

    ``place`` belongs to a single object; ``relations[i]`` is where mention i is, seen from mention i + 1.
    """

    mentions: tuple[Mention, ...]
    place: str | None
    relations: tuple[str, ...]
    ground: str | None


_SIZES_BY_WORD = {word: size for size, words in _SIZE_WORDS.items() for word in words}
_PLACES_BY_WORD = {**{place: place for place in PLACES}, "middle": "center"}
_RELATIONS_BY_WORD = {"above": "above", "over": "above", "below": "below", "under": "below",
                      "left": "left of", "right": "right of"}
_GROUNDS_BY_WORD = {**{ground: ground for ground in GROUNDS}, "grey": "gray"}
_FILLERS = frozenset(("a", "an", "the", "in", "on", "at", "near", "of", "to", "and", "with", "background", "picture",
                      "image", "there", "here", "is"))


def parse_caption(caption: str) -> Statement:
    """What ``caption`` says. Raises ValueError, naming the word, for a caption outside the grammar."""
    mentions: list[Mention] = []
    between: list[list[str]] = [[]]  # direction words before, between and after the mentions
    ground = colour = size = None
    for word in re.findall(r"[\w']+", caption.lower()):
        if word in COLOURS:
            colour = _only_one(colour, word, caption)
        elif word in _SIZES_BY_WORD:
            size = _only_one(size, _SIZES_BY_WORD[word], caption)
        elif word in SHAPES:
            if colour is None:
                raise ValueError(f"the caption {caption!r} does not say the colour of the {word}")
            mentions.append(Mention(colour, word, size))
            colour = size = None
            between.append([])
        elif word in _GROUNDS_BY_WORD:
            ground = _only_one(ground, _GROUNDS_BY_WORD[word], caption)
        elif word in _PLACES_BY_WORD or word in _RELATIONS_BY_WORD:
            between[-1].append(word)
        elif word not in _FILLERS:
            raise ValueError(f"the caption {caption!r} has a word outside the grammar of shapes: {word!r}")
    if not mentions or colour or size:
        raise ValueError(f"the caption {caption!r} names no coloured shape" if not mentions
                         else f"the caption {caption!r} ends without the shape of its last object")
    place, relations = _positions(caption, len(mentions), between)
    return Statement(tuple(mentions), place, relations, ground)


def _only_one(before: str | None, word: str, caption: str) -> str:
    if before is not None:
        raise ValueError(f"the caption {caption!r} has both {before!r} and {word!r} for one thing")
    return word


def _positions(caption: str, count: int, between: list[list[str]]) -> tuple[str | None, tuple[str, ...]]:
    """The place of a single object, or the relations of several, from the words around the mentions."""
    words = [word for group in between for word in group]
    if not words:
        return None, ()
    if count == 1:
        if len(words) == 1 and words[0] in _PLACES_BY_WORD:
            return _PLACES_BY_WORD[words[0]], ()
    elif all(len(group) == 1 and group[0] in _RELATIONS_BY_WORD for group in between[1:-1]) and len(words) == count - 1:
        return None, tuple(_RELATIONS_BY_WORD[word] for word in words)
    raise ValueError(f"the caption {caption!r} does not place its objects in a way that the grammar of shapes knows")
