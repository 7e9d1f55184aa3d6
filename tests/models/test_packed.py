"""Packed linear layers: the same products, no second copy of a tensor, and nothing where they cannot be."""

import pytest
import torch
from small_transformers import PIECES, make_batch, make_model
from torch import nn

from dalle.models.cpu import packed
from dalle.models.cpu.packed import PackedLinear, leave_linears, pack_linears, packs
from dalle.models.decoding import prefill

CPU = torch.device("cpu")


@pytest.mark.skipif(not packs(CPU, torch.float32), reason="this build of torch has no oneDNN")
@pytest.mark.parametrize("name", ["plain", "swiglu"])
def test_a_packed_model_is_the_same_function_of_the_same_tensors(name):
    model = make_model(**PIECES[name])
    text, codes = make_batch(model)
    twin = pack_linears(model, 2, ("text_head",))
    kinds = {place: type(module) for place, module in twin.named_modules() if hasattr(module, "out_features")}
    assert kinds.pop("text_head") is type(model.text_head) and set(kinds.values()) == {PackedLinear}
    assert [a.data_ptr() for a in twin.parameters()] == [b.data_ptr() for b in model.parameters()]
    with torch.inference_mode():
        (found, _), (expected, _) = (prefill(network, text, codes[:, :7]) for network in (twin, model))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert isinstance(model.image_head, nn.Linear)


def test_what_cannot_be_packed_is_left(monkeypatch):
    model = make_model()
    assert pack_linears(model.double(), 2) is model          # no packed products of doubles
    assert leave_linears(model, 2) is model
    monkeypatch.setattr(packed, "PACKED_BYTES", 100)
    assert pack_linears(model.float(), 2) is model           # too large for a second copy of its weights
    assert not packs(torch.device("cuda"), torch.float32)
