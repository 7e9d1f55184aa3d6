"""Pictures keep their bytes through every conversion, and stand in a grid row after row."""

import io

import numpy as np
import torch
from PIL import Image

from dalle.pictures import fit_picture, grid, png, side_by_side, signed_to_bytes, to_bytes, to_signed, to_unit

BYTES = torch.arange(256, dtype=torch.uint8)


def test_bytes_come_back_from_both_ranges():
    assert (to_unit(BYTES).min(), to_unit(BYTES).max()) == (0, 1)
    assert (to_signed(BYTES).min(), to_signed(BYTES).max()) == (-1, 1)
    assert torch.equal(to_bytes(to_unit(BYTES)), BYTES) and torch.equal(signed_to_bytes(to_signed(BYTES)), BYTES)


def test_what_lies_outside_is_cut_and_what_lies_between_is_rounded():
    assert to_bytes(torch.tensor([-0.1, 0.4 / 255, 0.6 / 255, 1.1])).tolist() == [0, 0, 1, 255]
    assert to_bytes(torch.tensor([-1.0, 0.5], dtype=torch.bfloat16)).tolist() == [0, 128]       # half to even
    assert signed_to_bytes(torch.tensor([-2.0, 0.0, 2.0])).tolist() == [0, 128, 255]


def test_a_picture_of_the_size_is_only_cropped():
    image = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(to_bytes(fit_picture(image, 4)), image[:, :, 1:5])
    assert fit_picture(image, 8).shape == (3, 8, 8)


def test_grids_hold_the_pictures_in_order():
    pictures = torch.stack([torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (10, 20, 30)])
    assert torch.equal(side_by_side(pictures)[0, 0], torch.tensor([10] * 4 + [20] * 4 + [30] * 4, dtype=torch.uint8))
    shown = grid(pictures, columns=2)
    assert shown.shape == (3, 14, 14) and shown.dtype == torch.uint8
    places = ((2, 2), (2, 8), (8, 2), (8, 8), (0, 0))
    assert [int(shown[0, row, column]) for row, column in places] == [10, 20, 30, 0, 0]


def test_a_png_holds_the_bytes():
    image = BYTES[:48].view(3, 4, 4)
    assert np.array_equal(np.array(Image.open(io.BytesIO(png(image)))), image.permute(1, 2, 0).numpy())
