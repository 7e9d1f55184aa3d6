"""Cached decoding against the full forward, and what its state may become."""

import pytest
import torch
from small_transformers import PIECES, each_layout, each_piece, make_batch, make_model

from dalle.models.cpu import key_value_cache
from dalle.models.decoding import cache_bytes, decode_step, prefill
from dalle.models.transformer import PRESETS, TextToImageTransformer


def cached_logits(model: TextToImageTransformer, text: torch.Tensor, codes: torch.Tensor, known: int) -> torch.Tensor:
    logits, prefilled = prefill(model, text, codes[:, :known])
    state = prefilled.expand(torch.arange(len(text)))
    steps = [logits]
    for slot in range(known, codes.shape[1] - 1):
        steps.append(decode_step(model, codes[:, slot], state))
    return torch.stack(steps, dim=1)


@pytest.mark.parametrize("known", [0, 6])
@each_layout
@each_piece
def test_cached_logits_equal_the_full_forward(pieces, layout, known):
    model = make_model(layout=layout, **pieces)
    text, codes = make_batch(model, 3)
    with torch.inference_mode():
        expected = model(text, codes)[1][:, known:]
        torch.testing.assert_close(cached_logits(model, text, codes, known), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["full", "list"])
def test_room_grows_by_buckets(monkeypatch, name):
    monkeypatch.setattr(key_value_cache, "BUCKET", 4)
    model = make_model(**PIECES[name])
    text, codes = make_batch(model, 3)
    with torch.inference_mode():
        expected = model(text, codes)[1]
        torch.testing.assert_close(cached_logits(model, text, codes, 0), expected, atol=1e-4, rtol=1e-4)


def test_decoding_leaves_training_possible():
    model = make_model(**PIECES["modern"])
    text, codes = make_batch(model)
    with torch.inference_mode():
        cached_logits(model, text, codes, 0)
    model(text, codes)[1].sum().backward()     # constants first built in inference mode may still be saved for this
    assert model.start.grad is not None


def test_joined_states_go_on_like_their_parts():
    model = make_model(token_shift=True)
    text, codes = make_batch(model, 3)
    with torch.inference_mode():
        together = cached_logits(model, text, codes, 0)
        parts = [prefill(model, text[part], codes[part, :0])[1] for part in (slice(0, 2), slice(2, 3))]
        state = parts[0].join(parts).expand(torch.tensor([2, 0]))
        torch.testing.assert_close(decode_step(model, codes[[2, 0], 0], state), together[[2, 0], 1])


def test_cache_bytes_of_the_paper():
    assert cache_bytes(PRESETS["12b"], torch.float16) == 2 * 64 * 1280 * 3968 * 2     # 1.30 GB a candidate
    config = PRESETS["debug"].model_copy(update={"token_shift": True})
    assert cache_bytes(config, torch.float32) == 4 * 4 * (2 * 32 * 64 + 2 * 4 * 32)
