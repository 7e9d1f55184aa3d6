"""Bytes of a shard to a picture, captions or a JSON object; whatever is wrong with them is a :class:`BadSample`.

Nothing here trusts its input: the size is read from the header before a pixel is decoded, only known picture formats
are opened (Pillow would start Ghostscript for an EPS), truncated pictures are refused, nothing is unpickled. Plain
JPEGs are then decoded by :mod:`dalle.data.quick`.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from dalle.data.quick import draft_scale, quick_pixels
from dalle.data.reader import ShardReader, VanishedShard
from dalle.data.shard import GONE
from dalle.text_file import decode_text

log = logging.getLogger(__name__)

IN_BAD_SHARD = "in_bad_shard"               # a sample that is gone with its shard, where that was chosen
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
MAX_PIXELS = 89_478_485                     # Pillow's own warning level: a quarter of a gigabyte of RGB
ORIENTATION = 0x0112
TRANSPOSE = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
             5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
             8: Image.Transpose.ROTATE_90}
METADATA = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")
WITH_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


class BadSample(Exception):
    """A sample that cannot be used: ``reason`` is a short name to count by, ``detail`` says more."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS, formats: Sequence[str] = FORMATS) -> Image.Image:
    """The picture as 8-bit RGB, by Pillow alone: alpha matted on white, 16 bits scaled, EXIF orientation applied, first
    frame. ``formats``: those that are opened, by Pillow's names.

    Raises :class:`BadSample`: ``empty_image``, ``not_an_image``, ``too_many_pixels``, ``truncated_image``,
    ``damaged_image``, ``unsupported_mode``.
    """
    with _faults_named(data):
        return _by_pillow(_opened(data, max_pixels, formats))


def decode_pixels(data: bytes, max_pixels: int = MAX_PIXELS, draft: tuple[int, int] | None = None
                  ) -> Image.Image | np.ndarray:
    """:func:`decode_image` by the quickest decoder at hand: the same pixels, as a picture or as uint8 [H, W, 3].

    ``draft``: the least and the largest side, in pixels, that the shorter side is resized to; the decoder of a JPEG may
    shrink it as far as that is exact enough (:func:`dalle.data.quick.draft_scale`).
    """
    with _faults_named(data):
        image = _opened(data, max_pixels, FORMATS)
        scale = draft_scale(image, *draft) if draft else 1
        pixels = quick_pixels(data, image, scale)
        if pixels is None:
            return _by_pillow(image, scale)
        return _turned(pixels, _orientation(image))


@contextmanager
def _faults_named(data: bytes) -> Iterator[None]:
    """Whatever a decoder raises becomes a :class:`BadSample`."""
    if not data:
        raise BadSample("empty_image")
    try:
        yield
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too_many_pixels", str(error)) from None
    except UnidentifiedImageError:
        raise BadSample("not_an_image", f"{len(data)} bytes that begin with {data[:8]!r}") from None
    except Exception as error:      # decoders raise anything on hostile input: SyntaxError, struct.error, EOFError, ...
        reason = "truncated_image" if "truncated" in str(error).lower() else "damaged_image"
        raise BadSample(reason, f"{type(error).__name__}: {error}") from None


def _opened(data: bytes, max_pixels: int, formats: Sequence[str]) -> Image.Image:
    """The header alone is read, and no more is done with a picture that claims too much."""
    image = Image.open(BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > max_pixels:
        raise BadSample("too_many_pixels", f"{width} x {height}, above {max_pixels}")
    return image


def _by_pillow(image: Image.Image, scale: int = 1) -> Image.Image:
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()
    orientation = _orientation(image)
    image = _to_rgb(image)
    return image.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else image


def _turned(pixels: np.ndarray, orientation: int) -> Image.Image | np.ndarray:
    return Image.fromarray(pixels).transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else pixels


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation of a loaded picture; 1 where there is none or it is broken (the picture is still good)."""
    if not any(name in image.info for name in METADATA):
        return 1
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except Exception:               # Pillow raises whatever the broken bytes lead to
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image if type(image) is Image.Image else image.convert("RGB")
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        raise BadSample("unsupported_mode", "floating point pixels have no known range")
    if image.mode in WITH_ALPHA or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        image = image.convert("RGBA")
        matte = Image.new("RGB", image.size, (255, 255, 255))
        matte.paste(image, mask=image.getchannel("A"))
        return matte
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """16-bit grey to 8 bits by /257, so that 65535 is 255; Pillow's own conversion clips at 255."""
    values = np.asarray(image).astype(np.int64)
    grey = ((values.clip(0, 65535) + 128) // 257).astype(np.uint8)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def decode_captions(data: bytes) -> list[str]:
    """The captions of a .txt, one a line, stripped, blank lines and NULs left out.

    Raises :class:`BadSample`: ``caption_encoding`` when the bytes are not UTF-8 (a guess would be mojibake learned as
    words), ``empty_caption`` when nothing is left.
    """
    try:
        text = decode_text(data)
    except ValueError as error:
        raise BadSample("caption_encoding", str(error)) from None
    captions = [line.strip() for line in text.replace("\0", "").split("\n")]
    captions = [caption for caption in captions if caption]
    if not captions:
        raise BadSample("empty_caption")
    return captions


def decode_meta(data: bytes) -> dict[str, Any]:
    """The JSON object of a sample. Raises :class:`BadSample` ``damaged_json``."""
    try:
        meta = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadSample("damaged_json", f"{type(error).__name__}: {error}") from None
    if not isinstance(meta, dict):
        raise BadSample("damaged_json", f"a {type(meta).__name__} instead of an object")
    return meta


def class_id(meta: dict[str, Any]) -> int:
    """The sample's ``class_id``, -1 if it has none. Raises :class:`BadSample` ``damaged_json`` for what is no id."""
    value = meta.get("class_id", -1)
    if value is None:
        return -1
    if not isinstance(value, int) or isinstance(value, bool) or not -1 <= value < 2**31:
        raise BadSample("damaged_json", f"class_id is {value!r}")
    return value


def read_member(reader: ShardReader, shard: int, row: np.void, part: str) -> bytes | None:
    """The bytes of the sample's "image", "text" or "json"; None if it has none.

    Raises :class:`BadSample`: ``truncated_shard`` if they are cut short, ``in_bad_shard`` if they are gone with a shard
    that the index skips.
    """
    offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
    if size < 0:
        return None
    if offset == GONE:
        raise BadSample(IN_BAD_SHARD, f"{reader.index.shards[shard].name} has lost it")
    try:
        data = reader.read(shard, offset, size)
    except VanishedShard as error:
        if reader.index.bad_shards == "refuse":
            raise
        log.warning("training without it: %s", error)
        reader.index.lose(shard)
        raise BadSample(IN_BAD_SHARD, str(error)) from None
    if len(data) != size:
        raise BadSample("truncated_shard", f"{reader.index.shards[shard].name} ends inside the sample's {part}")
    return data


def sample_captions(reader: ShardReader, shard: int, row: np.void, meta: dict[str, Any] | None = None) -> list[str]:
    """The sample's captions: its .txt, or else the ``caption`` of its JSON (parsed as ``meta`` if that is given).

    Raises :class:`BadSample`: ``no_caption``, or what :func:`decode_captions` raises.
    """
    data = read_member(reader, shard, row, "text")
    if data is not None:
        return decode_captions(data)
    if meta is None:
        json_data = read_member(reader, shard, row, "json")
        meta = decode_meta(json_data) if json_data is not None else {}
    return meta_captions(meta)


def meta_captions(meta: dict[str, Any]) -> list[str]:
    """The captions in the JSON of a sample. Raises :class:`BadSample` as :func:`sample_captions` does."""
    caption = meta.get("caption")
    if not isinstance(caption, str):
        raise BadSample("no_caption")
    try:
        return decode_captions(caption.encode("utf-8"))
    except UnicodeEncodeError as error:             # JSON can spell half of a surrogate pair
        raise BadSample("caption_encoding", f"half a character at {error.start}") from None
