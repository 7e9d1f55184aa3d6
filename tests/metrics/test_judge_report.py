"""The judge's report: matrices by hand, the figures of the judge itself, parts that add up, and the picture."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data.shapes.grammar import canonical_caption, parse_caption
from dalle.data.shapes.render import render
from dalle.data.shapes.scene import Scene, SceneObject, make_scene
from dalle.metrics.judge_report import NOTHING, Confusion, JudgeReport, assign, judge_report
from dalle.metrics.shapes_judge import ReadObject, accuracy

CAPTION = "a large red circle above a small blue square on a white background"


def picture(upper: tuple[str, str], lower: tuple[str, str] | None) -> torch.Tensor:
    objects = [SceneObject(*upper, "large", (0.5, 0.25), 0.2)]
    if lower is not None:
        objects.append(SceneObject(*lower, "small", (0.5, 0.75), 0.125))
    return torch.from_numpy(render(Scene(tuple(objects), "white", None, ()), 64)).permute(2, 0, 1)


def cells(matrix: Confusion) -> dict[tuple[str, str], int]:
    """The cells that are not 0, by (said, seen)."""
    return {(matrix.labels[row], matrix.labels[column]): int(count)
            for (row, column), count in np.ndenumerate(matrix.counts) if count}


def test_each_wrong_word_is_in_its_cell():
    pictures = torch.stack([picture(("red", "circle"), ("blue", "square")),       # right
                            picture(("red", "ring"), ("purple", "square")),       # a wrong shape, a wrong colour
                            picture(("red", "circle"), None),                     # one is missing
                            picture(("blue", "square"), ("red", "circle"))])      # upside down
    report = judge_report(pictures, [CAPTION] * 4)
    assert cells(report.confusion["colour"]) == {
        ("red", "red"): 4, ("blue", "blue"): 2, ("blue", "purple"): 1, ("blue", NOTHING): 1}
    assert cells(report.confusion["shape"]) == {
        ("circle", "circle"): 3, ("circle", "ring"): 1, ("square", "square"): 3, ("square", NOTHING): 1}
    assert cells(report.confusion["count"]) == {("2", "2"): 3, ("2", "1"): 1}
    assert cells(report.confusion["relation"]) == {("above", "above"): 2, ("above", "below"): 1, ("above", NOTHING): 1}
    assert report.accuracy["object_colour"] == 6 / 8 and report.accuracy["object_shape"] == 6 / 8
    assert report.accuracy["object_relation"] == 2 / 4 and report.accuracy["colour_shape"] == 2 / 4


def test_what_nobody_asked_for_has_a_row_and_no_share_in_the_accuracy():
    report = judge_report(picture(("red", "circle"), ("blue", "square"))[None], ["a red circle"])
    assert cells(report.confusion["colour"]) == {("red", "red"): 1, (NOTHING, "blue"): 1}
    assert report.confusion["colour"].accuracy == 1 and report.confusion["colour"].said == 1
    assert cells(report.confusion["relation"]) == {} and "object_relation" not in report.accuracy


def seen(colour: str, shape: str, center: tuple[float, float]) -> ReadObject:
    return ReadObject(colour, shape, "small", center, 0.1, 0.0)


def test_where_words_decide_nothing_the_place_does():
    # Each object has one word in common with each mention: only the said place tells which is which.
    top, bottom = seen("blue", "circle", (0.5, 0.25)), seen("red", "square", (0.5, 0.75))
    assert assign(parse_caption("a red circle above a blue square"), [bottom, top]) == [top, bottom]
    assert assign(parse_caption("a red circle below a blue square"), [bottom, top]) == [bottom, top]
    assert assign(parse_caption("a red circle and a blue square"), [top, bottom]) == [bottom, top]   # by colour
    red, green = seen("red", "star", (0.5, 0.25)), seen("red", "star", (0.5, 0.75))
    assert assign(parse_caption("a red star above a red star"), [green, red]) == [red, green]
    assert assign(parse_caption("a red circle and a blue square"), []) == [None, None]


def test_a_word_outweighs_places_and_sizes():
    said = parse_caption("a large red circle above a large blue square")
    blue, red = seen("blue", "square", (0.5, 0.1)), seen("red", "circle", (0.5, 0.9))
    assert assign(said, [blue, red]) == [red, blue]


def scenes(count: int) -> tuple[torch.Tensor, list[str]]:
    made = [make_scene(np.random.default_rng([21, number]), 3) for number in range(count)]
    images = torch.stack([torch.from_numpy(render(scene, 64)).permute(2, 0, 1) for scene in made])
    return images, [canonical_caption(scene) for scene in made]


def test_the_figures_are_the_judges_and_parts_add_up():
    images, captions = scenes(40)
    captions = captions[:20] + captions[21:] + captions[20:21]       # the second half has its neighbour's caption
    report = judge_report(images, captions)
    figures = report.accuracy
    assert {name: value for name, value in figures.items() if not name.startswith("object_")} == pytest.approx(
        accuracy(images, captions))
    parts = judge_report(images[:13], captions[:13]) + judge_report(images[13:], captions[13:])
    assert parts.to_json() == report.to_json()
    right = judge_report(images[:20], captions[:20]).confusion
    assert all(np.array_equal(matrix.counts, np.diag(np.diag(matrix.counts))) for matrix in right.values())
    assert report.confusion["count"].counts.sum() == 40 and figures["object_colour"] < 1


def test_many_blobs_and_many_objects_are_counted_as_more():
    image = np.full((64, 64, 3), 245, dtype=np.uint8)
    for row in range(8, 64, 16):
        image[row : row + 6, 8:14] = (220, 40, 40)
    report = JudgeReport()
    report.add(image, "a red circle and a red circle and a red circle and a red circle and a red circle")
    assert cells(report.confusion["count"]) == {("4+", "4+"): 1}
    assert cells(report.confusion["colour"]) == {("red", "red"): 4, ("red", NOTHING): 1}


def test_the_picture_and_the_json_can_be_read(tmp_path):
    report = judge_report(picture(("red", "circle"), ("blue", "square"))[None], ["a red circle"])   # no relation said
    report.figure(tmp_path / "confusion.png", "1 picture, seed 0")
    shown = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))
    assert min(shown.shape[:2]) > 1000 and len(np.unique(shown.reshape(-1, 3), axis=0)) > 20
    assert json.loads(json.dumps(report.to_json()))["confusion"]["count"]["labels"] == ["0", "1", "2", "3", "4+"]


def test_a_caption_outside_the_grammar_is_refused():
    with pytest.raises(ValueError, match="outside the grammar"):
        judge_report(picture(("red", "circle"), None)[None], ["a red elephant"])
