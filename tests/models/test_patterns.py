"""Patterns against masks written by loops, and against the paper's counts."""

import pytest
import torch

from dalle.models.patterns import AttentionPattern, layer_patterns

COUNTS = {  # true entries of the full square, text keys + image keys, no start token
    (256, 32, 11): {"row": 328_304, "column": 311_936, "conv": 352_209, "full": 819_840},
    (6, 4, 3): {"row": 187, "column": 157, "conv": 184, "full": 253},
}


def mask_by_loops(name: str, prefix: int, grid: tuple[int, int], kernel: int, mode: str) -> torch.Tensor:
    """Section 4.4 of the specification, from the query's side: what each slot may look at, and of that what is past."""
    length = prefix + grid[0] * grid[1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        mask[query, :min(query + 1, prefix)] = True
        if query >= prefix:
            slots = within_reach(name, query - prefix, grid, kernel // 2, mode)
            mask[query, [prefix + slot for slot in slots if 0 <= slot <= query - prefix]] = True
    return mask


def within_reach(name: str, query: int, grid: tuple[int, int], reach: int, mode: str) -> list[int]:
    """The image slots that a pattern names for the slot ``query``, those of the future included."""
    rows, width = grid
    if name == "full":
        return list(range(query + 1))
    if name == "row":
        return list(range(query - width, query + 1))
    if name == "column":
        return list(range(query % width, rows * width, width))
    window = [(down, right) for down in range(-reach, reach + 1) for right in range(-reach, reach + 1)]
    if mode == "flat":
        return [query + down * width + right for down, right in window]
    row, column = divmod(query, width)
    if mode == "torus":
        return [(row + down) % rows * width + (column + right) % width for down, right in window]
    return [(row + down) * width + column + right for down, right in window
            if 0 <= row + down < rows and 0 <= column + right < width]


@pytest.mark.parametrize("sizes", COUNTS)
@pytest.mark.parametrize("name", ["row", "column", "conv", "full"])
def test_pattern_counts_are_the_papers(sizes, name):
    prefix, width, kernel = sizes
    assert AttentionPattern(name, prefix, (width, width), kernel).pairs(10**6) == COUNTS[sizes][name]


@pytest.mark.parametrize(("sizes", "count"), [((256, 32, 11), 347_394), ((6, 4, 3), 175)])
def test_clamped_convolution_counts(sizes, count):
    prefix, width, kernel = sizes
    assert AttentionPattern("conv", prefix, (width, width), kernel, "clamp").pairs(10**6) == count


def test_the_torus_differs_from_the_flat_window_where_rudalles_does():
    """Four rows of four, a window of three: the left and right edges, and the last row, which sees the first."""
    flat, torus = (AttentionPattern("conv", 6, (4, 4), 3, mode).mask() for mode in ("flat", "torus"))
    assert int((flat != torus).sum()) == 17
    last_row_to_first = torus[-4:, 6:10]
    assert last_row_to_first.tolist() == [[True, True, False, True], [True, True, True, False],
                                          [False, True, True, True], [True, False, True, True]]


@pytest.mark.parametrize("mode", ["flat", "clamp", "torus"])
@pytest.mark.parametrize("name", ["row", "column", "conv", "full"])
@pytest.mark.parametrize(("prefix", "grid", "kernel"), [
    (6, (4, 4), 3), (3, (5, 7), 5), (2, (4, 3), 11), (1, (3, 1), 3), (2, (2, 6), 5)])
def test_mask_equals_the_loops(name, mode, prefix, grid, kernel):
    expected = mask_by_loops(name, prefix, grid, kernel, mode)
    assert torch.equal(AttentionPattern(name, prefix, grid, kernel, mode).mask(), expected)


@pytest.mark.parametrize("mode", ["flat", "clamp", "torus"])
@pytest.mark.parametrize("name", ["row", "column", "conv", "full"])
def test_visible_image_slots_are_the_masks_row(name, mode):
    pattern = AttentionPattern(name, 3, (5, 4), 3, mode)
    slots = torch.arange(pattern.length)
    for slot in range(3, pattern.length):
        expected = slots[pattern.mask()[slot]]
        assert slots[pattern.visible_image_slots(slot)].tolist() == expected[expected >= 3].tolist()


def test_layers_follow_the_papers_order():
    order = layer_patterns("dalle", 64)
    assert order[:8] == ["row", "column", "row", "row", "row", "column", "row", "row"]
    assert order[-1] == "conv"
    assert [order.count(name) for name in ("row", "column", "conv")] == [47, 16, 1]


def test_one_name_fills_and_a_list_repeats():
    assert layer_patterns("full", 3) == ["full"] * 3
    assert layer_patterns(("row", "conv"), 5) == ["row", "conv", "row", "conv", "row"]
