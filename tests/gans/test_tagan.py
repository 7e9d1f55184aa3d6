"""TAGAN: the paper's sizes, the words' reading and score against loops written out, the losses by hand."""

import math

import pytest
import torch
from editors import Encoder, batch_of, build, same_text
from published import Published
from pydantic import ValidationError
from torch import nn
from torch.nn.functional import binary_cross_entropy

from dalle.errors import UserError
from gans import tagan
from gans.editing import halvings
from gans.losses import bce
from gans.tagan import (
    Sentence,
    TAGANConfig,
    TAGANDiscriminator,
    TAGANDiscriminatorConfig,
    TAGANGenerator,
    TAGANLossConfig,
    WordReader,
    conditional_log_score,
    conditional_score,
    discriminator_loss,
    generator_loss,
    logit_of,
    reconstruction_error,
    word_attention,
)
from gans.text import Text

PUBLISHED = {"tagan": Published(paintings=3, one_caption=True)}       # each phase, and once with the own sentence
EDITOR = {"generator": {"channels": 2, "hidden": 4, "residual_blocks": 1},
          "discriminator": {"channels": 2, "hidden": 4}}
DOUBLES = {
    tagan.conditional_log_score: (((3, 4, 2), (3, 4, 2), (3, 4)), tagan.conditional_log_score),
    tagan.conditional_score: (((3, 4, 2), (3, 4, 2), (3, 4)), tagan.conditional_score),
    tagan.discriminator_loss: (((3,),) * 4, tagan.discriminator_loss),
    tagan.generator_loss: (((3,), (3,), (), (), ()), tagan.generator_loss),
    tagan.reconstruction_error: (((2, 3, 2, 2),) * 2, tagan.reconstruction_error),
}

TINY = {"image_size": 32, "word_dim": 5, "hidden": 6, "condition_dim": 4, "channels": 2, "residual_blocks": 1}


def text_of(lengths=(4, 2), word_dim=5, count=4):
    mask = torch.arange(count) < torch.tensor(lengths)[:, None]
    return Text(torch.zeros(len(lengths), 3), torch.randn(len(lengths), word_dim, count) * mask[:, None], mask)


def tiny_generator():
    torch.manual_seed(0)
    return TAGANGenerator(TAGANConfig(**TINY))


def tiny_discriminator(size=32):
    torch.manual_seed(0)
    return TAGANDiscriminator(TAGANDiscriminatorConfig(channels=2, hidden=6), size, 5)


def livened(module):
    """Weights large enough to tell inputs apart: 0.02 leaves next to nothing after a few layers."""
    for part in module.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(part.weight)
    return module


# -- the paper's sizes

def test_the_generator_has_the_paper_s_parameters_and_shapes():
    generator = TAGANGenerator(TAGANConfig()).eval()
    assert generator.num_parameters == 28_771_651
    source = torch.rand(1, 3, 128, 128) * 2 - 1
    assert generator.encoder(source).shape == (1, 512, 16, 16)
    image, details = generator.paint({"eps": torch.zeros(1, 128)}, text_of((4,), 300), source)
    assert image.shape == (1, 3, 128, 128) and image.abs().max() <= 1 and not details


def test_the_discriminator_has_the_paper_s_parameters():
    discriminator = TAGANDiscriminator(TAGANDiscriminatorConfig(), 128, 300)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 15_432_263


@pytest.mark.parametrize(("size", "layers"), [(32, 1), (64, 2), (128, 3), (256, 4)])
def test_the_scales_are_16_8_and_4_whatever_the_side(size, layers):
    discriminator = tiny_discriminator(size)
    convolutions = [part for part in discriminator.first if isinstance(part, nn.Conv2d)]
    assert 1 + len(discriminator.first[2:]) == layers and len(convolutions) == 1
    scales = [discriminator.first(torch.zeros(2, 3, size, size))]
    for layer in discriminator.further:
        scales.append(layer(scales[-1]))
    assert [tuple(scale.shape[1:]) for scale in scales] == [(8, 16, 16), (16, 8, 8), (16, 4, 4)]
    assert discriminator.head(scales[-1]).shape == (2, 1, 1, 1)


def test_a_side_that_cannot_be_halved_to_sixteen_is_refused():
    for side in (16, 96, 100):
        with pytest.raises(UserError, match=f"image_size is {side}"):
            halvings(side, 16)
    with pytest.raises(ValidationError, match="multiple of 8"):
        TAGANConfig(image_size=100)


def test_first_weights_are_drawn_for_linear_layers_too_and_not_for_the_recurrent_ones():
    generator = TAGANGenerator(TAGANConfig(image_size=32, channels=16, hidden=64, condition_dim=64))
    assert float(generator.augment.project.weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert not generator.augment.project.bias.any()
    assert float(generator.merge[0][0].weight.detach().std()) == pytest.approx(0.02, rel=0.1)
    assert float(generator.reader.forwards.weight_hh_l0.detach().abs().max()) == pytest.approx(1 / 8, rel=0.01)


# -- the words

def read_by_cells(reader, words, mask):
    """The two directions as cells that walk over one sentence at a time."""
    cells = []
    for layer in (reader.forwards, reader.backwards):
        cell = nn.GRUCell(layer.input_size, layer.hidden_size)
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
        cells.append(cell)
    batch, _, count = words.shape
    read = torch.zeros(batch, count, reader.forwards.hidden_size)
    for row in range(batch):
        places = [place for place in range(count) if mask[row, place]]
        for cell, walk in zip(cells, (places, places[::-1]), strict=True):
            state = torch.zeros(1, reader.forwards.hidden_size)
            for place in walk:
                state = cell(words[row, :, place][None], state)
                read[row, place] += state[0] / 2
    lengths = mask.sum(dim=1, keepdim=True)
    return read, read.sum(dim=1) / lengths


@pytest.mark.parametrize("mask", [
    [[True, True, True, True], [True, True, False, False], [True, False, False, False]],
    [[False, True, True, False], [False, True, False, True], [True, True, True, True]],      # gaps, as [CLS] leaves
])
def test_words_are_read_as_by_two_cells_whose_outputs_are_averaged(mask):
    torch.manual_seed(0)
    reader, mask = WordReader(5, 6), torch.tensor(mask)
    words = torch.randn(3, 5, 4) * mask[:, None]
    found = reader(words, mask)
    read, whole = read_by_cells(reader, words, mask)
    torch.testing.assert_close(found.words, read)
    torch.testing.assert_close(found.whole, whole)
    assert not found.words[~mask].any()


def test_a_caption_without_words_is_finite():
    sentence = WordReader(5, 6)(torch.zeros(1, 5, 4), torch.zeros(1, 4, dtype=torch.bool))
    assert not sentence.whole.any()
    assert not word_attention(sentence, torch.zeros(1, 4, dtype=torch.bool)).any()


def test_attention_is_over_the_words_alone():
    sentence = Sentence(torch.randn(2, 4, 6), torch.randn(2, 6))
    mask = torch.tensor([[True, True, True, False], [False, True, False, False]])
    attention = word_attention(sentence, mask)
    torch.testing.assert_close(attention.sum(dim=1), torch.ones(2))
    assert not attention[~mask].any() and attention[1, 1] == 1
    weights = [math.exp(float(sentence.words[0, word] @ sentence.whole[0])) for word in range(3)]
    torch.testing.assert_close(attention[0, :3], torch.tensor(weights) / sum(weights))


def test_attention_does_not_overflow():
    sentence = Sentence(torch.full((1, 2, 6), 50.0), torch.full((1, 6), 50.0))
    torch.testing.assert_close(word_attention(sentence, torch.ones(1, 2, dtype=torch.bool)), torch.full((1, 2), 0.5))


# -- the score

def test_the_score_agrees_with_a_loop_written_out():
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    attention = torch.rand(2, 4).softmax(dim=1)
    attention[1, 3] = 0
    expected = []
    for row in range(2):
        product = 1.0
        for word in range(4):
            beta = [math.exp(float(weights[row, word, layer])) for layer in range(3)]
            found = sum(beta[layer] / sum(beta) / (1 + math.exp(-float(logits[row, word, layer])))
                        for layer in range(3))
            product *= min(found + 1e-7, 1.0) ** float(attention[row, word])
        expected.append(product)
    torch.testing.assert_close(conditional_score(logits, weights, attention), torch.tensor(expected))


def test_the_power_is_taken_of_the_sum_over_the_layers():
    """The code's form; the paper's eq. 5, the power within the sum, gives another number."""
    logits = torch.tensor([[[0.0, 3.0, -3.0]]]).expand(1, 2, 3)
    shares = torch.tensor([0.5, 1 / (1 + math.exp(-3)), 1 / (1 + math.exp(3))])
    attention = torch.tensor([[0.25, 0.75]])
    found = conditional_score(logits, torch.zeros(1, 2, 3), attention)
    assert float(found) == pytest.approx(float(shares.mean()), rel=1e-5)        # equal words: exponents add up to 1
    inside = float((shares**0.25).mean() * (shares**0.75).mean())
    assert abs(float(found) - inside) > 1e-2


@pytest.mark.parametrize("logit", [-1e4, -30.0, 0.0, 30.0, 1e4])
def test_score_losses_and_gradients_are_finite(logit):
    logits = torch.full((2, 3, 3), logit, requires_grad=True)
    log_score = conditional_log_score(logits, torch.zeros(2, 3, 3), torch.full((2, 3), 1 / 3))
    assert (log_score <= 0).all() and (log_score.exp() > 0).all()
    for target in (0, 1):
        loss = bce(logit_of(log_score), target)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert loss.isfinite() and gradient.isfinite().all() and gradient.abs().max() <= 1


def test_cross_entropy_of_the_logit_is_that_of_the_score():
    score = torch.tensor([1e-6, 0.1, 0.5, 0.9, 0.999])
    for target in (0.0, 1.0):
        torch.testing.assert_close(bce(logit_of(score.log()), target),
                                   binary_cross_entropy(score, torch.full((5,), target)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logit_of(score.log()).sigmoid(), score, rtol=1e-4, atol=1e-7)


def test_padding_leaves_the_score_as_it_is():
    discriminator = livened(tiny_discriminator()).eval()
    text, image = text_of((4, 2)), torch.rand(2, 3, 32, 32)
    longer = Text(text.sentence, torch.cat([text.words, torch.zeros(2, 5, 3)], dim=2),
                  torch.cat([text.mask, torch.zeros(2, 3, dtype=torch.bool)], dim=1))
    (short,), (padded,) = discriminator(image, text).pairs, discriminator(image, longer).pairs
    torch.testing.assert_close(short, padded)
    assert short.std() > 0


def test_a_pair_s_score_by_its_pieces():
    """Filters, offsets, layers and attention put together by hand for one picture and one word at a time."""
    discriminator = livened(tiny_discriminator()).eval()
    text, image = text_of((3, 2)), torch.rand(2, 3, 32, 32)
    scales = [discriminator.first(image)]
    for layer in discriminator.further:
        scales.append(layer(scales[-1]))
    vectors = [look(scale).mean(dim=(2, 3)) for look, scale in zip(discriminator.look, scales, strict=True)]
    sentence = discriminator.reader(text.words, text.mask)
    attention = word_attention(sentence, text.mask)
    for row, (score,) in enumerate(zip(discriminator(image, text).pairs[0].sigmoid(), strict=True)):
        product = 1.0
        for word in range(int(text.mask[row].sum())):
            read = sentence.words[row, word]
            beta = discriminator.layer_weights(read).softmax(dim=0)
            found = 0.0
            for layer in range(3):
                filters = discriminator.filters[layer](read)
                found += float(beta[layer] * torch.sigmoid(filters[:-1] @ vectors[layer][row] + filters[-1]))
            product *= min(found + 1e-7, 1.0) ** float(attention[row, word])
        assert float(score) == pytest.approx(product, rel=1e-4)


# -- the networks

def test_edited_pictures_teach_the_discriminator_nothing_about_sentences():
    discriminator = tiny_discriminator()
    scores = discriminator(torch.rand(2, 3, 32, 32))
    assert scores.pairs == ()
    bce(scores.image, 0).backward()
    for part in (discriminator.filters, discriminator.layer_weights, discriminator.look, discriminator.reader):
        assert all(parameter.grad is None for parameter in part.parameters())
    assert discriminator.head.weight.grad is not None


def test_the_picture_follows_the_source_the_words_and_the_noise():
    generator = livened(tiny_generator()).eval()
    noise, text, source = {"eps": torch.randn(2, 4)}, text_of(), torch.rand(2, 3, 32, 32)
    first = generator.paint(noise, text, source)[0]
    assert torch.equal(first, generator.paint(noise, text, source)[0])
    for other in (({"eps": torch.randn(2, 4)}, text, source), (noise, text_of(), source),
                  (noise, text, torch.rand(2, 3, 32, 32))):
        assert (generator.paint(*other)[0] - first).abs().max() > 1e-4


def test_batches_can_be_permuted():
    generator, discriminator = tiny_generator().eval(), livened(tiny_discriminator()).eval()
    order = torch.tensor([2, 0, 1])
    eps, text, source = torch.randn(3, 4), text_of((4, 1, 3)), torch.rand(3, 3, 32, 32)
    moved = Text(*(part[order] for part in text))
    image = generator.paint({"eps": eps}, text, source)[0]
    torch.testing.assert_close(generator.paint({"eps": eps[order]}, moved, source[order])[0], image[order])
    found, permuted = discriminator(image, text), discriminator(image[order], moved)
    torch.testing.assert_close(permuted.image, found.image[order])
    torch.testing.assert_close(permuted.pairs[0], found.pairs[0][order])


# -- the losses

def test_losses_at_one_half():
    zero = torch.zeros(4)
    assert float(discriminator_loss(zero, zero, zero, zero)) == pytest.approx(12 * math.log(2))
    found = generator_loss(zero, zero, torch.tensor(0.4), torch.tensor(0.2), torch.tensor(0.5))
    assert float(found) == pytest.approx(11 * math.log(2) + 0.5 * 0.4 + 0.5 * 0.2 + 0.2 * 0.5)


def test_the_losses_by_hand():
    logit = {share: torch.tensor([math.log(share / (1 - share))]) for share in (0.9, 0.8, 0.3, 0.2)}
    found = discriminator_loss(logit[0.9], logit[0.8], logit[0.3], logit[0.2], conditional=4)
    expected = -math.log(0.9) - 4 * 0.5 * (math.log(0.8) + math.log(0.7)) - math.log(0.8)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    weights = TAGANLossConfig(conditional=4, reconstruction=3, kl=2)
    found = generator_loss(logit[0.2], logit[0.3], torch.tensor(0.4), torch.tensor(0.2), torch.tensor(0.5), weights)
    assert float(found) == pytest.approx(-math.log(0.2) - 4 * math.log(0.3) + 2 * 0.6 + 3 * 0.5, rel=1e-5)


def test_the_reconstruction_s_norms_by_hand():
    edited, source = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])
    assert float(reconstruction_error(edited, source)) == pytest.approx(1.0)
    assert float(reconstruction_error(edited, source, "l2")) == pytest.approx(5 / 3)


# -- a step

def test_tagan_s_step(monkeypatch):
    task, networks = build(monkeypatch, "tagan", discriminator=EDITOR["discriminator"],
                           generator={**EDITOR["generator"], "residual_blocks": 0})
    prepared = task.prepare(batch_of(), networks, 0)
    assert same_text(prepared["wrong_text"], Encoder()(["dddd", "a", "bb", "ccc"]))      # b gets the text of b - 1
    noises = [prepared[name]["eps"] for name in ("noise", "noise_g", "noise_own")]
    assert not any(torch.equal(first, second) for first, second in ((noises[0], noises[1]), (noises[0], noises[2]),
                                                                    (noises[1], noises[2])))
    for parameter in task.players["discriminator"].module.parameters():
        parameter.data.zero_()
    assert task.d_loss(networks, prepared, 0).total.item() == pytest.approx(12 * math.log(2), rel=1e-5)
    found = task.g_loss(networks, prepared, 0)
    own = task.network(prepared["noise_own"], prepared["text"], prepared["image"])
    expected = (11 * math.log(2) + 0.5 * found.parts["kl"] + 0.5 * task.network.augment.kl(own.augmented)
                + 0.2 * (own.image - prepared["image"]).abs().mean())
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)
