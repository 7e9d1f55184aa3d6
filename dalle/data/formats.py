"""Which files look like pictures, by name or first bytes, and the formats that only the making of shards reads.

Shards hold what training decodes (:data:`dalle.data.members.IMAGE_EXTENSIONS`); whatever else can be read is converted
on the way there, so that the formats below are never opened from a shard that came from elsewhere.
"""

from pathlib import Path

import numpy as np
from PIL import Image, features

from dalle.data.decode import FORMATS, MAX_PIXELS, BadSample, decode_image
from dalle.errors import UserError

READABLE = ("jpg", "jpeg", "jpe", "jfif", "jif", "pjpeg", "pjp", "png", "apng", "webp", "gif", "bmp", "dib", "tif",
            "tiff", "avif", "avifs", "heic", "heics", "heif", "heifs", "hif", "jp2", "j2k", "jpf", "jpx")
UNREADABLE = ("3fr", "arw", "cin", "cr2", "cr3", "crw", "dcm", "dcr", "dds", "djvu", "dng", "dpx", "emf", "eps", "erf",
              "exr", "fits", "hdr", "icns", "ico", "iiq", "jng", "jls", "jxl", "jxr", "kdc", "kra", "mos", "mrw", "nef",
              "nrw", "orf", "pbm", "pcx", "pef", "pfm", "pgm", "pic", "pict", "pnm", "ppm", "psb", "psd", "qoi", "raf",
              "ras", "raw", "rw2", "rwl", "sgi", "sr2", "srf", "srw", "svg", "svgz", "tga", "wdp", "wmf", "x3f", "xbm",
              "xcf", "xpm")
NEVER_PICTURES = ("txt", "json", "csv")     # the many files that are not worth a look inside
HEAD = 16                                   # bytes that tell a picture
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
CONVERTED = (*FORMATS, "AVIF", "JPEG2000")


def kind_of(head: bytes) -> str | None:
    """What the first bytes of a file say: "jpg", "png", "webp", "gif", "avif", "heif", "jp2", or None."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        return "heif"
    return "jp2" if head.startswith((b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51")) else None


def looks_like_picture(file: Path) -> bool:
    """Whether the name, or else the first bytes of the file, are a picture's."""
    extension = file.suffix.lower().removeprefix(".")
    if extension in READABLE or extension in UNREADABLE:
        return True
    if extension in NEVER_PICTURES or not file.is_file():       # a pipe would be waited for
        return False
    try:
        with open(file, "rb") as opened:
            return kind_of(opened.read(HEAD)) is not None
    except OSError:
        return False


def is_unreadable(file: Path) -> bool:
    """Whether the name is that of a format that is not read. A camera's raw file would open as its small preview."""
    return file.suffix.lower().removeprefix(".") in UNREADABLE


def decode_any(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """:func:`dalle.data.decode.decode_image` for every format that is read; HEIC by ``pillow-heif``.

    Raises :class:`BadSample`, with ``no_reader`` for a format that this installation cannot read.
    """
    kind = kind_of(data[:HEAD])
    if kind == "heif":
        _register_heif()
    if kind == "avif" and not features.check("avif"):
        raise BadSample("no_reader", "this Pillow was built without AVIF")
    try:
        return decode_image(data, max_pixels, formats=("HEIF",) if kind == "heif" else CONVERTED)
    except BadSample as bad:
        if bad.reason == "not_an_image" and kind is not None:       # it begins as one
            raise BadSample("damaged_image", bad.detail) from None
        raise


def _register_heif() -> None:
    try:
        from pillow_heif import register_heif_opener
    except ImportError as error:
        raise BadSample("no_reader", str(error)) from None
    register_heif_opener()


def read_picture(path: str | Path) -> np.ndarray:
    """A picture's file as uint8 [3, H, W]; ``UserError`` when it is missing or cannot be read."""
    try:
        return np.ascontiguousarray(np.array(decode_any(Path(path).read_bytes())).transpose(2, 0, 1))
    except OSError as error:
        raise UserError(f"cannot read the picture {path}: {error.strerror or error}") from error
    except BadSample as error:
        raise UserError(f"{path} is not a picture that can be read: {error}") from error
