"""Rotary positions: products depend on what lies between two slots, and on nothing else."""

import pytest
import torch

from dalle.models import fused, plain
from dalle.models.cpu.rotary import rotate
from dalle.models.rotary import rotary_table

CPU = torch.device("cpu")


def fused_rotate(stacked: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    return torch.stack(fused.rotate(tuple(stacked[:, None]), cosines, sines))[:, 0]      # of [..., heads, S, head_dim]


each_form = pytest.mark.parametrize("form", [plain.rotate, rotate, fused_rotate], ids=["plain", "cpu", "fused"])


def rotary_product(form, first: int, second: int, prefix: int = 6, grid: tuple[int, int] = (5, 7)) -> float:
    torch.manual_seed(0)
    stacked = torch.randn(3, 1, 16, dtype=torch.float64).expand(3, prefix + grid[0] * grid[1], 16).clone()
    queries, keys, _ = form(stacked, *rotary_table(prefix, grid, 16, CPU, torch.float64))
    return float(queries[first] @ keys[second])


@each_form
def test_text_products_depend_only_on_the_distance(form):
    assert rotary_product(form, 5, 2) == pytest.approx(rotary_product(form, 3, 0))
    assert rotary_product(form, 5, 2) != pytest.approx(rotary_product(form, 5, 3))


@each_form
def test_image_products_depend_only_on_rows_and_columns_between(form):
    def slot(row: int, column: int) -> int:
        return 6 + row * 7 + column

    assert rotary_product(form, slot(3, 5), slot(1, 2)) == pytest.approx(rotary_product(form, slot(4, 3), slot(2, 0)))
    assert rotary_product(form, slot(3, 5), slot(1, 2)) != pytest.approx(rotary_product(form, slot(3, 5), slot(2, 2)))
    assert rotary_product(form, slot(3, 5), slot(1, 2)) != pytest.approx(rotary_product(form, slot(3, 5), slot(1, 3)))


@each_form
def test_rotation_keeps_lengths_and_values_and_has_its_gradient(form):
    table = rotary_table(2, (2, 2), 8, CPU, torch.float64)
    stacked = torch.randn(3, 2, 6, 8, dtype=torch.float64, requires_grad=True)
    turned = form(stacked, *table)
    torch.testing.assert_close(turned.norm(dim=-1), stacked.norm(dim=-1))
    assert torch.equal(turned[2], stacked[2])
    assert not torch.allclose(turned[0, :, 1], stacked[0, :, 1])
    assert torch.autograd.gradcheck(lambda inputs: form(inputs, *table), (stacked,))


def test_a_table_by_columns_is_that_of_the_slots_in_that_order():
    slots = [0, 1, *(2 + row * 3 + column for column in range(3) for row in range(4))]
    table, by_columns = (rotary_table(2, (4, 3), 8, CPU, torch.float64, order) for order in (False, True))
    for part, turned in zip(table, by_columns, strict=True):
        assert torch.equal(part[slots], turned)
