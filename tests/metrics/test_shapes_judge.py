"""The judge reads what was drawn, and scores only what a caption says."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from dalle.data.shapes.grammar import canonical_caption, captions
from dalle.data.shapes.render import render
from dalle.data.shapes.scene import Scene, SceneObject, make_scene
from dalle.metrics.shapes_judge import Reading, ReadObject, accuracy, colour_shape_right, judge, score


def right(count: int, size: int, max_objects: int, blur: float = 0.0, noise: float = 0.0) -> dict[str, float]:
    scores = []
    for number in range(count):
        rng = np.random.default_rng([11, number])
        scene = make_scene(rng, max_objects)
        picture = render(scene, size).astype(float)
        picture = ndimage.gaussian_filter(picture, (blur * size / 64, blur * size / 64, 0)) if blur else picture
        picture = np.clip(np.rint(picture + rng.normal(0, 1, picture.shape) * noise), 0, 255).astype(np.uint8)
        scores.append(score(judge(picture), scene))
    return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}


def test_ground_truth_is_read_right():
    for name, value in right(1000, 64, 2).items():
        assert value >= 0.995, name


def test_three_objects_are_read_right():
    assert min(right(200, 64, 3).values()) >= 0.99


def test_blur_and_noise_hardly_matter():
    assert right(500, 64, 2, blur=0.7, noise=8)["colour_shape"] >= 0.99


@pytest.mark.parametrize("size", [32, 48, 96, 128, 256])
def test_other_sizes(size):
    assert right(60, size, 3, blur=0.5, noise=4)["colour_shape"] >= 0.98


def scene() -> Scene:
    return Scene((SceneObject("red", "circle", "large", (0.5, 0.25), 0.2),
                  SceneObject("blue", "square", "small", (0.5, 0.75), 0.125)), "white", None, ("above",))


def test_a_reading_has_the_numbers_of_the_scene():
    reading = judge(render(scene(), 64))
    assert reading.ground == "white"
    upper, lower = sorted(reading.objects, key=lambda item: item.center[1])
    assert (upper.colour, upper.shape, upper.size) == ("red", "circle", "large")
    assert upper.center == pytest.approx((0.5, 0.25), abs=0.005) and upper.radius == pytest.approx(0.2, rel=0.03)
    assert (lower.colour, lower.shape, lower.size) == ("blue", "square", "small")
    assert lower.center == pytest.approx((0.5, 0.75), abs=0.005) and lower.radius == pytest.approx(0.125, rel=0.03)
    assert max(upper.misfit, lower.misfit) < 0.03


def test_an_extra_blob_fails_the_picture_and_a_speck_does_not():
    picture = render(scene(), 64)
    picture[2:5, 2:5] = (40, 160, 60)  # 9 pixels
    assert score(judge(picture), scene())["colour_shape"]
    picture[2:9, 2:9] = (40, 160, 60)  # 49 pixels
    result = score(judge(picture), scene())
    assert not result["colour_shape"] and not result["count"] and result["ground"]


def test_an_empty_picture_has_no_object():
    reading = judge(np.full((64, 64, 3), 128, dtype=np.uint8))
    assert reading == Reading((), "gray")
    assert score(reading, "a red circle")["colour_shape"] is False


def seen(*objects: tuple[str, str, str, tuple[float, float]], ground: str = "white") -> Reading:
    return Reading(tuple(ReadObject(*item, radius=0.1, misfit=0.0) for item in objects), ground)


RED_TOP = ("red", "circle", "large", (0.45, 0.2))
BLUE_BELOW = ("blue", "square", "small", (0.55, 0.8))


@pytest.mark.parametrize("caption, expected", [
    ("a large red circle above a small blue square on white",
     {"colour_shape": True, "count": True, "size": True, "place": True, "ground": True}),
    ("a red circle and a blue square",
     {"colour_shape": True, "count": True, "size": None, "place": None, "ground": None}),
    ("a blue square below a small red circle on black",
     {"colour_shape": True, "count": True, "size": False, "place": True, "ground": False}),
    ("a blue square left of a red circle",
     {"colour_shape": True, "count": True, "size": None, "place": False, "ground": None}),
    ("a large red square above a blue circle",
     {"colour_shape": False, "count": True, "size": False, "place": False, "ground": None}),
    ("a large red circle at the top",
     {"colour_shape": False, "count": False, "size": False, "place": False, "ground": None}),
])
def test_scores_by_hand(caption, expected):
    assert score(seen(RED_TOP, BLUE_BELOW), caption) == expected
    assert score(seen(BLUE_BELOW, RED_TOP), caption) == expected  # the order of reading does not matter


def test_places_of_one_object():
    for place, words in (("center", (0.48, 0.53)), ("left", (0.27, 0.5)), ("bottom", (0.5, 0.72))):
        reading = seen(("red", "ring", "small", words))
        joint = "in the center" if place == "center" else f"on the {place}" if place == "left" else f"at the {place}"
        assert score(reading, f"a red ring {joint}")["place"] is True
        assert score(reading, "a red ring at the top")["place"] is False


def test_the_same_thing_twice_may_be_assigned_either_way():
    reading = seen(("red", "circle", "large", (0.5, 0.8)), ("red", "circle", "small", (0.5, 0.2)))
    result = score(reading, "a small red circle above a large red circle")
    assert result["size"] is True and result["place"] is True
    assert score(reading, "a large red circle above a small red circle")["place"] is False


def test_chains_of_three_are_checked_pair_by_pair():
    reading = seen(("red", "circle", "small", (0.25, 0.25)), ("blue", "star", "small", (0.25, 0.75)),
                   ("pink", "ring", "small", (0.75, 0.75)))
    assert score(reading, "a red circle above a blue star left of a pink ring")["place"] is True
    assert score(reading, "a pink ring right of a blue star below a red circle")["place"] is True
    assert score(reading, "a red circle above a blue star right of a pink ring")["place"] is False


def test_accuracy_is_over_what_is_said():
    picture = torch.from_numpy(render(scene(), 64)).permute(2, 0, 1)
    images = torch.stack([picture] * 4)
    texts = ["a large red circle above a small blue square on a white background",   # all right
             "a small red circle and a blue square",                                 # size wrong
             "a red circle and a blue square on black",                              # ground wrong
             "a red ring"]                                                           # all that it says wrong
    result = accuracy(images, texts)
    assert result == {"colour_shape": 0.75, "count": 0.75, "size": 0.5, "place": 1.0, "ground": 0.5,
                      "colour_shape_1": 0.0, "colour_shape_2": 1.0}
    assert colour_shape_right(images, texts).tolist() == [True, True, True, False]


def test_every_caption_of_a_picture_is_satisfied_by_it():
    for number in range(40):
        one = make_scene(np.random.default_rng([12, number]), 3)
        reading = judge(render(one, 64))
        for caption in (canonical_caption(one), *captions(one, np.random.default_rng([13, number]))):
            assert all(value is not False for value in score(reading, caption).values()), caption


def test_other_arrays_are_refused():
    with pytest.raises(ValueError, match="uint8"):
        judge(np.zeros((64, 64, 3), dtype=np.float32))
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\]"):
        accuracy(np.zeros((2, 64, 64, 3), dtype=np.uint8), ["a red circle"] * 2)
