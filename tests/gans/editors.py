"""What the tests of systems that edit share: a text encoder that is drawn, tiny tasks and a batch."""

import pytest
import torch
from bare import BareNetworks

import gans
from dalle.tasks import RUNS, TASKS
from dalle.training.task import Task
from gans.text import Text

gans.register()
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


def build(monkeypatch: pytest.MonkeyPatch, name: str, **sections: dict) -> tuple[Task, BareNetworks]:
    """The task of the system ``name`` with these sections of its config, and its networks."""
    monkeypatch.setattr("gans.task.load_text_encoder", lambda encoder: Encoder())
    torch.manual_seed(0)
    settings = {"name": "t", "text_encoder": "none", "data": {"train": "none", "image_size": SIDE}, **sections}
    task = TASKS[name](RUNS[name].model_validate(settings))
    return task, BareNetworks(task)


def batch_of():
    source = torch.Generator().manual_seed(0)
    return {"image": torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=source),
            "class_id": torch.arange(BATCH), "caption": ["a", "bb", "ccc", "dddd"]}


def same_text(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
