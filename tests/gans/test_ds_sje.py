"""DS-SJE: the paper's sizes and lengths, the authors' recurrences and loss by hand, zero-shot figures, training."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from bare import CAPTIONS, BareNetworks, count, trained
from published import Published
from pydantic import ValidationError
from torch import nn

from dalle.config import load_config
from dalle.errors import UserError
from dalle.training.optimizers import build_optimizer
from gans import ds_sje
from gans.ds_sje import (
    ALPHABET,
    DSSJE,
    CharCNNRNN,
    DSSJEConfig,
    DSSJERun,
    DSSJETask,
    DSSJETextEncoder,
    GatedRNN,
    ReluRNN,
    character_ids,
    class_vectors,
    classified,
    precision_at,
    structured_hinge,
    time_steps,
)
from gans.text import load_text_encoder
from gans.trunks import build_trunk

PUBLISHED = {"ds_sje": Published(one_caption=True)}
DOUBLES = {
    ds_sje.structured_hinge: (((3, 3),), ds_sje.structured_hinge),
}

ROOT = Path(__file__).resolve().parents[2]
TINY = {"trunk": "small:2", "image_map": True, "char_length": 90, "conv_channels": (6, 7), "recurrent_dim": 5,
        "embed_dim": 8, "init_range": None}
pytestmark = pytest.mark.usefixtures("seeded")


# -- the network

@pytest.mark.parametrize(("settings", "expected"), [
    ({}, 1_814_144), ({"recurrent_dim": 512}, 2_994_560), ({"recurrent_dim": 512, "recurrent": "gru"}, 4_045_184)])
def test_the_papers_sizes_have_the_papers_parameters(settings, expected):
    assert count(CharCNNRNN(DSSJEConfig(**settings))) == expected


@pytest.mark.parametrize(("recurrent", "steps"), [("rnn", 8), ("gru", 18)])
def test_the_lengths_between_the_layers(recurrent, steps):
    network = CharCNNRNN(DSSJEConfig(conv_channels=(3, 3), recurrent_dim=3, recurrent=recurrent))
    lengths, signal = [], torch.zeros(1, 70, 201)
    for layer in network.convolutions:
        signal = layer(signal)
        if not isinstance(layer, nn.Threshold):
            lengths.append(signal.shape[2])
    assert lengths == [198, 66, 63, 21, 18, 8][: 6 if recurrent == "rnn" else 5]
    assert network(torch.zeros(2, 201, dtype=torch.int64))[1].shape == (2, steps, 3)
    assert time_steps(201, recurrent == "rnn") == steps


def test_the_alphabet_and_its_double():
    assert len(ALPHABET) == 70 and len(set(ALPHABET)) == 69
    ids = character_ids(["a-Z", " é9", ""], 5)
    assert ids.tolist() == [[1, 60, 26, 0, 0], [70, 0, 36, 0, 0], [0] * 5]


def test_what_lies_behind_the_last_place_has_no_effect():
    text = "abcdefghij" * 20 + "k"
    assert torch.equal(character_ids([text + "xyz"], 201), character_ids([text], 201))
    assert not torch.equal(character_ids([text[:-1] + "z"], 201), character_ids([text], 201))


def test_unknown_characters_are_columns_of_zeros():
    network = CharCNNRNN(DSSJEConfig(**TINY))
    known, unknown = network(character_ids(["a b"], 90))[0], network(character_ids(["a b" + "é" * 9], 90))[0]
    assert torch.equal(known, unknown)


def test_the_plain_recurrence_by_hand():
    network, steps = ReluRNN(3), torch.randn(2, 4, 3)
    hidden = F.relu(F.linear(steps[:, 0], network.inputs.weight, network.inputs.bias))       # no b_h at the first step
    expected = [hidden]
    for step in range(1, 4):
        hidden = F.relu(network.inputs(steps[:, step]) + hidden @ network.states.weight.T + network.states.bias)
        expected.append(hidden)
    torch.testing.assert_close(network(steps), torch.stack(expected, dim=1), atol=2e-6, rtol=1e-5)


def test_the_gated_recurrence_by_hand():
    network, steps = GatedRNN(3), torch.randn(2, 4, 3)
    (wu, wr, wc), (bu, br, bc) = network.inputs.weight.chunk(3), network.inputs.bias.chunk(3)
    (vu, vr), (au, ar) = network.gates.weight.chunk(2), network.gates.bias.chunk(2)
    hidden = torch.tanh(steps[:, 0] @ wc.T + bc)
    expected = [hidden]
    for step in range(1, 4):
        seen = steps[:, step]
        update = torch.sigmoid(seen @ wu.T + bu + hidden @ vu.T + au)
        reset = torch.sigmoid(seen @ wr.T + br + hidden @ vr.T + ar)
        new = torch.tanh(seen @ wc.T + bc + (reset * hidden) @ network.candidate.weight.T + network.candidate.bias)
        hidden = update * new + (1 - update) * hidden
        expected.append(hidden)
    torch.testing.assert_close(network(steps), torch.stack(expected, dim=1))


@pytest.mark.parametrize("over_time", ["mean", "last"])
def test_pooling_over_time(over_time):
    network = CharCNNRNN(DSSJEConfig(**TINY, over_time=over_time))
    embedding, hidden = network(character_ids(CAPTIONS, 90))
    pooled = hidden.mean(dim=1) if over_time == "mean" else hidden[:, -1]
    torch.testing.assert_close(embedding, pooled @ network.output.weight.T + network.output.bias)


def test_weights_start_uniform():
    network = DSSJE(DSSJEConfig())
    weights = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    assert float(weights.abs().max()) <= 0.08
    assert float(weights.std()) == pytest.approx(0.08 / math.sqrt(3), rel=0.01)


def test_a_length_that_leaves_nothing_is_refused():
    with pytest.raises(ValidationError, match="char_length 40 leaves nothing"):
        DSSJEConfig(char_length=40)
    DSSJEConfig(char_length=70)


# -- the loss

def loop(scores, classes, symmetric):
    count, total, scores = len(scores), 0.0, scores.detach()
    for i in range(count):
        for j in range(count):
            if i == j or (classes[i] == classes[j] and classes[i] >= 0):
                continue
            total += max(0.0, 1 + float(scores[i, j]) - float(scores[i, i]))
            if symmetric:
                total += max(0.0, 1 + float(scores[j, i]) - float(scores[i, i]))
    return total / count**2


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 4], [0, 1, 0, 1, 1], [-1, -1, 2, 2, -1]])
def test_the_loss_agrees_with_a_loop_written_out(symmetric, classes):
    scores = torch.randn(5, 5)
    found = structured_hinge(scores, torch.tensor(classes), symmetric)
    assert float(found) == pytest.approx(loop(scores, classes, symmetric), rel=1e-5)


def test_features_of_zero_cost_the_margin_for_every_pair():
    scores = torch.zeros(40, 40)
    assert float(structured_hinge(scores)) == pytest.approx(2 * 39 / 40) == pytest.approx(1.95)
    assert float(structured_hinge(scores, symmetric=False)) == pytest.approx(39 / 40)


def test_larger_text_vectors_never_cost_more_once_every_pair_leads():
    pictures, texts = torch.eye(6), torch.eye(6) + 0.1 * torch.rand(6, 6)
    losses = [float(structured_hinge(pictures @ (scale * texts).T)) for scale in (0.1, 0.5, 1.0, 1.05, 2.0)]
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0 < losses[0]


def test_the_loss_does_not_depend_on_the_order():
    pictures, texts, order = torch.randn(7, 4), torch.randn(7, 4), torch.randperm(7)
    classes = torch.tensor([0, 1, 1, 2, -1, -1, 0])
    torch.testing.assert_close(structured_hinge(pictures[order] @ texts[order].T, classes[order]),
                               structured_hinge(pictures @ texts.T, classes))


# -- zero-shot classification and retrieval

def test_classes_are_known_by_their_mean_caption():
    texts = torch.tensor([[4.0, 0], [0, 2], [2, 0], [0, 4]])
    present, vectors = class_vectors(texts, torch.tensor([7, 3, 7, 3]))
    assert present.tolist() == [3, 7] and vectors.tolist() == [[0, 3], [3, 0]]
    pictures = torch.tensor([[1.0, 0.5], [0.1, 0.2], [-1, -2]])
    assert classified(pictures, present, vectors).tolist() == [7, 3, 7]


def test_precision_counts_the_class_among_the_first():
    pictures = torch.tensor([[5.0, 0], [4, 9], [3, 8], [2, 7], [0, 1]])
    classes, vectors = torch.tensor([0, 1, 0, 1, 1]), torch.eye(2)
    assert precision_at(pictures, classes, torch.tensor([0, 1]), vectors, depth=3).tolist() == pytest.approx(
        [2 / 3, 2 / 3])                                # first by column 0: 0, 1, 2; by column 1: 1, 2, 3
    assert precision_at(pictures, classes, torch.tensor([0, 1]), vectors, depth=50).tolist() == pytest.approx([.4, .6])


# -- the text encoder

@pytest.mark.parametrize(("recurrent", "stride"), [("rnn", 18), ("gru", 9)])
def test_the_encoder_gives_the_embedding_and_the_states_within_the_text(recurrent, stride, tmp_path):
    model = DSSJE(DSSJEConfig(**{**TINY, "recurrent": recurrent, "trunk": None, "image_map": False}))
    model.save_pretrained(tmp_path)
    encoder = load_text_encoder(str(tmp_path))
    captions = [*CAPTIONS, "", "x" * 300]
    text = encoder(captions)
    embedding, hidden = model.text(character_ids(captions, 90))
    torch.testing.assert_close(text.sentence, embedding.detach())
    assert (encoder.sentence_dim, encoder.word_dim, encoder.text_length) == (8, 5, hidden.shape[1])
    for row, caption in enumerate(captions):
        for step in range(encoder.text_length):
            inside = step * stride < len(caption) or step == 0
            assert bool(text.mask[row, step]) == inside
            expected = hidden[row, step].detach() if inside else torch.zeros(5)
            torch.testing.assert_close(text.words[row, :, step], expected)
    assert not text.sentence.requires_grad
    assert encoder.warnings(captions)[0].endswith("has 300 characters, this model reads 90: the first 90 are kept")
    assert encoder.warnings(["a Größe ?", "a {b}"]) == [
        'the prompt "a Größe ?" has characters that this model does not know, all the same to it: ö ß']


def test_the_encoder_is_saved_without_the_pictures_side(tmp_path):
    model = DSSJE(DSSJEConfig(**TINY, image_dim=build_trunk("small:2").pooled_dim)).eval()
    encoder = DSSJETextEncoder(model)
    encoder.save(tmp_path)
    again = load_text_encoder(str(tmp_path))
    for found, expected in zip(again(CAPTIONS), encoder(CAPTIONS), strict=True):
        assert torch.equal(found, expected)
    assert count(again) == count(model.text)


# -- training

def settings(workshop, **changes) -> dict:
    data = workshop.folder / "data"
    return {"task": "ds_sje", "name": "ds_sje", "model": TINY, "optimizer": {"lr": 0.01},
            "data": {"train": str(data / "train"), "validation": str(data / "validation"), "image_size": 16,
                     "workers": 0},
            "train": {"steps": 4, "batch_size": 8, "precision": "fp32", "log_every": 1, "validate_every": 4,
                      "save_every": 2},
            **changes}


class StandInTrunk(nn.Module):
    """A frozen trunk of one layer."""

    local_dim, pooled_dim, trained = 3, 8, False

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 8)

    def forward(self, images):
        return images, self.layer(images.mean(dim=(2, 3)))


def make_task(workshop, **changes) -> DSSJETask:
    torch.manual_seed(0)
    return DSSJETask(DSSJERun(**settings(workshop, **changes)))


def make_batch() -> dict:
    return {"image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), "caption": CAPTIONS,
            "captions": [[caption, caption[::-1]] for caption in CAPTIONS],
            "class_id": torch.tensor([0, 1, 2, 0, 3, 4, -1, -1])}


def test_it_learns_and_reads_what_it_was_shown(workshop):
    task = make_task(workshop, model={**TINY, "recurrent_dim": 32, "embed_dim": 32}, optimizer={"lr": 1e-3})
    networks, batch = BareNetworks(task), make_batch()
    optimizer = build_optimizer(task.model, task.config.optimizer)
    losses = []
    for step in range(200):
        loss = task.compare(networks, task.prepare(batch, networks, step), step)
        loss.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.total.detach()))
    assert losses[-1] < 0.3 * losses[0]
    figures = task.validate(networks, [batch])
    assert figures["zero_shot_accuracy"].value > 0.4 and 0 < figures["ap@50"].value <= 1       # chance is 0.2


def frozen_task(workshop, monkeypatch, **model) -> DSSJETask:
    monkeypatch.setattr("gans.joint.build_trunk", lambda spec, load=True: StandInTrunk().requires_grad_(False))
    return make_task(workshop, model={**TINY, "trunk": "googlenet", "image_map": False, **model})


def test_no_gradient_reaches_what_makes_the_pictures_features(workshop, monkeypatch, tmp_path):
    task = frozen_task(workshop, monkeypatch)
    networks, batch = BareNetworks(task), make_batch()
    prepared = task.prepare(batch, networks, 0)
    assert prepared["pictures"].shape == (8, 8) and not prepared["pictures"].requires_grad
    task.compare(networks, prepared, 0).total.backward()
    assert all(parameter.grad is not None for parameter in task.model.parameters())
    assert all(parameter.grad is None for parameter in task.frozen["trunk"].parameters())
    assert count(task.model) == count(task.model.text)             # nothing of the pictures' side is trained
    task.export(str(tmp_path), {"ds_sje": task.model.state_dict()})
    pictures = batch["image"].float() / 127.5 - 1
    again = DSSJE.from_pretrained(tmp_path)
    torch.testing.assert_close(again.embed_images(pictures), prepared["pictures"])


def test_a_vector_of_another_length_needs_the_map(workshop, monkeypatch):
    with pytest.raises(ValueError, match="set image_map to true, or embed_dim to the same"):
        frozen_task(workshop, monkeypatch, embed_dim=9)
    assert frozen_task(workshop, monkeypatch, embed_dim=9, image_map=True).model.image.weight.shape == (9, 8)


def test_two_captions_of_a_picture_can_be_the_pair(workshop):
    task = make_task(workshop, loss={"pairs": "captions"}, model={**TINY, "trunk": None, "image_map": False},
                     data={**settings(workshop)["data"], "num_captions": 2})
    networks, batch = BareNetworks(task), make_batch()
    loss = task.compare(networks, task.prepare(batch, networks, 0), 0).total
    first, second = (task.model.embed_text(character_ids([pair[place] for pair in batch["captions"]], 90))
                     for place in (0, 1))
    expected = loop(second @ first.T, batch["class_id"].tolist(), symmetric=False)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert task.validate(networks, [batch]).keys() >= {"zero_shot_accuracy"}


def share_of(batch: dict, rank: int) -> dict:
    return {name: value[rank::2] for name, value in batch.items()}


def train_on_rank(rank: int, task: DSSJETask, batch: dict) -> dict:
    networks = BareNetworks(task)
    networks.rank, networks.world_size = rank, 2
    with torch.no_grad():
        prepared = task.prepare(share_of(batch, rank), networks, 0)
    loss = task.compare(networks, prepared, 0).total
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in trained(task.model).items()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
        gradient /= 2                       # as an engine does
    figures = task.validate(networks, [share_of(batch, rank)])
    return {"loss": loss.detach(), "gradients": gradients,
            "accuracy": figures["zero_shot_accuracy"].value}


def test_two_processes_are_one(workshop, two_ranks):
    task, batch = make_task(workshop), make_batch()
    networks = BareNetworks(task)
    ranks = two_ranks(train_on_rank, task, batch)
    loss = task.compare(networks, task.prepare(batch, networks, 0), 0).total
    loss.backward()
    for found in ranks:
        torch.testing.assert_close(found["loss"], loss.detach(), atol=1e-5, rtol=0)
        for name, parameter in trained(task.model).items():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, atol=1e-5, rtol=0)
        assert found["accuracy"] == pytest.approx(task.validate(networks, [batch])["zero_shot_accuracy"].value)


def test_the_exported_run_is_a_text_encoder(workshop, commands, tmp_path):
    path = tmp_path / "ds_sje.yaml"
    path.write_text(yaml.safe_dump({**settings(workshop), "model": {**TINY, "conv_channels": [6, 7]},
                                    "output": str(tmp_path)}))
    assert commands["train"](path) == 0
    encoder = load_text_encoder(str(tmp_path / "ds_sje"))
    assert encoder(CAPTIONS).sentence.shape == (8, 8)
    model = DSSJE.from_pretrained(tmp_path / "ds_sje" / "model")
    assert model.embed_images(torch.zeros(2, 3, 16, 16)).shape == (2, 8)


@pytest.mark.parametrize(("changes", "said"), [
    ({"loss": {"pairs": "captions"}}, "set data.num_captions to 2"),
    ({"model": {**TINY, "trunk": None}}, "name a trunk for the pictures"),
    ({"train": {"steps": 1, "batch_size": 1}}, "set train.batch_size to 2 or more"),
])
def test_what_does_not_fit_is_named(workshop, changes, said):
    with pytest.raises(ValidationError, match=said):
        DSSJERun(**settings(workshop, **changes))


def test_an_unknown_trunk_is_one_line(workshop):
    with pytest.raises(UserError, match="unknown trunk 'nothing'"):
        make_task(workshop, model={**TINY, "trunk": "nothing"})


def test_the_papers_config_has_the_papers_numbers():
    config = load_config(ROOT / "configs" / "gans" / "ds_sje.yaml", [], {"ds_sje": DSSJERun})
    model, optimizer = config.model, config.optimizer
    assert count(CharCNNRNN(model)) == 1_814_144 and model.trunk == "googlenet" and not model.image_map
    assert (config.train.batch_size, config.train.steps) == (40, 30_000)
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.clip) == (7e-4, (0, 0.99), 1e-8, 0)
    assert optimizer.factor(149, 30_000) == 1 and optimizer.factor(300, 30_000) == pytest.approx(0.98**2)


def test_the_optimiser_is_rmsprop_once_its_start_is_past():
    weight = {name: nn.Parameter(torch.ones(3)) for name in ("ours", "theirs")}
    config = settings_of_optimizer()
    ours = torch.optim.AdamW([weight["ours"]], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=0)
    theirs = torch.optim.RMSprop([weight["theirs"]], lr=config.lr, alpha=0.99, eps=1e-8)
    for step in range(1200):
        if step == 1000:
            weight["theirs"].data.copy_(weight["ours"].data)
        for name, optimizer in (("ours", ours), ("theirs", theirs)):
            weight[name].grad = torch.tensor([1.0, -2.0, 0.5]) * (1 + step % 3)
            optimizer.step()
    torch.testing.assert_close(weight["ours"], weight["theirs"], atol=1e-5, rtol=0)


def settings_of_optimizer():
    from gans.ds_sje import DSSJEOptimizer

    return DSSJEOptimizer()
