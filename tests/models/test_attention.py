"""Patterns against masks written by loops, and every implementation of attention against the formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle.models.attention import (
    Attention,
    KeyValueCache,
    MathAttention,
    Rotate,
    additive_mask,
    block_mask,
    choose_backend,
    math_attention,
    rotary_table,
    rotate_,
    sdpa_attention,
)
from dalle.models.patterns import AttentionPattern, layer_patterns

CPU = torch.device("cpu")
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


def by_formula(stacked: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    queries, keys, values = stacked
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(stacked.shape[-1])
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_every_implementation_is_the_formula(name):
    pattern = AttentionPattern(name, 3, (3, 4), 3)
    stacked = torch.randn(3, 2, 2, 14, 8)
    expected = by_formula(stacked, pattern.mask()[:14, :14])
    torch.testing.assert_close(math_attention(stacked, additive_mask(pattern, 14, CPU, torch.float32)), expected)
    torch.testing.assert_close(sdpa_attention(stacked, pattern.mask()[:14, :14]), expected)
    if name == "full":
        torch.testing.assert_close(sdpa_attention(stacked, None), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_block_mask_is_the_pattern(name):
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    pattern = AttentionPattern(name, 3, (3, 4), 3)
    stacked = torch.randn(3, 1, 2, 14, 16)
    with torch.no_grad():
        out = flex_attention(*stacked, block_mask=block_mask(pattern, 14, CPU))
    torch.testing.assert_close(out, by_formula(stacked, pattern.mask()[:14, :14]))


def test_hand_written_gradient_of_attention():
    stacked = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = additive_mask(AttentionPattern("full", 1, (2, 2)), 5, CPU, torch.float64)
    assert torch.autograd.gradcheck(lambda inputs: MathAttention.apply(inputs, mask), (stacked,))


def test_bfloat16_attention_is_close_to_exact():
    pattern = AttentionPattern("full", 4, (5, 4))
    stacked = torch.randn(3, 2, 2, 23, 16)
    out = math_attention(stacked.bfloat16(), additive_mask(pattern, 23, CPU, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_formula(stacked, pattern.mask()[:23, :23]), atol=0.03, rtol=0.05)


def test_backend_is_chosen_by_device_pattern_and_length():
    full, row = AttentionPattern("full", 3, (4, 4)), AttentionPattern("row", 3, (4, 4))
    assert choose_backend("auto", full, 88, CPU) == "math"
    assert choose_backend("auto", full, 1280, CPU) == "sdpa"
    assert choose_backend("auto", full, 1280, torch.device("cuda")) == "sdpa"
    assert choose_backend("auto", row, 1280, torch.device("cuda")) == "flex"
    assert choose_backend("sdpa", row, 8, CPU) == "sdpa"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_backend("flex", row, 8, CPU)


def rotary_product(first: int, second: int, prefix: int = 6, grid: tuple[int, int] = (5, 7)) -> float:
    torch.manual_seed(0)
    stacked = torch.randn(3, 1, 16, dtype=torch.float64).expand(3, prefix + grid[0] * grid[1], 16).clone()
    queries, keys, _ = rotate_(stacked, *rotary_table(prefix, grid, 16, CPU, torch.float64))
    return float(queries[first] @ keys[second])


def test_text_products_depend_only_on_the_distance():
    assert rotary_product(5, 2) == pytest.approx(rotary_product(3, 0))
    assert rotary_product(5, 2) != pytest.approx(rotary_product(5, 3))


def test_image_products_depend_only_on_rows_and_columns_between():
    def slot(row: int, column: int) -> int:
        return 6 + row * 7 + column

    assert rotary_product(slot(3, 5), slot(1, 2)) == pytest.approx(rotary_product(slot(4, 3), slot(2, 0)))
    assert rotary_product(slot(3, 5), slot(1, 2)) != pytest.approx(rotary_product(slot(3, 5), slot(2, 2)))
    assert rotary_product(slot(3, 5), slot(1, 2)) != pytest.approx(rotary_product(slot(3, 5), slot(1, 3)))


def test_rotation_keeps_lengths_and_values_and_has_its_gradient():
    table = rotary_table(2, (2, 2), 8, CPU, torch.float64)
    stacked = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    turned = Rotate.apply(stacked, *table)
    torch.testing.assert_close(turned.norm(dim=-1), stacked.norm(dim=-1))
    assert torch.equal(turned[2], stacked[2])
    assert not torch.allclose(turned[0, :, 1], stacked[0, :, 1])
    assert torch.autograd.gradcheck(lambda inputs: Rotate.apply(inputs, *table), (stacked,))


def test_query_key_norm_bounds_the_scores():
    attention = Attention(16, 2, 8, AttentionPattern("full", 2, (2, 2)), qk_norm=True)
    stacked = attention._position(torch.randn(3, 1, 2, 5, 8) * 100, None)
    assert (stacked[0] @ stacked[1].transpose(-2, -1)).abs().max() <= 8 + 1e-4    # |q| = |k| = sqrt(head_dim)


def test_cache_copies_sequences_in_any_order():
    source = KeyValueCache(3, 2, 4, 5, CPU, torch.float32)
    source.fill(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4))
    target = KeyValueCache(4, 2, 4, 6, CPU, torch.float32)
    target.copy_rows(source, torch.tensor([2, 2, 0]), length=5, first=1)
    keys, expected = target.keys.view(4, 2, 4, 6), source.keys.view(3, 2, 4, 5)
    assert torch.equal(keys[1:, :, :, :5], expected[[2, 2, 0]])
    assert keys[0].abs().sum() == 0
    assert torch.equal(target.values.view(4, 2, 6, 4)[3, :, :5], source.values.view(3, 2, 5, 4)[0])


@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_sdpa_and_math_give_the_same_gradients(name):
    pattern = AttentionPattern(name, 3, (3, 4), 3)
    gradients = []
    for backend in ("math", "sdpa"):
        torch.manual_seed(0)
        attention = Attention(16, 2, 8, pattern, rotary=True, backend=backend)
        inputs = torch.randn(2, 14, 16, requires_grad=True)
        constants = attention.constants(14, CPU, torch.float32)
        F.mse_loss(attention(inputs, constants), torch.ones(2, 14, 16)).backward()
        gradients.append([inputs.grad, attention.qkv.weight.grad])
    torch.testing.assert_close(gradients[0], gradients[1])
