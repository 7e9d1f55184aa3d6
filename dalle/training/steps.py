"""How far a run is, in optimiser steps: one object that all parts of the run read and the loop alone advances."""

from dalle.training.settings import TrainConfig


class Steps:
    """``done`` of ``last``, where this start ends, and of ``total``, where the run is finished."""

    def __init__(self, config: TrainConfig, stop_after: int | None = None):
        self.done = 0
        self.total, self.last = config.steps, min(stop_after or config.steps, config.steps)
        self._batch_size = config.batch_size

    @property
    def samples(self) -> int:
        return self.done * self._batch_size

    def due(self, every: int) -> bool:
        """At every multiple of ``every``, and after the last step of the run; never for 0."""
        return every > 0 and (self.done % every == 0 or self.done == self.total)
