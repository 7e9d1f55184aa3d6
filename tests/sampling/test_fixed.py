"""Steps of one shape against plain decoding, and what a replay of them has to go on with."""

import dataclasses
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "models"))
from small_transformers import PIECES, make_batch, make_model

from dalle.models import kernels
from dalle.models.cpu.packed import leave_linears
from dalle.models.fixed_decoding import choose_form, triton_attends, visible_table
from dalle.models.patterns import AttentionPattern
from dalle.sampling import fixed
from dalle.sampling.decode import SamplingConfig, sample_codes

OPTIONS = [SamplingConfig(), SamplingConfig(guidance=2.0, temperature=0.8, top_k=5),
           SamplingConfig(top_p=0.8, guidance=1.5), SamplingConfig(temperature=0)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def unpacked(monkeypatch):
    """The weights as they are, as on CUDA: what is kept for a model is kept for the packed copy of one otherwise."""
    monkeypatch.setitem(kernels.KERNELS, "cpu", dataclasses.replace(kernels.KERNELS["cpu"], packed=leave_linears))


@pytest.fixture
def captures(monkeypatch):
    """A stand-in for CUDA graphs: what was "captured" is run again, by the state and options of that time."""
    taken = []

    def capture(run, rewind):
        for _ in range(fixed.WARM_UP):
            rewind()
            run()
        taken.append(run)
        return run

    monkeypatch.setattr(fixed, "capture", capture)
    return taken


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
def test_steps_of_one_shape_give_the_codes_of_plain_decoding(pieces):
    for backend, options, first in (("auto", OPTIONS[0], 0), ("auto", OPTIONS[1], 5), ("sdpa", OPTIONS[2], 0)):
        model = make_model(**pieces, attention_backend=backend)
        text, codes = make_batch(model, 3)
        known = codes[:, :first]
        expected = sample_codes(model, text, list(range(6)), options, known, batch_size=4)
        found = sample_codes(model, text, list(range(6)), options, known, batch_size=4, method="fixed")
        assert torch.equal(found, expected)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_of_one_shape_take_all_options(options):
    model = make_model(**PIECES["modern"])
    text, _ = make_batch(model, 2)
    expected = sample_codes(model, text, [1, 2], options, dtype=torch.float64)
    assert torch.equal(sample_codes(model, text, [1, 2], options, dtype=torch.float64, method="fixed"), expected)


@pytest.mark.parametrize("name", ["plain", "modern", "shift"])
def test_a_capture_is_replayed_for_other_captions_seeds_and_known_codes(captures, name):
    model = make_model(**PIECES[name])
    text, codes = make_batch(model, 3)
    for options in OPTIONS[:2]:
        captures.clear()
        for rows, seeds, known in ((text, range(6), None), (text.flip(0), range(7, 13), None), (text, range(6), None),
                                   (text, range(6), codes[:, :4])):
            expected = sample_codes(model, rows, list(seeds), options, known, batch_size=4)
            found = sample_codes(model, rows, list(seeds), options, known, batch_size=4, method="captured")
            assert torch.equal(found, expected)
        assert len(captures) == 1


def test_weights_may_change_in_place_and_may_move(captures):
    model, other = make_model(seed=1), make_model(seed=2)
    text, _ = make_batch(model)
    first = sample_codes(model, text, [1, 2], method="captured")
    model.load_state_dict(other.state_dict())
    expected = sample_codes(other, text, [1, 2])
    assert not torch.equal(first, expected)
    assert torch.equal(sample_codes(model, text, [1, 2], method="captured"), expected)
    assert len(captures) == 1
    model.blocks[0].attention.norm.weight.data = torch.zeros_like(model.blocks[0].attention.norm.weight)
    expected = sample_codes(model, text, [1, 2])
    assert torch.equal(sample_codes(model, text, [1, 2], method="captured"), expected)
    assert len(captures) == 2


def test_what_is_kept_goes_with_its_model_and_is_not_kept_in_training(monkeypatch):
    monkeypatch.setattr(fixed, "capture", lambda run, rewind: lambda: None)
    model = make_model()
    text, _ = make_batch(model)
    sample_codes(model, text, [1, 2], method="captured")
    memory = weakref.ref(fixed.KEPT[model].memory)
    model.train()
    sample_codes(model, text, [1, 2], method="captured")
    gc.collect()
    assert model not in fixed.KEPT and memory() is None
    model.eval()
    sample_codes(model, text, [1, 2], method="captured")
    memory = weakref.ref(fixed.KEPT[model].memory)
    del model
    gc.collect()
    assert memory() is None


def test_a_capture_that_fails_is_told_and_the_codes_are_the_same(monkeypatch, caplog):
    def refuse(run, rewind):
        raise RuntimeError("not permitted")

    monkeypatch.setattr(fixed, "capture", refuse)
    model = make_model()
    text, _ = make_batch(model)
    assert torch.equal(sample_codes(model, text, [1, 2], method="captured"), sample_codes(model, text, [1, 2]))
    assert "not permitted" in caplog.text


def test_only_a_kernel_that_knows_no_batch_attends_for_fewer(monkeypatch):
    model = make_model()
    assert [fixed.active_candidates(model, count, 64) for count in (1, 64)] == [64, 64]
    monkeypatch.setattr(fixed, "choose_form", lambda backend, device: "triton")
    assert [fixed.active_candidates(model, count, 64) for count in (1, 2, 3, 33, 64)] == [1, 2, 4, 64, 64]
    assert fixed.active_candidates(model, 5, 6) == 6


def test_the_form_is_chosen_by_backend_and_device(monkeypatch):
    monkeypatch.setattr("dalle.models.fixed_decoding.triton_attends", lambda device: True)
    assert [choose_form(backend, CUDA) for backend in ("auto", "flex", "sdpa", "math")] == [
        "triton", "triton", "sdpa", "products"]
    assert [choose_form(backend, CPU) for backend in ("auto", "sdpa", "math")] == ["products", "sdpa", "products"]


def test_a_kernel_that_does_not_run_is_told_and_not_taken(caplog):
    assert not triton_attends(torch.device("meta"))
    assert "plain products" in caplog.text


@pytest.mark.parametrize("name", ["row", "column", "conv"])
@pytest.mark.parametrize("mode", ["flat", "clamp", "torus"])
def test_the_table_names_what_the_pattern_shows(name, mode):
    pattern = AttentionPattern(name, 5, (4, 6), conv_kernel=3, conv_mode=mode)
    table = visible_table(pattern, CPU)
    for slot, row in enumerate(table.tolist()):
        shown = pattern.mask()[pattern.prefix + slot, pattern.prefix:].nonzero().squeeze(1).tolist()
        assert row == shown + [-1] * (table.shape[1] - len(shown))
    assert (table >= 0).sum(1).max() == table.shape[1]


def test_progress_is_told_at_intervals_and_ends_with_all(monkeypatch):
    monkeypatch.setattr(fixed, "STEPS_PER_REPORT", 3)
    model, told = make_model(), []
    text, _ = make_batch(model)
    sample_codes(model, text, [1, 2], on_progress=told.append, method="fixed")
    assert told == sorted(told) and told[-1] == 2 and 2 < len(told) < model.config.num_image_slots
