"""Boxes and key points go where the pixels go; what is damaged costs its sample, by reason."""

import io
import json
import math

import numpy as np
import pytest
from numbered import take
from PIL import Image

from dalle.data.decode import BadSample
from dalle.data.loader import train_batches, validation_batches
from dalle.data.places import Places, moved, read_places, stacked
from dalle.data.settings import DataConfig
from dalle.data.shapes.making import make_sample, picture_rng
from dalle.data.transforms import Cut, cut_square, to_square
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

SIZE = 32
WIDTH, HEIGHT = 96, 72
DOT = (60, 24, 24, 18)          # a white box in a black picture: x, y, width, height


def dotted(width=WIDTH, height=HEIGHT, dot=DOT):
    picture = np.zeros((height, width, 3), np.uint8)
    x, y, wide, high = dot
    picture[y:y + high, x:x + wide] = 255
    return Image.fromarray(picture)


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def seen(square):
    """x, y, width, height of what is white, in shares of the square; by the marginals, so that edges count in part."""
    light = square[..., 0].astype(float) / 255
    across, down = light.max(axis=0), light.max(axis=1)
    places = np.arange(len(square)) + 0.5
    middle = [float(side @ places / side.sum()) for side in (across, down)]
    length = [float(side.sum()) for side in (across, down)]
    return [number / len(square) for number in (middle[0] - length[0] / 2, middle[1] - length[1] / 2, *length)]


@pytest.mark.parametrize(("crop", "crop_from"), [("none", 1.0), ("center", 1.0), ("random", 1.0), ("dvae", 1.0),
                                                 ("transformer", 1.0), ("random", 1.25), ("none", 1.25)])
@pytest.mark.parametrize("size", [(96, 72), (72, 96), (40, 40), (20, 24)])
def test_a_box_is_moved_as_the_pixels_are(crop, crop_from, size):
    """What is white in the square is where the box says, within a pixel."""
    dot = (size[0] // 3, size[1] // 3, size[0] // 3, size[1] // 3)
    both = set()
    for seed in range(8):
        square, cut = cut_square(dotted(*size, dot), SIZE, crop, True, np.random.default_rng(seed), crop_from)
        np.testing.assert_array_equal(
            square, to_square(dotted(*size, dot), SIZE, crop, True, np.random.default_rng(seed), crop_from))
        box = moved(Places(np.array([dot], float)), "boxes", size, cut)[0]
        if (box[:2] < 0).any() or (box[:2] + box[2:] > 1).any():
            continue
        both.add(cut.mirrored)
        assert np.abs(np.array(seen(square)) - box).max() < 1.1 / SIZE, (seed, cut)
        middle = (dot[0] + dot[2] / 2, dot[1] + dot[3] / 2, 1)
        point = moved(Places(np.array([middle])), "keypoints", size, cut)[0]
        np.testing.assert_allclose(point, [box[0] + box[2] / 2, box[1] + box[3] / 2, 1], atol=1e-6)
    assert both == {False, True}


def test_a_square_by_hand():
    cut = Cut(left=10, top=20, width=40, height=20, mirrored=False)
    box, point = Places(np.array([[20.0, 25, 10, 5]])), Places(np.array([[20.0, 25, 1], [5, 25, 1], [30, 30, 0]]))
    assert moved(box, "boxes", (100, 80), cut).tolist() == [[0.25, 0.25, 0.25, 0.25]]
    assert moved(point, "keypoints", (100, 80), cut).tolist() == [[0.25, 0.25, 1], [0, 0, 0], [0, 0, 0]]
    mirrored = cut._replace(mirrored=True)
    assert moved(box, "boxes", (100, 80), mirrored).tolist() == [[0.5, 0.25, 0.25, 0.25]]
    assert moved(point, "keypoints", (100, 80), mirrored)[0].tolist() == [0.75, 0.25, 1]
    assert moved(Places(np.array([[0.2, 0.25, 1]]), in_shares=True), "keypoints", (100, 100), cut).tolist() == [
        [0.25, 0.25, 1]]


def test_what_is_read():
    assert read_places({"boxes": [[1, 2, 3, 4.5]]}, "boxes").rows.tolist() == [[1, 2, 3, 4.5]]
    assert read_places({"keypoints": [[1, 2, 0], [0, 0, 1]]}, "keypoints").rows.tolist() == [[1, 2, 0], [0, 0, 1]]
    objects = {"objects": [{"box": [2, 3, 7, 5], "center": [0.25, 0.5]}]}
    assert read_places(objects, "boxes").rows.tolist() == [[2, 3, 5, 2]]
    centres = read_places(objects, "keypoints")
    assert centres.rows.tolist() == [[0.25, 0.5, 1]] and centres.in_shares


@pytest.mark.parametrize(("meta", "kind", "reason"), [
    ({}, "boxes", "no_boxes"), ({"boxes": [[1, 1, 1, 1]]}, "keypoints", "no_keypoints"),
    ({"boxes": []}, "boxes", "damaged_boxes"), ({"boxes": 3}, "boxes", "damaged_boxes"),
    ({"boxes": [[1, 2, 3]]}, "boxes", "damaged_boxes"), ({"boxes": [["1", 2, 3, 4]]}, "boxes", "damaged_boxes"),
    ({"boxes": [[1, 2, 0, 4]]}, "boxes", "damaged_boxes"), ({"boxes": [[1, 2, -3, 4]]}, "boxes", "damaged_boxes"),
    ({"boxes": [[1, 2, math.nan, 4]]}, "boxes", "damaged_boxes"),
    ({"boxes": [[1, 2, 1e300, 4]]}, "boxes", "damaged_boxes"),
    ({"boxes": [[1, 2, 10**400, 4]]}, "boxes", "damaged_boxes"),
    ({"boxes": [[1, 2, 3, 4]] * 1001}, "boxes", "damaged_boxes"),
    ({"keypoints": [[1, 2]]}, "keypoints", "damaged_keypoints"),
    ({"objects": [3]}, "boxes", "damaged_boxes"), ({"objects": "a"}, "keypoints", "damaged_keypoints"),
    ({"objects": [{}]}, "keypoints", "damaged_keypoints"),
    ({"objects": [{"box": [5, 5, 4, 6]}]}, "boxes", "damaged_boxes"),
])
def test_what_is_damaged_is_a_bad_sample(meta, kind, reason):
    with pytest.raises(BadSample) as error:
        read_places(meta, kind)
    assert error.value.reason == reason


@pytest.mark.parametrize(("kind", "row"), [("boxes", [96, 0, 5, 5]), ("boxes", [-5, 0, 5, 5]), ("boxes", [0, 72, 1, 1]),
                                           ("keypoints", [97, 0, 1]), ("keypoints", [0, -1, 1])])
def test_what_lies_outside_of_the_picture_is_damaged(kind, row):
    with pytest.raises(BadSample, match=f"damaged_{kind}: .* outside of 96 x 72"):
        moved(Places(np.array([row], float)), kind, (96, 72), Cut(0, 0, 96, 72, False))


def test_fewer_rows_are_filled_with_zeros():
    whole = stacked([np.ones((1, 3), np.float32), np.ones((2, 3), np.float32)])
    assert whole.tolist() == [[[1, 1, 1], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]]]


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "d", 4) as writer:
        for number in range(12):
            box = list(DOT) if number != 5 else [1, 2]
            writer.write(png(dotted()), "png", ["a", "b"], {"boxes": [box], "keypoints": [[72, 33, 1]]})
    return DataConfig(train=str(tmp_path / "d"), validation=str(tmp_path / "d"), image_size=SIZE, workers=0,
                      max_bad_fraction=1, crop="random", crop_from=1.25, flip=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_say_where_things_are_and_count_what_is_damaged(shards, workers):
    settings = shards.model_copy(update={"places": "boxes", "workers": workers})
    loader = train_batches(settings, seed=0, batch_size=6)
    batches = take(loader, 4)
    loader.close()
    assert loader.skipped == {"damaged_boxes": 2}
    assert all("meta" not in batch and batch["boxes"].shape == (6, 1, 4) for batch in batches)
    for batch in batches:
        for image, (box,) in zip(batch["image"], batch["boxes"].numpy(), strict=True):
            if (box[:2] >= 0).all() and (box[:2] + box[2:] <= 1).all():
                assert np.abs(np.array(seen(image.permute(1, 2, 0).numpy())) - box).max() < 1.1 / SIZE


def test_pictures_and_their_order_are_the_same_with_and_without(shards):
    plain, placed = (take(train_batches(shards.model_copy(update={"places": kind}), seed=0, batch_size=6), 3)
                     for kind in (None, "keypoints"))
    for one, other in zip(plain, placed, strict=True):
        assert other.pop("keypoints").shape == (6, 1, 3) and one.keys() == other.keys()
        assert one["key"] == other["key"] and one["caption"] == other["caption"]
        assert one["image"].equal(other["image"])


def test_validation_is_placed_in_its_middle_square(shards):
    (batch,) = validation_batches(shards.model_copy(update={"places": "keypoints"}), seed=0, batch_size=12)
    np.testing.assert_allclose(batch["keypoints"][:, 0], [[(72 - 12) / 72, 33 / 72, 1]] * 12, rtol=1e-6)
    assert json.dumps(batch["meta"][0])



def test_places_without_pictures_are_refused(shards):
    with pytest.raises(UserError, match="data.places reads boxes in pictures, but data.images is false"):
        train_batches(shards.model_copy(update={"places": "boxes", "images": False}), seed=0, batch_size=6)


def test_the_pictures_of_shapes_say_both():
    sample = make_sample(picture_rng(0, "train", 3), "train", 64, 2)
    objects = sample.meta["objects"]
    whole = Cut(0, 0, 64, 64, False)
    boxes = moved(read_places(sample.meta, "boxes"), "boxes", (64, 64), whole)
    centres = moved(read_places(sample.meta, "keypoints"), "keypoints", (64, 64), whole)
    assert len(boxes) == len(centres) == len(objects)
    for box, centre, one in zip(boxes, centres, objects, strict=True):
        np.testing.assert_allclose(centre, [*one["center"], 1], rtol=1e-6)
        assert (box[:2] < centre[:2]).all() and (centre[:2] < box[:2] + box[2:]).all()
