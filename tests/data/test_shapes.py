"""Scenes, drawing, captions, parsing, edits and whole sets of `shapes`."""

import base64
import hashlib
import io
import json
import math
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from dalle.data.shapes import grammar
from dalle.data.shapes.edits import make_edit
from dalle.data.shapes.geometry import POLYGONS, SHAPES, area, inside
from dalle.data.shapes.grammar import Mention, Statement, canonical_caption, captions, parse_caption
from dalle.data.shapes.making import ShapesConfig, make_shapes
from dalle.data.shapes.render import coverage, encode_png, mask, render
from dalle.data.shapes.scene import COLOURS, GROUNDS, INVERSE, Scene, SceneObject, make_scene
from dalle.errors import UserError


def scenes(count: int, max_objects: int = 3, split: str | None = None) -> list[Scene]:
    return [make_scene(np.random.default_rng([5, number]), max_objects, split) for number in range(count)]


RED_CIRCLE = SceneObject("red", "circle", "large", (0.5, 0.25), 0.2)
BLUE_SQUARE = SceneObject("blue", "square", "small", (0.5, 0.75), 0.125)
TWO = Scene((RED_CIRCLE, BLUE_SQUARE), "black", None, ("above",))


# -- geometry and drawing

def test_areas_are_the_closed_forms():
    expected = {
        "circle": math.pi,
        "ring": math.pi * (1 - 0.55**2),
        "square": 1.7**2,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * (0.5 * 1 * 0.5 * math.sin(math.radians(36))),  # ten triangles: middle, tip, inner corner
        "cross": 2 * (2 * 0.66) - 0.66**2,
    }
    for shape in SHAPES:
        assert area(shape) == pytest.approx(expected[shape])


def crossings_say_inside(x: float, y: float, points: list[tuple[float, float]]) -> bool:
    odd = False
    for (ax, ay), (bx, by) in zip(points, points[1:] + points[:1], strict=True):
        if (ay > y) != (by > y) and x < ax + (y - ay) * (bx - ax) / (by - ay):
            odd = not odd
    return odd


@pytest.mark.parametrize("shape", sorted(POLYGONS))
def test_inside_agrees_with_counting_crossings_of_the_outline(shape):
    axis = np.linspace(-1.2, 1.2, 41, dtype=np.float32) + 0.003
    grid = inside(shape, axis, axis)
    expected = [[crossings_say_inside(x, y, POLYGONS[shape]) for x in axis] for y in axis]
    assert (grid == np.array(expected)).mean() > 0.995  # points on an edge may go either way


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [32, 64, 256])
def test_coverage_has_the_area_and_the_middle_of_the_shape(shape, size):
    rows, columns, alpha = coverage(shape, (0.52, 0.47), 0.2, size)
    assert alpha.sum() == pytest.approx(area(shape) * (0.2 * size) ** 2, rel=0.02)
    x = (alpha.sum(axis=0) @ (np.arange(columns.start, columns.stop) + 0.5)) / alpha.sum() / size
    assert x == pytest.approx(0.52, abs=0.003)
    assert alpha.min() == 0 and alpha.max() == 1
    assert ((alpha > 0) & (alpha < 1)).any()


def test_render_puts_the_colours_where_the_scene_says():
    picture = render(TWO, 64)
    assert picture.shape == (64, 64, 3) and picture.dtype == np.uint8
    assert tuple(picture[0, 0]) == GROUNDS["black"]
    assert tuple(picture[16, 32]) == COLOURS["red"]
    assert tuple(picture[48, 32]) == COLOURS["blue"]
    assert tuple(picture[32, 32]) == GROUNDS["black"]


def test_object_colours_and_grounds_are_far_apart():
    values = list(COLOURS.values())
    assert min(math.dist(colour, ground) for colour in values for ground in GROUNDS.values()) > 80
    assert min(math.dist(a, b) for index, a in enumerate(values) for b in values[:index]) > 70


def test_png_is_lossless_and_read_by_others():
    picture = render(TWO, 48)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode_png(picture)))), picture)


def test_objects_never_touch_nor_leave_the_picture():
    for scene in scenes(300):
        near = [ndimage.binary_dilation(mask(item, 64), np.ones((3, 3))) for item in scene.objects]
        assert sum(near).max() == 1
        for item in scene.objects:
            left, top, right, bottom = item.to_meta(64)["box"]
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64


def test_boxes_and_outlines_describe_the_drawn_masks():
    for scene in scenes(60):
        for item in scene.objects:
            drawn = mask(item, 256)
            meta = item.to_meta(256)
            rows, columns = np.nonzero(drawn)
            assert np.allclose(meta["box"], [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], atol=2.0)
            outline = Image.new("1", (256, 256))
            draw = ImageDraw.Draw(outline)
            ((kind, numbers),) = meta["mask"].items()
            if kind == "polygon":
                draw.polygon(numbers, fill=1)
            else:
                x, y, radius = numbers[:3]
                draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)
                if kind == "ring":
                    hole = numbers[3]
                    draw.ellipse([x - hole, y - hole, x + hole, y + hole], fill=0)
            outlined = np.asarray(outline)
            assert (drawn & outlined).sum() / (drawn | outlined).sum() > 0.88


# -- scenes

def test_meta_round_trips_through_json():
    for scene in scenes(50):
        meta = json.loads(json.dumps(scene.to_meta(64)))
        assert Scene.from_meta(meta) == scene
        assert np.array_equal(render(Scene.from_meta(meta), 64), render(scene, 64))


def test_naming_the_objects_in_the_other_order_is_the_same_picture_in_the_same_split():
    for scene in scenes(100):
        other = scene.reversed()
        assert other.reversed() == scene
        assert other.split() == scene.split()
        assert np.array_equal(render(other, 32), render(scene, 32))


def test_about_five_percent_is_held_out_and_splits_are_respected():
    held_out = np.mean([scene.split() == "validation" for scene in scenes(4000)])
    assert 0.035 < held_out < 0.065
    assert {scene.split() for scene in scenes(50, split="train")} == {"train"}
    assert {scene.split() for scene in scenes(20, split="validation")} == {"validation"}


def test_jitter_does_not_change_the_split():
    moved = SceneObject("red", "circle", "large", (0.51, 0.26), 0.21)
    assert Scene((moved, BLUE_SQUARE), "black", None, ("above",)).split() == TWO.split()


def test_all_counts_and_attributes_come_up():
    counts = Counter(len(scene.objects) for scene in scenes(900))
    assert all(240 < counts[number] < 360 for number in (1, 2, 3))
    seen = {(item.colour, item.shape, item.size) for scene in scenes(900) for item in scene.objects}
    assert len(seen) == 8 * 6 * 2
    assert {scene.class_id() for scene in scenes(900)} == set(range(48))


def test_three_objects_stand_in_an_l():
    for scene in scenes(60):
        if len(scene.objects) == 3:
            (ax, ay), (bx, by), (cx, cy) = (item.center for item in scene.objects)
            vertical_first = scene.relations[0] in ("above", "below")
            assert (abs(ax - bx) < 0.1) == vertical_first and (abs(ay - by) < 0.1) != vertical_first
            assert (abs(by - cy) < 0.1) == vertical_first and (abs(bx - cx) < 0.1) != vertical_first


def test_too_many_objects_are_refused():
    with pytest.raises(ValueError, match="1 to 3"):
        make_scene(np.random.default_rng(0), 4)


# -- captions

def test_canonical_captions_by_hand():
    assert canonical_caption(TWO) == "a large red circle above a small blue square on a black background"
    one = Scene((SceneObject("orange", "star", "small", (0.5, 0.5), 0.125),), "gray", "center")
    assert canonical_caption(one) == "a small orange star in the center on a gray background"


def says_the_truth(statement: Statement, scene: Scene) -> bool:
    """Written out: the caption may name the objects in either order."""
    for version in (scene, scene.reversed()):
        objects = zip(statement.mentions, version.objects, strict=True)
        if (all(mention.colour == item.colour and mention.shape == item.shape and mention.size in (None, item.size)
                for mention, item in objects)
                and statement.relations in ((), version.relations)
                and statement.place in (None, version.place)
                and statement.ground in (None, version.ground)):
            return True
    return False


def test_every_caption_parses_back_to_its_scene():
    words = set()
    for number, scene in enumerate(scenes(400)):
        ten = captions(scene, np.random.default_rng([6, number]))
        assert len(set(ten)) == 10 and ten[0] == canonical_caption(scene)
        for caption in ten:
            assert says_the_truth(parse_caption(caption), scene), caption
            assert caption == caption.lower() and " ".join(caption.split()) == caption
            words.update(caption.split())
            if len(scene.objects) <= 2:
                assert len(caption.split()) <= 19
        full = parse_caption(ten[0])
        assert full.ground and all(mention.size for mention in full.mentions) and (full.place or full.relations)
    assert len(words) <= 49


def test_omission_rates():
    said = [parse_caption(caption) for number, scene in enumerate(scenes(600, 2))
            for caption in captions(scene, np.random.default_rng([8, number]))[1:]]
    sizes = [mention.size is None for statement in said for mention in statement.mentions]
    assert np.mean(sizes) == pytest.approx(0.20, abs=0.03)
    assert np.mean([not (one.place or one.relations) for one in said]) == pytest.approx(0.10, abs=0.02)
    assert np.mean([one.ground is None for one in said]) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("caption, expected", [
    ("a large red star above a small blue circle",
     Statement((Mention("red", "star", "large"), Mention("blue", "circle", "small")), None, ("above",), None)),
    ("An orange ring, on the left, with a grey background!",
     Statement((Mention("orange", "ring", None),), "left", (), "gray")),
    ("on white there is a big pink cross to the right of a little blue ring",
     Statement((Mention("pink", "cross", "large"), Mention("blue", "ring", "small")), None, ("right of",), "white")),
    ("a red circle and a blue square and a cyan star",
     Statement((Mention("red", "circle", None), Mention("blue", "square", None), Mention("cyan", "star", None)),
               None, (), None)),
    ("a red circle over a blue square left of a cyan star",
     Statement((Mention("red", "circle", None), Mention("blue", "square", None), Mention("cyan", "star", None)),
               None, ("above", "left of"), None)),
])
def test_parse_by_hand(caption, expected):
    assert parse_caption(caption) == expected


@pytest.mark.parametrize("caption, complaint", [
    ("a red dog", "'dog'"),
    ("a circle", "colour of the circle"),
    ("on a white background", "no coloured shape"),
    ("a red blue circle", "both 'red' and 'blue'"),
    ("a red circle above a blue", "without the shape"),
    ("a red circle above", "place"),
    ("a red circle above left a blue square", "place"),
    ("", "no coloured shape"),
])
def test_parse_names_what_is_wrong(caption, complaint):
    with pytest.raises(ValueError, match=complaint):
        parse_caption(caption)


def test_the_grammar_covers_every_relation_and_its_inverse():
    assert {INVERSE[INVERSE[name]] for name in INVERSE} == set(INVERSE) == set(grammar._RELATION_WORDS)


# -- whole sets

def make(folder, workers=1, **changes):
    return make_shapes(ShapesConfig(**{"count": 30, "validation": 7, "size": 32, "samples_per_shard": 20, **changes}),
                       folder, workers=workers, report=lambda line: None)


def digests(folder):
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.tar"))}


def read_set(folder):
    samples = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names = tar.getnames()
            for key in dict.fromkeys(name.split(".")[0] for name in names):
                image, text, meta = (tar.extractfile(f"{key}.{part}").read() for part in ("png", "txt", "json"))
                samples.append((np.asarray(Image.open(io.BytesIO(image))), text.decode().split("\n"), json.loads(meta)))
    return samples


def test_the_bytes_depend_on_the_seed_and_on_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.shapes.making.CHUNK", 10)
    make(tmp_path / "one")
    make(tmp_path / "two", workers=2)
    make(tmp_path / "other", seed=1)
    first = digests(tmp_path / "one")
    assert list(first) == ["train/00000.tar", "train/00001.tar", "validation/00000.tar"]
    assert digests(tmp_path / "two") == first
    assert not set(digests(tmp_path / "other").values()) & set(first.values())


def test_a_set_holds_what_its_record_says(tmp_path):
    record = make(tmp_path / "set")
    assert record["counts"] == {"train": 30, "validation": 7} and record["left_out"] == {}
    assert json.loads((tmp_path / "set/dataset.json").read_text()) == record
    for split, count in record["counts"].items():
        samples = read_set(tmp_path / "set" / split)
        assert len(samples) == count
        for picture, lines, meta in samples:
            scene = Scene.from_meta(meta)
            assert np.array_equal(picture, render(scene, 32))
            assert len(lines) == 10 and lines[0] == canonical_caption(scene)
            assert meta["split"] == split == scene.split() and meta["class_id"] == scene.class_id()


def test_edits_change_one_thing(tmp_path):
    make(tmp_path / "set", edits=True, count=60)
    kinds = set()
    for picture, lines, meta in read_set(tmp_path / "set/train"):
        source, target = Scene.from_meta(meta["source"]), Scene.from_meta(meta["target"])
        before = np.asarray(Image.open(io.BytesIO(base64.b64decode(meta["source_png"]))))
        assert np.array_equal(before, render(source, 32)) and np.array_equal(picture, render(target, 32))
        assert source.split() == target.split() == meta["split"] == "train"
        assert len(lines) == 3 and canonical_caption(target) == meta["target_caption"]
        kept = set(source.objects) & set(target.objects)
        changed = max(len(source.objects), len(target.objects)) - len(kept)
        assert changed + (source.ground != target.ground) == 1
        kinds.add(meta["edit"]["kind"])
    assert len(kinds) == 7
    assert {meta["target"]["split"] for _, _, meta in read_set(tmp_path / "set/validation")} == {"validation"}


def test_an_edit_says_what_it_does():
    for number in range(200):
        source, target, edit = make_edit(np.random.default_rng([9, number]), "train", 2)
        if edit.kind == "colour":
            old = next(item for item in source.objects if f"{item.colour} {item.shape}" == edit.target)
            new = next(item for item in target.objects if item.center == old.center)
            assert (new.colour, new.shape) == (edit.value, old.shape)
            assert edit.instructions[0] == f"make the {old.colour} {old.shape} {new.colour}"
        if edit.kind == "add":
            assert parse_caption(edit.instructions[0].removeprefix("add ")).relations == target.relations
        if edit.kind == "remove":
            assert f"{target.objects[0].colour} {target.objects[0].shape}" != edit.target and target.place


@pytest.mark.parametrize("changes, complaint", [({"size": 8}, "--size 8"), ({"max_objects": 4}, "--max-objects 4"),
                                                ({"count": 0}, "--count")])
def test_impossible_parameters(tmp_path, changes, complaint):
    with pytest.raises(UserError, match=complaint):
        make(tmp_path / "set", **changes)
