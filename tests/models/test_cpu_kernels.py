"""Each hand-written form against the plain one: values and gradients, in fp32, bf16 and, by differences, in doubles."""

import pytest
import torch

from dalle.models import plain
from dalle.models.cpu.activations import SquaredRelu, squared_relu
from dalle.models.cpu.attention import MathAttention, math_attention
from dalle.models.cpu.key_value_cache import KeyValueCache
from dalle.models.cpu.rotary import rotate
from dalle.models.cpu.token_shift import ShiftSlots, shift_slots
from dalle.models.masks import additive_mask
from dalle.models.patterns import AttentionPattern
from dalle.models.rotary import rotary_table

CPU = torch.device("cpu")
PATTERN = AttentionPattern("row", 4, (3, 4))
TOLERANCES = {torch.float32: {"atol": 1e-5, "rtol": 1e-4}, torch.bfloat16: {"atol": 0.05, "rtol": 0.05},
              torch.float64: {"atol": 1e-12, "rtol": 1e-10}}


def attention_forms(dtype: torch.dtype):
    mask = additive_mask(PATTERN, 15, CPU, dtype)
    return lambda x: math_attention(x, mask), lambda x: plain.attention(x, mask)


def rotation_forms(dtype: torch.dtype):
    table = [part[:15] for part in rotary_table(4, (3, 4), 8, CPU, dtype)]
    return lambda x: rotate(x, *table), lambda x: plain.rotate(x, *table)


OPERATIONS = {      # name -> (the hand-written and the plain form for a type, the shape that they take)
    "attention": (attention_forms, (3, 2, 2, 15, 8)),
    "rotate": (rotation_forms, (3, 2, 2, 15, 8)),
    "squared_relu": (lambda dtype: (squared_relu, plain.squared_relu), (2, 15, 8)),
    "shift_slots": (lambda dtype: (lambda x: shift_slots(x, 8, 4), lambda x: plain.shift_slots(x, 8, 4)), (2, 15, 8)),
}


def value_and_gradient(form, inputs: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = inputs.clone().requires_grad_()
    value = form(inputs)
    (value * weights).sum().backward()
    return value.detach(), inputs.grad


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_hand_written_form_has_the_plain_ones_values_and_gradients(name, dtype):
    forms, shape = OPERATIONS[name]
    written, reference = forms(dtype)
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=source).to(dtype)
    weights = torch.randn(written(inputs).shape, generator=source).to(dtype)
    found = value_and_gradient(written, inputs, weights)
    expected = value_and_gradient(reference, inputs, weights)
    assert found[0].dtype == found[1].dtype == dtype
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])


@pytest.mark.parametrize("name", OPERATIONS)
def test_both_gradients_are_those_of_differences(name):
    forms, shape = OPERATIONS[name]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for form in forms(torch.float64):
        assert torch.autograd.gradcheck(form, (inputs,), fast_mode=True)


def test_hand_written_gradient_of_attention():
    stacked = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = additive_mask(AttentionPattern("full", 1, (2, 2)), 5, CPU, torch.float64)
    assert torch.autograd.gradcheck(lambda inputs: MathAttention.apply(inputs, mask), (stacked,))


@pytest.mark.parametrize("shape", [(2, 15, 8), (1, 4, 8), (1, 1, 8)])
def test_token_shift_against_loops(shape):
    inputs = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    prefix, width = 3, 4
    expected = inputs.detach().clone()
    for slot in range(shape[1]):
        if slot > 0:
            expected[:, slot, :2] = inputs[:, slot - 1, :2]
        if slot - prefix >= width:
            expected[:, slot, 2:4] = inputs[:, slot - width, 2:4]
    torch.testing.assert_close(ShiftSlots.apply(inputs, prefix + width, width), expected)
    torch.testing.assert_close(plain.shift_slots(inputs, prefix + width, width), expected)
    assert torch.autograd.gradcheck(lambda x: ShiftSlots.apply(x, prefix + width, width), (inputs,))


def test_squared_relu():
    inputs = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    assert SquaredRelu.apply(inputs).tolist() == plain.squared_relu(inputs).tolist() == [0, 0.25, 9]
    assert torch.autograd.gradcheck(SquaredRelu.apply, (inputs,))


def test_cache_copies_sequences_in_any_order():
    given = torch.randn(2, 3, 2, 5, 4)
    for form in (KeyValueCache, plain.KeyValueCache):
        source, target = form(3, 2, 4, 5, CPU, torch.float32), form(4, 2, 4, 6, CPU, torch.float32)
        source.fill(*given)
        target.copy_rows(source, torch.tensor([2, 2, 0]), length=5, first=1)
        for filled, expected in zip(target.filled(5), given, strict=True):
            assert torch.equal(filled[1:], expected[[2, 2, 0]])
            assert filled[0].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_both_caches_attend_to_the_same(name, dtype):
    """Filled at once, copied in another order, then slot by slot: each step against the row of the whole attention."""
    pattern, known = AttentionPattern(name, 4, (3, 4), 3), 6
    stacked = torch.randn(3, 3, 2, 15, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = plain.attention(stacked.float(), additive_mask(pattern, 15, CPU, torch.float32))
    rows = torch.tensor([2, 0, 2])
    for form in (KeyValueCache, plain.KeyValueCache):
        filled, cache = (form(3, 2, 8, length, CPU, dtype) for length in (known, 15))
        filled.fill(stacked[1, :, :, :known], stacked[2, :, :, :known])
        cache.copy_rows(filled, rows, known, first=0)
        for slot in range(known, 15):
            queries, keys, values = stacked[:, rows, :, slot:slot + 1]
            cache.put(slot, keys, values)
            attended = cache.attend(queries, pattern, slot)
            assert (attended.dtype, attended.shape) == (dtype, (3, 2 * 8))
            torch.testing.assert_close(attended.float(), expected[rows][:, :, slot].flatten(1), **TOLERANCES[dtype])
