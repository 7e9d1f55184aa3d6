"""Tensors that travel as one come out as they went in."""

import pickle

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from dalle.data import packing
from dalle.data.packing import unpacked, with_images
from dalle.data.reasons import Tally


def batch():
    return {"key": ["a", "b"], "position": torch.tensor([5, 6]), "valid": torch.tensor([True, False]),
            "text": torch.arange(14).view(2, 7), "score": torch.tensor([0.5, -1]), "skipped": Tally({"bad": 1}),
            "meta": [{"list": [1, (2, 3)]}, None]}


SQUARES = [np.arange(75, dtype=np.uint8).reshape(5, 5, 3) + add for add in (0, 7, 20, 100)]


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("views", [None, 2])
@pytest.mark.parametrize("squares", [None, SQUARES])
def test_what_a_worker_packs_is_what_is_made_without(monkeypatch, squares, views, pinned):
    plain = with_images(batch(), squares, views)
    assert unpacked(plain) is plain
    monkeypatch.setattr(packing, "get_worker_info", lambda: object())
    packed = with_images(batch(), squares, views)
    assert [name for name, value in packed.items() if isinstance(value, torch.Tensor)] == ["pack"]
    assert packed["pack"].is_shared()
    if pinned:                                   # as DataLoader's thread takes a batch apart, where nothing is to pin
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "pin_memory", lambda self, *_: self.clone())
            packed = pin_memory(packed)
    found = unpacked(pickle.loads(pickle.dumps(packed)))
    assert set(found) == set(plain)
    for name, value in plain.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            assert found[name].is_contiguous()
        elif name != "skipped":
            assert found[name] == value
    if squares:
        shape = (4, 3, 5, 5) if views is None else (2, 2, 3, 5, 5)
        assert found["image"].shape == shape
        np.testing.assert_array_equal(found["image"].view(4, 3, 5, 5)[3].numpy(), SQUARES[3].transpose(2, 0, 1))


def test_an_error_travels_as_it_is():
    assert unpacked({"error": "no"}) == {"error": "no"}
