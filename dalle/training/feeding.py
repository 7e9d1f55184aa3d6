"""The batches of a run, in the reading order, without those that are left out."""

from collections.abc import Callable, Iterator

from dalle.data.batch import Batch, BatchSource
from dalle.training.guards import BatchNumbers


class Feed:
    """What ``train_loader(number)`` gives from the batch of that number on, a batch a step."""

    def __init__(self, train_loader: Callable[[int], BatchSource]):
        self._train_loader = train_loader
        self.source = BatchSource()                    # none, until :meth:`open`
        self._batches: Iterator[Batch] = iter(())
        self._next_number = 0

    def open(self, step: int, numbers: BatchNumbers) -> None:
        """Begin at the batch that ``step`` takes."""
        self._next_number = numbers.of(step)
        self.source = self._train_loader(self._next_number)
        self._batches = iter(self.source)

    def next(self, step: int, numbers: BatchNumbers) -> Batch:
        """The batch of ``step``; steps come in their order."""
        wanted = numbers.of(step)
        while True:
            batch, number = next(self._batches), self._next_number
            self._next_number += 1
            if number == wanted:
                return batch

    def close(self) -> None:
        self.source.close()
