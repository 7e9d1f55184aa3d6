"""Makes the `shapes` set: its parameters, and its shards from them.

A sample is ``KEY.png``, ``KEY.txt`` (ten captions, the first says everything) and ``KEY.json``
(:meth:`dalle.data.shapes.scene.Scene.to_meta`). Picture ``i`` of a split depends on the seed, the split and ``i`` only.
Validation shows attribute tuples that are never in training (5 % of all, by hash).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import Field

from dalle.config import Section
from dalle.data.building import SPLITS, Sample, build_dataset, in_order
from dalle.data.shapes.edits import edit_sample
from dalle.data.shapes.grammar import captions
from dalle.data.shapes.render import encode_png, render
from dalle.data.shapes.scene import MAX_OBJECTS, make_scene
from dalle.errors import UserError

VERSION = 1  # raise it when the same parameters would give other bytes
CHUNK = 250
MIN_SIZE, MAX_SIZE = 16, 1024


class ShapesConfig(Section):
    """Everything that decides the bytes of the set."""

    count: int = Field(30_000, description="training pictures")
    validation: int = Field(1_000, description="held-out pictures")
    size: int = Field(64, description="side of a picture, in pixels")
    max_objects: int = Field(2, description="the most objects in a picture; each number from one on is as frequent")
    seed: int = Field(0, description="of all that is drawn; another one gives other pictures")
    edits: bool = Field(False, description="whether samples are (source, instruction, target) triples")
    samples_per_shard: int = Field(1_000, description="samples in each shard but the last of a split")


@dataclass(frozen=True)
class _Chunk:
    config: ShapesConfig
    split: str
    start: int
    stop: int


def make_shapes(config: ShapesConfig, out: Path, workers: int = 1, force: bool = False, report=print) -> dict:
    """Write the set below ``out`` (:func:`build_dataset`); the number of ``workers`` does not change a byte."""
    _check(config)
    kind = "shapes-edits" if config.edits else "shapes"
    recipe = {"kind": kind, "version": VERSION, **config.model_dump(exclude={"edits"})}
    return build_dataset(out, recipe, lambda: _samples(config, workers), total=config.count + config.validation,
                         samples_per_shard=config.samples_per_shard, force=force, report=report)


def _check(config: ShapesConfig) -> None:
    if not MIN_SIZE <= config.size <= MAX_SIZE:
        raise UserError(f"--size {config.size}: shapes are drawn at {MIN_SIZE} to {MAX_SIZE} pixels")
    if not 1 <= config.max_objects <= MAX_OBJECTS:
        raise UserError(f"--max-objects {config.max_objects}: a picture has 1 to {MAX_OBJECTS} objects")
    if config.count < 1 or config.validation < 0 or config.samples_per_shard < 1 or config.seed < 0:
        raise UserError("--count and --samples-per-shard must be at least 1, --validation and --seed at least 0")


def _samples(config: ShapesConfig, workers: int) -> Iterator[Sample]:
    counts = dict(zip(SPLITS, (config.count, config.validation), strict=True))
    chunks = [_Chunk(config, split, start, min(start + CHUNK, count))
              for split, count in counts.items() for start in range(0, count, CHUNK)]
    for samples in in_order(_make_chunk, chunks, workers):
        yield from samples


def _make_chunk(chunk: _Chunk) -> list[Sample]:
    config, split = chunk.config, chunk.split
    make = edit_sample if config.edits else make_sample
    return [make(picture_rng(config.seed, split, index), split, config.size, config.max_objects)
            for index in range(chunk.start, chunk.stop)]


def picture_rng(seed: int, split: str, index: int) -> np.random.Generator:
    """The random numbers of picture ``index`` of a split."""
    return np.random.default_rng([seed, SPLITS.index(split), index])


def make_sample(rng: np.random.Generator, split: str, size: int, max_objects: int) -> Sample:
    """One picture of ``split`` with its ten captions."""
    scene = make_scene(rng, max_objects, split)
    return Sample(split, encode_png(render(scene, size)), "png", captions(scene, rng), scene.to_meta(size))
