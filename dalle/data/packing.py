"""The tensors of a batch; on their way from a loader worker to the process that trains they are one.

Each tensor on that way is shared memory whose file descriptor is handed over a connection of its own: 0.3 ms of both
processes, whatever its size, and a page table for each. So a worker lays all of a batch side by side in one piece of
shared memory, and writes the pictures there at once; what pins memory copies one tensor.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from dalle.data.batch import Fetched

ALIGNMENT = 64               # bytes: whatever a tensor's type, it may begin there


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a pack. No tuple: what pins memory takes those apart."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int               # byte

    @property
    def end(self) -> int:
        return self.start + self.dtype.itemsize * math.prod(self.shape)

    def of(self, pack: Tensor) -> Tensor:
        return pack[self.start:self.end].view(self.dtype).view(self.shape)


def with_images(batch: Fetched, squares: Sequence[np.ndarray] | None, views: int | None = None) -> Fetched:
    """``batch`` with ``squares``, uint8 [S, S, 3] each, as its ``image``; in a loader worker packed.

    ``image`` is uint8 [b, 3, S, S], with ``views`` [b, views, 3, S, S].
    """
    images: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if squares is not None:
        rows = (len(squares),) if views is None else (len(squares) // views, views)
        images["image"] = torch.uint8, (*rows, 3, *squares[0].shape[:2])
    if get_worker_info() is None:
        for name, (dtype, shape) in images.items():
            batch[name] = torch.empty(shape, dtype=dtype)
            fill(batch[name], squares)
        return batch
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    places, end = [], 0
    for name, (dtype, shape) in {**images, **{name: (value.dtype, tuple(value.shape))
                                              for name, value in tensors.items()}}.items():
        places.append(Place(name, dtype, shape, -(-end // ALIGNMENT) * ALIGNMENT))
        end = places[-1].end
    # shared from the start, as torch's own collation does it: what is not would be copied on its way
    pack = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(end), 0, (end,))
    for place in places:
        if place.name in images:
            fill(place.of(pack), squares)
        else:
            place.of(pack).copy_(tensors[place.name])
    return {**{name: value for name, value in batch.items() if name not in tensors}, "pack": pack, "places": places}


def fill(images: Tensor, squares: Sequence[np.ndarray]) -> None:
    into = images.flatten(0, -4).numpy()
    for place, square in enumerate(squares):
        into[place] = square.transpose(2, 0, 1)


def unpacked(batch: Fetched) -> Fetched:
    """A batch as :func:`with_images` was given it, its tensors views of the pack."""
    if "pack" not in batch:
        return batch
    pack, places = batch.pop("pack"), batch.pop("places")
    batch.update({place.name: place.of(pack) for place in places})
    return batch
