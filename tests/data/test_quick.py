"""The quick decoder gives Pillow's pixels and verdicts; a decoder shrinks only where that is exact enough."""

import functools
import io
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from dalle.data import quick
from dalle.data.decode import BadSample, decode_image, decode_pixels
from dalle.data.transforms import size_of, to_square

SUBSAMPLING = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}


@pytest.fixture
def quick_decoder():
    pytest.importorskip("simplejpeg")
    assert quick.jpeg_decoder()


quickly = pytest.mark.usefixtures("quick_decoder")


@functools.cache
def scene(width=512, height=512, seed=0):
    """Smoothed noise under sharp shapes of saturated colours."""
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8))
    fine = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    image = Image.blend(rough.resize((width, height), Image.Resampling.BICUBIC), fine, 0.25)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        (left, right), (top, bottom) = np.sort(rng.integers(0, width, 2)), np.sort(rng.integers(0, height, 2))
        draw.ellipse([left, top, right, bottom], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def encoded(image, kind="jpeg", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def by_pillow(monkeypatch, data, **options):
    with monkeypatch.context() as patch:
        patch.setattr(quick, "jpeg_decoder", lambda: None)
        return np.asarray(decode_pixels(data, **options))


# -- the same pixels

@quickly
@pytest.mark.parametrize("size", [(64, 64), (101, 67), (17, 200), (1, 1), (8, 9)])
@pytest.mark.parametrize("options", [
    {}, {"quality": 30}, {"quality": 95, "subsampling": 0}, {"subsampling": 1}, {"progressive": True},
    {"optimize": True, "restart_marker_blocks": 2}, {"keep_rgb": True}, {"quality": 100, "subsampling": 0}])
def test_a_jpeg_has_pillows_pixels(size, options):
    data = encoded(scene(*size), **options)
    pixels = decode_pixels(data)
    assert isinstance(pixels, np.ndarray)
    np.testing.assert_array_equal(pixels, np.asarray(decode_image(data)))


@quickly
def test_a_grey_jpeg_has_pillows_pixels():
    data = encoded(scene(50, 30).convert("L"))
    pixels = decode_pixels(data)
    assert isinstance(pixels, np.ndarray) and pixels.shape == (30, 50, 3)
    np.testing.assert_array_equal(pixels, np.asarray(decode_image(data)))


def test_what_is_not_plain_is_left_to_pillow():
    clear = Image.merge("RGBA", [*scene(40, 40).split(), Image.linear_gradient("L").resize((40, 40))])
    film = {"save_all": True, "append_images": [scene(40, 40, 1)]}
    for data in (encoded(scene(40, 40).convert("CMYK")), encoded(clear, "webp"), encoded(scene(40, 40), "webp"),
                 encoded(scene(40, 40), "webp", **film), encoded(scene(40, 40), "png"), encoded(clear, "png")):
        decoded = decode_pixels(data)
        assert isinstance(decoded, Image.Image)
        np.testing.assert_array_equal(np.asarray(decoded), np.asarray(decode_image(data)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_by_their_exif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(scene(48, 32), exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_pixels(data)), np.asarray(decode_image(data)))


@quickly
def test_without_the_quick_decoder_the_pixels_are_the_same_and_the_log_says_so(monkeypatch, caplog):
    data = encoded(scene(512, 512))
    quick.jpeg_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "simplejpeg", None)
    with caplog.at_level("INFO"):
        slow = [np.asarray(decode_pixels(data, draft=(64, 64))) for _ in range(2)]
    assert [record.message.split()[:4] for record in caplog.records] == [["JPEGs", "are", "decoded", "by"]]     # once
    monkeypatch.undo()
    quick.jpeg_decoder.cache_clear()
    for pixels in slow:
        np.testing.assert_array_equal(decode_pixels(data, draft=(64, 64)), pixels)


# -- the same verdicts

def verdict(decode, data):
    """The pixels, or why there are none."""
    try:
        return np.asarray(decode(data)).tobytes()
    except BadSample as bad:
        return bad.reason


FILES = [encoded(scene(48, 40)), encoded(scene(48, 40), progressive=True), encoded(scene(48, 40).convert("L")),
         encoded(scene(40, 40), restart_marker_blocks=2), encoded(scene(40, 40), subsampling=0, optimize=True)]


@quickly
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FILES), st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4))
def test_truncated_and_corrupted_bytes_get_the_same_verdict_and_pixels(data, kept, changes):
    damaged = bytearray(data)
    for place, value in changes:
        damaged[int(place * (len(damaged) - 1))] = value
    for bytes_ in (bytes(damaged), bytes(damaged[:int(kept * len(damaged))])):
        assert verdict(decode_pixels, bytes_) == verdict(decode_image, bytes_)


@quickly
@pytest.mark.parametrize("data", FILES)
def test_every_cut_gets_the_same_verdict(data):
    for length in {*range(0, len(data), max(1, len(data) // 60)), *range(len(data) - 8, len(data))}:
        assert verdict(decode_pixels, data[:length]) == verdict(decode_image, data[:length])
    assert verdict(decode_pixels, data + b"behind the end") == verdict(decode_image, data + b"behind the end")


def test_sizes_are_judged_before_a_pixel_is_decoded(monkeypatch):
    monkeypatch.setattr(quick, "jpeg_decoder", lambda: pytest.fail("decoded"))
    with pytest.raises(BadSample, match="too_many_pixels"):
        decode_pixels(encoded(scene(64, 64)), max_pixels=64 * 64 - 1)


# -- shrunk by the decoder

@pytest.mark.parametrize(("size", "sides", "scale"), [
    ((400, 300), (64, 64), 2), ((400, 300), (75, 75), 4), ((400, 300), (150, 150), 2), ((400, 300), (151, 151), 1),
    ((512, 512), (256, 256), 2), ((512, 900), (64, 64), 8), ((640, 640), (256, 256), 1), ((768, 800), (256, 256), 1),
    ((768, 768), (64, 64), 4), ((768, 768), (288, 384), 1), ((1536, 1600), (288, 384), 2),
    ((256, 256), (256, 256), 1), ((24, 24), (3, 3), 2)])
def test_the_decoder_shrinks_to_the_side_or_leaves_enough_to_average(size, sides, scale):
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", size))))
    assert quick.draft_scale(image, *sides) == scale


def test_only_jpegs_of_whole_or_halved_colour_are_shrunk():
    def scale(data):
        return quick.draft_scale(Image.open(io.BytesIO(data)), 64, 64)

    image = scene(128, 128)
    assert {name: scale(encoded(image, subsampling=number)) for name, number in SUBSAMPLING.items()} == {
        "4:4:4": 2, "4:2:2": 1, "4:2:0": 2}
    assert scale(encoded(image.convert("L"))) == 2 and scale(encoded(image.convert("CMYK"))) == 1
    assert scale(encoded(image, "png")) == scale(encoded(image, "webp")) == 1


@quickly
@pytest.mark.parametrize("size", [(512, 512), (517, 600), (770, 512)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_a_shrunk_jpeg_has_pillows_pixels(monkeypatch, size, subsampling):
    data = encoded(scene(*size), subsampling=SUBSAMPLING[subsampling], quality=90)
    for side in (64, 128):
        shrunk = decode_pixels(data, draft=(side, side))
        assert isinstance(shrunk, np.ndarray) and side <= min(shrunk.shape[:2]) < min(size)
        np.testing.assert_array_equal(shrunk, by_pillow(monkeypatch, data, draft=(side, side)))


@pytest.mark.parametrize("size", [512, 768, 1024])
@pytest.mark.parametrize(("subsampling", "most"), [("4:4:4", 0.6), ("4:2:0", 1.6)])
def test_shrinking_is_exact_enough(size, subsampling, most):
    """Of 256 grey levels: 1.6 from the whole decode on average, and hardly farther from the picture before the JPEG."""
    image = scene(size, size)
    data = encoded(image, subsampling=SUBSAMPLING[subsampling], quality=90)
    for side in (64, 128, 256):
        shrunk = decode_pixels(data, draft=(side, side))
        assert size_of(shrunk)[0] < size or (size, side) == (768, 256)
        shrunk, whole, true = (to_square(picture, side, "center", False, None).astype(float)
                               for picture in (shrunk, decode_pixels(data), image))
        assert np.abs(shrunk - whole).mean() < most
        assert np.abs(shrunk - true).mean() < 1.15 * np.abs(whole - true).mean() + 0.2
