"""MirrorGAN: the paper's sizes, its attention against a loop, the network against a one-channel twin, what learns."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from bare import CAPTIONS, count, make_constant, mean_of
from published import Published
from test_attngan import BN, gated, make_noise, make_text, sized, twin_up
from torch import Tensor

import gans.refining as refining
from dalle.data.tokenizer import CaptionTokenizer
from gans.mirrorgan import GlobalLocalAttention, MirrorGANConfig, MirrorGANGenerator, MirrorGANLossConfig, MirrorGANTask
from gans.stream import Stream, StreamConfig, StreamNetwork

PUBLISHED = {"mirrorgan": Published(zero=1, paintings=1, one_caption=True)}

DIM, LENGTH, WIDTH = 6, 5, 4
TINY = {"image_size": 32, "sentence_dim": DIM, "word_dim": DIM, "z_dim": 5, "condition_dim": 3, "width": WIDTH}


@pytest.fixture
def generator(seeded) -> MirrorGANGenerator:
    return MirrorGANGenerator(MirrorGANConfig(**TINY))


@pytest.fixture
def captioner(seeded) -> Stream:
    tokenizer = CaptionTokenizer.train(CAPTIONS * 3, 300)
    return Stream(StreamNetwork(StreamConfig(num_text_tokens=tokenizer.vocab_size, text_length=LENGTH, trunk="small:2",
                                             embedding_dim=6, hidden_dim=7)), tokenizer)


@pytest.mark.parametrize(("width", "residuals", "total"), [(32, 2, 7_105_392), (48, 3, 13_853_408)])
def test_the_papers_generators_have_the_papers_parameters(monkeypatch, width, residuals, total):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)
    network = sized(MirrorGANGenerator, MirrorGANConfig(width=width, residuals=residuals))
    assert count(network) == total
    if width == 32:
        stage = network.refine[0]
        assert [count(part) for part in (stage.attend, stage.fuse, stage.residual, stage.grow)] \
            == [12_448, 6_144, 221_952, 36_992]


def test_without_the_sentence_a_refinement_is_attngans(monkeypatch):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)
    network = sized(MirrorGANGenerator, MirrorGANConfig(sentence_attention="none"))
    assert [count(stage) for stage in network.refine] == [267_136, 267_136]


# -- the attention

@pytest.mark.parametrize("axis", ["channels", "spatial"])
def test_both_attentions_by_a_loop(seeded, axis):
    attend = GlobalLocalAttention(WIDTH, DIM, 3, axis).double()
    h, text, condition = torch.randn(2, WIDTH, 2, 3).double(), make_text([2, 5]), torch.randn(2, 3).double()
    text = text._replace(words=text.words.double())
    words, sentence, attention = attend(h, text, condition)
    said = F.linear(condition, attend.to_sentence.weight, attend.to_sentence.bias)
    kernel, values = attend.score.weight[:, :, 0, 0], attend.to_values.weight[:, :, 0, 0]
    for b in range(2):
        known = [values @ text.words[b, :, t] for t in range(LENGTH) if text.mask[b, t]]
        scores = torch.stack([kernel @ (h[b, :, i, j] * said[b]) for i in range(2) for j in range(3)])   # [places, C]
        weights = scores.softmax(dim=1 if axis == "channels" else 0)
        for place, (i, j) in enumerate((i, j) for i in range(2) for j in range(3)):
            own = torch.stack([h[b, :, i, j] @ value for value in known]).softmax(dim=0)
            torch.testing.assert_close(attention[b, :len(known), i, j], own)
            torch.testing.assert_close(words[b, :, i, j], sum(weight * value for weight, value in
                                                              zip(own, known, strict=True)))
            torch.testing.assert_close(sentence[b, :, i, j], said[b] * weights[place])


@pytest.mark.parametrize(("axis", "dims"), [("channels", (1,)), ("spatial", (2, 3))])
def test_the_weights_of_the_sentence_sum_to_one(seeded, axis, dims):
    attend = GlobalLocalAttention(WIDTH, DIM, 3, axis)
    weights = attend.sentence_weights(torch.randn(2, WIDTH, 4, 4), torch.randn(2, WIDTH, 1, 1))
    torch.testing.assert_close(weights.sum(dim=dims), torch.ones(weights.sum(dim=dims).shape))


def test_without_v_the_sentence_says_nothing(seeded):
    attend = GlobalLocalAttention(WIDTH, DIM, 3, "channels")
    torch.nn.init.zeros_(attend.to_sentence.weight)
    torch.nn.init.zeros_(attend.to_sentence.bias)
    assert not attend(torch.randn(2, WIDTH, 4, 4), make_text([2, 5]), torch.randn(2, 3))[1].any()


def twin(noise: dict[str, Tensor], text, residuals: int) -> list[Tensor]:
    """The generator of one channel: all channels are alike, so the softmax over them gives 1 / width to each."""
    half = gated(text.sentence.mean(dim=1, keepdim=True))
    condition = half + (half / 2).exp() * noise["eps"]
    h = gated(BN * torch.cat([condition, noise["z"]], dim=1).mean(dim=1))[:, None, None, None].expand(-1, 1, 4, 4)
    images = [mean_of(twin_up(h), 3, padding=1).tanh()]
    h, values = twin_up(h), text.words.mean(dim=1)
    said = condition.mean(dim=1)[:, None, None, None] / WIDTH
    for _ in range(2):
        context = torch.zeros_like(h)
        for picture, mask in enumerate(text.mask):
            known = values[picture, mask]
            weights = (WIDTH * h[picture, 0, :, :, None] * known).softmax(dim=-1)
            context[picture, 0] = (weights * known).sum(dim=-1)
        h = (h + context + said) / 3
        for _ in range(residuals):
            h = h + BN * mean_of(gated(BN * mean_of(h, 3, padding=1)), 3, padding=1)
        h = twin_up(h)
        images.append(mean_of(h, 3, padding=1).tanh())
    return images


def test_the_generator_agrees_with_a_twin_of_one_channel(seeded):
    network = MirrorGANGenerator(MirrorGANConfig(**TINY)).double().eval()
    make_constant(network)
    text = make_text([2, 5, 3])
    text = text._replace(sentence=3 * text.sentence.double(), words=3 * text.words.double())
    drawn = {name: 2 * values.double() for name, values in make_noise(network, 3).items()}
    with torch.no_grad():
        found = network(drawn, text).images
    for image, other in zip(found, twin(drawn, text, residuals=2), strict=True):
        torch.testing.assert_close(image, other.expand(-1, 3, -1, -1), rtol=1e-7, atol=1e-9)
    assert found[-1].std() > 0.01


# -- what learns

def test_the_captioner_teaches_what_makes_the_last_picture_and_stays_as_it_is(generator, captioner):
    task = MirrorGANTask.__new__(MirrorGANTask)
    task.players = {"generator": SimpleNamespace(module=generator)}
    text, ids = make_text([2, 3, 4]), captioner.ids(CAPTIONS[:3])
    painted = generator(make_noise(generator, 3), text)
    before = {name: value.clone() for name, value in captioner.state_dict().items()}
    batch = {"painted": painted, "stream_ids": ids, "stream_count": (ids != 0).sum().float()}
    term = task.terms({"stream": captioner}, batch)["stream"]
    term.backward()
    taught = [generator.augmentation, generator.start, *generator.refine, generator.heads[-1]]
    assert all(one.grad is not None and one.grad.any() for module in taught for one in module.parameters())
    assert all(one.grad is None for head in generator.heads[:-1] for one in head.parameters())
    assert all(one.grad is None for one in captioner.parameters())
    assert all(torch.equal(before[name], value) for name, value in captioner.state_dict().items())
    assert float(term) == pytest.approx(math.log(captioner.network.config.num_text_tokens), rel=0.2)   # untrained


def test_the_paper_weighs_the_captioner_by_twenty():
    assert MirrorGANLossConfig().stream == 20 and MirrorGANLossConfig().kl == 1


# -- caption in, picture, caption out

def test_painting_shows_what_is_said_of_the_picture(generator, captioner):
    generator.eval()
    drawn, text = make_noise(generator, 2), make_text([2, 4])
    image, plain = generator.paint(drawn, text)
    generator.captioners = (captioner,)
    again, shown = generator.paint(drawn, text)
    assert torch.equal(image, again) and shown.keys() - plain.keys() == {"described"}
    assert torch.equal(shown["described"], captioner.network.describe(image))
    pictures = generator.pictures({name: value[1] for name, value in shown.items()}, "a red circle")
    assert pictures.keys() == {"scales", "attention", "described"}
    assert pictures["described"].dtype == torch.uint8 and pictures["described"].shape[0] == 3
    assert sum(1 for name in generator.state_dict() if name.startswith("captioner")) == 0


def test_an_exported_generator_has_its_captioner_beside_it(generator, captioner, tmp_path):
    generator.save_pretrained(tmp_path)
    assert MirrorGANGenerator.from_pretrained(tmp_path).captioners == ()
    captioner.save(tmp_path / "stream")
    (loaded,) = MirrorGANGenerator.from_pretrained(tmp_path).captioners
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    assert loaded.describe(image) == captioner.describe(image)
