"""What there is to see of a picture beside itself: its scales in a row, and where each word was looked for.

A network's ``paint`` hands out :func:`seen`; :func:`pictures` makes something to look at of one picture's part of it.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dalle.pictures import signed_to_bytes, to_bytes, to_pillow
from dalle.sampling.gallery import CAPTION_LINE, INK, PAPER, SHEET_GAP, SHEET_SIDE, wrap_text
from dalle.sampling.lettering import Lettering
from gans.outputs import Painted

SHADE = 0.2          # of a picture where a word was not looked for
IMAGE, ATTENTION = "image_", "attention_"


def seen(painted: Painted) -> dict[str, Tensor]:
    """``image_S`` float [B, 3, S, S] of each picture, and ``attention_S`` [B, T, S, S] of each refinement."""
    return {**{f"{IMAGE}{image.shape[-1]}": image for image in painted.images},
            **{f"{ATTENTION}{maps.shape[-1]}": maps for maps in painted.attention}}


def pictures(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """uint8 [3, h, w] each, of one picture's part of :func:`seen`.

    ``scales`` where there are several pictures, ``attention`` where words were looked for.
    """
    images = [value for name, value in values.items() if name.startswith(IMAGE)]
    maps = [value for name, value in values.items() if name.startswith(ATTENTION)]
    shown = {}
    if len(images) > 1:
        shown["scales"] = scales_picture(images)
    if maps:
        shown["attention"] = attention_picture(images[-1], maps)
    return shown


def scales_picture(images: Sequence[Tensor]) -> Tensor:
    """uint8 [3, S, columns]: float [3, s, s] in [-1, 1] each side by side, all enlarged to the side S of the largest.

    Enlarged without smoothing: the pixels of a small picture are to be seen.
    """
    side = max(image.shape[-1] for image in images)
    enlarged = [F.interpolate(unit(image)[None], (side, side), mode="nearest")[0] for image in images]
    return to_bytes(torch.cat(enlarged, dim=2))


def attention_picture(image: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """uint8 [3, rows, columns]: on top the picture, below it a row a word, where each refinement looked for that word.

    ``image`` float [3, S, S] in [-1, 1]; ``maps`` [T, s, s] each, a column each. A word's brightest place is the one of
    its largest weight; a word without any weight is padding and left out.
    """
    side = image.shape[-1]
    image = unit(image)
    present = maps[0].flatten(1).any(dim=1)
    columns = []
    for weights in maps:
        weights = weights[present].float()
        light = weights / weights.amax(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        light = F.interpolate(light[:, None], (side, side), mode="bilinear", align_corners=False)
        lit = image * (SHADE + (1 - SHADE) * light)
        columns.append(torch.cat([image, *lit], dim=1))
    return to_bytes(torch.cat(columns, dim=2))


def unit(image: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((image.float() + 1) / 2).clamp(0, 1)


def described_picture(image: Tensor, caption: str, description: str) -> Tensor:
    """uint8 [3, H, W]: ``image`` float [3, S, S] in [-1, 1], above it its caption, below it what is said of it."""
    factor = max(1, -(-SHEET_SIDE // image.shape[-1]))
    side = factor * image.shape[-1]
    font = Lettering([caption, description])
    above, below = (wrap_text(text, font, side) for text in (caption, description))
    top = SHEET_GAP + len(above) * CAPTION_LINE
    canvas = Image.new("RGB", (side + 2 * SHEET_GAP, top + side + 2 * SHEET_GAP + len(below) * CAPTION_LINE), PAPER)
    for start, lines in ((SHEET_GAP // 2, above), (top + side + SHEET_GAP // 2, below)):
        for number, line in enumerate(lines):
            font.draw(canvas, SHEET_GAP, start + number * CAPTION_LINE, line, INK)
    picture = to_pillow(signed_to_bytes(image)).resize((side, side), Image.Resampling.NEAREST)
    canvas.paste(picture, (SHEET_GAP, top))
    return torch.from_numpy(np.array(canvas)).permute(2, 0, 1)
