"""What a loader gives: batches, each a dict with declared keys, and the little that a run wants to know beside them."""

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypedDict

from torch import Tensor

from dalle.data.reasons import Tally

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Batch(TypedDict, total=False):
    """b samples; what is not configured is absent. A task's ``prepare`` adds keys, which a subclass declares."""

    key: list[str]
    position: Tensor                # int64 [b]: places in the reading order
    image: Tensor                   # uint8 [b, 3, S, S]; [b, views, 3, S, S] where several crops are made of each
    valid: Tensor                   # bool [b], of such crops alone: False where the picture cannot be decoded
    caption: list[str]
    captions: list[list[str]]       # data.num_captions of each sample, where that is above 1
    text: Tensor                    # int64 [b, T] token ids; 0: unfilled, all 0: the caption was dropped
    codes: Tensor                   # int64 [b, N]: cached codes of the pictures
    class_id: Tensor                # int64 [b]; -1: none
    boxes: Tensor                   # float32 [b, n, 4], data.places: x, y, width, height in shares of the image
    keypoints: Tensor               # float32 [b, n, 3], data.places: x, y in shares of the image, 1; all 0: not seen
    meta: list[dict[str, Any]]      # the samples' JSON, in validation alone


class Fetched(Batch, total=False):
    """A batch as it comes from a worker, with what the loader takes out of it and accounts for."""

    skipped: Tally                  # samples left out
    partly_used: Tally              # samples of which a part is not used
    read: int                       # samples looked at, where that is not the batch's size
    error: str                      # a UserError's message, in place of a batch
    pack: Tensor                    # uint8, and the places of the tensors in it: dalle.data.packing
    places: list[Any]


class BatchSource:
    """An iterable of batches, and what a run notes of it; a source that has nothing to say leaves it at this."""

    identity: Mapping[str, Any] = NOTHING          # what must be the same data at a resume
    skipped: Mapping[str, int] = NOTHING           # samples left out so far, by reason
    partly_used: Mapping[str, int] = NOTHING       # samples of which a part was not used so far, by reason

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def report(self) -> list[str]:
        """A line for each reason why samples were left out or used in part so far."""
        return []

    def close(self) -> None:
        """End what works in the background."""
