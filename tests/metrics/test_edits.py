"""What an edit changed: drawn pictures whose answers are known."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dalle.data.shapes.grammar import canonical_caption, parse_caption
from dalle.data.shapes.render import mask, render
from dalle.data.shapes.scene import Scene, SceneObject
from dalle.metrics.edits import THRESHOLD, Swap, colour_swaps, differences, edit_figures, l2_errors, swap_of
from dalle.metrics.shapes_judge import judge, judge_with_masks

CIRCLE = SceneObject("red", "circle", "large", (0.5, 0.25), 13 / 64)
SQUARE = SceneObject("blue", "square", "small", (0.5, 0.75), 8 / 64)
SCENE = Scene((CIRCLE, SQUARE), "white", None, ("above",))


def recoloured(scene: Scene, number: int, colour: str) -> Scene:
    objects = [replace(item, colour=colour) if place == number else item for place, item in enumerate(scene.objects)]
    return replace(scene, objects=tuple(objects))


def pictures(*scenes: Scene, size: int = 64) -> torch.Tensor:
    return torch.from_numpy(np.stack([render(scene, size) for scene in scenes])).permute(0, 3, 1, 2)


def figures(before: Scene, after: Scene, painted: Scene, size: int = 64) -> dict[str, float]:
    swap = swap_of(canonical_caption(before), canonical_caption(after))
    return edit_figures(pictures(before, size=size), pictures(painted, size=size), [swap])


@pytest.mark.parametrize("size", [64, 96, 256])
@pytest.mark.parametrize("number", [0, 1])
def test_an_object_that_alone_changes_leaves_all_outside_it(number, size):
    green = recoloured(SCENE, number, "green")
    found = figures(SCENE, green, green, size)
    assert found["changed_outside"] == 0 and found["outside_pairs"] == found["pairs"] == 1
    assert found["colour_before"] == found["colour_after"] == found["colour_changed"] == 1
    covered = (mask(SCENE.objects[number], size) > 0).mean()
    assert covered <= found["changed"] < 1.3 * covered      # the soft edge, too


def test_another_object_that_changes_is_outside():
    wrong = recoloured(SCENE, 1, "green")
    found = figures(SCENE, recoloured(SCENE, 0, "green"), wrong)
    square, circle = ((mask(item, 64) > 0).mean() for item in (SQUARE, CIRCLE))
    assert found["colour_before"] == 1 and found["colour_after"] == found["colour_changed"] == 0
    # the mask of the circle takes its soft edge in and two pixels more
    assert square < found["changed_outside"] < square / (1 - 1.6 * circle)


def test_an_object_that_moves_changes_what_it_uncovers():
    moved = replace(SCENE, objects=(replace(CIRCLE, center=(0.75, 0.25), colour="green"), SQUARE))
    found = figures(SCENE, recoloured(SCENE, 0, "green"), moved)
    assert found["colour_changed"] == 1 and found["changed_outside"] > 0.02


def test_nothing_said_nothing_done():
    found = figures(SCENE, recoloured(SCENE, 0, "green"), SCENE)
    assert found["changed"] == found["l2"] == found["changed_outside"] == 0
    assert found["colour_before"] == 1 and found["colour_after"] == found["colour_changed"] == 0


def test_a_picture_without_objects_has_no_outside():
    blank = torch.full((1, 3, 64, 64), 245, dtype=torch.uint8)
    found = edit_figures(blank, blank, [Swap("a red circle", "a blue circle", 0)])
    assert "changed_outside" not in found and found["outside_pairs"] == found["colour_before"] == 0


def test_captions_without_a_judge_leave_the_shares_of_whole_pictures():
    pair = torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.full((2, 3, 16, 16), 255, dtype=torch.uint8)
    assert edit_figures(*pair, [None, None]) == {"pairs": 2, "changed": 1, "l2": 1}


def test_differences_and_errors_by_hand():
    before = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    after = before.clone()
    after[0, 1, :8] = 51
    after[0, 2, :8] = THRESHOLD
    assert differences(before, after)[0].max() == 51 and differences(before, after)[0, 8:].max() == 0
    expected = math.sqrt((0.2 ** 2 + (THRESHOLD / 255) ** 2) / 6)
    assert l2_errors(before, after).tolist() == pytest.approx([expected, 0])
    assert edit_figures(before, after, [None, None])["changed"] == 0.25
    assert edit_figures(before, after, [None, None], threshold=51)["changed"] == 0       # more than, not as much


@pytest.mark.parametrize(("before", "after", "number"), [
    ("a red circle", "a blue circle", 0),
    ("a red circle above a blue square", "a red circle above a pink square", 1),
    ("a red circle", "a red square", None), ("a red circle", "a small blue circle", None),
    ("a red circle on white", "a blue circle on black", None), ("a red circle", "a red circle", None),
    ("a red circle above a blue square", "a pink circle above a green square", None),
    ("a red circle", "a red circle and a blue square", None), ("a bird", "a red bird", None)])
def test_what_is_a_swap_of_one_colour(before, after, number):
    assert swap_of(before, after) == (None if number is None else Swap(before, after, number))


def test_pairs_of_the_grammar_differ_in_one_word_and_name_each_object():
    swaps = colour_swaps(50, seed=3)
    assert swaps == colour_swaps(50, seed=3) and swaps != colour_swaps(50, seed=4)
    assert {len(parse_caption(swap.before).mentions) for swap in swaps} == {1, 2}
    for swap in swaps:
        words = list(zip(swap.before.split(), swap.after.split(), strict=True))
        assert [pair for pair in words if pair[0] != pair[1]] == [swap.colours]
        assert swap_of(swap.before, swap.after) == swap
        named = [(one.colour, one.shape) for one in parse_caption(swap.after).mentions]
        assert len(set(named)) == len(named)


@pytest.mark.parametrize("size", [32, 64, 100, 256])
def test_masks_hold_their_object_and_no_other(size):
    picture = render(SCENE, size)
    reading, masks = judge_with_masks(picture)
    assert reading == judge(picture) and len(masks) == 2
    for item, found in zip(reading.objects, masks, strict=True):
        own, other = (CIRCLE, SQUARE) if item.colour == "red" else (SQUARE, CIRCLE)
        assert found.shape == (size, size) and found[mask(own, size) > 0].all()
        assert not found[mask(other, size) > 0.5].any()
