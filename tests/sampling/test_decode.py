"""Sampling: determinism of each candidate, filters, guidance, completion."""

import copy

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from dalle.errors import UserError
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling.choosing import SamplingConfig, choose_codes, guide, whole_weights
from dalle.sampling.decode import default_batch_size, sample_codes, uniforms

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> TextToImageTransformer:
    torch.manual_seed(0)
    model = TextToImageTransformer(TransformerConfig(
        dim=32, depth=3, heads=2, text_length=5, num_text_tokens=20, grid=(3, 4), num_codes=33, token_shift=True,
        conv_kernel=3, dropout=0.1))
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.tensor([[3, 5, 0, 0, 0], [7, 1, 2, 19, 4], [0, 0, 0, 0, 0]])


OPTIONS = [SamplingConfig(), SamplingConfig(temperature=0.7, guidance=2.5, top_k=9), SamplingConfig(top_p=0.8)]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_candidate_does_not_depend_on_the_split(model, text, options, dtype):
    seeds = list(range(100, 116))
    whole = sample_codes(model, text[:1], seeds, options, dtype=dtype, batch_size=16)
    for split in (1, 3, 8, 16):
        parts = [sample_codes(model, text[:1], seeds[start:start + split], options, dtype=dtype, batch_size=16)
                 for start in range(0, 16 if split > 1 else 4, split)]
        together = torch.cat(parts)
        assert torch.equal(together, whole[:len(together)])
    assert len(whole.unique(dim=0)) > 1


def test_a_candidate_does_not_depend_on_its_company(model, text):
    seeds = list(range(12))
    together = sample_codes(model, text, seeds, OPTIONS[1], batch_size=5)
    for caption in range(3):
        own = slice(4 * caption, 4 * caption + 4)
        alone = sample_codes(model, text[caption:caption + 1], seeds[own], OPTIONS[1], batch_size=5)
        assert torch.equal(alone, together[own])


@pytest.mark.parametrize("batch_size", [1, 2, 7, None])
def test_many_captions_in_any_batch_size(model, text, batch_size):
    many = text.repeat(4, 1)
    codes = sample_codes(model, many, list(range(12)), batch_size=batch_size)
    assert codes.shape == (12, 12)
    assert torch.equal(codes, sample_codes(model, many, list(range(12)), batch_size=16))


def test_sampling_is_the_models_own_distribution_step_by_step(model, text):
    """The cached loop against one without a cache: full forward, softmax, inverse of the distribution."""
    model.eval()
    numbers = uniforms([5], 12)[0]
    codes = torch.zeros(1, 12, dtype=torch.long)
    with torch.no_grad():
        for slot in range(12):
            cumulative = model(text[1:2], codes)[1][0, slot].double().softmax(-1).cumsum(-1)
            codes[0, slot] = int((cumulative <= numbers[slot] * cumulative[-1]).sum())
    assert torch.equal(sample_codes(model, text[1:2], [5]), codes)


def test_guidance_of_one_is_no_guidance(model, text):
    conditioned = sample_codes(model, text, [1, 2, 3], SamplingConfig(temperature=0.9))
    assert torch.equal(sample_codes(model, text, [1, 2, 3], SamplingConfig(temperature=0.9, guidance=1)), conditioned)
    assert not torch.equal(sample_codes(model, text, [1, 2, 3], SamplingConfig(guidance=6)), conditioned)


def test_guidance_of_zero_forgets_the_caption(model, text):
    free = SamplingConfig(guidance=0)
    assert torch.equal(sample_codes(model, text[:1], [4], free), sample_codes(model, text[2:3], [4], free))


def test_guide_is_the_formula():
    logits = torch.tensor([[1.0, 2.0], [0.5, 0.0]])
    torch.testing.assert_close(guide(logits, SamplingConfig(guidance=3)), torch.tensor([[2.0, 6.0]]))
    assert guide(logits, SamplingConfig()) is logits


def test_known_codes_are_kept_and_the_rest_continues_them(model, text):
    known = torch.tensor([3, 1, 4, 1, 5])
    codes = sample_codes(model, text, list(range(6)), known_codes=known)
    assert torch.equal(codes[:, :5], known.expand(6, 5))
    assert len(codes[:2, 5:].unique(dim=0)) == 2


def test_completing_a_sample_with_its_own_seed_gives_the_sample(model, text):
    whole = sample_codes(model, text, [1, 2, 3], SamplingConfig(guidance=2))
    again = sample_codes(model, text, [1, 2, 3], SamplingConfig(guidance=2), known_codes=whole[:, :7])
    assert torch.equal(again, whole)


def test_temperature_zero_takes_the_best(model, text):
    codes = sample_codes(model, text[:1], [0, 1], SamplingConfig(temperature=0))
    assert torch.equal(codes[0], codes[1])
    model.eval()
    with torch.no_grad():
        assert torch.equal(model(text[:1], codes[:1])[1].argmax(-1), codes[:1])


PROBABILITIES = torch.tensor([[0.1, 0.4, 0.2, 0.3]])


def chosen(options: SamplingConfig, count: int = 2000) -> list[float]:
    numbers = torch.arange(count, dtype=torch.float64).add(0.5) / count
    codes = choose_codes(PROBABILITIES.log().expand(count, -1), numbers, options)
    return (codes.bincount(minlength=4) / count).tolist()


@pytest.mark.parametrize(("options", "expected"), [
    (SamplingConfig(), [0.1, 0.4, 0.2, 0.3]),
    (SamplingConfig(top_k=2), [0, 4 / 7, 0, 3 / 7]),
    (SamplingConfig(top_p=0.69), [0, 4 / 7, 0, 3 / 7]),
    (SamplingConfig(top_p=0.75), [0, 4 / 9, 2 / 9, 3 / 9]),
    (SamplingConfig(top_p=0.01), [0, 1, 0, 0]),
    (SamplingConfig(temperature=0.5), [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
    (SamplingConfig(temperature=0), [0, 1, 0, 0]),
    (SamplingConfig(top_k=99, top_p=1.0), [0.1, 0.4, 0.2, 0.3]),
])
def test_filters_against_hand_computed_shares(options, expected):
    assert chosen(options) == pytest.approx(expected, abs=2e-3)


HALVES = np.arange(0.0, 1.0, 1 / 16) + 1 / 32


def reached(logits: list[float], options: SamplingConfig) -> set[int]:
    """The codes that numbers all over [0, 1) lead to."""
    numbers = torch.from_numpy(HALVES)
    return set(choose_codes(torch.tensor([logits]).expand(len(numbers), -1), numbers, options).tolist())


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-37, 1e-39, 1e-46, 5e-324])
def test_any_small_temperature_takes_the_best_code(temperature):
    assert reached([30.0, -500.0, 31.0, 30.9], SamplingConfig(temperature=temperature)) == {2}
    assert reached([-3e38, -2e38, -2.5e38], SamplingConfig(temperature=temperature)) == {1}


def test_small_temperatures_share_among_equal_codes():
    assert reached([2.0, 5.0, 1.0, 5.0], SamplingConfig(temperature=1e-39)) == {1, 3}


def test_a_temperature_above_all_logits_is_uniform():
    assert reached([2.0, 5.0, 1.0, 5.0], SamplingConfig(temperature=1e300)) == {0, 1, 2, 3}


@pytest.mark.parametrize(("top_k", "expected"), [(1, {1}), (2, {1, 0}), (3, {1, 0, 2}), (4, {1, 0, 2, 4}), (5, None)])
def test_top_k_keeps_exactly_k_and_of_equal_codes_the_first(top_k, expected):
    logits = [0.0, 0.1, 0.0, -0.1, 0.0]
    assert reached(logits, SamplingConfig(top_k=top_k)) == (expected or set(range(5)))


@pytest.mark.parametrize(("top_p", "expected"), [(1e-300, {0}), (1e-9, {0}), (0.2, {0}), (0.3, {0, 1}), (1.0, None)])
def test_top_p_keeps_one_at_least_and_of_equal_codes_the_first(top_p, expected):
    assert reached([0.0, 0.0, 0.0, 0.0], SamplingConfig(top_p=top_p)) == (expected or set(range(4)))


@pytest.mark.parametrize("options", [{"temperature": float("nan")}, {"temperature": float("inf")}, {"temperature": -1},
                                     {"guidance": float("inf")}, {"guidance": float("nan")}, {"guidance": 1e300},
                                     {"top_p": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": 0}])
def test_options_outside_their_range_are_refused(options):
    with pytest.raises(ValidationError):
        SamplingConfig(**options)


@pytest.mark.parametrize("options", [SamplingConfig(), SamplingConfig(temperature=0, guidance=2),
                                     SamplingConfig(top_p=0.5)])
def test_logits_that_are_not_finite_are_an_error_and_no_picture(model, text, options):
    damaged = copy.deepcopy(model)
    damaged.image_head.weight.data[3] = float("nan")
    with pytest.raises(UserError, match="weights are damaged"):
        sample_codes(damaged, text, [1, 2, 3], options)


def test_the_strongest_guidance_is_still_a_distribution(model, text):
    codes = sample_codes(model, text, [1, 2, 3], SamplingConfig(guidance=10_000, top_k=5, top_p=0.9))
    assert codes.min() >= 0 and codes.max() < model.config.num_codes


def test_the_largest_number_never_leaves_the_vocabulary():
    logits = torch.tensor([[0.0, 0.0, -1e4, float("-inf")]])
    assert choose_codes(logits, torch.tensor([1 - 2**-24], dtype=torch.float64), SamplingConfig()).item() == 1


@pytest.mark.parametrize("options", [SamplingConfig(), SamplingConfig(temperature=0.7, top_k=200),
                                     SamplingConfig(top_p=0.9)])
def test_a_choice_is_the_inverse_of_the_distribution(options):
    """Against doubles, which are sorted: to one in a million, about what a number of 24 bits can tell."""
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)).mul(3)
    numbers = uniforms(range(64), 1)[:, 0]
    codes = choose_codes(logits, numbers, options)
    shares = (logits.double() / options.temperature).softmax(-1)
    ranked, order = shares.sort(dim=-1, descending=True)
    ranked[:, options.top_k or ranked.shape[1]:] = 0
    ranked /= ranked.sum(-1, keepdim=True)
    ranked[ranked.cumsum(-1) - ranked >= (options.top_p or 1)] = 0
    shares = torch.zeros_like(shares).scatter(1, order, ranked / ranked.sum(-1, keepdim=True))
    above = shares.cumsum(-1).gather(1, codes[:, None])[:, 0]
    below = above - shares.gather(1, codes[:, None])[:, 0]
    assert ((below - 1e-6 <= numbers) & (numbers <= above + 1e-6)).all()


@pytest.mark.parametrize("options", [SamplingConfig(), SamplingConfig(top_k=7, top_p=0.7)])
def test_a_choice_knows_no_company_and_no_order(options):
    logits, numbers = torch.randn(50, 301), uniforms(range(50), 1)[:, 0]
    together = choose_codes(logits, numbers, options)
    assert torch.equal(torch.cat([choose_codes(logits[[row]], numbers[[row]], options) for row in range(50)]), together)
    weights = whole_weights(logits)
    assert torch.equal(weights.flip(1).sum(1), weights.cumsum(1)[:, -1])
    assert int(weights.max()) == 2**29 and int(whole_weights(torch.zeros(1, 2**14)).sum()) == 2**38


def test_numbers_belong_to_their_seed():
    assert torch.equal(uniforms([3, 9], 5)[1], uniforms([9], 5)[0])
    assert float(uniforms([1], 1000).mean()) == pytest.approx(0.5, abs=0.05)


def test_training_mode_and_random_state_are_left_alone(model, text):
    model.train()
    before = torch.get_rng_state()
    codes = sample_codes(model, text, [1, 2, 3])
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert not codes.is_inference()
    model.eval()


def test_batch_size_follows_the_memory(model):
    assert default_batch_size(model.config, torch.float32, CPU, streams=1) == 16
    giant = TransformerConfig(dim=3968, depth=64, heads=62, text_length=256, num_text_tokens=16_384, grid=(32, 32),
                              num_codes=8192)
    assert default_batch_size(giant, torch.bfloat16, CPU, streams=1) == 1


def test_no_seeds_no_codes(model, text):
    assert sample_codes(model, text, []).shape == (0, 12)


@pytest.mark.parametrize(("seeds", "known", "message"), [
    ([1, 2], None, "cannot be shared equally"),
    ([1, 2, 3], torch.zeros(12, dtype=torch.long), "leave nothing to sample"),
    ([1, 2, 3], torch.zeros(2, 4, dtype=torch.long), "neither"),
    ([1, 2, 3], torch.tensor([0, 10_000]), "known codes from 0 to 10000"),
    ([1, 2, 3], torch.tensor([0, -1]), "known codes from -1"),
])
def test_sizes_that_do_not_fit_are_refused(model, text, seeds, known, message):
    with pytest.raises(ValueError, match=message):
        sample_codes(model, text, seeds, known_codes=known)
