"""Counts the bytes of the tensors that are alive, operation by operation."""

import weakref
from collections.abc import Iterable

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """``peak``: the most bytes of storages that were alive at once after an operation, those ``from_the_start`` and
    those that operations made meanwhile."""

    def __init__(self, from_the_start: Iterable[Tensor] = ()):
        super().__init__()
        self.storages: dict[int, weakref.ref] = {}
        self.peak = 0
        self.note(from_the_start)

    def note(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            tensor = getattr(tensor, "_local_tensor", tensor)
            storage = tensor.untyped_storage()
            self.storages[storage._cdata] = weakref.ref(storage)

    @property
    def now(self) -> int:
        alive = {key: storage() for key, storage in self.storages.items()}
        self.storages = {key: self.storages[key] for key, storage in alive.items() if storage is not None}
        return sum(storage.nbytes() for storage in alive.values() if storage is not None)

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        self.note(leaf for leaf in tree_leaves((arguments, named, result))
                  if isinstance(leaf, Tensor) and leaf.device.type == "cpu")
        self.peak = max(self.peak, self.now)
        return result
