"""Each hand-written form against the plain one: values and gradients, in fp32, bf16 and, by differences, in doubles."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from dalle.models import fused, plain
from dalle.models.cpu import attention as cpu_attention
from dalle.models.cpu import linear as cpu_linear
from dalle.models.cpu.activations import SquaredRelu, squared_relu
from dalle.models.cpu.attention import MathAttention, attend, causal_ends, math_attention
from dalle.models.cpu.dropout import dropout
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


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_hand_written_form_can_stand_in_a_compiled_graph(monkeypatch, name):
    monkeypatch.setattr(cpu_attention, "CHUNK", 4)
    torch.compiler.reset()
    forms, shape = OPERATIONS[name]
    written, _ = forms(torch.float32)
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=source)
    weights = torch.randn(written(inputs).shape, generator=source)
    compiled = torch.compile(written, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(value_and_gradient(compiled, inputs, weights),
                               value_and_gradient(written, inputs, weights))


def test_hand_written_gradient_of_attention():
    stacked = torch.randn(3, 2, 5, 4, dtype=torch.float64, requires_grad=True)
    mask = additive_mask(AttentionPattern("full", 1, (2, 2)), 5, CPU, torch.float64)
    assert torch.autograd.gradcheck(lambda inputs: MathAttention.apply(inputs, mask), (stacked,))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("length", [4, 6, 9, 15])
def test_attention_in_chunks_is_attention(monkeypatch, dtype, length):
    """Chunks of 4: one of 4, one of 6, then two and four, the last of them shorter."""
    monkeypatch.setattr(cpu_attention, "CHUNK", 4)
    mask = additive_mask(PATTERN, length, CPU, dtype)
    source = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 2, 2, length, 8, generator=source).to(dtype)
    weights = torch.randn(2, 2, length, 8, generator=source).to(dtype)
    found = value_and_gradient(lambda x: math_attention(x, mask), inputs, weights)
    torch.testing.assert_close(found, value_and_gradient(lambda x: plain.attention(x, mask), inputs, weights),
                               **TOLERANCES[dtype])
    if dtype == torch.float64:
        assert torch.autograd.gradcheck(lambda x: math_attention(x, mask), (inputs.requires_grad_(),), fast_mode=True)


def test_chunks_follow_each_other_to_the_end():
    chunk = cpu_attention.CHUNK
    for length in range(1, 6 * chunk):
        ends = causal_ends(length)
        sizes = [end - start for start, end in itertools.pairwise((0, *ends))]
        assert ends[-1] == length
        assert all(size == chunk for size in sizes[:-1])
        assert len(sizes) == 1 or chunk / 2 < sizes[-1] <= 1.5 * chunk


@pytest.mark.parametrize("longest", [15, 14])        # by two products, and by the fused kernel
@pytest.mark.parametrize("mask", ["none", "looks ahead"])
def test_attention_with_any_mask_or_none(monkeypatch, longest, mask):
    """Nothing is taken for causal: a chunk that saw only what is behind it would be wrong."""
    monkeypatch.setattr(cpu_attention, "CHUNK", 4)
    monkeypatch.setattr(cpu_attention, "MATH_LONGEST", longest)
    source = torch.Generator().manual_seed(0)
    added = None if mask == "none" else torch.randn(15, 15, generator=source)       # fp32, as open_clip keeps it
    inputs = torch.randn(3, 2, 2, 15, 8, generator=source, dtype=torch.float64)
    weights = torch.randn(2, 2, 15, 8, generator=source, dtype=torch.float64)
    forms = [value_and_gradient(lambda x, form=form: form(x, added), inputs, weights)
             for form in (attend, fused.attend, plain.attend)]
    torch.testing.assert_close(forms[0], forms[2], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(forms[1], forms[2], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_dropout_keeps_the_mean_and_its_gradient_is_its_factor(dtype, share):
    torch.manual_seed(0)
    inputs = torch.ones(301, 337, dtype=dtype, requires_grad=True)       # not a multiple of the four that a word gives
    factors = dropout(inputs, share)
    kept = factors != 0
    torch.testing.assert_close(kept.double().mean().item(), 1 - share, atol=0.006, rtol=0)     # some five deviations
    torch.testing.assert_close(factors[kept], torch.full_like(factors[kept], 1 / (1 - share)), atol=1e-4, rtol=1e-2)
    for axis in (0, 1):                                                  # no feature and no slot is drawn otherwise
        torch.testing.assert_close(kept.double().mean(axis), torch.full(kept.shape[1 - axis:][:1], 1 - share).double(),
                                   atol=0.16, rtol=0)
    weights = torch.randn_like(factors)
    assert torch.equal(torch.autograd.grad(factors, inputs, weights)[0], weights * factors)
    torch.manual_seed(0)
    assert torch.equal(dropout(inputs, share), factors)
    assert not torch.equal(dropout(inputs, share), factors)


def test_a_share_below_the_steps_of_dropout_is_drawn_by_torch():
    torch.manual_seed(0)
    expected = F.dropout(torch.ones(1000, 1000), 5e-6)
    torch.manual_seed(0)
    assert torch.equal(dropout(torch.ones(1000, 1000), 5e-6), expected) and 0 < (expected == 0).sum() < 30
    assert dropout(torch.ones(5), 1.0).tolist() == [0] * 5


needs_onednn = pytest.mark.skipif(not cpu_linear.AVAILABLE, reason="torch has no oneDNN beside MKL, or no AVX-512")


@needs_onednn
@pytest.mark.parametrize("learns", ["inputs", "weight", "bias", "inputs weight bias"])
@pytest.mark.parametrize(("shape", "outputs"), [((2, 15, 8), 24), ((30, 24), 8), ((2, 3, 5, 8), 8)])
def test_linear_by_onednn_is_linear(monkeypatch, shape, outputs, learns):
    monkeypatch.setattr(cpu_linear, "FEWEST_PRODUCTS", 0)
    source = torch.Generator().manual_seed(0)
    given = {"inputs": torch.randn(shape, generator=source),
             "weight": torch.randn(outputs, shape[-1], generator=source),
             "bias": torch.randn(outputs, generator=source) if "bias" in learns else None}
    weights = torch.randn(*shape[:-1], outputs, generator=source)

    def run(form, dtype):
        tensors = {name: None if value is None else value.to(dtype, copy=True).requires_grad_(name in learns.split())
                   for name, value in given.items()}
        value = form(*tensors.values())
        (value * weights.to(dtype)).sum().backward()
        return [value.detach(), *(tensors[name].grad for name in learns.split())]

    found, expected = run(cpu_linear.linear, torch.float32), run(F.linear, torch.float64)
    assert all(value.is_contiguous() for value in found)      # as the parameters are: optimisers walk both together
    torch.testing.assert_close(found, [value.float() for value in expected], **TOLERANCES[torch.float32])


@needs_onednn
def test_onednn_is_asked_for_large_products_in_single_precision_alone(monkeypatch):
    monkeypatch.setattr(cpu_linear.OneDnnLinear, "apply", lambda *inputs: "oneDNN")
    inputs, weight = torch.randn(64, 256), torch.randn(256, 256)
    assert cpu_linear.linear(inputs, weight, None) == cpu_linear.linear(inputs[None], weight, None) == "oneDNN"
    assert cpu_linear.linear(inputs, weight, torch.randn(256)) == "oneDNN"
    for others in ((inputs[:15], weight, None), (inputs.double(), weight.double(), None),
                   (inputs.bfloat16(), weight.bfloat16(), torch.randn(256).bfloat16())):
        assert torch.equal(cpu_linear.linear(*others), F.linear(*others))
    with torch.autocast("cpu", torch.bfloat16):
        assert cpu_linear.linear(inputs, weight, None).dtype == torch.bfloat16
    monkeypatch.setattr(cpu_linear, "AVAILABLE", False)
    assert torch.equal(cpu_linear.linear(inputs, weight, None), F.linear(inputs, weight))


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
