"""Mask functions and block masks against the dense tables of their patterns."""

import itertools

import pytest
import torch

from dalle.models.masks import BLOCK, block_mask, computed_blocks
from dalle.models.patterns import AttentionPattern, mask_function

CPU = torch.device("cpu")
GRIDS = [(3, 4), (4, 4), (5, 3), (1, 7), (7, 1), (6, 16)]
KINDS = [("full", 3, "flat"), ("row", 3, "flat"), ("column", 3, "flat"),
         *itertools.product(["conv"], [1, 3, 5, 11], ["flat", "clamp", "torus"])]
NONE = torch.zeros((), dtype=torch.int32)


def table(pattern: AttentionPattern, by_columns: bool = False) -> torch.Tensor:
    slots = torch.arange(pattern.length, dtype=torch.int32)
    return mask_function(pattern, by_columns)(NONE, NONE, slots[:, None], slots)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [1, 3, 8])
def test_a_mask_function_is_its_patterns_table(grid, prefix):
    for name, kernel, mode in KINDS:
        pattern = AttentionPattern(name, prefix, grid, kernel, mode)
        assert torch.equal(table(pattern), pattern.mask()), pattern


@pytest.mark.parametrize("grid", GRIDS)
def test_by_columns_a_slot_sees_the_same_slots(grid):
    pattern, (rows, width) = AttentionPattern("column", 3, grid), grid
    order = [0, 1, 2, *(3 + row * width + column for column in range(width) for row in range(rows))]
    assert torch.equal(table(pattern, by_columns=True), pattern.mask()[order][:, order])
    with pytest.raises(ValueError, match="not 'row'"):
        mask_function(AttentionPattern("row", 3, grid), by_columns=True)


@pytest.mark.parametrize("length", [1, 100, 128, 250, 271])
@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_a_block_mask_lists_what_the_table_holds(name, length):
    pattern = AttentionPattern(name, 15, (16, 16), 5)
    made = block_mask(pattern, length, CPU)
    count = -(-length // BLOCK)
    padded = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    padded[:length, :length] = pattern.mask()[:length, :length]
    blocks = padded.view(count, BLOCK, count, BLOCK).transpose(1, 2).flatten(2)
    whole, touched = blocks.all(dim=2), blocks.any(dim=2)
    for row in range(count):
        mixed = made.kv_indices[0, 0, row, :made.kv_num_blocks[0, 0, row]]
        full = made.full_kv_indices[0, 0, row, :made.full_kv_num_blocks[0, 0, row]]
        assert mixed.tolist() == (touched & ~whole)[row].nonzero().flatten().tolist()
        assert full.tolist() == whole[row].nonzero().flatten().tolist()
    assert made.shape[-2:] == (length, length)
    assert computed_blocks(pattern, length) == (int(touched.sum()), int(whole.sum()))
    assert block_mask(pattern, length, CPU) is made, "layers of one pattern share one mask"


def test_blocks_of_the_papers_stream():
    """What the order of columns is for: of 55 causal blocks, raster order leaves none out."""
    computed = {name: computed_blocks(AttentionPattern(name, 257, (32, 32)), 1280)[0]
                for name in ("full", "row", "column", "conv")}
    assert computed == {"full": 55, "row": 40, "column": 55, "conv": 45}
    assert computed_blocks(AttentionPattern("column", 257, (32, 32)), 1280, by_columns=True)[0] == 40
