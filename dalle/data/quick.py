"""JPEG to pixels by a quicker decoder than Pillow's, where it gives the very same; and how far it may shrink them.

``simplejpeg``, an optional dependency, calls libjpeg-turbo as Pillow does, without the copies in between. Pillow has
read the header before, so that what is a picture and how large it may be is decided in one place; and whatever the
quick decoder does not take, or only warns of, is Pillow's to judge: a fault has one name whichever met it first.

There is none for WebP: most of its time is libwebp's own, whoever calls it.
"""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from PIL.JpegImagePlugin import get_sampling
from torch.utils.data import get_worker_info

log = logging.getLogger(__name__)

Decoder = Callable[..., Any]

SCALES = (8, 4, 2)               # by which libjpeg's decoder can shrink at the cost of fewer operations, not of more
LEAST_LEFT = 2                   # what is left to resize by after it, where it does not meet the side itself
SMALLEST = 8                     # pixels of a side: below, a rounded side and a scale do not determine each other
WHOLE_CHROMA = (0, 2)            # Pillow's numbers of 4:4:4 and 4:2:0
JPEG_MODES = ("RGB", "L")


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
    decode = jpeg_decoder() if image.format == "JPEG" and image.mode in JPEG_MODES else None
    if decode is None:
        return None
    shape = math.ceil(image.height / scale), math.ceil(image.width / scale), 3
    least = {"min_height": shape[0], "min_width": shape[1]} if scale > 1 else {}
    try:
        pixels = decode(data, "RGB", **least)      # strict: a warning is an error
    except ValueError:
        return None
    return pixels if pixels.shape == shape else None


@functools.cache
def jpeg_decoder() -> Decoder | None:
    """``simplejpeg.decode_jpeg``; None where the package is not installed, which is said once."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        worker = get_worker_info()
        log.log(logging.INFO if worker is not None and worker.id else logging.WARNING, "JPEGs are "
                "decoded by Pillow, to the same pixels at three quarters of the speed (%s); pip install simplejpeg",
                error)
        return None
    return decode_jpeg
