"""Stand-ins that several systems' tests share: networks without an engine, and a text encoder that counts letters."""

import torch
from torch import Tensor, nn

from dalle.training.task import detached
from gans.text import Text


class BareNetworks:
    """What a task is given, without an engine: every network as it is; ``rank`` and ``world_size`` are only said."""

    def __init__(self, task, rank: int = 0, world_size: int = 1):
        self.modules = {**{name: player.module for name, player in task.players.items()}, **task.frozen}
        self.rank, self.world_size = rank, world_size

    def __getitem__(self, name: str) -> nn.Module:
        return self.modules[name]

    bare = penalty = __getitem__


def loss_of(task, name: str, networks, prepared: dict, step: int = 0):
    """The loss of the phase ``name`` of a prepared batch, with what the phases make ahead, as the loop asks for it."""
    batch = dict(prepared)
    for phase in task.phases:
        made = phase.make(networks, batch, step)
        batch |= made if phase.name == name else detached(made)
    return next(phase for phase in task.phases if phase.name == name).loss(networks, batch, step)


class LetterEncoder(nn.Module):
    """The sentence counts the caption's letters a to h; there is one word, and it is all ones."""

    sentence_dim, word_dim, text_length = 8, 1, 1

    def forward(self, captions) -> Text:
        return sentence_text(torch.tensor([[float(caption.count(letter)) for letter in "abcdefgh"]
                                           for caption in captions]))


def sentence_text(sentence: Tensor) -> Text:
    """[B, D] as the text of captions of one word."""
    return Text(sentence, torch.ones(len(sentence), 1, 1), torch.ones(len(sentence), 1, dtype=torch.bool))
