"""The phases of a step, recorded once and replayed: one launch a piece, where the host would launch every kernel.

A small model's step is bound by the host, which hands a GPU some thousands of kernels of a few microseconds each. A
recording does all that the phases do on the device, forwards, backwards, clipping and the optimisers' steps, again on
the same addresses: for every step it takes another batch into its buffers, other learning rates and other seeds. What
the host decides while it records is decided for good. So only steps are recorded whose phases all declare that they
depend on the tensors of their prepared batch alone (``Phase.capturable``).

How it goes, for each combination of due phases and shapes: some plain steps, which make all that is made only once
(states of optimisers, plans and workspaces of libraries); one step that is recorded and then replayed; and replays from
then on. A piece ends wherever the random numbers are seeded, for that is the host's to do; so a replayed step draws
what a plain one draws, and a resumed run, which records again, trains as one that went on.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dalle.training.task import Batch, Task, parameter_count

log = logging.getLogger(__name__)

PLAIN_STEPS = 3                 # before a recording, of each combination
MOST_RECORDINGS = 8             # more combinations of phases and shapes than these are not worth their memory
LARGEST = 50_000_000            # parameters in all players; beyond, a step's kernels outlast what the host needs

Seed = Callable[..., None]      # (step, micro-batch, ...): seed the draws that follow


class Results(Protocol):
    """What came of a phase."""

    def mapped(self, work: Callable[[Tensor], Tensor]) -> Self:
        """The same with ``work`` done to every tensor in it, in an order that is always the same."""


Play = Callable[[list[Batch], Seed], Sequence[Results]]     # the step's phases on its prepared micro-batches


class Recorder(Protocol):
    """Takes down what the device is asked to do, in pieces, and does it again."""

    def warming(self) -> AbstractContextManager[None]:
        """Around a plain step before the recording."""

    def start(self) -> None:
        """Take down what follows as the next piece. Raises ``RuntimeError`` (or what follows does) for what cannot be
        repeated: a value that the host reads, a shape that follows from values."""

    def stop(self) -> None:
        """The piece, if one is begun, ends here."""

    def abandon(self) -> None:
        """The piece cannot be repeated: go on as if none had been begun."""

    def replay(self, piece: int) -> None:
        """Do again what the piece holds; pieces are replayed in the order in which they were taken down."""


class GraphRecorder:
    """Pieces as CUDA graphs in one pool of memory: what a piece leaves for later ones stays where it is.

    Recording runs nothing. Plain steps and recordings use one stream of their own, as torch's notes on CUDA graphs ask:
    a backward runs on the streams of its forward, and the default stream cannot be recorded.
    """

    def __init__(self, stream: torch.cuda.Stream):
        self._stream, self._pool = stream, torch.cuda.graph_pool_handle()
        self._graphs: list[torch.cuda.CUDAGraph] = []
        self._open: torch.cuda.graph | None = None
        self._outside = torch.cuda.current_stream()

    @contextmanager
    def warming(self) -> Iterator[None]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def start(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # thread_local: loaders and savers, which pin memory and wait for events, may go on meanwhile
        capture = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        self._outside = torch.cuda.current_stream()
        capture.__enter__()
        self._open = capture
        self._graphs.append(graph)

    def stop(self) -> None:
        capture, self._open = self._open, None
        if capture is not None:
            capture.__exit__(None, None, None)

    def abandon(self) -> None:
        with suppress(RuntimeError):      # the capture is spoilt, and says so once more at its end
            self.stop()
        torch.cuda.set_stream(self._outside)

    def replay(self, piece: int) -> None:
        self._graphs[piece].replay()


@dataclass
class Recording:
    """One combination's step as it is replayed."""

    recorder: Recorder
    buffers: list[Tensor]            # of the prepared micro-batches
    seeds: list[tuple[Any, ...]]     # of each piece: what it is seeded with, without the step
    results: Sequence[Results]       # in memory that the next replay overwrites
    figures: Tensor                  # [n]: all that is in ``results``, at one address

    def replay(self, fresh: list[Tensor], step: int, seed: Seed) -> Sequence[Results]:
        torch._foreach_copy_(self.buffers, fresh)
        for piece, key in enumerate(self.seeds):
            seed(step, *key)
            self.recorder.replay(piece)
        values = iter(self.figures.clone().unbind())
        return [one.mapped(lambda _: next(values)) for one in self.results]


class Capture:
    """Plays the steps of a run: plainly at first, then by replay.

    ``new_recorder`` makes the recorder of one combination; ``optimizers`` are those that move the players, with their
    learning rates in tensors.
    """

    def __init__(self, new_recorder: Callable[[], Recorder], optimizers: Sequence[torch.optim.Optimizer]):
        self._new_recorder, self._optimizers = new_recorder, optimizers
        self._seen: Counter[Any] = Counter()
        self._recorders: dict[Any, Recorder] = {}
        self._recordings: dict[Any, Recording] = {}
        self._refused: str | None = None           # why nothing is recorded any more

    def forget(self) -> None:
        """States of optimisers lie elsewhere from now on: record anew, after as many plain steps as at first."""
        self._seen.clear()
        self._recordings.clear()
        self._recorders.clear()

    def play(self, due: tuple[Any, ...], micro_batches: list[Batch], step: int, seed: Seed, play: Play) \
            -> Sequence[Results]:
        """The results of ``play`` for a step whose phases are ``due``. Learning rates are set already."""
        fresh: list[Tensor] = []
        mapped(micro_batches, lambda tensor: fresh.append(tensor) or tensor)
        key = (due, tuple((tensor.shape, tensor.stride(), tensor.dtype) for tensor in fresh))
        if key not in self._recordings:
            if self._refused is not None:
                return play(micro_batches, seed)
            if key not in self._recorders:
                self._recorders[key] = self._new_recorder()
            recorder = self._recorders[key]
            self._seen[key] += 1
            if self._seen[key] <= PLAIN_STEPS:
                with recorder.warming():
                    return play(micro_batches, seed)
            if len(self._recordings) == MOST_RECORDINGS:
                return self._refuse("its batches come in too many shapes", micro_batches, seed, play)
            try:
                self._recordings[key] = self._record(recorder, micro_batches, step, seed, play)
            except RuntimeError as error:
                return self._refuse(str(error).strip().split("\n")[0], micro_batches, seed, play)
        return self._recordings[key].replay(fresh, step, seed)

    def _record(self, recorder: Recorder, micro_batches: list[Batch], step: int, seed: Seed, play: Play) -> Recording:
        buffers: list[Tensor] = []

        def kept(tensor: Tensor) -> Tensor:
            buffers.append(tensor.clone())
            return buffers[-1]

        batches, seeds = mapped(micro_batches, kept), []

        def next_piece(step: int, *key: Any) -> None:
            recorder.stop()
            seed(step, *key)
            seeds.append(key)
            recorder.start()

        with self._capturable():
            try:
                results = play(batches, next_piece)
                values: list[Tensor] = []
                for one in results:
                    one.mapped(lambda tensor: values.append(tensor) or tensor)
                figures = torch.stack([value.detach().reshape(()).float() for value in values])
                recorder.stop()
            except BaseException:
                recorder.abandon()
                raise
        return Recording(recorder, buffers, seeds, results, figures)

    @contextmanager
    def _capturable(self) -> Iterator[None]:
        """While recording, torch's optimisers ask to be told that they may be."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups
                  if "capturable" in group]
        for group in groups:
            group["capturable"] = True
        try:
            yield
        finally:
            for group in groups:
                group["capturable"] = False

    def _refuse(self, reason: str, micro_batches: list[Batch], seed: Seed, play: Play) -> Sequence[Results]:
        self._refused = reason
        log.warning("train.capture: the step is run plainly, for it cannot be recorded: %s", reason)
        return play(micro_batches, seed)


def reason_to_run_plainly(wish: bool | None, task: Task, *, alone_on_cuda: bool, accumulation: int,
                          compiled: bool) -> str | None:
    """Why the task's steps are not recorded; None where they are. ``wish``: ``train.capture``."""
    if wish is False:
        return "train.capture is false"
    if not alone_on_cuda:
        return "only a single process on a GPU records its steps"
    if accumulation > 1:
        return "the step has several micro-batches"
    plain = [phase.name for phase in task.phases if not phase.capturable]
    if plain:
        return f"the phase {plain[0]!r} depends on more than the tensors of its batch"
    if compiled:
        return "its networks are compiled"
    if wish is None and sum(parameter_count(player.module) for player in task.players.values()) > LARGEST:
        return "a model this large is not bound by the host"
    return None


def mapped(value: Any, work: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``work`` done to every tensor in its dicts, tuples and lists; all else as it is."""
    if isinstance(value, Tensor):
        return work(value)
    if isinstance(value, dict):
        return {name: mapped(part, work) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, work) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(mapped(part, work) for part in value)
    return value
