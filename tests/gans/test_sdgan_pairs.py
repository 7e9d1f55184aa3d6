"""SD-GAN's task: which captions are painted and compared, the losses of both branches, who learns what from which."""

import math
from types import SimpleNamespace

import pytest
import torch
from bare import BareNetworks, loss_of
from test_sdgan import DIM, LENGTH, SIDES, TINY, moved_by_captions
from torch import Tensor, nn

from dalle.training.task import Loss, Phase
from gans.damsm import Damsm, DamsmConfig
from gans.matching import sent_loss, words_loss
from gans.sdgan import SDGANConfig, SDGANGenerator, SDGANLossConfig, SDGANTask, SiameseDiscriminators, SiameseScores
from gans.task import Exchange, GANPreviewConfig
from gans.text import Text

BATCH = 4


@pytest.fixture
def generator() -> SDGANGenerator:
    torch.manual_seed(0)
    return SDGANGenerator(SDGANConfig(**TINY))


class WordEncoder(nn.Module):
    """The sentence counts the letters a to f, and each of the first words counts its own."""

    sentence_dim, word_dim, text_length = DIM, DIM, LENGTH

    def forward(self, captions) -> Text:
        words = [caption.split()[:LENGTH] for caption in captions]
        counted = torch.zeros(len(captions), LENGTH, DIM)
        for row, own in enumerate(words):
            counted[row, :len(own)] = torch.tensor([[float(word.count(letter)) for letter in "abcdef"] for word in own])
        mask = torch.arange(LENGTH)[None] < torch.tensor([len(own) for own in words])[:, None]
        return Text(counted.sum(dim=1), counted.transpose(1, 2), mask)


def make_task(generator: SDGANGenerator, **loss) -> SDGANTask:
    torch.manual_seed(5)
    task = SDGANTask.__new__(SDGANTask)
    task.config = SimpleNamespace(seed=3, loss=SDGANLossConfig(**loss), preview=GANPreviewConfig())
    damsm = Damsm(DamsmConfig(num_text_tokens=9, text_length=LENGTH, dim=DIM, embedding_dim=3, trunk="small:2"))
    task.frozen = {"text": WordEncoder(), "damsm": damsm.eval().requires_grad_(False)}
    judge = SiameseDiscriminators(SIDES, DIM, 2, 9)
    task.players = {"generator": SimpleNamespace(module=generator), "discriminator": SimpleNamespace(module=judge)}
    task.phases = [Phase("discriminator", "discriminator", task.d_loss),
                   Phase("generator", "generator", task.g_loss, ahead={"painted": task.paint})]
    return task


def loaded(classes=(0, 0, 1, -1)) -> dict:
    torch.manual_seed(6)
    others = [["a red circle", "a red ring"], ["a deaf bead", "a deaf bead"], ["fade", "cafe"], ["a bad face", "ace"]]
    return {"image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8), "class_id": torch.tensor(classes),
            "caption": ["a red circle", "a deaf bead", "fade", "dad"], "captions": others}


@pytest.fixture
def task(generator) -> SDGANTask:
    return make_task(generator)


def test_a_batch_has_every_picture_with_two_different_captions(task):
    networks, batch = BareNetworks(task), loaded()
    prepared = task.prepare(batch, networks, 0)
    # the next that differs; the second sample has no other
    expected = ["a red circle", "a deaf bead", "fade", "dad", "a red ring", "a deaf bead", "cafe", "a bad face"]
    assert prepared["caption"] == expected
    assert torch.equal(prepared["text"].sentence, WordEncoder()(expected).sentence)
    assert prepared["text"] is prepared["matching_text"]
    assert torch.equal(prepared["image"][:BATCH], prepared["image"][BATCH:])
    assert torch.equal(prepared["wrong_text"].sentence, prepared["text"].sentence.roll(-1, 0))
    assert all(len(noise) == 2 * BATCH and not torch.equal(noise[:BATCH], noise[BATCH:])
               for noise in prepared["noise"].values())


def test_half_of_the_pairs_are_of_one_picture_and_the_others_of_two_classes(task):
    classes = torch.tensor([0, 0, 1, 1, 2, 2, -1, -1])
    alone = Exchange(SimpleNamespace(rank=0, world_size=1))
    drawn = [task.pairs(alone, classes, step) for step in range(50)]
    own = torch.arange(8)
    for partner in drawn:
        same = partner == own
        assert same.sum() == 4
        assert all(classes[i] != classes[j] or classes[i] == -1 for i, j in enumerate(partner.tolist()) if not same[i])
    assert torch.equal(drawn[7], task.pairs(alone, classes, 7)) and not torch.equal(drawn[7], drawn[8])
    assert all(0 < sum(int(partner[i] == i) for partner in drawn) < 50 for i in range(8))
    for share, expected in ((0, 0), (1, 8), (0.3, 2)):
        task.config = SimpleNamespace(seed=3, loss=SDGANLossConfig(intra=share))
        assert (task.pairs(alone, classes, 0) == own).sum() == expected


class TwoProcesses(Exchange):
    """This rank's share, and all of it from what both have."""

    def __init__(self, rank: int, whole: Tensor):
        super().__init__(SimpleNamespace(rank=rank, world_size=2))
        self.whole = whole

    def everyone(self, tensor: Tensor) -> Tensor:
        assert torch.equal(self.mine(self.whole), tensor)
        return self.whole


def test_two_processes_draw_the_pairs_of_one(task):
    classes = torch.tensor([0, 1, 1, -1, 0, -1])
    pairs = task.pairs(Exchange(SimpleNamespace(rank=0, world_size=1)), classes, 4)
    kinds = task.kinds(Exchange(SimpleNamespace(rank=0, world_size=1)), classes)
    for rank in range(2):
        exchange = TwoProcesses(rank, classes)
        assert torch.equal(task.pairs(exchange, exchange.mine(classes), 4), pairs)
        assert torch.equal(task.kinds(exchange, exchange.mine(classes)), exchange.mine(kinds))


def test_the_total_is_both_branches_and_the_contrastive_loss_of_all_sides(generator):
    task = make_task(generator, contrastive=3.0, scale=0.25, alpha=0.5, eps=20.0)
    torch.manual_seed(7)
    vectors = torch.randn(2, 8, 9, dtype=torch.float64)                 # of two sides; four pairs
    scores = [SiameseScores(None, None, None, vector) for vector in vectors]
    partner = torch.tensor([0, 3, 2, 0])
    found = task.compared(BareNetworks(task), {"partner": partner}, scores, Loss(torch.tensor(1.5)))
    expected, apart = 0.0, {True: [], False: []}
    for vector in vectors:
        for i, j in enumerate(partner.tolist()):
            d = math.dist(vector[i].tolist(), vector[4 + j].tolist())
            expected += 0.25 / 4 * (max(d, 0.5) ** 2 if i == j else max(20 - d, 0) ** 2)
            apart[i == j].append(d)
    assert found.parts["contrastive"].item() == pytest.approx(expected)
    assert found.total.item() == pytest.approx(2 * 1.5 + 3 * expected)
    for name, same in (("of_one", True), ("of_two", False)):
        assert found.parts[name].item() == pytest.approx(sum(apart[same][2:]) / 2)      # of the last side


@pytest.mark.parametrize("same_class", ["left_out", "mismatched"])
def test_a_pictures_other_caption_is_no_mismatch(generator, same_class):
    task = make_task(generator, same_class=same_class)
    networks = BareNetworks(task)
    prepared = task.prepare(loaded(), networks, 0)
    image, text = torch.rand(8, 3, 32, 32) * 2 - 1, prepared["matching_text"]
    picture, classes = [0, 1, 2, 3] * 2, [0, 0, 1, -1] * 2
    alike = {(i, j) for i in range(8) for j in range(8) if i != j and
             (picture[i] == picture[j] or (same_class == "left_out" and classes[i] == classes[j] >= 0))}
    local, pooled = task.frozen["damsm"].image(image)
    sentence = 10 * torch.nn.functional.cosine_similarity(pooled[:, None], text.sentence[None], dim=2)
    losses = []
    for scores in (sentence, sentence.T):
        for i in range(8):
            allowed = [j for j in range(8) if (i, j) not in alike]
            losses.append(scores[i, allowed].logsumexp(dim=0) - scores[i, i])
    expected = sum(sent_loss(pooled, text.sentence, prepared["kind"]))
    assert expected.item() == pytest.approx(sum(losses).item() / 8)
    expected = expected + sum(words_loss(local, text.words, text.mask, prepared["kind"]))
    assert task.matching(networks, image, prepared).item() == pytest.approx(expected.item())


# -- who learns what

def given(module: nn.Module) -> set[str]:
    """The parts of ``module`` that have a gradient which is not zero."""
    return {name for name, one in module.named_parameters() if one.grad is not None and one.grad.any()}


def only_contrastive(task: SDGANTask, monkeypatch) -> None:
    """Leave the branches' own losses out."""
    task.config = SimpleNamespace(seed=3, loss=SDGANLossConfig(scale=0.5, eps=100.0))
    monkeypatch.setattr(task, "d_loss_of", lambda *scores: Loss(torch.zeros(())))
    monkeypatch.setattr(task, "g_loss_of", lambda *scores: Loss(torch.zeros(())))


def test_the_contrastive_loss_teaches_the_discriminators_maps_alone(task, generator, monkeypatch):
    only_contrastive(task, monkeypatch)
    networks = BareNetworks(task)
    loss_of(task, "discriminator", networks, task.prepare(loaded(), networks, 0)).total.backward()
    assert given(networks["discriminator"]) == {f"scales.{level}.project.weight" for level in range(3)}
    assert given(generator) == set()


def test_the_contrastive_loss_teaches_the_whole_generator(task, generator, monkeypatch):
    moved_by_captions(generator)
    only_contrastive(task, monkeypatch)
    networks = BareNetworks(task)
    loss_of(task, "generator", networks, task.prepare(loaded(), networks, 0)).total.backward()
    assert given(generator) == dict(generator.named_parameters()).keys()
    assert all(one.grad is None for one in task.frozen["damsm"].parameters())


def test_each_players_loss_teaches_it(task, generator):
    networks = BareNetworks(task)
    prepared = task.prepare(loaded(), networks, 0)
    loss = loss_of(task, "discriminator", networks, prepared)
    loss.total.backward()
    assert given(generator) == set()
    assert given(networks["discriminator"]) == dict(networks["discriminator"].named_parameters()).keys()
    assert set(loss.parts) == {"8", "16", "32", "contrastive", "of_one", "of_two"}
    loss = loss_of(task, "generator", networks, prepared)
    loss.total.backward()
    cues = {name for name in dict(generator.named_parameters()) if ".cue." in name}
    first = {name for name in cues if not name.endswith((".cue.gain.2.weight", ".cue.offset.2.weight",
                                                         ".cue.gain.weight", ".cue.offset.weight"))}
    assert given(generator) == dict(generator.named_parameters()).keys() - first     # behind what is zero at first
    assert set(loss.parts) == {"adversarial", "damsm", "kl", "contrastive", "of_one", "of_two"}


def test_branches_are_one_network_and_may_change_places(task, generator, monkeypatch):
    """In training mode, too: both are normalised by the same statistics."""
    moved_by_captions(generator)
    task.config.loss = SDGANLossConfig(intra=1.0)
    networks = BareNetworks(task)
    prepared = task.prepare(loaded(), networks, 0)
    order = torch.arange(8).roll(4)
    swapped = {**prepared, "text": Text(*(part[order] for part in prepared["text"])),
               "matching_text": Text(*(part[order] for part in prepared["matching_text"])),
               "noise": {name: noise[order] for name, noise in prepared["noise"].items()}}
    one, other = (task.paint(networks, batch, 0) for batch in (prepared, swapped))
    torch.testing.assert_close(one.image[order], other.image, rtol=1e-4, atol=1e-5)
    losses = [loss_of(task, "generator", networks, batch) for batch in (prepared, swapped)]
    for name in ("contrastive", "adversarial", "damsm"):
        assert losses[0].parts[name].item() == pytest.approx(losses[1].parts[name].item(), rel=1e-4)
    assert losses[0].parts["of_one"] > 0
