"""The names come from CLDR's XML, the pictures from the font; real glyphs are drawn where the font is installed."""

import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from dalle.data import emoji
from dalle.data.emoji import EmojiConfig, Named, install_packages, make_emoji, read_annotations
from dalle.errors import UserError

needs_font = pytest.mark.skipif(not emoji.FONT.is_file(), reason=f"the Debian package {emoji.FONT_PACKAGE} is missing")

PLAIN = """<ldml><annotations>
  <annotation cp="{">brace | bracket</annotation><annotation cp="{" type="tts">open curly bracket</annotation>
  <annotation cp="😀">face | grin | grinning face</annotation><annotation cp="😀" type="tts">grinning face</annotation>
  <annotation cp="❤">heart</annotation><annotation cp="❤" type="tts">red heart</annotation>
  <annotation cp="☃">cold | snow</annotation>
</annotations></ldml>"""
DERIVED = """<ldml><annotations>
  <annotation cp="🇫🇷">flag</annotation><annotation cp="🇫🇷" type="tts">flag: France</annotation>
  <annotation cp="🇳🇴">flag</annotation><annotation cp="🇳🇴" type="tts">flag: Norway</annotation>
  <annotation cp="🇧🇻">flag</annotation><annotation cp="🇧🇻" type="tts">flag: Bouvet Island</annotation>
  <annotation cp="👩‍🚀">rocket | space | woman | moon</annotation>
  <annotation cp="👩‍🚀" type="tts">woman astronaut</annotation>
  <annotation cp="👩‍😀">nothing</annotation><annotation cp="👩‍😀" type="tts">two glyphs</annotation>
</annotations></ldml>"""


@pytest.fixture
def annotations(tmp_path):
    for name, text in zip(emoji.ANNOTATION_FILES, (PLAIN, DERIVED), strict=True):
        path = tmp_path / "common" / name
        path.parent.mkdir(parents=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path / "common"


def make(annotations, out, **options):
    return make_emoji(EmojiConfig(size=48), out, annotations=annotations, report=lambda line: None, **options)


def test_names_and_keywords_are_read(annotations):
    named = read_annotations([annotations / name for name in emoji.ANNOTATION_FILES])
    assert [one.name for one in named][:4] == ["open curly bracket", "grinning face", "red heart", "flag: France"]
    assert named[0].keywords == ("brace",)       # "bracket" is in the name already
    assert named[1].keywords == ()
    assert all(one.text != "☃" for one in named)  # it has no name
    assert next(one for one in named if one.text == "👩‍🚀").keywords == ("rocket", "space", "moon")


def test_captions_by_hand():
    assert Named("x", "woman astronaut", ("rocket", "space", "moon")).captions() == [
        "woman astronaut", "woman astronaut, rocket, space", "woman astronaut, moon"]


@needs_font
def test_what_is_no_single_picture_of_its_own_is_left_out(annotations, tmp_path):
    record = make(annotations, tmp_path / "set")
    assert record["left_out"] == {"more than one glyph": 1, "no glyph in the font": 1,
                                  "same picture as another emoji": 1}
    assert sum(record["counts"].values()) == 5


@needs_font
def test_pictures_are_right_side_up_in_colour_on_white(annotations, tmp_path):
    make(annotations, tmp_path / "set")
    found = {}
    for path in (tmp_path / "set").rglob("*.tar"):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".png"):
                    meta = json.loads(tar.extractfile(name.replace(".png", ".json")).read())
                    text = tar.extractfile(name.replace(".png", ".txt")).read().decode()
                    assert text.split("\n")[0] == meta["name"] and meta["split"] == path.parent.name
                    found[meta["name"]] = np.asarray(Image.open(io.BytesIO(tar.extractfile(name).read()))).astype(int)
    for picture in found.values():
        assert picture.shape == (48, 48, 3)
        assert picture[[0, 0, -1, -1], [0, -1, 0, -1]].min() >= 250
    left, right = found["flag: France"][24, 6], found["flag: France"][24, 41]
    assert left[2] > left[0] + 50 and right[0] > right[2] + 50       # blue, white, red
    heart = found["red heart"]
    assert heart[20, 24, 0] > 150 and heart[20, 24, 1:].max() < 100
    assert (heart[14:20] < 200).any(axis=2).sum() > (heart[36:42] < 200).any(axis=2).sum()   # the point is below
    face = found["grinning face"][16, 24]
    assert face[0] > 180 and face[1] > 130 and face[2] < 120         # yellow


@needs_font
def test_the_same_bytes_again_whatever_the_workers(annotations, tmp_path, monkeypatch):
    monkeypatch.setattr(emoji, "CHUNK", 2)
    digests = []
    for name, workers in (("one", 1), ("two", 2)):
        make(annotations, tmp_path / name, workers=workers)
        shards = sorted((tmp_path / name).rglob("*.tar"))
        digests.append([hashlib.sha256(shard.read_bytes()).hexdigest() for shard in shards])
    assert digests[0] == digests[1] and digests[0]


def test_missing_packages_are_named_with_the_command(tmp_path):
    with pytest.raises(UserError) as error:
        make(tmp_path / "nowhere", tmp_path / "set", font=tmp_path / "none.ttf")
    for words in ("fonts-noto-color-emoji", "unicode-cldr-core", "apt-get install", "none.ttf"):
        assert words in str(error.value)
    assert not (tmp_path / "set").exists()


def test_another_font_and_broken_annotations_are_refused(annotations, tmp_path):
    font = tmp_path / "font.ttf"
    font.write_bytes(b"no font")
    with pytest.raises(UserError, match="not the Noto Color Emoji font"):
        make(annotations, tmp_path / "set", font=font)
    (annotations / emoji.ANNOTATION_FILES[0]).write_text("<ldml>")
    with pytest.raises(UserError, match="CLDR annotations"):
        make(annotations, tmp_path / "set", font=font)


def test_installing_takes_root_and_installs_what_is_missing(tmp_path, monkeypatch):
    installed = []
    monkeypatch.setattr(emoji.debian, "install", lambda packages, report: installed.append(packages))
    monkeypatch.setattr(emoji, "FONT", tmp_path / "none.ttf")
    monkeypatch.setattr(emoji, "ANNOTATIONS", tmp_path)
    monkeypatch.setattr(emoji.os, "geteuid", lambda: 1000)
    with pytest.raises(UserError, match="sudo apt-get update && sudo apt-get install"):
        install_packages(report=lambda line: None)
    assert installed == []
    monkeypatch.setattr(emoji.os, "geteuid", lambda: 0)
    install_packages(report=lambda line: None)
    assert installed == [["fonts-noto-color-emoji", "unicode-cldr-core"]]
