import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from dalle.data.decode import BadSample, class_id, decode_captions, decode_image, decode_meta


def encoded(image, format="png", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(data, **options):
    image = decode_image(data, **options)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def reason(data, **options):
    with pytest.raises(BadSample) as caught:
        decode_image(data, **options)
    return caught.value.reason


def noise(width, height):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_rgb_is_kept_exactly():
    image = noise(5, 3)
    np.testing.assert_array_equal(pixels(encoded(image)), np.asarray(image))


def test_alpha_is_matted_on_white():
    image = Image.new("RGBA", (4, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 127), (10, 20, 30, 255)])
    # alpha 127: 255 * (1 - 127 / 255) = 128
    np.testing.assert_array_equal(pixels(encoded(image))[0],
                                  [[255, 0, 0], [255, 255, 255], [128, 128, 128], [10, 20, 30]])


def test_grey_alpha_and_palette_transparency():
    grey = Image.new("LA", (2, 1))
    grey.putdata([(40, 255), (40, 0)])
    assert pixels(encoded(grey))[0].tolist() == [[40] * 3, [255] * 3]
    palette = Image.new("P", (2, 1))
    palette.putpalette([9, 8, 7, 1, 2, 3])
    palette.putdata([0, 1])
    assert pixels(encoded(palette, transparency=1))[0].tolist() == [[9, 8, 7], [255, 255, 255]]
    assert pixels(encoded(palette))[0].tolist() == [[9, 8, 7], [1, 2, 3]]


def test_colour_key_transparency():
    image = Image.new("RGB", (2, 1))
    image.putdata([(1, 2, 3), (4, 5, 6)])
    assert pixels(encoded(image, transparency=(4, 5, 6)))[0].tolist() == [[1, 2, 3], [255, 255, 255]]


def test_sixteen_bits_are_scaled_not_clipped():
    grey = Image.fromarray(np.array([[0, 257, 40000, 65535]], dtype=np.uint16))
    assert pixels(encoded(grey))[0, :, 0].tolist() == [0, 1, 156, 255]        # 40000 / 257 = 155.6
    assert pixels(encoded(grey, "tiff"))[0, :, 0].tolist() == [0, 1, 156, 255]


def test_one_bit_grey_and_cmyk():
    assert pixels(encoded(Image.new("1", (1, 1), 1)))[0, 0].tolist() == [255] * 3
    assert pixels(encoded(Image.new("L", (1, 1), 77)))[0, 0].tolist() == [77] * 3
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))                        # no cyan, all magenta and yellow: red
    red = pixels(encoded(cmyk, "jpeg", quality=95))[4, 4]
    assert red[0] > 245 and red[1] < 10 and red[2] < 10


def test_float_pixels_are_refused():
    assert reason(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "tiff")) == "unsupported_mode"


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    for format, options in (("gif", {}), ("webp", {"lossless": True})):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:], **options)
        assert pixels(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["png", "jpeg"])
def test_exif_orientation_is_applied(orientation, format):
    shown = np.zeros((16, 32, 3), np.uint8)                   # what a viewer must see: white top left quarter
    shown[:8, :16] = 255
    store = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
             5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
             8: lambda a: np.rot90(a, -1)}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(store(shown))), format, exif=exif)
    np.testing.assert_allclose(pixels(data), shown, atol=3)


def test_broken_exif_keeps_the_picture():
    image = Image.new("RGB", (8, 4), "red")
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0garbage", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        assert decode_image(encoded(image, "jpeg", exif=exif)).size == (8, 4)


@pytest.mark.parametrize("format", ["jpeg", "png", "webp", "gif"])
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_truncated_pictures_are_refused(format, kept):
    data = encoded(noise(64, 64), format)
    assert reason(data[:int(len(data) * kept)]) in ("truncated_image", "damaged_image", "not_an_image")
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_truncated_jpeg_is_named_so():
    data = encoded(noise(64, 64), "jpeg")
    assert reason(data[:len(data) // 2]) == "truncated_image"


@pytest.mark.parametrize(("data", "expected"), [
    (b"", "empty_image"), (b"<html>404</html>", "not_an_image"), (b"\xff\xd8\xff", "not_an_image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not_an_image"),
])
def test_what_is_no_picture(data, expected):
    assert reason(data) == expected


def test_bombs_are_refused_before_decoding():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(png_header(50_000, 50_000)) == "too_many_pixels"
    assert reason(png_header(10_000, 9_000)) == "too_many_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000          # kilobytes
    image = encoded(Image.new("RGB", (10, 10)))
    assert reason(image, max_pixels=99) == "too_many_pixels" and decode_image(image, max_pixels=100).size == (10, 10)


@pytest.mark.parametrize(("data", "expected"), [
    (b"a cat\n", ["a cat"]), (b"a cat\r\n\r\n  two cats \n", ["a cat", "two cats"]), (b"\xef\xbb\xbfa cat", ["a cat"]),
    (b"c\0a\0t\0", ["cat"]), ("über".encode(), ["über"]), ("a\u2028b".encode(), ["a\u2028b"]),
])
def test_captions(data, expected):
    assert decode_captions(data) == expected


@pytest.mark.parametrize(("data", "expected"), [
    (b"", "empty_caption"), (b" \n\t\n", "empty_caption"), (b"\xef\xbb\xbf", "empty_caption"), (b"\0", "empty_caption"),
    (b"it\x92s", "caption_encoding"), (b"caf\xe9", "caption_encoding"), ("cat".encode("utf-16"), "caption_encoding"),
])
def test_captions_that_cannot_be_used(data, expected):
    with pytest.raises(BadSample) as caught:
        decode_captions(data)
    assert caught.value.reason == expected


def test_json():
    assert decode_meta(b'{"class_id": 3}') == {"class_id": 3}
    assert class_id({"class_id": 3}) == 3 and class_id({}) == class_id({"class_id": None}) == -1
    for data in (b"", b"[1]", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(BadSample, match="damaged_json"):
            decode_meta(data)
    for value in ("3", 1.5, True, -2, 2**40):
        with pytest.raises(BadSample, match="damaged_json"):
            class_id({"class_id": value})
