"""STREAM: the released sizes, its words against a loop, its losses by hand, what learns, what descriptions score."""

import math

import pytest
import torch
import torch.nn.functional as F
from bare import CAPTIONS, count
from published import Published
from torch import Tensor, nn

import gans.stream as stream
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from gans.damsm import Damsm, DamsmConfig
from gans.descriptions import description_scores, texts_of_everyone, words_of
from gans.stream import Stream, StreamConfig, StreamNetwork, WordPerplexity, finished_trunk, stream_loss, target_mask

# nothing but the batch normalisation puts samples together; validation reads several captions of a picture
PUBLISHED = {"stream": Published(zero=1, compares=False)}
DOUBLES = {stream.stream_loss: (((3, 4),), lambda losses: stream.stream_loss(losses, torch.tensor(7.0)))}

TINY = {"num_text_tokens": 11, "text_length": 5, "trunk": "small:2", "embedding_dim": 6, "hidden_dim": 7}
IDS = torch.tensor([[3, 4, 0, 0, 0], [5, 6, 7, 8, 9], [1, 0, 0, 0, 0]])


@pytest.fixture
def network(seeded) -> StreamNetwork:
    return StreamNetwork(StreamConfig(**TINY)).eval()


@pytest.fixture
def images(seeded) -> Tensor:
    return torch.rand(3, 3, 64, 64) * 2 - 1


def test_the_released_sizes():
    with torch.device("meta"):
        whole = StreamNetwork(StreamConfig(trunk="resnet152:random"))
    assert count(whole.see) == 525_056
    assert sum(count(part) for part in (whole.embedding, whole.lstm, whole.words)) == 5_768_010


def by_a_loop(network: StreamNetwork, images: Tensor, ids: Tensor, end: bool) -> list[list[float]]:
    """-log p of each word of each caption, by LSTM cells that stop at the caption's end."""
    cell = nn.LSTMCell(network.lstm.input_size, network.lstm.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in network.lstm.state_dict().items()})
    found = []
    for seen, row in zip(network.look(images), ids.tolist(), strict=True):
        words = [word for word in row if word]
        targets = words + [0] * (end and len(words) < len(row))
        state, step, own = None, seen, []
        for target in targets:
            state = cell(step[None], state)
            own.append(-float(network.words(state[0]).log_softmax(dim=1)[0, target]))
            step = network.embedding(torch.tensor(target))
        found.append(own)
    return found


@pytest.mark.parametrize("end", [False, True])
def test_each_word_is_told_by_the_picture_and_the_words_before_it(network, images, end):
    with torch.no_grad():
        losses = network(images, IDS, end)
        assert losses.shape == (3, 5 + end)
        for own, expected in zip(losses, by_a_loop(network, images, IDS, end), strict=True):
            torch.testing.assert_close(own[:len(expected)], torch.tensor(expected))
            assert not own[len(expected):].any()


def test_neither_padding_nor_the_last_word_as_an_input_counts(network, images):
    longer = network(images, F.pad(IDS, (0, 3)))
    torch.testing.assert_close(longer[:, :5], network(images, IDS))
    assert not longer[:, 5:].any()
    last = IDS.clone()
    last[1, 4] = 2                                        # no word before it is told otherwise
    torch.testing.assert_close(network(images, last)[:, :4], network(images, IDS)[:, :4])


def test_the_end_of_a_caption_has_a_place_unless_it_was_cut():
    assert target_mask(IDS, end=False).sum(dim=1).tolist() == [2, 5, 1]
    assert target_mask(IDS, end=True).int().tolist() == [[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]


def test_words_that_are_all_as_likely_cost_ln_v(images):
    network = StreamNetwork(StreamConfig(**{**TINY, "num_text_tokens": 5450})).eval()
    nn.init.zeros_(network.words.weight)
    nn.init.zeros_(network.words.bias)
    with torch.no_grad():
        found = float(stream_loss(network(images, IDS), (IDS != 0).sum()))
    assert found == pytest.approx(math.log(5450)) and found == pytest.approx(8.6034, abs=1e-4)


def test_the_mean_is_over_the_words_of_the_batch():
    losses = torch.tensor([[1.0, 2.0, 0.0], [6.0, 0.0, 0.0]])
    assert float(stream_loss(losses, torch.tensor(3.0))) == 3.0


def test_a_frozen_captioner_hands_its_gradient_to_the_picture(network, images):
    captioner = Stream(network, CaptionTokenizer.train(CAPTIONS * 3, 300)).train()
    images.requires_grad_()
    likelihood = captioner.log_likelihood(images, IDS)
    torch.testing.assert_close(likelihood, -captioner(images, IDS).sum(dim=1))
    likelihood.sum().backward()
    assert all(image.abs().sum() > 0 for image in images.grad)
    assert all(parameter.grad is None for parameter in captioner.parameters())
    # cuDNN differentiates an LSTM in training mode alone; it has no dropout, and the normalisation keeps its statistics
    assert captioner.network.lstm.training and not captioner.network.see.training


def test_a_description_is_the_likeliest_word_after_word(network, images):
    found = network.describe(images)
    with torch.no_grad():
        for image, row in zip(images, found, strict=True):
            words: list[int] = []
            while len(words) < 5:
                ids = torch.tensor([words], dtype=torch.int64).reshape(1, -1)
                word = int(network.logits(image[None], ids)[0, -1].argmax())
                if word == 0:
                    break
                words.append(word)
            assert [word for word in row.tolist() if word] == words and row.shape == (5,)
    nn.init.zeros_(network.words.weight)
    with torch.no_grad():
        network.words.bias.copy_(F.one_hot(torch.tensor(0), 11))
    assert not network.describe(images).any()             # the end at once


def test_what_was_saved_comes_back(network, images, tmp_path):
    tokenizer = CaptionTokenizer.train(CAPTIONS * 3, 300)
    network = StreamNetwork(StreamConfig(**{**TINY, "num_text_tokens": tokenizer.vocab_size})).eval()
    one = Stream(network, tokenizer)
    one.save(tmp_path)
    other = Stream.load(tmp_path)
    ids = one.ids(CAPTIONS[:3])
    assert ids.shape == (3, 5) and torch.equal(ids, other.ids(CAPTIONS[:3]))
    assert torch.equal(one.log_likelihood(images, ids), other.log_likelihood(images, ids))
    assert one.describe(images) == other.describe(images)
    assert one.warnings(["a red circle " * 9]) and not one.warnings(["red"])


def test_only_a_captioner_is_one(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vse"}')
    with pytest.raises(UserError, match="holds a 'vse' model, not 'stream'"):
        Stream.load(tmp_path)


def test_the_trunk_of_a_matching_model_looks_and_stays_as_it_is(tmp_path, seeded, images):
    model = Damsm(DamsmConfig(num_text_tokens=9, text_length=5, dim=4, embedding_dim=3, trunk="small:2"))
    model.save_pretrained(tmp_path)
    trunk = finished_trunk(str(tmp_path), "small:2")
    assert not trunk.trained
    torch.testing.assert_close(trunk(images)[1], model.image.trunk(images)[1])
    with pytest.raises(UserError, match="sees through the trunk small:2, model.trunk is small:3"):
        finished_trunk(str(tmp_path), "small:3")


# -- the scores

def test_descriptions_are_scored_as_the_coco_challenge_does():
    """By hand: four-gram precisions and no brevity; weights of words, a picture with all and one with none."""
    references = [["a red circle on white", "the red disc"], ["two blue squares on black"]]
    same = description_scores(["A red circle, on white!", "two blue squares on black"], references)
    assert same["bleu4"].value == pytest.approx(1, abs=1e-4)
    other = description_scores(["a red circle on black", "two blue squares on black"], references)
    precisions = [9 / 10, 7 / 8, 5 / 6, 3 / 4]            # of the 10 words, 8 pairs, 6 threes and 4 fours
    expected = math.exp(sum(math.log(value) for value in precisions) / 4)
    assert other["bleu4"].value == pytest.approx(expected, abs=1e-4)
    wrong = description_scores(["green", "green"], references)
    assert wrong["bleu4"].value < 1e-4 and wrong["cider"].value == pytest.approx(0)
    assert same["cider"].value > other["cider"].value > wrong["cider"].value


def test_a_caption_said_word_for_word_has_a_cider_of_ten():
    """One reference that is said word for word, with no word in common with the other picture: the cosine is 1."""
    found = description_scores(["a b c d", "e f g h"], [["a b c d"], ["e f g h"]])
    assert found["cider"].value == pytest.approx(10)


def test_words_are_lower_case_and_one_picture_has_no_score():
    assert words_of("A Red-circle, 2 times!") == "a red circle 2 times"
    assert description_scores(["a"], [["a"]]) == {}
    assert texts_of_everyone(["ä", ""], 1) == ["ä", ""]


def test_perplexity_is_of_the_mean_over_all_shares():
    one, other = WordPerplexity(), WordPerplexity()
    one.add(math.log(2), count=3)
    other.add(math.log(8), count=1)
    assert one.joined(other).value == pytest.approx(math.exp((3 * math.log(2) + math.log(8)) / 4))
