"""Quantisers against answers worked out by hand or by enumeration."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from dalle.models.quantizers import (
    CodebookConv,
    FiniteScalarQuantizer,
    FSQConfig,
    FullPrecisionConv,
    GumbelConfig,
    GumbelQuantizer,
    gumbel_noise,
)

# --- FSQ --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(2, 2), (3, 2), (4, 4, 4), (8, 5, 5, 5), (4, 4, 4, 4, 4)])
def test_fsq_index_is_a_bijection_over_all_codes(levels):
    quantizer = FiniteScalarQuantizer(FSQConfig(levels=levels))
    codes = torch.arange(math.prod(levels)).view(1, 1, -1)
    vectors = quantizer.entry(codes)
    assert len(set(map(tuple, vectors[0, :, 0].T.tolist()))) == math.prod(levels)
    values = vectors * (torch.tensor(levels).view(1, -1, 1, 1) // 2)            # integers about 0
    assert torch.equal(quantizer._index(values), codes)


def test_fsq_index_is_the_mixed_radix_number_of_its_digits():
    quantizer = FiniteScalarQuantizer(FSQConfig(levels=(3, 4)))
    for low, high in itertools.product((-1, 0, 1), (-2, -1, 0, 1)):
        values = torch.tensor([low, high]).view(1, 2, 1, 1).float()
        assert int(quantizer._index(values)) == (low + 1) + 3 * (high + 2)


@pytest.mark.parametrize("level", [2, 3, 4, 5, 8])
def test_fsq_reaches_exactly_its_levels_and_leaves_zero_where_it_is(level):
    quantizer = FiniteScalarQuantizer(FSQConfig(levels=(level,)))
    features = torch.linspace(-20, 20, 4001).view(-1, 1, 1, 1)
    rounded = quantizer.bound(features).round().flatten().long()
    lowest = -(level // 2)
    assert rounded.unique().tolist() == list(range(lowest, lowest + level))
    assert float(quantizer.bound(torch.zeros(1, 1, 1, 1))) == pytest.approx(0, abs=1e-6)


def test_fsq_even_levels_are_moved_down_by_half():
    quantizer = FiniteScalarQuantizer(FSQConfig(levels=(4, 5)))
    ends = quantizer.bound(torch.full((1, 2, 1, 1), 50.0)).flatten()
    assert ends.tolist() == pytest.approx([1.5 * 1.001 - 0.5, 2 * 1.001])


def test_fsq_gradient_passes_the_rounding_unchanged():
    quantizer = FiniteScalarQuantizer(FSQConfig(levels=(5, 4)))
    features = torch.randn(2, 2, 3, 3, requires_grad=True)
    through_rounding = torch.autograd.grad(quantizer(features, 1.0).entry.sum(), features)[0]
    smooth = torch.autograd.grad((quantizer.bound(features) / quantizer.halves).sum(), features)[0]
    assert torch.allclose(through_rounding, smooth)
    assert (through_rounding > 0).all()


def test_fsq_training_and_known_codes_give_the_decoder_the_same():
    quantizer = FiniteScalarQuantizer(FSQConfig(levels=(8, 5, 3)))
    features = 3 * torch.randn(4, 3, 5, 5)
    quantized = quantizer(features, 1.0)
    assert torch.allclose(quantized.entry, quantizer.entry(quantized.codes), atol=1e-6)
    assert torch.equal(quantized.codes, quantizer.codes(features))
    assert quantized.logits is None


def test_fsq_refuses_a_channel_of_one_level():
    with pytest.raises(ValueError, match="greater than or equal to 2"):
        FSQConfig(levels=(4, 1))


def test_fsq_refuses_more_codes_than_can_be_stored():
    with pytest.raises(ValueError, match="at most 2147483647"):
        FSQConfig(levels=(1000,) * 4)


# --- Gumbel-softmax ---------------------------------------------------------------------------------------------------


def linear(num_codes=6, **options):
    return GumbelQuantizer(GumbelConfig(num_codes=num_codes, **options))


def cosine(num_codes=6, **options):
    return GumbelQuantizer(GumbelConfig(num_codes=num_codes, logits="cosine", dim=4, **options))


def test_gumbel_noise_is_the_double_logarithm_of_a_uniform():
    like = torch.zeros(2, 3)
    noise = gumbel_noise(like, torch.Generator().manual_seed(5))
    uniform = torch.rand(2, 3, generator=torch.Generator().manual_seed(5))
    for g, u in zip(noise.flatten().tolist(), uniform.flatten().tolist(), strict=True):
        assert g == pytest.approx(-math.log(-math.log(u)), rel=1e-4)


def test_gumbel_noise_has_the_mean_and_variance_of_its_law():
    noise = gumbel_noise(torch.zeros(200_000), torch.Generator().manual_seed(0))
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)              # Euler's constant
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.03)


def test_noisy_argmax_follows_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0]).view(1, 3, 1, 1).expand(1, 3, 200, 200)
    noisy = logits + gumbel_noise(logits, torch.Generator().manual_seed(0))
    shares = torch.bincount(noisy.argmax(dim=1).flatten(), minlength=3) / 40_000
    total = 1 + math.e + math.e**2
    assert shares.tolist() == pytest.approx([1 / total, math.e / total, math.e**2 / total], abs=0.01)


def test_relaxed_codes_sum_to_one_and_approach_the_noisy_argmax():
    features = torch.randn(2, 6, 3, 3)
    warm = linear()(features, 1.0, torch.Generator().manual_seed(1)).entry
    assert torch.allclose(warm.sum(dim=1), torch.ones(2, 3, 3))
    cold = linear()(features, 1e-4, torch.Generator().manual_seed(1)).entry
    last = features.movedim(1, -1)
    noise = gumbel_noise(last, torch.Generator().manual_seed(1))
    one_hot = F.one_hot((last + noise).argmax(dim=-1), 6).movedim(-1, 1).float()
    assert torch.allclose(cold, one_hot, atol=1e-3)


@pytest.mark.parametrize("build", [linear, cosine])
@pytest.mark.parametrize("straight_through", [False, True])
def test_gradient_reaches_the_encoder(build, straight_through):
    quantizer = build(straight_through=straight_through)
    features = torch.randn(2, quantizer.feature_channels, 3, 3, requires_grad=True)
    entry = quantizer(features, 1.0).entry
    (entry * torch.randn_like(entry)).sum().backward()
    assert features.grad.abs().sum() > 0
    assert torch.isfinite(features.grad).all()


def test_straight_through_gives_the_decoder_a_code_and_the_encoder_the_soft_gradient():
    features = torch.randn(1, 6, 2, 2, requires_grad=True)
    weight = torch.randn(1, 6, 2, 2)
    hard = linear(straight_through=True)(features, 0.7, torch.Generator().manual_seed(2)).entry
    soft = linear()(features, 0.7, torch.Generator().manual_seed(2)).entry
    assert torch.allclose(hard.detach().amax(dim=1), torch.ones(1, 2, 2))
    assert torch.allclose(hard.detach().sum(dim=1), torch.ones(1, 2, 2))
    gradients = [torch.autograd.grad((entry * weight).sum(), features)[0] for entry in (hard, soft)]
    assert torch.allclose(*gradients)


def test_codes_and_logits_know_no_noise_and_no_temperature():
    quantizer, features = linear(), torch.randn(2, 6, 3, 3)
    first, second = quantizer(features, 1.0), quantizer(features, 0.1)
    assert torch.equal(first.codes, features.argmax(dim=1))
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.logits, features)


def test_cosine_logits_are_the_scaled_cosines_written_out():
    quantizer = cosine(first_scale=3.0)
    features = torch.randn(1, 4, 1, 2)
    logits = quantizer.logits(features).detach()
    for column in range(2):
        feature = features[0, :, 0, column]
        for code in range(6):
            vector = quantizer.codebook[code].detach()
            expected = 3.0 * float(feature @ vector / (feature.norm() * vector.norm()))
            assert float(logits[0, code, 0, column]) == pytest.approx(expected, abs=1e-5)


def test_cosine_hard_code_is_the_cold_limit_of_the_mixture():
    torch.manual_seed(0)
    quantizer = cosine(first_scale=1e6)                                         # far above the noise
    features = torch.randn(2, 4, 3, 3)
    quantized = quantizer(features, 1.0)
    assert torch.allclose(quantized.entry, quantizer.entry(quantized.codes), atol=1e-4)


# --- the layers beside the codes --------------------------------------------------------------------------------------


def test_codebook_gather_equals_the_convolution_of_a_one_hot():
    codebook = CodebookConv(7, 5)
    torch.nn.init.normal_(codebook.b)
    codes = torch.randint(7, (2, 3, 3))
    one_hot = F.one_hot(codes, 7).movedim(-1, 1).float()
    assert torch.allclose(codebook(codes), codebook(one_hot), atol=1e-6)
    assert torch.allclose(codebook(codes)[1, :, 2, 0], codebook.w[:, codes[1, 2, 0], 0, 0] + codebook.b)


def test_layers_beside_the_codes_stay_in_full_precision_under_autocast():
    layer = FullPrecisionConv(3, 4, 1)
    features = torch.randn(1, 3, 2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(features)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, layer(features))
