"""AttnGAN: the paper's sizes, the attention against a loop, the networks against a one-channel twin, losses by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bare import count, make_constant, mean_of
from published import Published
from pydantic import ValidationError
from torch import Tensor, nn

import gans.refining as refining
from gans.attention import global_attention
from gans.attngan import AttnGANConfig, AttnGANGenerator, AttnGANTask
from gans.damsm import Damsm, DamsmConfig
from gans.losses import bce
from gans.matching import Gammas, damsm_losses
from gans.refining import (
    MatchingLossConfig,
    ScaleDiscriminators,
    discriminator_loss,
)
from gans.text import Text

PUBLISHED = {"attngan": Published(paintings=1, one_caption=True)}      # both players see the same fakes

BN = (1 + 1e-5) ** -0.5      # what a fresh BatchNorm multiplies by in evaluation mode
TINY = {"image_size": 32, "sentence_dim": 6, "word_dim": 6, "z_dim": 5, "condition_dim": 4, "width": 4}
DIM, LENGTH = 6, 5


def sized(build, *arguments, **options) -> nn.Module:
    """The network without its weights: they would fill the memory."""
    with torch.device("meta"):
        return build(*arguments, **options)


@pytest.fixture
def no_init(monkeypatch):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)


def make_text(lengths: list[int], total: int = LENGTH, dim: int = DIM) -> Text:
    mask = torch.arange(total)[None] < torch.tensor(lengths)[:, None]
    return Text(torch.randn(len(lengths), dim), torch.randn(len(lengths), dim, total) * mask[:, None], mask)


def make_noise(network: AttnGANGenerator, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn(batch, length) for name, length in network.noise_dims.items()}


@pytest.fixture
def generator() -> AttnGANGenerator:
    torch.manual_seed(0)
    return AttnGANGenerator(AttnGANConfig(**TINY))


# -- sizes

@pytest.mark.parametrize(("width", "residuals", "total", "start", "refinement"), [
    (32, 2, 7_084_592, 6_444_928, 267_136), (48, 3, 13_811_456, 12_017_472, 843_648)])
def test_the_papers_generators_have_the_papers_parameters(no_init, width, residuals, total, start, refinement):
    network = sized(AttnGANGenerator, AttnGANConfig(width=width, residuals=residuals))
    assert count(network.augmentation) == 102_800
    assert count(network.start) == start
    assert [count(refine) for refine in network.refine] == [refinement, refinement]
    assert [count(head) for head in network.heads] == [27 * width] * 3
    assert count(network) == total


@pytest.mark.parametrize(("width", "expected"), [
    (64, [6_313_730, 19_424_002, 71_858_946]), (96, [13_304_450, 42_800_258, 160_774_274])])
def test_the_papers_discriminators_have_the_papers_parameters(no_init, width, expected):
    network = sized(ScaleDiscriminators, [64, 128, 256], 256, width)
    assert [count(scale) for scale in network.scales] == expected


def test_the_variant_with_one_picture_has_its_parameters(no_init):
    config = AttnGANConfig(residuals=0, last_only=True)
    assert count(sized(AttnGANGenerator, config)) == 6_638_960
    assert count(sized(ScaleDiscriminators, config.picture_sides, 256, 64, unconditional=False)) == 71_850_753


def test_shapes_of_pictures_attention_and_scores():
    network = AttnGANGenerator(AttnGANConfig(**{**TINY, "image_size": 256}))
    painted = network(make_noise(network, 2), make_text([3, 5]))
    assert [tuple(image.shape) for image in painted.images] == [(2, 3, side, side) for side in (64, 128, 256)]
    assert [tuple(maps.shape) for maps in painted.attention] == [(2, LENGTH, 64, 64), (2, LENGTH, 128, 128)]
    discriminator = ScaleDiscriminators([64, 128, 256], DIM, width=2)
    for scale, image in zip(discriminator.scales, painted.images, strict=True):
        assert scale.features(image).shape == (2, 16, 4, 4)
    for scores in discriminator(painted.images, torch.randn(2, DIM), torch.randn(1, DIM)):
        assert scores.alone.shape == scores.matched.shape == (2,) and scores.mismatched.shape == (1,)


def test_sides_follow_the_picture(generator):
    assert generator.config.sides == [8, 16, 32]
    painted = generator(make_noise(generator, 2), make_text([1, 4]))
    assert [image.shape[-1] for image in painted.images] == [8, 16, 32]
    scores = ScaleDiscriminators([8, 16, 32], DIM, width=2)(painted.images, torch.randn(2, DIM))
    assert all(score.matched.shape == (2,) for score in scores)
    only = AttnGANGenerator(AttnGANConfig(**TINY, last_only=True))
    assert [image.shape[-1] for image in only(make_noise(only, 2), make_text([1, 4])).images] == [32]


@pytest.mark.parametrize("size", [96, 16, 100])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValidationError, match=f"image_size {size} with 2 refinements"):
        AttnGANConfig(image_size=size)


# -- the attention

def attention_by_a_loop(h: Tensor, words: Tensor, allowed) -> tuple[Tensor, Tensor]:
    """``allowed(picture, place, word)`` says whether a place may look at a word."""
    batch, channels, height, width = h.shape
    length = words.shape[2]
    context, weights = torch.zeros_like(h), torch.zeros(batch, length, height, width, dtype=h.dtype)
    for picture in range(batch):
        for place in range(height * width):
            y, x = divmod(place, width)
            scores = {word: sum(float(h[picture, c, y, x]) * float(words[picture, c, word]) for c in range(channels))
                      for word in range(length) if allowed(picture, place, word)}
            total = sum(math.exp(score) for score in scores.values())
            for word, score in scores.items():
                weights[picture, word, y, x] = math.exp(score) / total
                context[picture, :, y, x] += weights[picture, word, y, x] * words[picture, :, word]
    return context, weights


def test_the_attention_agrees_with_a_loop_written_out():
    torch.manual_seed(0)
    h, text = torch.randn(3, DIM, 2, 4, dtype=torch.float64), make_text([2, 5, 3])
    words = text.words.double()
    for found, expected in zip(global_attention(h, words, text.mask), attention_by_a_loop(
            h, words, lambda picture, place, word: text.mask[picture, word]), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_released_mask_is_that_of_other_captions():
    torch.manual_seed(0)
    h, text = torch.randn(3, DIM, 2, 4, dtype=torch.float64), make_text([2, 5, 3])
    words, places = text.words.double(), 8
    found = global_attention(h, words, text.mask, released_mask=True)
    expected = attention_by_a_loop(h, words, lambda picture, place, word: text.mask[(picture * places + place) % 3,
                                                                                    word])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(found[1], global_attention(h, words, text.mask)[1])
    equal = torch.ones_like(text.mask)                     # with captions of one length the two agree
    for one, other in zip(global_attention(h, words, equal, released_mask=True), global_attention(h, words, equal),
                          strict=True):
        torch.testing.assert_close(one, other)


def test_weights_sum_to_one_and_padding_gets_none():
    torch.manual_seed(0)
    text = make_text([2, 5, 0])
    context, weights = global_attention(torch.randn(3, DIM, 4, 4), text.words, text.mask)
    torch.testing.assert_close(weights[:2].sum(dim=1), torch.ones(2, 4, 4))
    assert not weights[0, 2:].any()
    assert not weights[2].any() and not context[2].any()       # a caption without words says nothing, and is not NaN


def test_more_padding_and_another_order_of_words_change_no_picture(generator):
    generator.eval()
    text, drawn = make_text([2, 5, 4]), make_noise(generator, 3)
    painted = generator(drawn, text)
    garbage = torch.cat([text.words, torch.randn(3, DIM, 2)], dim=2)
    longer = generator(drawn, text._replace(words=garbage, mask=F.pad(text.mask, (0, 2))))
    for image, same in zip(painted.images, longer.images, strict=True):
        torch.testing.assert_close(image, same)
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = generator(drawn, text._replace(words=text.words[:, :, order], mask=text.mask[:, order]))
    for image, same in zip(painted.images, shuffled.images, strict=True):
        torch.testing.assert_close(image, same)
    for maps, permuted in zip(painted.attention, shuffled.attention, strict=True):
        torch.testing.assert_close(maps[:, order], permuted)


# -- the conditioning

def test_the_conditioning_of_a_caption(generator):
    generator.eval()
    drawn, text = make_noise(generator, 2), make_text([2, 3])
    still = {**drawn, "eps": torch.zeros_like(drawn["eps"])}
    one, other = generator(still, text), generator(still, text)
    assert all(torch.equal(image, same) for image, same in zip(one.images, other.images, strict=True))
    moved = generator({**still, "z": torch.randn_like(drawn["z"])}, text)
    assert torch.equal(moved.augmented.mean, one.augmented.mean)
    assert torch.equal(moved.augmented.spread, one.augmented.spread)
    assert not torch.allclose(moved.images[-1], one.images[-1])
    hidden = F.linear(text.sentence, generator.augmentation.project.weight, generator.augmentation.project.bias)
    mean, logvar = (hidden[:, :8] * hidden[:, 8:].sigmoid()).chunk(2, dim=1)
    condition = generator.augmentation(text.sentence, drawn["eps"]).condition
    torch.testing.assert_close(condition, mean + (logvar / 2).exp() * drawn["eps"])


# -- the networks against a twin of one channel

def gated(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def twin_up(x: Tensor) -> Tensor:
    x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return gated(BN * mean_of(x, 3, padding=1))


def twin_generator(noise: dict[str, Tensor], text: Text, doublings: int, refinements: int, residuals: int,
                   width: int) -> list[Tensor]:
    half = gated(text.sentence.mean(dim=1, keepdim=True))                       # mu and log sigma^2 alike
    condition = half + (half / 2).exp() * noise["eps"]
    h = gated(BN * torch.cat([condition, noise["z"]], dim=1).mean(dim=1))[:, None, None, None].expand(-1, 1, 4, 4)
    for _ in range(doublings):
        h = twin_up(h)
    images = [mean_of(h, 3, padding=1).tanh()]
    values = text.words.mean(dim=1)                                             # [B, T], in every channel
    for _ in range(refinements):
        context = torch.zeros_like(h)
        for picture, mask in enumerate(text.mask):
            known = values[picture, mask]
            weights = (width * h[picture, 0, :, :, None] * known).softmax(dim=-1)
            context[picture, 0] = (weights * known).sum(dim=-1)
        for _ in range(residuals):
            added = BN * mean_of(gated(BN * mean_of((h + context) / 2, 3, padding=1)), 3, padding=1)
            h, context = h + added, context + added
        h = twin_up((h + context) / 2)
        images.append(mean_of(h, 3, padding=1).tanh())
    return images


def test_the_generator_agrees_with_a_twin_of_one_channel():
    torch.manual_seed(3)
    network = AttnGANGenerator(AttnGANConfig(**TINY)).double().eval()
    make_constant(network)
    text = make_text([2, 5, 3])
    text = text._replace(sentence=3 * text.sentence.double(), words=3 * text.words.double())
    drawn = {name: 2 * values.double() for name, values in make_noise(network, 3).items()}
    with torch.no_grad():
        found = network(drawn, text).images
    for image, twin in zip(found, twin_generator(drawn, text, 1, 2, 2, TINY["width"]), strict=True):
        torch.testing.assert_close(image, twin.expand(-1, 3, -1, -1), rtol=1e-7, atol=1e-9)
    assert found[-1].std() > 0.01


def twin_scores(image: Tensor, sentence: Tensor, width: int, narrowings: int) -> tuple[Tensor, Tensor]:
    x = F.leaky_relu(mean_of(image.mean(dim=1, keepdim=True), 4, 2, 1), 0.2)
    while x.shape[-1] > 4:
        x = F.leaky_relu(BN * mean_of(x, 4, 2, 1), 0.2)
    for _ in range(narrowings):
        x = F.leaky_relu(BN * mean_of(x, 3, 1, 1), 0.2)
    said = sentence.mean(dim=1)[:, None, None, None]
    joined = (8 * width * x + sentence.shape[1] * said) / (8 * width + sentence.shape[1])
    joined = F.leaky_relu(BN * mean_of(joined, 3, 1, 1), 0.2)
    return mean_of(x, 4).flatten(), mean_of(joined, 4).flatten()


def test_the_discriminators_agree_with_a_twin_of_one_channel():
    network = ScaleDiscriminators([64, 128, 256], DIM, width=2).double().eval()
    make_constant(network)
    torch.manual_seed(4)
    images = [torch.rand(2, 3, side, side, dtype=torch.float64) - 0.4 for side in (64, 128, 256)]
    sentence, other = torch.randn(2, 2, DIM, dtype=torch.float64)
    with torch.no_grad():
        for level, scores in enumerate(network(images, sentence, other)):
            alone, pair = twin_scores(images[level], sentence, 2, narrowings=level)
            torch.testing.assert_close(scores.alone, alone, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(scores.matched, pair, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(scores.mismatched, twin_scores(images[level], other, 2, level)[1])


# -- the losses

def test_wrong_pairs_of_two_processes_weigh_as_those_of_one():
    batch, scores = 6, torch.randn(6, dtype=torch.float64)          # sample i with the sentence of sample i + 1
    expected = bce(scores[:-1], 0)
    for world_size in (1, 2, 3, 6):
        terms = []
        for rank in range(world_size):
            task = AttnGANTask.__new__(AttnGANTask)
            share = scores[rank::world_size]
            text = Text(share[:, None], share[:, None, None], torch.ones(len(share), 1, dtype=torch.bool))
            other, weight = task.shifted(SimpleNamespace(rank=rank, world_size=world_size),
                                         {"wrong_text": text, "caption": [""] * len(share)})
            terms.append(weight * bce(other[:, 0], 0))
        assert float(sum(terms)) / world_size == pytest.approx(float(expected)), (batch, world_size)


# -- what learns

def test_the_discriminators_loss_leaves_the_generator_alone(generator):
    text, judge = make_text([2, 3]), ScaleDiscriminators([8, 16, 32], DIM, width=2)
    with torch.no_grad():
        fakes = generator(make_noise(generator, 2), text).images
    real = judge([torch.randn_like(fake) for fake in fakes], text.sentence, text.sentence[1:])
    fake = judge(fakes, text.sentence)
    sum(discriminator_loss(*scores) for scores in zip(real, fake, strict=True)).backward()
    assert all(one.grad is None for one in generator.parameters())
    assert all(one.grad is not None for one in judge.parameters())


@pytest.fixture
def task(generator) -> AttnGANTask:
    torch.manual_seed(5)
    task = AttnGANTask.__new__(AttnGANTask)
    task.config = SimpleNamespace(loss=MatchingLossConfig())
    task.frozen = {"damsm": Damsm(DamsmConfig(num_text_tokens=9, text_length=LENGTH, dim=DIM, embedding_dim=3,
                                              trunk="small:2")).eval().requires_grad_(False)}
    return task


class Bare:
    """What a task sees of an engine of one process."""

    rank, world_size = 0, 1

    def __init__(self, **networks: nn.Module):
        self.networks = networks

    def __getitem__(self, name: str) -> nn.Module:
        return self.networks[name]

    bare = penalty = __getitem__


def test_the_matching_term_teaches_what_makes_the_last_picture(generator, task):
    text = make_text([2, 3, 4])
    painted = generator(make_noise(generator, 3), text)
    batch = {"matching_text": text, "class_id": torch.tensor([-1, -1, -1])}
    task.matching(Bare(**task.frozen), painted.images[-1], batch).backward()
    taught = [generator.augmentation, generator.start, *generator.refine, generator.heads[-1]]
    assert all(one.grad is not None and one.grad.any() for module in taught for one in module.parameters())
    assert all(one.grad is None for head in generator.heads[:-1] for one in head.parameters())
    assert all(one.grad is None for one in task.frozen["damsm"].parameters())
    assert text.sentence.grad is None and text.words.grad is None


def test_the_matching_term_is_the_sum_of_the_four(task):
    text, image = make_text([2, 3, 4]), torch.rand(3, 3, 32, 32) * 2 - 1
    damsm, classes = task.frozen["damsm"], torch.tensor([0, 0, 1])
    batch = {"matching_text": text, "class_id": classes}
    masked, whole = damsm.losses(image, text, classes), damsm.losses(image, text)
    assert task.matching(Bare(damsm=damsm), image, batch).item() == pytest.approx(sum(one.item() for one in masked))
    task.config = SimpleNamespace(loss=MatchingLossConfig(same_class="mismatched"))
    assert task.matching(Bare(damsm=damsm), image, batch).item() == pytest.approx(sum(one.item() for one in whole))
    task.config = SimpleNamespace(loss=MatchingLossConfig(gammas=(5, 5, 10)))
    sharper = damsm_losses(*damsm.image(image), text, classes, Gammas(5.0, 5.0, 10.0))
    assert task.matching(Bare(damsm=damsm), image, batch).item() == pytest.approx(sum(one.item() for one in sharper))


# -- pictures of the attention

def test_painting_tells_where_words_were_looked_for(generator):
    generator.eval()
    images, seen = generator.paint(make_noise(generator, 2), make_text([2, 4]))
    assert images.shape == (2, 3, 32, 32) and not images.requires_grad
    assert {name: tuple(values.shape) for name, values in seen.items()} == {
        "image_8": (2, 3, 8, 8), "image_16": (2, 3, 16, 16), "image_32": (2, 3, 32, 32),
        "attention_8": (2, LENGTH, 8, 8), "attention_16": (2, LENGTH, 16, 16)}
    drawn = generator.pictures({name: values[1] for name, values in seen.items()}, "a caption")
    assert drawn["attention"].shape == (3, 5 * 32, 2 * 32) and drawn["scales"].shape == (3, 32, 3 * 32)
