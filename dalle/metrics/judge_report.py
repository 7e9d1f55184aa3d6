"""The shapes judge, attribute by attribute: shares that are right, and what was seen in place of what was said."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment

from dalle.data.shapes.geometry import SHAPES
from dalle.data.shapes.grammar import Mention, Statement, parse_caption
from dalle.data.shapes.scene import COLOURS, DIRECTIONS, MAX_OBJECTS, layout
from dalle.metrics.shapes_judge import ReadObject, channels_last, direction, judge, score

NOTHING = "nothing"        # said of an object that is not there, or seen where no object was asked for
MORE = f"{MAX_OBJECTS + 1}+"
AXES = {
    "colour": (*COLOURS, NOTHING),
    "shape": (*SHAPES, NOTHING),
    "count": (*map(str, range(MAX_OBJECTS + 1)), MORE),
    "relation": (*DIRECTIONS, NOTHING),
}
TITLES = {"colour": "Colour of an object", "shape": "Shape of an object", "count": "Number of objects",
          "relation": "Relation of neighbours"}

# What an assignment of seen to said objects costs: one wrong word outweighs all sizes and distances together.
WRONG_COLOUR, WRONG_SHAPE, WRONG_SIZE, DISTANCE = 1.01, 1.0, 0.1, 0.05


@dataclass
class Confusion:
    """``counts[i, j]``: how often ``labels[i]`` was said and ``labels[j]`` was seen."""

    labels: tuple[str, ...]
    counts: np.ndarray

    def add(self, said: str, seen: str) -> None:
        self.counts[self.labels.index(said), self.labels.index(seen)] += 1

    @property
    def said(self) -> int:
        """How many were asked for: all rows but that of what was seen and not said."""
        return int(self.counts.sum() - self._unasked)

    @property
    def accuracy(self) -> float:
        """The share of what was said that was seen so; nan where nothing was said."""
        return float(np.trace(self.counts) / self.said) if self.said else float("nan")

    @property
    def shares(self) -> np.ndarray:
        """Each row as shares of its sum; rows of zeros stay zeros."""
        sums = self.counts.sum(axis=1, keepdims=True)
        return self.counts / np.maximum(sums, 1)

    @property
    def _unasked(self) -> int:
        return int(self.counts[self.labels.index(NOTHING)].sum()) if NOTHING in self.labels else 0


def _empty_matrices() -> dict[str, Confusion]:
    return {name: Confusion(labels, np.zeros((len(labels), len(labels)), dtype=np.int64))
            for name, labels in AXES.items()}


@dataclass
class JudgeReport:
    """What the judge found in ``samples`` pictures; reports of parts of a set add up to that of the whole."""

    samples: int = 0
    right: Counter = field(default_factory=Counter)     # by attribute, the keys of shapes_judge.accuracy
    asked: Counter = field(default_factory=Counter)
    confusion: dict[str, Confusion] = field(default_factory=_empty_matrices)

    def add(self, image: np.ndarray, caption: str) -> None:
        """One picture, uint8 [H, W, 3]. Raises ``ValueError`` for a caption outside the grammar of shapes."""
        said, reading = parse_caption(caption), judge(image)
        scores: Mapping[str, bool | None] = score(reading, said)
        for name, value in (*scores.items(), (f"colour_shape_{len(said.mentions)}", scores["colour_shape"])):
            if value is not None:
                self.asked[name] += 1
                self.right[name] += value
        self.confusion["count"].add(_count_label(len(said.mentions)), _count_label(len(reading.objects)))
        found = assign(said, reading.objects)
        for mention, item in [*zip(said.mentions, found, strict=True),
                              *((None, item) for item in reading.objects if item not in found)]:
            for name in ("colour", "shape"):
                self.confusion[name].add(getattr(mention, name, NOTHING), getattr(item, name, NOTHING))
        for relation, (first, second) in zip(said.relations, itertools.pairwise(found), strict=False):
            seen = direction(first, second) if first is not None and second is not None else NOTHING
            self.confusion["relation"].add(relation, seen)
        self.samples += 1

    def __add__(self, other: "JudgeReport") -> "JudgeReport":
        confusion = {name: Confusion(mine.labels, mine.counts + other.confusion[name].counts)
                     for name, mine in self.confusion.items()}
        return JudgeReport(self.samples + other.samples, self.right + other.right, self.asked + other.asked, confusion)

    @property
    def accuracy(self) -> dict[str, float]:
        """By attribute, over the pictures whose caption says it (the figures of ``shapes_judge.accuracy``).

        ``object_colour``, ``object_shape`` and ``object_relation`` are over objects and neighbours instead.
        """
        figures = {name: self.right[name] / asked for name, asked in self.asked.items()}
        objects = {f"object_{name}": self.confusion[name].accuracy for name in ("colour", "shape", "relation")
                   if self.confusion[name].said}
        return figures | objects

    def to_json(self) -> dict[str, Any]:
        """Accuracies, and each matrix as labels and counts (rows said, columns seen)."""
        matrices = {name: {"labels": list(matrix.labels), "counts": matrix.counts.tolist()}
                    for name, matrix in self.confusion.items()}
        return {"samples": self.samples, "accuracy": self.accuracy, "confusion": matrices}

    def figure(self, path: str | Path, caption: str = "") -> None:
        """The four confusion matrices as one picture (PNG, PDF or SVG by its suffix), ``caption`` below them."""
        figure = Figure(figsize=(11, 10.5), layout="constrained")
        axes = figure.subplots(2, 2)
        for (name, matrix), axis in zip(self.confusion.items(), axes.flat, strict=True):
            shown = axis.imshow(100 * matrix.shares, cmap="Blues", vmin=0, vmax=100)
            positions, labels = range(len(matrix.labels)), matrix.labels
            axis.set_xticks(positions, labels, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(positions, labels)
            axis.set_xlabel("seen in the picture")
            axis.set_ylabel("said by the caption")
            share = f"{100 * matrix.accuracy:.1f} % right of" if matrix.said else "none of"
            axis.set_title(f"{TITLES[name]}: {share} {matrix.said:,}")
            for (row, column), count in np.ndenumerate(matrix.counts):
                if count:
                    colour = "white" if matrix.shares[row, column] > 0.5 else "black"
                    axis.text(column, row, f"{count}", ha="center", va="center", fontsize=7, color=colour)
        figure.colorbar(shown, ax=axes, label="share of the row (%); the numbers are counts", shrink=0.5)
        figure.supxlabel(caption or f"the shapes judge on {self.samples:,} pictures", fontsize=9, wrap=True)
        figure.savefig(path, dpi=150)


def judge_report(images: Any, captions: Sequence[str]) -> JudgeReport:
    """The report of uint8 [N, 3, H, W] (array or tensor) and their N captions."""
    report = JudgeReport()
    for image, caption in zip(channels_last(images), captions, strict=True):
        report.add(image, caption)
    return report


def assign(said: Statement, objects: Sequence[ReadObject]) -> list[ReadObject | None]:
    """The seen object of each mention, None where there are too few: the fewest wrong words overall.

    Among equals sizes decide, then how far each stands from where its caption puts it, then colours before shapes.
    """
    found: list[ReadObject | None] = [None] * len(said.mentions)
    if not objects:
        return found
    says_where = (said.place or said.relations) and len(said.mentions) <= MAX_OBJECTS
    places = layout(said.place, said.relations) if says_where else [None] * len(said.mentions)
    costs = np.array([[_cost(mention, place, item) for item in objects]
                      for mention, place in zip(said.mentions, places, strict=True)])
    for mention, item in zip(*linear_sum_assignment(costs), strict=True):
        found[mention] = objects[item]
    return found


def _count_label(count: int) -> str:
    return str(count) if count <= MAX_OBJECTS else MORE


def _cost(mention: Mention, place: tuple[float, float] | None, item: ReadObject) -> float:
    cost = WRONG_COLOUR * (item.colour != mention.colour) + WRONG_SHAPE * (item.shape != mention.shape)
    cost += WRONG_SIZE * (mention.size not in (None, item.size))
    return cost + (DISTANCE * math.dist(place, item.center) if place else 0)
