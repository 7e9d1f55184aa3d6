"""The tasks of the systems that edit, found by the table: which player each loss moves, how a run shows itself.

Each is built from the tiny sections that its own test file names ``EDITOR``.
"""

import pytest
import torch
from editors import BATCH, SIDE, batch_of, build
from published import file_of

import gans
from dalle.tasks import TASKS
from gans import SYSTEMS
from gans.editing import EditingTask

gans.register()
EDITING = [name for name in SYSTEMS if issubclass(TASKS[name], EditingTask)]


@pytest.fixture(params=EDITING)
def editor(request, monkeypatch):
    return build(monkeypatch, request.param, **file_of(SYSTEMS[request.param].module).EDITOR)


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
