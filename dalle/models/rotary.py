"""Rotary positions (arXiv 2104.09864) over a stream of text and an image grid, as tables of cosines and sines."""

from functools import lru_cache

import torch
from torch import Tensor

ROTARY_BASE = 10_000.0


@lru_cache(maxsize=8)
def rotary_table(prefix: int, grid: tuple[int, int], head_dim: int, device: torch.device,
                 dtype: torch.dtype, by_columns: bool = False) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, each [prefix + image slots, head_dim], to turn the pairs (i, i + head_dim / 2).

    The sines of the first half are negative: a slot x becomes x cos + swap(x) sin, with the halves of x swapped.
    A text slot is rotated by its index with all frequencies (1-D, arXiv 2104.09864); an image slot by its row with the
    first half of the pairs and by its column with the second half (2-D), so that the product of two text slots, or of
    two image slots, depends only on their displacement. ``by_columns``: of a stream whose image slots stand column
    after column.
    """
    with torch.inference_mode(False):
        pairs = head_dim // 2
        text_angles = torch.outer(torch.arange(prefix).double(), _frequencies(pairs))
        rows = torch.arange(grid[0]).double().repeat_interleave(grid[1])
        columns = torch.arange(grid[1]).double().repeat(grid[0])
        if by_columns:
            order = torch.arange(grid[0] * grid[1]).view(grid).t().flatten()
            rows, columns = rows[order], columns[order]
        half = _frequencies(pairs // 2)
        image_angles = torch.cat([torch.outer(rows, half), torch.outer(columns, half)], dim=1)
        angles = torch.cat([text_angles, image_angles]).repeat(1, 2)
        signs = torch.tensor([-1.0, 1.0]).double().repeat_interleave(pairs)
        return angles.cos().to(device, dtype), (angles.sin() * signs).to(device, dtype)


def _frequencies(count: int) -> Tensor:
    return ROTARY_BASE ** (-torch.arange(count).double() / count)
