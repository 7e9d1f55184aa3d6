"""What all ranks do next, agreed on without waiting for one another."""

from collections.abc import Callable

from dalle.training.engines.base import Engine


class Agreement:
    """The largest over the ranks of each of a few small integers, asked for after one step and known after the next.

    The protocol, the same on every rank:

        step t            trained; then, with an answer that is known on all ranks: log, save, validation
        ask               at the very end of the step's turn, unless the run ends there: ``wishes()`` of now go out
        step t + 1        trained, while the answer comes together in the background
        answer            what was asked after step t; on it, and on nothing else, the ranks act alike

    So there is one question under way or none, a rank waits only for one that is more than a whole step behind, and
    what a rank wishes during step t takes effect on all of them after step t + 1. Between ``ask`` and ``answer`` lies
    nothing but the loader and the step: what the wishes say of a save that is being written still holds for it at the
    answer. The one exception is a rollback, which waits for that save and leaves the question under way until the step
    after it: the save is over by then, and what was said of it has no effect. The group is the agreement's own, so its
    order beside other collectives does not matter. A rank that dies breaks the answer, one that hangs delays it: the
    watchdog's time runs there as in the step.

    A process alone has nobody to wait for: it answers itself, with its wishes of the moment, after the same step.
    """

    def __init__(self, engine: Engine, wishes: Callable[[], tuple[int, ...]]):
        self._engine, self._wishes = engine, wishes
        self._answer: Callable[[], tuple[int, ...]] | None = None

    def ask(self) -> None:
        """Send this rank's wishes out; every rank must, and :meth:`answer` comes before the next time."""
        assert self._answer is None, "an answer was not read"
        if self._engine.world_size > 1:
            self._answer = self._engine.start_max(*self._wishes())

    def answer(self) -> tuple[int, ...] | None:
        """The largest of what the ranks wished when they asked; None where none has asked yet."""
        if self._engine.world_size == 1:
            return self._wishes()
        answer, self._answer = self._answer, None
        return None if answer is None else answer()
