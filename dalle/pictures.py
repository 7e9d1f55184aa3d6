"""Pictures as the parts of the project hand them on: uint8 [3, H, W], float in [0, 1] or float in [-1, 1].

Each conversion is one expression here, because another order of the same arithmetic may round differently.
"""

import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

GRID_PADDING = 2      # pixels between the pictures of a grid


def to_unit(images: Tensor) -> Tensor:
    """uint8 -> float in [0, 1]."""
    return images.float() / 255


def to_signed(images: Tensor) -> Tensor:
    """uint8, or floats from 0 to 255 -> float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_bytes(pixels: Tensor) -> Tensor:
    """Float in [0, 1] -> uint8, rounded."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)


def signed_to_bytes(pixels: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8, rounded."""
    return to_bytes((pixels.float() + 1) / 2)


def fit_picture(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> float [3, size, size] in [0, 1]: centre kept, then resized (antialiased)."""
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = to_unit(image[None, :, top : top + side, left : left + side])
    if side == size:
        return square[0]
    return F.interpolate(square, (size, size), mode="bicubic", antialias=True, align_corners=False)[0].clamp(0, 1)


def grid(images: Tensor, columns: int) -> Tensor:
    """uint8 [N, 3, H, W] -> uint8 [3, h, w]: row after row, with a black line between neighbours."""
    from torchvision.utils import make_grid  # half a second to import, for previews alone

    return make_grid(images, nrow=columns, padding=GRID_PADDING)


def side_by_side(images: Tensor) -> Tensor:
    """[N, 3, H, W] -> [3, H, N * W]."""
    return torch.cat(list(images), dim=2)


def to_pillow(image: Tensor) -> Image.Image:
    """uint8 [3, H, W] -> Pillow's."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())


def png(image: Tensor) -> bytes:
    """uint8 [3, H, W] -> the bytes of a PNG file."""
    buffer = io.BytesIO()
    to_pillow(image).save(buffer, format="PNG")
    return buffer.getvalue()
