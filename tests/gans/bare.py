"""What several systems' tests share: networks without an engine, text without an encoder, weights that are alike."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.training.task import detached
from gans.text import Text

CAPTIONS = ["a red circle", "a blue square above a green star", "two pink rings", "a red circle on black",
            "a small cyan cross", "a large red square", "a ring", "a grey triangle at the top"]


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


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def make_constant(network: nn.Module) -> None:
    """Every weight 1 over its fan-in, so that all channels of a map are the same."""
    for part in network.modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            nn.init.constant_(part.weight, 1 / part.weight[0].numel())
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)


def mean_of(x: Tensor, size: int, stride: int = 1, padding: int = 0) -> Tensor:
    """[B, 1, H, W]: what a convolution with weights 1 / fan-in makes of equal channels."""
    return F.conv2d(x, torch.full((1, 1, size, size), 1 / size ** 2, dtype=x.dtype), stride=stride, padding=padding)
