"""The tasks of the systems that edit: what a step is made of, which player each loss moves, how a run shows itself."""

import math

import pytest
import torch
from bare import BareNetworks

from gans import sisgan, tagan
from gans.editing import EditingTask
from gans.text import Text

SIDE, BATCH, WORDS = 32, 4, 5


class Encoder(torch.nn.Module):
    """Every caption a row of numbers of its own, as many words as the caption has letters."""

    sentence_dim = word_dim = 6
    text_length = WORDS

    def forward(self, captions):
        rows = [torch.Generator().manual_seed(sum(map(ord, caption))) for caption in captions]
        mask = torch.arange(WORDS) < torch.tensor([min(len(caption), WORDS) for caption in captions])[:, None]
        words = torch.stack([torch.randn(6, WORDS, generator=row) for row in rows]) * mask[:, None]
        return Text(words.sum(dim=2), words, mask)


def settings(**sections):
    return {"name": "t", "text_encoder": "none", "data": {"train": "none", "image_size": SIDE}, **sections}


def build(monkeypatch, module, run, task, **sections):
    monkeypatch.setattr(module, "load_encoder", lambda config: Encoder())
    torch.manual_seed(0)
    built = task(run.model_validate(settings(**sections)))
    return built, BareNetworks(built)


@pytest.fixture(params=["sisgan", "tagan"])
def editor(request, monkeypatch):
    if request.param == "sisgan":
        return build(monkeypatch, sisgan, sisgan.SISGANRun, sisgan.SISGANTask,
                     generator={"encoder": "plain", "channels": 4, "residual_blocks": 1},
                     discriminator={"channels": 4, "text_dim": 3})
    return build(monkeypatch, tagan, tagan.TAGANRun, tagan.TAGANTask,
                 generator={"channels": 2, "hidden": 4, "residual_blocks": 1},
                 discriminator={"channels": 2, "hidden": 4})


def batch_of():
    source = torch.Generator().manual_seed(0)
    return {"image": torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=source),
            "class_id": torch.arange(BATCH), "caption": ["a", "bb", "ccc", "dddd"]}


def same_text(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_sizes_follow_from_the_data_and_the_text_encoder(editor):
    task, _ = editor
    assert task.network.config.image_size == SIDE
    assert getattr(task.network.config, "sentence_dim", None) == 6 or task.network.config.word_dim == 6
    assert task.network.edits and isinstance(task, EditingTask)


def test_each_loss_moves_its_own_player_alone(editor):
    task, networks = editor
    prepared = task.prepare(batch_of(), networks, 3)
    generator, discriminator = (task.players[name].module for name in ("generator", "discriminator"))
    task.d_loss(networks, prepared, 3).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.zero_grad(set_to_none=True)
    discriminator.requires_grad_(False)
    task.g_loss(networks, prepared, 3).total.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    assert all(parameter.grad is None for parameter in discriminator.parameters())


def test_real_scores_are_those_of_pictures_with_their_own_text(editor):
    task, networks = editor
    prepared = task.prepare(batch_of(), networks, 0)
    image = prepared["image"].clone().requires_grad_(True)
    scores = task.real_scores(networks["discriminator"], prepared, image)
    assert all(score.shape == (BATCH,) for score in scores)
    (gradient,) = torch.autograd.grad(sum(score.sum() for score in scores), image)
    assert gradient.abs().sum() > 0


def test_sisgan_s_step(monkeypatch):
    task, networks = build(monkeypatch, sisgan, sisgan.SISGANRun, sisgan.SISGANTask,
                           generator={"encoder": "plain", "channels": 4, "residual_blocks": 0},
                           discriminator={"channels": 4, "text_dim": 3})
    prepared = task.prepare(batch_of(), networks, 0)
    encoder = Encoder()
    assert same_text(prepared["wrong_text"], encoder(["bb", "ccc", "dddd", "a"]))
    assert same_text(prepared["relevant_text"], encoder(["bb", "a", "ccc", "dddd"]))
    assert not torch.equal(prepared["noise"]["eps"], prepared["noise_g"]["eps"])
    for parameter in task.players["discriminator"].module.parameters():
        parameter.data.zero_()
    assert task.d_loss(networks, prepared, 0).total.item() == pytest.approx(2 * math.log(2))
    found = task.g_loss(networks, prepared, 0)
    assert found.total.item() == pytest.approx(math.log(2) + found.parts["kl"].item())


def test_tagan_s_step(monkeypatch):
    task, networks = build(monkeypatch, tagan, tagan.TAGANRun, tagan.TAGANTask,
                           generator={"channels": 2, "hidden": 4, "residual_blocks": 0},
                           discriminator={"channels": 2, "hidden": 4})
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


def test_a_preview_shows_the_sources_above_what_becomes_of_them(editor, monkeypatch):
    task, networks = editor
    sources = batch_of()["image"][:3]
    monkeypatch.setattr(task, "preview_sources", lambda: sources)
    grid = task.preview(networks, 0)["samples"]
    captions = task.config.preview.captions
    side = SIDE + 2
    assert grid.shape == (3, 2 + side * (1 + len(captions)), 2 + side * 3) and grid.dtype == torch.uint8
    assert torch.equal(grid[:, 2:2 + SIDE, 2:2 + SIDE], sources[0])
    edited = task.generator(networks).generate([captions[1]], [2], sources=sources[2:])
    row, column = 2 + 2 * side, 2 + 2 * side
    assert torch.equal(grid[:, row:row + SIDE, column:column + SIDE], edited[0])
