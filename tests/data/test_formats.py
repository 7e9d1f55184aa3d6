"""Formats that are read when shards are made: turned upright, and refused by the size in their header."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from dalle.data.decode import BadSample
from dalle.data.formats import decode_any, kind_of, read_picture


def encoded(kind: str, orientation: int | None = None) -> bytes:
    """Left half white, right half black, 32 x 16."""
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **({"exif": exif.tobytes()} if orientation else {}))
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_a_telephones_picture_is_turned_upright_once(kind):
    picture = np.asarray(decode_any(encoded(kind, orientation=6)))       # 6: to be turned clockwise
    assert picture.shape == (32, 16, 3)
    assert picture[:12].min() > 200 and picture[20:].max() < 55


@pytest.mark.parametrize("kind", ["JPEG2000", "AVIF", "HEIF"])
def test_no_pixel_is_decoded_above_the_limit(kind, monkeypatch):
    data = encoded(kind)
    assert decode_any(data).size == (32, 16)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadSample, match="too_many_pixels"):
        decode_any(data, max_pixels=511)


@pytest.mark.parametrize("kind", ["PNG", "AVIF", "HEIF"])
def test_what_begins_as_a_picture_is_damaged_rather_than_none(kind):
    with pytest.raises(BadSample) as caught:
        decode_any(encoded(kind)[:40])
    assert caught.value.reason in ("damaged_image", "truncated_image")


def test_a_picture_to_sample_from_may_be_of_any_format(tmp_path):
    (tmp_path / "picture").write_bytes(encoded("AVIF"))
    assert read_picture(tmp_path / "picture").shape == (3, 16, 32)


def test_kinds_by_first_bytes():
    assert kind_of(encoded("AVIF")[:16]) == "avif" and kind_of(encoded("JPEG2000")[:16]) == "jp2"
    assert kind_of(b"<html>") is None and kind_of(b"") is None


def test_without_the_reader_a_heic_picture_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadSample, match="no_reader"):
        decode_any(b"\0\0\0\x1cftypheic" + bytes(40))
