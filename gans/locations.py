"""Places in pictures as GAWWN takes them (arXiv 1610.02454): boxes as matrices, key points as maps.

Coordinates are shares of the side, x to the right and y down. A box is (x, y, width, height), a key point
(x, y, visible). Matrices have their rows in the authors' order, y before x.
"""

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from dalle.data.batch import Batch
from dalle.errors import UserError
from dalle.models.precision import at_least_single
from dalle.pictures import to_bytes
from gans.looking import unit

Condition = Literal["box", "keypoints"]
Which = Literal["all", "first"]

LEAST = 1 / 16           # of the side: no box is narrower, for the maps have cells of that size
DRAWN_SIDE = 256         # pixels of a picture on which places are drawn, at least
MARKS = ((255, 60, 60), (60, 160, 255), (60, 220, 60), (255, 200, 0), (230, 80, 255), (0, 220, 220))


# -- out of a batch

def places_in(batch: Batch, condition: Condition, num_parts: int, which: Which = "all") -> Tensor:
    """Of each sample one box, float [b, 4], or its key points, [b, num_parts, 3], parts that are not there all 0."""
    if condition == "box":
        return one_box(batch["boxes"], which)
    points = batch["keypoints"]
    missing = num_parts - points.shape[1]
    if missing < 0:
        raise UserError(f"a sample has {points.shape[1]} key points: set generator.num_parts to the most that one has, "
                        f"not {num_parts}")
    return F.pad(points, (0, 0, 0, missing))


def one_box(boxes: Tensor, which: Which) -> Tensor:
    """[B, n, 4], rows of zeros behind the last of a sample -> [B, 4]: the box around all, or the first."""
    if which == "first":
        return clipped(boxes[:, 0])
    there = (boxes[..., 2:] > 0).all(dim=-1, keepdim=True)
    low = boxes[..., :2].masked_fill(~there, torch.inf).amin(dim=1)
    high = (boxes[..., :2] + boxes[..., 2:]).masked_fill(~there, -torch.inf).amax(dim=1)
    return clipped(torch.cat([low, high - low], dim=1))


def clipped(box: Tensor) -> Tensor:
    """[B, 4]: the part of a box that lies in the picture, at least ``LEAST`` wide and high."""
    low = box[:, :2].clamp(0, 1 - LEAST)
    high = torch.maximum((box[:, :2] + box[:, 2:]).clamp(max=1), low + LEAST)
    return torch.cat([low, high - low], dim=1)


# -- boxes

def crop_matrix(box: Tensor) -> Tensor:
    """[B, 4] -> [B, 2, 3]: [[h, 0, ty], [0, w, tx]], from the whole frame to where the box is; t = 2 (centre - 1/2).

    Coordinates are -1 at the middle of the first cell and 1 at that of the last.
    """
    wide, high = box[:, 2], box[:, 3]
    x, y = 2 * (box[:, 0] + wide / 2 - 0.5), 2 * (box[:, 1] + high / 2 - 0.5)
    zero = torch.zeros_like(x)
    return torch.stack([torch.stack([high, zero, y], dim=1), torch.stack([zero, wide, x], dim=1)], dim=1)


def inverse_matrix(matrix: Tensor) -> Tensor:
    """[B, 2, 3], without shear: [[1/sy, 0, -ty/sy], [0, 1/sx, -tx/sx]], by which the frame is put into the box."""
    scale, shift = matrix[:, :, :2].diagonal(dim1=1, dim2=2), matrix[:, :, 2]
    return torch.cat([torch.diag_embed(1 / scale), (-shift / scale)[..., None]], dim=2)


def resampled(features: Tensor, matrix: Tensor) -> Tensor:
    """[B, C, S, S] read bilinearly at ``matrix`` [B, 2, 3] of each cell; 0 outside of the frame.

    What ``grid_sample`` gives with ``align_corners`` for a matrix of no shear. It is two products with narrow tents,
    which can be differentiated twice, as R1 does, and give the same every time.
    """
    side = features.shape[-1]
    rows, columns = (tents(matrix[:, axis, axis], matrix[:, axis, 2], side) for axis in (0, 1))     # [B, S, S] each
    wide = at_least_single(features)
    return (rows[:, None] @ wide @ columns[:, None].transpose(2, 3)).to(features.dtype)


def tents(scale: Tensor, shift: Tensor, side: int) -> Tensor:
    """[B, side, side]: how much each cell (last) counts at scale * place + shift of each place, linearly."""
    scale, shift = at_least_single(scale), at_least_single(shift)
    places = torch.linspace(-1, 1, side, device=scale.device, dtype=scale.dtype)
    read = (scale[:, None] * places + shift[:, None] + 1) / 2 * (side - 1)
    cells = torch.arange(side, device=scale.device, dtype=scale.dtype)
    return (1 - (read[..., None] - cells).abs()).clamp(min=0)


# -- key points

def keypoint_maps(points: Tensor, side: int) -> Tensor:
    """[B, n, 3] -> [B, n, side, side]: 1 in the cell of a visible part, else 0. Cells are counted from 1, as
    round(side * coordinate)."""
    cells = torch.floor(points[..., :2] * side + 0.5).clamp(1, side) - 1
    numbers = torch.arange(side, device=points.device, dtype=points.dtype)
    across, down = (cells[..., axis, None] == numbers for axis in (0, 1))                           # [B, n, side]
    return (down[..., :, None] & across[..., None, :] & (points[..., 2] > 0)[..., None, None]).to(points.dtype)


def gate(maps: Tensor) -> Tensor:
    """[B, n, S, S] -> [B, 1, S, S]: 1 where any part is."""
    return maps.sum(dim=1, keepdim=True).clamp(0, 1)


# -- as they are typed

def read_box(value: Any) -> tuple[float, float, float, float] | None:
    """Numbers, or as they were typed."""
    if value is None:
        return None
    wanted = "write X,Y,WIDTH,HEIGHT in shares of the side, such as 0.25,0.25,0.5,0.5"
    numbers = shares(value.split(",") if isinstance(value, str) else value)
    if numbers is None or len(numbers) != 4:
        raise UserError(f"box {value!r}: {wanted}")
    x, y, wide, high = numbers
    if wide <= 0 or high <= 0 or x + wide > 1 + 1e-6 or y + high > 1 + 1e-6:
        raise UserError(f"box {value!r} does not lie in the picture, whose sides are 1: {wanted}")
    return x, y, wide, high


def read_keypoints(value: Any, most: int) -> tuple[tuple[float, float] | None, ...] | None:
    """Pairs or None of each part, or as they were typed."""
    if value is None:
        return None
    parts = [None if part.strip() in ("-", "") else part.split(":") for part in value.split(",")] \
        if isinstance(value, str) else list(value)
    points = [None if part is None else shares(part) for part in parts]
    if any(part is not None and (point is None or len(point) != 2) for part, point in zip(parts, points, strict=True)):
        raise UserError(f"keypoints {value!r}: write X:Y,X:Y,... in shares of the side, a part each, - for one that is "
                        "not there")
    if len(points) > most or not any(points):
        raise UserError(f"keypoints {value!r}: give 1 to {most} parts")
    return tuple(points)


def shares(values: Any) -> tuple[float, ...] | None:
    """Numbers from 0 to 1; None for anything else."""
    try:
        numbers = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return None
    return numbers if all(0 <= number <= 1 for number in numbers) else None


def read_switch(value: Any) -> bool:
    if str(value).lower() not in ("true", "false"):
        raise UserError(f"complete is {value!r}: true or false")
    return str(value).lower() == "true"


# -- looking

def drawn_places(image: Tensor, places: Tensor) -> Tensor:
    """uint8 [3, s, s]: a copy of float [3, S, S] in [-1, 1], enlarged, with a box [4] or the visible of key points
    [n, 3] drawn into it."""
    factor = -(-DRAWN_SIDE // image.shape[-1])
    pixels = to_bytes(unit(image)).repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    picture = Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
    draw, side = ImageDraw.Draw(picture), picture.width
    if places.ndim == 1:
        left, top, wide, high = (float(number) * side for number in places)
        draw.rectangle([left, top, left + wide - 1, top + high - 1], outline=MARKS[0], width=3)
    else:
        for number, (x, y, there) in enumerate(places.tolist()):
            if there > 0:
                x, y, size = x * side, y * side, side / 40
                draw.ellipse([x - size, y - size, x + size, y + size], fill=MARKS[number % len(MARKS)],
                             outline=(255, 255, 255), width=2)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)
