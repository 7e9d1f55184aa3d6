"""CLIP score by hand; R-precision in its two limits, its draws, and captions that repeat."""

import math

import numpy as np
import pytest
import torch

from dalle.metrics.retrieval import (
    clip_score,
    distinct,
    mean_and_error,
    mismatched,
    r_precision,
    r_precision_hits,
)


def features(count: int, dim: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def test_clip_score_by_hand():
    images = torch.tensor([[3.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    torch.testing.assert_close(clip_score(images, texts), torch.tensor([100.0, 100 / math.sqrt(2), 0.0]))


def test_perfect_features_find_every_caption():
    texts = features(300)
    assert r_precision(3 * texts, texts) == 1
    assert mean_and_error(r_precision_hits(texts, texts)) == (1, 0)


def test_random_features_find_one_in_a_hundred():
    hits = r_precision_hits(features(20_000, seed=1), features(20_000, seed=2))
    mean, error = mean_and_error(hits)
    assert error == pytest.approx(math.sqrt(0.01 * 0.99 / 20_000), rel=0.15)
    assert mean == pytest.approx(0.01, abs=4 * 0.0007)


def test_features_that_collapsed_find_nothing():
    texts = torch.ones(150, 4)
    assert r_precision(texts, texts, captions=[str(row) for row in range(150)]) == 0


def test_the_same_seed_gives_the_same_answer_and_another_seed_another():
    images, texts = features(200) + features(200, seed=1), features(200)
    hits = r_precision_hits(images, texts, seed=3)
    assert torch.equal(hits, r_precision_hits(images, texts, seed=3))
    assert not torch.equal(hits, r_precision_hits(images, texts, seed=4))
    assert 0.1 < r_precision(images, texts) == r_precision_hits(images, texts).double().mean() < 1


def test_a_hit_agrees_with_a_loop_written_out():
    images, texts = features(60) + features(60, seed=1), features(60)
    captions = [str(row // 2) for row in range(60)]      # every caption twice
    texts[1::2] = texts[::2]
    hits = r_precision_hits(images, texts, 20, 5, captions)
    own, first_rows = distinct(texts, captions)
    choices = mismatched(own, 30, 20, 5)
    for row in range(60):
        others = [torch.cosine_similarity(images[row], texts[first_rows[choice]], dim=0) for choice in choices[row]]
        assert bool(hits[row]) == all(torch.cosine_similarity(images[row], texts[row], dim=0) > x for x in others)


def test_mismatched_captions_are_99_others_and_every_other_is_drawn():
    own, _ = distinct(features(130), [f"caption {row % 120}" for row in range(130)])
    choices = mismatched(own, 120, 100, seed=0)
    assert choices.shape == (130, 99) and not (choices == own[:, None]).any()
    assert all(len(set(row)) == 99 for row in choices.tolist())
    assert set(choices.ravel().tolist()) == set(range(120))
    assert not np.array_equal(choices[0], choices[120])     # the same caption, other draws


def test_a_repeated_caption_is_never_its_own_rival():
    texts = features(120)[torch.arange(240) % 120]
    assert r_precision(texts, texts) == 1                                             # seen in the features
    assert r_precision(texts, texts, captions=[str(row % 120) for row in range(240)]) == 1


def test_wrong_inputs():
    with pytest.raises(ValueError, match="needs 100 different captions; there are 50"):
        r_precision(features(100), features(50).repeat(2, 1))
    with pytest.raises(ValueError, match=r"not \[3, 4\] and \[3, 5\]"):
        clip_score(torch.ones(3, 4), torch.ones(3, 5))
    with pytest.raises(ValueError, match="2 captions but 120 rows"):
        r_precision(features(120), features(120), captions=["a", "b"])
    with pytest.raises(ValueError, match="at least 2 candidates"):
        r_precision(features(120), features(120), candidates=1)
