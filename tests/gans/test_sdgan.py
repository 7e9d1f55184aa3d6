"""SD-GAN: its sizes, SCBN against batch normalisation and loops, the contrastive loss by hand."""

import math

import pytest
import torch
from bare import count
from published import Published
from torch import Tensor, nn

import gans
from dalle.config import load_config
from dalle.errors import UserError
from dalle.tasks import RUNS
from gans import refining, sdgan
from gans.attngan import AttnGANConfig, AttnGANGenerator
from gans.layers import SynchronisedBatchNorm, synchronised
from gans.sdgan import (
    SCBN,
    SDGANConfig,
    SDGANGenerator,
    SentenceCue,
    SiameseDiscriminators,
    WordCue,
    contrastive_loss,
    distances,
)
from gans.text import Text

PUBLISHED = {"sdgan": Published(paintings=1)}      # both branches in one batch
DOUBLES = {sdgan.contrastive_loss: (((4, 3), (4, 3)), lambda first, second: sdgan.contrastive_loss(
    first, second, torch.tensor([True, False, True, False]), eps=4.0))}

TINY = {"image_size": 32, "sentence_dim": 6, "word_dim": 6, "z_dim": 5, "condition_dim": 4, "width": 4, "cue_hidden": 7}
SIDES = [8, 16, 32]
DIM, LENGTH = 6, 5


def make_text(lengths: list[int], dtype: torch.dtype = torch.float32) -> Text:
    mask = torch.arange(LENGTH)[None] < torch.tensor(lengths)[:, None]
    words = torch.randn(len(lengths), DIM, LENGTH, dtype=dtype) * mask[:, None]
    return Text(torch.randn(len(lengths), DIM, dtype=dtype), words, mask)


def make_noise(network: SDGANGenerator, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn(batch, length) for name, length in network.noise_dims.items()}


def moved_by_captions(network: nn.Module) -> nn.Module:
    """``network`` with what is zero at first drawn at random."""
    for part in network.modules():
        if isinstance(part, SCBN) and part.cue is not None:
            for last in part.cue.last_layers():
                nn.init.normal_(last.weight)
    return network


@pytest.fixture
def generator() -> SDGANGenerator:
    torch.manual_seed(0)
    return SDGANGenerator(SDGANConfig(**TINY))


# -- sizes

@pytest.mark.parametrize(("width", "residuals", "total", "start", "refinement"), [
    (32, 2, 8_151_600, 7_462_784, 291_712), (48, 3, 15_161_088, 13_281_088, 886_656)])
def test_the_generators_have_attngans_parameters_and_those_of_their_cues(monkeypatch, width, residuals, total, start,
                                                                         refinement):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)
    with torch.device("meta"):
        network = SDGANGenerator(SDGANConfig(width=width, residuals=residuals))
        plain = SDGANGenerator(SDGANConfig(width=width, residuals=residuals, sentence_level=False, word_level=False))
        attngan = AttnGANGenerator(AttnGANConfig(width=width, residuals=residuals))
    assert (count(network), count(network.start)) == (total, start)
    assert [count(refine) for refine in network.refine] == [refinement] * 2
    assert count(plain) == count(attngan)
    words = 2 * width * (256 + 2 * 2 * width)                               # f and two maps, to twice the width
    channels = [2 * 8 * width, 2 * 4 * width, 2 * 2 * width, 2 * width]     # of the four layers before 64 pixels
    sentences = sum(2 * (256 * 256 + 256 + 256 * one) for one in channels)
    assert total - count(attngan) == 2 * words + sentences


@pytest.mark.parametrize(("width", "expected"), [
    (64, [6_444_802, 19_555_074, 71_990_018]), (96, [13_501_058, 42_996_866, 160_970_882])])
def test_the_discriminators_have_attngans_parameters_and_a_map(monkeypatch, width, expected):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)
    with torch.device("meta"):
        network = SiameseDiscriminators([64, 128, 256], 256, width)
        attngan = refining.ScaleDiscriminators([64, 128, 256], 256, width)
    assert [count(scale) for scale in network.scales] == expected
    assert expected == [count(scale) + 8 * width * 256 for scale in attngan.scales]


def test_shapes_of_pictures_attention_scores_and_vectors(generator):
    painted = generator(make_noise(generator, 2), make_text([2, 5]))
    assert [tuple(image.shape) for image in painted.images] == [(2, 3, side, side) for side in SIDES]
    assert [tuple(maps.shape) for maps in painted.attention] == [(2, LENGTH, 8, 8), (2, LENGTH, 16, 16)]
    for scores in SiameseDiscriminators(SIDES, DIM, 2, 9)(painted.images, torch.randn(2, DIM), torch.randn(1, DIM)):
        assert scores.alone.shape == scores.matched.shape == (2,) and scores.mismatched.shape == (1,)
        assert scores.vector.shape == (2, 9)


# -- semantic-conditioned batch normalisation

@pytest.mark.parametrize("cue", [None, lambda channels: SentenceCue(DIM, 3, channels),
                                 lambda channels: WordCue(DIM, channels)])
def test_untrained_cues_leave_batch_normalisation_as_it_is(cue):
    torch.manual_seed(0)
    conditional, plain = SCBN(4, cue).double(), nn.BatchNorm2d(4).double()
    plain.load_state_dict({"weight": conditional.gain, "bias": conditional.offset}, strict=False)
    text = make_text([2, 5, 0], torch.float64)
    for training in (True, False):
        conditional.train(training), plain.train(training)
        x = 3 * torch.randn(3, 4, 2, 5, dtype=torch.float64) + 1
        torch.testing.assert_close(conditional(x, text), plain(x), rtol=1e-12, atol=1e-12)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(conditional.normalise, name), getattr(plain, name))


def test_an_untrained_generator_paints_as_attngan_does(generator):
    attngan = AttnGANGenerator(AttnGANConfig(**{key: value for key, value in TINY.items() if key != "cue_hidden"}))
    renamed = {"1.weight": "enlarge.1.weight", "2.weight": "norm.gain", "2.bias": "norm.offset",
               **{f"2.{name}": f"norm.normalise.{name}" for name in ("running_mean", "running_var",
                                                                     "num_batches_tracked")}}
    state = generator.state_dict()
    for name in attngan.state_dict():
        head, grows, tail = name.rpartition("grow.")
        layer, ours = (tail[:2], tail[2:]) if head.startswith("start") else ("", tail)
        attngan.state_dict()[name].copy_(state[f"{head}{grows}{layer}{renamed[ours]}" if grows else name])
    noise, text = make_noise(generator, 3), make_text([2, 5, 3])
    for image, same in zip(generator(noise, text).images, attngan(noise, text).images, strict=True):
        torch.testing.assert_close(image, same, rtol=1e-4, atol=1e-5)


def scbn_by_a_loop(layer: SCBN, x: Tensor, moved: tuple[Tensor, Tensor]) -> Tensor:
    out = torch.empty_like(x)
    for channel in range(x.shape[1]):
        values = x[:, channel]
        normalised = (values - values.mean()) / (values.var(unbiased=False) + 1e-5).sqrt()
        gain, offset = (part[:, channel] for part in moved)
        out[:, channel] = (layer.gain[channel] + gain) * normalised + layer.offset[channel] + offset
    return out


def test_a_sentence_moves_every_place_alike():
    torch.manual_seed(1)
    layer = moved_by_captions(SCBN(4, lambda channels: SentenceCue(DIM, 3, channels))).double()
    x, text = torch.randn(2, 4, 3, 5, dtype=torch.float64), make_text([2, 5], torch.float64)
    moved = []
    for part in (layer.cue.gain, layer.cue.offset):
        hidden = (text.sentence @ part[0].weight.T + part[0].bias).clamp(min=0)
        moved.append((hidden @ part[2].weight.T)[:, :, None, None])
    torch.testing.assert_close(layer(x, text), scbn_by_a_loop(layer, x, tuple(moved)))
    assert [tuple(part.shape) for part in layer.cue(x, text)] == [(2, 4, 1, 1)] * 2
    assert all(part.std(dim=0).min() > 0 for part in moved)                   # another sentence, another gain


def test_words_move_each_place_by_what_fits_it():
    torch.manual_seed(2)
    layer = moved_by_captions(SCBN(4, lambda channels: WordCue(DIM, channels))).double()
    x, text = torch.randn(3, 4, 3, 5, dtype=torch.float64), make_text([2, 5, 3], torch.float64)
    v = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (x.var(dim=(0, 2, 3), unbiased=False, keepdim=True) + 1e-5).sqrt()
    f = layer.cue.to_values.weight[:, :, 0, 0]
    vse = torch.zeros_like(x)
    for sample, length in enumerate([2, 5, 3]):
        words = [f @ text.words[sample, :, t] for t in range(length)]
        for y in range(3):
            for place in range(5):
                fits = [math.exp(float((v[sample, :, y, place] @ word).detach())) for word in words]
                vse[sample, :, y, place] = sum(fit / sum(fits) * word for fit, word in zip(fits, words, strict=True))
    moved = tuple(torch.einsum("oc,bchw->bohw", part.weight[:, :, 0, 0], vse)
                  for part in (layer.cue.gain, layer.cue.offset))
    torch.testing.assert_close(layer(x, text), scbn_by_a_loop(layer, x, moved))
    assert all(part.flatten(2).std(dim=2).min() > 0 for part in layer.cue(v, text))     # one place is not another
    embedding, weights = layer.cue.embed(v, text)
    torch.testing.assert_close(embedding, vse)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(3, 3, 5, dtype=torch.float64))
    assert not weights[0, 2:].any() and not weights[2, 3:].any()


@pytest.mark.parametrize(("sentence", "word"), [(True, True), (True, False), (False, True), (False, False)])
def test_levels_can_be_left_out(sentence, word):
    network = SDGANGenerator(SDGANConfig(**TINY, sentence_level=sentence, word_level=word))
    assert [up.norm.cue is not None for up in network.start.grow] == [sentence]
    assert [refine.grow.norm.cue is not None for refine in network.refine] == [word, word]
    moved_by_captions(network)
    drawn, text = make_noise(network, 3), make_text([2, 4, 5])
    other = text._replace(sentence=torch.randn(3, DIM))
    maps = [network.first_map(torch.ones(3, 4), drawn, one) for one in (text, other)]
    assert torch.equal(*maps) != sentence


def test_normalisations_over_processes_take_the_place_of_all(generator):
    names = list(generator.state_dict())
    drawn, text = make_noise(generator, 3), make_text([2, 5, 3])
    before = moved_by_captions(generator).eval()(drawn, text).image
    same = synchronised(generator)
    assert list(same.state_dict()) == names and torch.equal(same(drawn, text).image, before)
    norms = [part for part in same.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == 12 and all(isinstance(part, SynchronisedBatchNorm) for part in norms)


# -- the contrastive loss

def pair_at(distance: float, dim: int = 256) -> tuple[Tensor, Tensor]:
    first = torch.randn(1, dim, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(1, dim, dtype=torch.float64), dim=1)
    return first.requires_grad_(), (first + distance * direction).detach().requires_grad_()


@pytest.mark.parametrize(("same", "distance", "expected", "still"), [
    (True, 0.0, 0.01 / 512, True), (True, 0.09, 0.01 / 512, True), (True, 2.0, 4 / 512, False),
    (False, 1.01, 0.0, True), (False, 3.0, 0.0, True), (False, 0.25, 0.5625 / 512, False)])
def test_the_contrastive_loss_of_a_pair(same, distance, expected, still):
    torch.manual_seed(0)
    first, second = pair_at(distance)
    loss = contrastive_loss(first, second, torch.tensor([same]))
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert first.grad.isfinite().all() and (not first.grad.any()) == still
    torch.testing.assert_close(first.grad, -second.grad)
    if not still:       # two of one come nearer, two of two go apart
        towards = (first.grad * (second - first)).sum()
        assert (towards < 0) == same
    swapped = contrastive_loss(second, first, torch.tensor([same]))
    assert swapped.item() == loss.item()


def test_the_contrastive_loss_is_the_mean_over_the_pairs():
    torch.manual_seed(0)
    pairs, same = [pair_at(distance, dim=4) for distance in (0.5, 0.02, 0.5, 3.0)], [True, True, False, False]
    first, second = (torch.cat(side) for side in zip(*pairs, strict=True))
    loss = contrastive_loss(first, second, torch.tensor(same))
    assert loss.item() == pytest.approx((0.25 + 0.01 + 0.25 + 0) / 4 / 8)
    loss = contrastive_loss(first, second, torch.tensor(same), alpha=0.0, eps=4.0, scale=0.5)
    assert loss.item() == pytest.approx((0.25 + 0.0004 + 3.5 ** 2 + 1) / 4 / 2)
    torch.testing.assert_close(distances(first, second), torch.tensor([0.5, 0.02, 0.5, 3.0], dtype=torch.float64))


# -- the discriminators

def test_a_picture_with_two_captions_is_judged_as_that_picture_twice():
    torch.manual_seed(0)
    judge = SiameseDiscriminators(SIDES, DIM, 2, 9).double()
    images = [torch.randn(3, 3, side, side, dtype=torch.float64) for side in SIDES]
    sentence, other = torch.randn(2, 6, DIM, dtype=torch.float64)
    once = judge(images, sentence, other[:5])
    for scores, same in zip(once, judge([image.repeat(2, 1, 1, 1) for image in images], sentence, other[:5]),
                            strict=True):
        for name in ("matched", "mismatched", "alone"):
            torch.testing.assert_close(getattr(scores, name), getattr(same, name))
        torch.testing.assert_close(scores.vector.repeat(2, 1), same.vector)


def test_a_vector_is_the_map_of_the_mean_features():
    judge = SiameseDiscriminators([16], DIM, 2, 9).eval()
    image = torch.randn(2, 3, 16, 16)
    features = judge.scales[0].features(image)
    assert features.shape == (2, 16, 4, 4)
    expected = features.flatten(2).mean(dim=2) @ judge.scales[0].project.weight.T
    torch.testing.assert_close(judge([image], torch.randn(2, DIM))[0].vector, expected)


# -- runs and samples

def test_a_run_without_pairs_of_captions_is_refused():
    gans.register()
    with pytest.raises(UserError, match="two captions of each picture: set data.num_captions to 2"):
        load_config("configs/gans/sdgan_shapes.yaml", ["data.num_captions=1"], RUNS)


def test_painting_shows_scales_and_attention(generator):
    images, seen = generator.eval().paint(make_noise(generator, 2), make_text([2, 4]))
    assert images.shape == (2, 3, 32, 32)
    assert sorted(seen) == ["attention_16", "attention_8", "image_16", "image_32", "image_8"]
