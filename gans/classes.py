"""Classes of ``class_id``: what a prompt names, which class a caption is nearest to, and which ids a model has.

``class:12`` in place of a caption is class 12 itself. A caption is of the class whose prototype, the mean sentence
vector of the captions seen with the class, has the highest cosine with it: the zero-shot rule of DS-SJE (arXiv
1605.05395).
"""

import re
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.errors import UserError
from gans.layers import one_hot

LITERAL = re.compile(r"\s*class:\s*(\d+)\s*")      # a prompt that names a class


class ClassPrototypes(nn.Module):
    """The mean sentence vector of each class's captions, [K, D], and of how many it is the mean, [K]."""

    def __init__(self, num_classes: int, dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, dim))
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))

    @torch.no_grad()
    def add(self, sentence: Tensor, class_id: Tensor) -> None:
        """Take [B, D] of captions whose pictures are of the classes [B] into the means."""
        with torch.autocast(sentence.device.type, enabled=False):
            # a product, not index_add_, whose order of summation differs from call to call on a GPU
            members = one_hot(class_id, len(self.count), torch.float32).T               # [K, B]
            added = members.sum(dim=1)
            self.count += added.long()
            difference = members @ sentence.float() - added[:, None] * self.mean
            self.mean += difference / self.count.clamp(min=1)[:, None]

    def nearest(self, sentence: Tensor) -> Tensor:
        """[B, D] -> the class of highest cosine among those seen, int64 [B]."""
        with torch.autocast(sentence.device.type, enabled=False):
            cosines = F.normalize(sentence.float(), dim=1) @ F.normalize(self.mean.float(), dim=1).T    # [B, K]
        return cosines.masked_fill(self.count == 0, -torch.inf).argmax(dim=1)


def named_classes(prompts: Sequence[str], num_classes: int) -> Tensor:
    """The class that each prompt of the form ``class:12`` names, -1 for captions; int64 [N]."""
    found = [LITERAL.fullmatch(prompt) for prompt in prompts]
    named = [int(match[1]) if match else -1 for match in found]
    if max(named, default=-1) >= num_classes:
        raise UserError(f"class:{max(named)} is out of range: this model has the classes 0 to {num_classes - 1}")
    return torch.tensor(named, dtype=torch.int64)


def class_accuracy(classes: Tensor, class_id: Tensor) -> Tensor:
    """The share of [B, K] whose highest logit is at ``class_id`` [B]."""
    return (classes.detach().argmax(dim=1) == class_id).float().mean()


class ClassCheck:
    """Refuses classes that the model does not have. On an accelerator a step late: no step waits for the device."""

    def __init__(self, task: str, key: str, num_classes: int):
        self.task, self.key, self.num_classes = task, key, num_classes
        self._copied: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, class_id: Tensor) -> Tensor:
        """Class ids of the whole batch [B] -> the same, none of them out of range."""
        if class_id.device.type != "cuda":
            self._refuse(class_id)
            return class_id
        if self._copied is not None:
            values, arrived = self._copied
            arrived.synchronize()
            self._refuse(values)
        values = torch.empty(class_id.shape, dtype=class_id.dtype, pin_memory=True)
        self._copied = values.copy_(class_id, non_blocking=True), torch.cuda.current_stream().record_event()
        return class_id.clamp(0, self.num_classes - 1)      # an index out of range would end the process

    def _refuse(self, class_id: Tensor) -> None:
        lowest, highest = int(class_id.min()), int(class_id.max())
        if lowest < 0:
            raise UserError(f"data.train: a sample has no class, and {self.task} needs that of each: write class_id "
                            "into the samples' JSON, or train a system that needs none")
        if highest >= self.num_classes:
            raise UserError(f"data.train: a sample is of class {highest}, but {self.key} is {self.num_classes}: set it "
                            f"to the number of classes, {highest + 1} or more")
