"""The matching of words and regions: attention, scores and losses against loops written out."""

import math

import pytest
import torch
from torch import Tensor

from gans import matching
from gans.matching import (
    damsm_losses,
    func_attention,
    pair_losses,
    sent_loss,
    sentence_scores,
    word_scores,
    words_loss,
)
from gans.text import Text

MASK = torch.ones(3, 4, dtype=torch.bool)
DOUBLES = {
    matching.pair_losses: (((3, 3),), lambda a: sum(matching.pair_losses(a))),
    matching.words_loss: (((3, 2, 2, 2), (3, 2, 4)), lambda r, w: sum(matching.words_loss(r, w, MASK))),
    matching.sent_loss: (((3, 2),) * 2, lambda a, b: sum(matching.sent_loss(a, b))),
    matching.damsm_losses: (((3, 2, 2, 2), (3, 2), (3, 2), (3, 2, 4)), lambda local, pooled, sentence, words: sum(
        matching.damsm_losses(local, pooled, Text(sentence, words, MASK)))),
}

GAMMAS = (4.0, 5.0, 10.0)


def pairs(count: int = 5, dim: int = 6, length: int = 7, side: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Regions, words and mask in float64, the captions of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    regions = torch.randn(count, dim, side, side, generator=generator, dtype=torch.float64)
    words = torch.randn(count, dim, length, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([length, 3, 1, 5, 4, 2, 6, 7][:count])
    return regions, words, torch.arange(length) < lengths[:, None]


# -- attention and scores

def attention_by_loops(words: Tensor, regions: Tensor, gamma1: float) -> tuple[Tensor, Tensor]:
    """[D, T], [D, R] of one pair -> contexts [D, T] and weights [T, R], one number at a time."""
    count, places = words.shape[1], regions.shape[1]
    scores = [[sum(float(a) * float(b) for a, b in zip(words[:, t], regions[:, r], strict=True))
               for r in range(places)] for t in range(count)]
    over_words = [[math.exp(scores[t][r]) / sum(math.exp(scores[k][r]) for k in range(count))
                   for r in range(places)] for t in range(count)]
    weights = [[math.exp(gamma1 * over_words[t][r]) / sum(math.exp(gamma1 * value) for value in over_words[t])
                for r in range(places)] for t in range(count)]
    weights = torch.tensor(weights, dtype=torch.float64)
    return regions @ weights.T, weights


def scores_by_loops(regions: Tensor, words: Tensor, mask: Tensor) -> Tensor:
    """S of every picture and caption, from attention_by_loops, with the padding cut off."""
    gamma1, gamma2, gamma3 = GAMMAS
    table = torch.zeros(len(regions), len(words), dtype=torch.float64)
    for i, picture in enumerate(regions.flatten(2)):
        for j, caption in enumerate(words):
            said = caption[:, : int(mask[j].sum())]
            seen, _ = attention_by_loops(said, picture, gamma1)
            total = sum(math.exp(gamma2 * float(seen[:, t] @ said[:, t] / max(
                float(seen[:, t].norm() * said[:, t].norm()), 1e-8))) for t in range(said.shape[1]))
            table[i, j] = gamma3 * math.log(total)
    return table


def losses_by_loops(scores: Tensor, classes: list[int] | None) -> tuple[float, float]:
    def one_way(rows: Tensor) -> float:
        costs = []
        for i, row in enumerate(rows):
            rivals = [j for j in range(len(row)) if j == i or classes is None or classes[j] != classes[i]]
            costs.append(math.log(sum(math.exp(float(row[j])) for j in rivals)) - float(row[i]))
        return sum(costs) / len(costs)
    return one_way(scores), one_way(scores.T)


def test_attention_agrees_with_loops():
    regions, words, mask = pairs()
    contexts, weights = func_attention(words, regions, 4.0, mask)
    assert weights.shape == (5, 7, 3, 3) and contexts.shape == words.shape
    for i, length in enumerate(mask.sum(dim=1).tolist()):
        seen, expected = attention_by_loops(words[i, :, :length], regions[i].flatten(1), 4.0)
        torch.testing.assert_close(weights[i, :length].flatten(1), expected, rtol=1e-10, atol=0)
        torch.testing.assert_close(contexts[i, :, :length], seen, rtol=1e-10, atol=1e-12)
    whole, _ = func_attention(words[:1], regions[:1])          # all seven words are there
    torch.testing.assert_close(whole, contexts[:1])


@pytest.mark.parametrize("gamma1", [4.0, 5.0])
def test_attention_over_regions_sums_to_one_and_is_bounded(gamma1):
    regions, words, mask = pairs(dim=256, side=17)
    _, weights = func_attention(30 * words, regions, gamma1, mask)     # as sharp as it gets
    weights = weights.flatten(2)[mask]
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(len(weights), dtype=torch.float64))
    bound = math.exp(gamma1) / (math.exp(gamma1) + 288)
    assert weights.max() <= bound + 1e-12
    assert bound == pytest.approx({4.0: 0.159, 5.0: 0.340}[gamma1], abs=1e-3)


def test_word_scores_agree_with_loops():
    regions, words, mask = pairs()
    torch.testing.assert_close(word_scores(regions, words, mask, *GAMMAS), scores_by_loops(regions, words, mask),
                               rtol=1e-10, atol=0)


@pytest.mark.parametrize("classes", [None, [0, 1, 0, 2, 1]])
def test_words_loss_and_its_gradients_agree_with_loops(classes):
    regions, words, mask = (tensor.requires_grad_(tensor.is_floating_point()) for tensor in pairs())
    ids = None if classes is None else torch.tensor(classes)
    found = words_loss(regions, words, mask, ids, *GAMMAS)
    expected = losses_by_loops(scores_by_loops(regions.detach(), words.detach(), mask), classes)
    assert [one.item() for one in found] == pytest.approx(expected, rel=1e-9)
    assert torch.autograd.gradcheck(lambda v, e: words_loss(v, e, mask, ids, *GAMMAS), (regions, words))


@pytest.mark.parametrize("classes", [None, [3, 1, 3, 3, 1]])
def test_sent_loss_agrees_with_loops(classes):
    generator = torch.Generator().manual_seed(1)
    pooled, sentence = torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    scores = torch.tensor([[10 * float(a @ b) / max(float(a.norm()) * float(b.norm()), 1e-8) for b in sentence]
                           for a in pooled], dtype=torch.float64)
    torch.testing.assert_close(sentence_scores(pooled, sentence, 10.0), scores)
    found = sent_loss(pooled, sentence, None if classes is None else torch.tensor(classes), 10.0)
    assert [one.item() for one in found] == pytest.approx(losses_by_loops(scores, classes), rel=1e-9)


def test_a_code_without_length_fits_nothing():
    pooled = torch.zeros(2, 3, requires_grad=True)
    loss, _ = sent_loss(pooled, torch.randn(2, 3))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2)) and pooled.grad.isfinite().all()


def test_scores_lie_within_ln_t_and_gamma2_and_grow_with_ln_t():
    regions, words, mask = pairs()
    fits = word_scores(regions, words, mask, *GAMMAS) / GAMMAS[2]
    middle = mask.sum(dim=1).double().log()
    assert ((fits - middle).abs() <= GAMMAS[1]).all()
    same = words[:, :, :1].expand_as(words)                     # a caption of T times the same word
    once = word_scores(regions, same[:1].expand(2, -1, -1), torch.arange(7) < torch.tensor([[7], [3]]), *GAMMAS)
    torch.testing.assert_close(once[:, 0] - once[:, 1], torch.full((5,), 10 * math.log(7 / 3), dtype=torch.float64))


def test_equal_scores_cost_ln_b_and_a_batch_of_one_class_nothing():
    scores = torch.full((6, 6), 3.0)
    assert [loss.item() for loss in pair_losses(scores)] == pytest.approx([math.log(6)] * 2)
    unknown = torch.full((6,), -1)
    assert [loss.item() for loss in pair_losses(scores, unknown)] == pytest.approx([math.log(6)] * 2)
    one_class = torch.zeros(6, dtype=torch.int64)
    assert [loss.item() for loss in pair_losses(torch.randn(6, 6), one_class)] == [0, 0]
    row_alone = pair_losses(scores, torch.tensor([0, 0, 0, 0, 0, 1]))
    assert row_alone[0].item() == pytest.approx((5 * math.log(2) + math.log(6)) / 6)


def test_what_the_losses_do_not_depend_on():
    regions, words, mask = pairs()
    classes = torch.tensor([0, 1, 0, 2, 1])
    found = words_loss(regions, words, mask, classes)
    padded = words.masked_fill(~mask[:, None], 1e3)
    torch.testing.assert_close(words_loss(regions, padded, mask, classes), found)
    longer = torch.cat([words, torch.randn(5, 6, 4).double()], dim=2)
    torch.testing.assert_close(words_loss(regions, longer, torch.cat([mask, torch.zeros(5, 4).bool()], 1), classes),
                               found)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(words_loss(regions[order], words[order], mask[order], classes[order]), found)
    assert (words_loss(regions, 2 * words, mask, classes)[0] - found[0]).abs() > 1e-3      # scale decides here
    pooled, sentence = words[:, :, 0], words[:, :, 1]
    whole = sent_loss(pooled, sentence)
    torch.testing.assert_close(sent_loss(3 * pooled, 0.1 * sentence), whole)
    torch.testing.assert_close(sent_loss(pooled[order], sentence[order]), whole)


def test_the_damsm_loss_is_all_four():
    regions, words, mask = pairs()
    text, classes = Text(words[:, :, 0], words, mask), torch.tensor([0, 1, 0, 2, 1])
    losses = damsm_losses(regions, regions[:, :, 0, 0], text, classes)
    assert tuple(losses) == (*words_loss(regions, words, mask, classes),
                             *sent_loss(regions[:, :, 0, 0], text.sentence, classes))
