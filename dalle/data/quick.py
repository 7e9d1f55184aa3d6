"""JPEG and WebP to pixels by quicker decoders than Pillow's, where they give the very same pixels.

A JPEG through ``simplejpeg`` (libjpeg-turbo, an optional dependency), a WebP through torchvision (libwebp): the
libraries that Pillow calls, without its copies in between. Pillow has read the header before, so that what is a picture
and how large it may be is decided in one place; and whatever these decoders do not take, or only warn of, is Pillow's
to judge. A fault has one name whichever decoder met it first.
"""

import functools
import logging
import math
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import get_sampling

log = logging.getLogger(__name__)

Decoder = Callable[..., Any]

SCALES = (8, 4, 2)               # by which libjpeg's decoder can shrink at the cost of fewer operations, not of more
LEAST_LEFT = 2                   # what is left to resize by after it, where it does not meet the side itself
SMALLEST = 8                     # pixels of a side: below, a rounded side and a scale do not determine each other
WHOLE_CHROMA = (0, 2)            # Pillow's numbers of 4:4:4 and 4:2:0
JPEG_MODES, ONE_FRAME_WEBP = ("RGB", "L"), (b"VP8 ", b"VP8L")


def draft_scale(image: Image.Image, smallest: int, largest: int) -> int:
    """1, 2, 4 or 8: by how much the decoder may shrink an opened picture whose shorter side then becomes anything from
    ``smallest`` to ``largest``.

    The decoder shrinks in the frequencies of a block, which is close to an area mean, so it may where it meets the side
    itself, or where resizing still averages at least ``LEAST_LEFT`` of its pixels: a picture that is resized by less
    becomes blurred. Colour must be stored whole or halved both ways. Of one that is halved in one direction (4:2:2)
    the decoder throws away what the other direction has: 4 to 10 grey levels of mean error where the others have 1.
    """
    if image.format != "JPEG" or image.mode not in JPEG_MODES:
        return 1
    if image.mode == "RGB" and get_sampling(image) not in WHOLE_CHROMA:
        return 1
    shorter = min(image.size)
    for scale in SCALES:
        left = shorter / (scale * largest)
        if shorter >= scale * SMALLEST and (left >= LEAST_LEFT or (left == 1 and smallest == largest)):
            return scale
    return 1


def quick_pixels(data: bytes, image: Image.Image, scale: int = 1) -> np.ndarray | None:
    """uint8 [H, W, 3] of ``data``, which Pillow has opened as ``image``, shrunk by ``scale``; None: Pillow must do it.
    """
    if image.format == "JPEG" and image.mode in JPEG_MODES:
        return _jpeg(data, *image.size, scale)
    if image.format == "WEBP" and image.mode == "RGB" and data[12:16] in ONE_FRAME_WEBP:
        return _webp(data, *image.size)
    return None


def _jpeg(data: bytes, width: int, height: int, scale: int) -> np.ndarray | None:
    decode = jpeg_decoder()
    shape = math.ceil(height / scale), math.ceil(width / scale), 3
    if decode is None:
        return None
    least = {"min_height": shape[0], "min_width": shape[1]} if scale > 1 else {}
    try:
        pixels = decode(data, "RGB", **least)      # strict: a warning is an error
    except ValueError:
        return None
    return pixels if pixels.shape == shape else None


def _webp(data: bytes, width: int, height: int) -> np.ndarray | None:
    decode = webp_decoder()
    if decode is None:
        return None
    try:
        pixels = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8)).permute(1, 2, 0).numpy()
    except RuntimeError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


@functools.cache
def jpeg_decoder() -> Decoder | None:
    """``simplejpeg.decode_jpeg``; None where the package is not installed, which is said once."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        log.info("JPEGs are decoded by Pillow, to the same pixels at two thirds of the speed (%s); "
                 "pip install simplejpeg", error)
        return None
    return decode_jpeg


@functools.cache
def webp_decoder() -> Decoder | None:
    """``torchvision.io.decode_webp``; None where this torchvision was built without it, which is said once."""
    file = BytesIO()
    Image.new("RGB", (2, 2)).save(file, "WEBP")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of a torchvision without its own library; said below
            from torchvision.io import decode_webp  # late: a loader without a WebP does without it
        decode_webp(torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8))
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        log.info("WebPs are decoded by Pillow, to the same pixels at half of the speed (torchvision: %s)",
                 str(error).splitlines()[0] if str(error) else type(error).__name__)
        return None
    return decode_webp
