"""The table of kernels: every operation on every type of device, and that models run by whichever it names."""

import dataclasses

import pytest
import torch
from small_transformers import PIECES, make_batch, make_model

from dalle.models import fused, kernels, plain
from dalle.models.cpu import activations, key_value_cache, rotary, token_shift
from dalle.models.kernels import ATTENTION, ELSEWHERE, KERNELS, PLAIN, Kernels, choose_backend, kernels_for
from dalle.models.patterns import AttentionPattern

CPU = torch.device("cpu")
COLUMNS = {**KERNELS, "elsewhere": ELSEWHERE, "plain": PLAIN}
FULL, ROW = AttentionPattern("full", 3, (4, 4)), AttentionPattern("row", 3, (4, 4))


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_names_every_operation(column):
    chosen = COLUMNS[column]
    for operation in dataclasses.fields(Kernels):
        assert operation.default is operation.default_factory is dataclasses.MISSING
        assert callable(getattr(chosen, operation.name))
    for pattern in (FULL, ROW):
        for length in (8, 1280):
            assert chosen.attention(pattern, length) in ATTENTION


def test_what_was_written_for_cpus_runs_everywhere_but_where_blocks_are_compiled():
    for device in ("cpu", "mps", "meta"):
        chosen = kernels_for(torch.device(device))
        assert (chosen.rotate, chosen.squared_relu) == (rotary.rotate, activations.squared_relu)
        assert (chosen.shift_slots, chosen.key_value_cache) == (token_shift.shift_slots, key_value_cache.KeyValueCache)
    chosen = kernels_for(torch.device("cuda"))
    assert (chosen.rotate, chosen.squared_relu, chosen.shift_slots) == (fused.rotate, plain.squared_relu,
                                                                        fused.shift_slots)


def test_the_device_chooses_the_column():
    assert kernels_for(torch.device("cuda", 3)) is KERNELS["cuda"]
    assert kernels_for(torch.device("meta")) is ELSEWHERE


def test_backend_is_chosen_by_device_pattern_and_length():
    assert choose_backend("auto", FULL, 88, CPU) == "math"
    assert choose_backend("auto", FULL, 1280, CPU) == "sdpa"
    assert choose_backend("auto", FULL, 1280, torch.device("cuda")) == "sdpa"
    assert choose_backend("auto", ROW, 1280, torch.device("cuda")) == "flex"
    assert choose_backend("auto", ROW, 96, torch.device("cuda")) == "sdpa"
    assert choose_backend("auto", ROW, 8, torch.device("mps")) == "sdpa"
    assert choose_backend("sdpa", ROW, 8, CPU) == "sdpa"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        choose_backend("flex", ROW, 8, CPU)


@pytest.mark.parametrize("name", ["plain", "list", "shift", "modern_shift"])
def test_a_device_may_run_the_plain_forms(monkeypatch, name):
    """The whole model by the reference: the same logits and gradients, up to rounding."""
    model = make_model(**PIECES[name]).double()
    batch = make_batch(model)
    parameters = list(model.parameters())

    def run() -> tuple[torch.Tensor, ...]:
        text_logits, image_logits = model(*batch)
        loss = text_logits.square().mean() + image_logits.square().mean()
        return text_logits, image_logits, *torch.autograd.grad(loss, parameters)

    expected = run()
    used = []
    monkeypatch.setitem(kernels.KERNELS, "cpu", dataclasses.replace(
        PLAIN, attention=lambda pattern, length: used.append("attention") or "plain",
        shift_slots=lambda *inputs: used.append("shift") or plain.shift_slots(*inputs)))
    torch.testing.assert_close(run(), expected)
    assert set(used) == ({"attention", "shift"} if model.config.token_shift else {"attention"})


@pytest.mark.parametrize("shape", [(2, 15, 8), (1, 4, 8), (1, 1, 8), (2, 9, 11)])
def test_the_fused_shift_is_the_plain_one(shape):
    inputs = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    found, expected = (form(inputs, 8, 4) for form in (fused.shift_slots, plain.shift_slots))
    assert torch.equal(found, expected)
    weights = torch.randn_like(found)
    gradients = [torch.autograd.grad((value * weights).sum(), inputs)[0] for value in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("column", ["cpu", "cuda", "plain"])
def test_heads_are_split_alike(column):
    """A stack or a tuple, in the order q, k, v of the one product."""
    projected = torch.arange(2 * 3 * 24.0).view(2, 3, 24)
    heads = COLUMNS[column].split_heads(projected, 2)
    for index in range(3):
        expected = projected[..., 8 * index:8 * index + 8].view(2, 3, 2, 4).transpose(1, 2)
        assert torch.equal(heads[index], expected)
    joined = COLUMNS[column].join_heads(*heads)
    assert all(torch.equal(joined[index], heads[index]) for index in range(3))
