"""VSE and VSE++: the papers' sizes, the GRU against packed captions, both losses by hand, word vectors, training."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from bare import CAPTIONS, BareNetworks, count, trained
from published import Published
from pydantic import ValidationError
from torch.nn.utils.rnn import pack_padded_sequence

from dalle.config import load_config
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.training.optimizers import build_optimizer
from gans import vse
from gans.text import load_text_encoder
from gans.vse import (
    VSE,
    VSEConfig,
    VSERun,
    VSETask,
    VSETextEncoder,
    WordGRU,
    hinges,
    max_of_hinges,
    read_word_vectors,
    sum_of_hinges,
)

PUBLISHED = {"vse": Published(one_caption=True)}
DOUBLES = {
    vse.hinges: (((3, 3),), lambda a: sum(map(torch.sum, vse.hinges(a, 0.2)))),
    vse.sum_of_hinges: (((3, 3),), vse.sum_of_hinges),
    vse.max_of_hinges: (((3, 3),), vse.max_of_hinges),
}

ROOT = Path(__file__).resolve().parents[2]
TINY = {"trunk": "small:2", "word_dim": 5, "hidden_dim": 8}
LENGTH = 12
pytestmark = pytest.mark.usefixtures("seeded")


# -- the network

def test_the_papers_sizes_have_the_papers_parameters():
    model = VSE(VSEConfig(image_dim=4096, num_text_tokens=10, text_length=50))
    assert count(model.text.gru) == 541_800 and count(model.image) == 1_228_800


def test_the_sentence_is_the_last_state_of_the_packed_captions():
    network = WordGRU(20, 5, 7)
    ids = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0], [7, 8, 9, 10], [0, 0, 0, 0]])
    last, states = network(ids)
    lengths = torch.tensor([3, 1, 4, 1])
    packed = pack_padded_sequence(network.words(ids), lengths, batch_first=True, enforce_sorted=False)
    torch.testing.assert_close(last, network.gru(packed)[1][0])
    torch.testing.assert_close(states[2, :, :], network.gru(network.words(ids[2:3]))[0][0])
    assert not network.words(torch.tensor([0])).any()


def test_both_sides_have_unit_length():
    model = VSE(VSEConfig(image_dim=6, num_text_tokens=20, text_length=4, **{**TINY, "trunk": None}))
    text, pictures = model(torch.randint(1, 20, (3, 4)), torch.randn(3, 6))
    for side in (text, pictures):
        torch.testing.assert_close(side.norm(dim=1), torch.ones(3))
    features = torch.randn(2, 6)
    expected = F.normalize(features @ model.image.weight.T, dim=1)
    torch.testing.assert_close(model.embed_images(features), expected)


# -- the losses

def loops(scores, margin):
    """Both losses, written out: (sum, max)."""
    count, total, hardest = len(scores), 0.0, 0.0
    for i in range(count):
        captions = [max(0.0, margin - float(scores[i, i]) + float(scores[i, j])) for j in range(count) if j != i]
        pictures = [max(0.0, margin - float(scores[i, i]) + float(scores[j, i])) for j in range(count) if j != i]
        total += sum(captions) + sum(pictures)
        hardest += max(captions) + max(pictures)
    return total / count, hardest


@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_the_losses_agree_with_loops_written_out(margin):
    scores = torch.rand(6, 6) * 2 - 1
    total, hardest = loops(scores, margin)
    assert float(sum_of_hinges(scores, margin)) == pytest.approx(total, rel=1e-5)
    assert float(max_of_hinges(scores, margin)) == pytest.approx(hardest, rel=1e-5)


def test_the_diagonal_costs_nothing():
    for side in hinges(torch.randn(5, 5), 0.2):
        assert not side.diagonal().any() and (side >= 0).all()
    assert sum_of_hinges(torch.tensor([[-1.0]])) == 0 == max_of_hinges(torch.tensor([[-1.0]]))


def test_the_hardest_cost_no_more_than_all():
    for _ in range(20):
        scores = torch.rand(5, 5) * 2 - 1
        assert float(max_of_hinges(scores)) <= 5 * float(sum_of_hinges(scores)) + 1e-6     # both as sums over the rows


# -- the text encoder

@pytest.fixture
def tokenizer(workshop) -> CaptionTokenizer:
    return CaptionTokenizer.load(workshop.folder / "data" / "tokenizer")


def test_the_encoder_gives_the_last_state_and_those_of_the_words(tokenizer, tmp_path):
    model = VSE(VSEConfig(num_text_tokens=tokenizer.vocab_size, text_length=LENGTH, **{**TINY, "trunk": None}))
    model.save_pretrained(tmp_path)
    tokenizer.save(tmp_path / "tokenizer")
    encoder = load_text_encoder(str(tmp_path))
    text = encoder([*CAPTIONS, ""])
    assert text.words.shape == (9, 8, LENGTH) and not text.sentence.requires_grad
    for row, caption in enumerate(CAPTIONS):
        count = min(LENGTH, tokenizer.count(caption))
        states = model.text.gru(model.text.words(torch.tensor([tokenizer.token_ids(caption)[:count]])))[0][0].detach()
        torch.testing.assert_close(text.sentence[row], states[-1])
        torch.testing.assert_close(text.words[row, :, :count].T, states)
        assert text.mask[row].sum() == count and not text.words[row, :, count:].any()
    assert text.mask[8].sum() == 1


def test_the_encoder_is_saved_without_the_pictures_side(tokenizer, tmp_path):
    config = VSEConfig(num_text_tokens=tokenizer.vocab_size, text_length=LENGTH, image_dim=9, **{**TINY, "trunk": None})
    encoder = VSETextEncoder(VSE(config), tokenizer)
    encoder.save(tmp_path)
    again = load_text_encoder(str(tmp_path))
    assert count(again) == count(encoder.model.text)
    for found, expected in zip(again(CAPTIONS), encoder(CAPTIONS), strict=True):
        assert torch.equal(found, expected)


# -- word vectors

def words_of(tokenizer) -> dict[int, str]:
    return {index: tokenizer.decode([index]) for index in range(tokenizer.vocab_size)}


def test_word_vectors_are_read_by_word(tokenizer, tmp_path):
    (tmp_path / "w.vec").write_text("2 3\na 1 2 3\nnobody's 4 5 6\n", encoding="utf-8")
    vectors = read_word_vectors(tmp_path / "w.vec", tokenizer, 3)
    assert vectors.shape == (tokenizer.vocab_size, 3)
    for index, word in words_of(tokenizer).items():
        assert vectors[index].tolist() == ([1, 2, 3] if word == "a" else [0, 0, 0])
    assert vectors.any()


@pytest.mark.parametrize(("text", "said"), [
    ("a 1 2\n", "cannot be read as vectors of 3 numbers"), ("a 1 2 x\n", "cannot be read"),
    ("nobody's 1 2 3\n", "none of the .* words"), (None, "cannot be read")])
def test_word_vectors_that_do_not_fit_are_one_line(text, said, tokenizer, tmp_path):
    if text is not None:
        (tmp_path / "w.vec").write_text(text)
    with pytest.raises(UserError, match=said) as error:
        read_word_vectors(tmp_path / "w.vec", tokenizer, 3)
    assert "\n" not in str(error.value)


# -- training

def settings(workshop, **changes) -> dict:
    data = workshop.folder / "data"
    return {"task": "vse", "name": "vse", "model": TINY, "optimizer": {"lr": 0.01},
            "data": {"train": str(data / "train"), "validation": str(data / "validation"), "image_size": 16,
                     "tokenizer": str(data / "tokenizer"), "text_length": LENGTH, "workers": 0},
            "train": {"steps": 4, "batch_size": 8, "precision": "fp32", "log_every": 1, "validate_every": 4,
                      "save_every": 2},
            **changes}


def make_task(workshop, **changes) -> VSETask:
    torch.manual_seed(0)
    return VSETask(VSERun(**settings(workshop, **changes)))


def make_batch() -> dict:
    return {"image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), "class_id": torch.zeros(8).long(),
            "text": torch.randint(1, 250, (8, LENGTH)) * (torch.arange(LENGTH) < torch.arange(3, 11)[:, None])}


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_it_learns(kind, workshop):
    task, batch = make_task(workshop, loss={"hinges": kind}), make_batch()
    networks, losses = BareNetworks(task), []
    optimizer = build_optimizer(task.model, task.config.optimizer)
    for step in range(60):
        loss = task.rank(networks, task.prepare(batch, networks, step), step)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.3 * losses[0]


def test_recall_is_measured_in_whole_pools(workshop):
    task = make_task(workshop)
    batch = {name: torch.cat([value] * 8) for name, value in make_batch().items()}
    figures = task.validate(BareNetworks(task), [batch])
    assert set(figures) == {"recall@1_in_64", "recall@5_in_64"}


def test_given_vectors_do_not_move(workshop, tmp_path):
    (tmp_path / "w.vec").write_text("a 1 2 3 4 5\n")
    task, batch = make_task(workshop, word_vectors=str(tmp_path / "w.vec")), make_batch()
    networks, before = BareNetworks(task), task.model.text.words.weight.clone()
    assert before.any()
    optimizer = build_optimizer(task.model, task.config.optimizer)
    task.rank(networks, task.prepare(batch, networks, 0), 0).total.backward()
    optimizer.step()
    assert torch.equal(task.model.text.words.weight, before)
    assert all(parameter.grad is not None for parameter in task.model.text.gru.parameters())


def gradients_on_rank(rank: int, tasks: dict[str, VSETask], batch: dict) -> dict[str, dict]:
    return {kind: gradients(task, {name: value[rank::2] for name, value in batch.items()}, rank, 2)
            for kind, task in tasks.items()}


def gradients(task: VSETask, batch: dict, rank: int = 0, world_size: int = 1) -> dict[str, torch.Tensor]:
    """The loss, and the gradients as an engine averages them."""
    networks = BareNetworks(task)
    networks.rank, networks.world_size = rank, world_size
    loss = task.rank(networks, task.prepare(batch, networks, 0), 0).total
    loss.backward()
    found = {name: parameter.grad for name, parameter in trained(task.model).items()}
    if world_size > 1:
        for gradient in found.values():
            dist.all_reduce(gradient)
            gradient /= world_size
    return {**found, "loss": loss.detach()}


def test_two_processes_are_one(workshop, two_ranks):
    tasks, batch = {kind: make_task(workshop, loss={"hinges": kind}) for kind in ("sum", "max")}, make_batch()
    ranks = two_ranks(gradients_on_rank, tasks, batch)
    for kind, task in tasks.items():
        expected = gradients(task, batch)
        for found in ranks:
            assert found[kind].keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(found[kind][name], value, atol=1e-5, rtol=1e-5)


def test_the_exported_run_is_a_text_encoder(workshop, commands, tmp_path):
    path = tmp_path / "vse.yaml"
    path.write_text(yaml.safe_dump({**settings(workshop), "output": str(tmp_path)}))
    assert commands["train"](path) == 0
    assert load_text_encoder(str(tmp_path / "vse"))(CAPTIONS).sentence.shape == (8, 8)
    model = VSE.from_pretrained(tmp_path / "vse" / "model")
    assert model.embed_images(torch.zeros(2, 3, 16, 16)).shape == (2, 8)


@pytest.mark.parametrize(("section", "changes", "said"), [
    ("model", {"trunk": None}, "name a trunk for the pictures"),
    ("data", {"tokenizer": None}, "set data.tokenizer"),
    ("data", {"images": False}, "set data.images to true"),
    ("train", {"batch_size": 1}, "set train.batch_size to 2 or more"),
])
def test_what_does_not_fit_is_named(section, changes, said, workshop):
    whole = settings(workshop)
    with pytest.raises(ValidationError, match=said):
        VSERun(**{**whole, section: {**whole[section], **changes}})


def test_the_papers_config_has_the_papers_numbers():
    config = load_config(ROOT / "configs" / "gans" / "vse.yaml", [], {"vse": VSERun})
    model, optimizer = config.model, config.optimizer
    assert (model.trunk, model.word_dim, model.hidden_dim) == ("vgg16", 300, 300)
    assert (config.data.text_length, config.train.batch_size, config.loss.margin) == (50, 64, 0.2)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (2e-4, (0.9, 0.999), 0, 0)
    assert round(config.train.steps * 64 / 8855) == 300
