"""A recorder without a GPU: operations as they are asked for, repeated on the same memory as a CUDA graph does.

What could not be a CUDA graph is refused: values that the host reads, and shapes that follow from values.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dalle.training import capture
from dalle.training.engines.base import Engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from dalle.training.task import Task

PLAIN_STEPS = 1        # before a recording, here: a CPU has nothing to warm up but the states of optimisers

aten = torch.ops.aten
READS_OF_THE_HOST = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
SHAPES_FROM_VALUES = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
                      aten.unique_consecutive.default, aten.repeat_interleave.Tensor, aten.bincount.default}


INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


def reason_against(operation: Any, arguments: tuple) -> str | None:
    """Why a CUDA graph could not hold the operation, and a host that asks for it waits for the device."""
    if operation in READS_OF_THE_HOST:
        return f"{operation} reads a value on the host"
    masked = operation in INDEXING and any(index is not None and index.dtype in (torch.bool, torch.uint8)
                                           for index in arguments[1])
    if operation in SHAPES_FROM_VALUES or masked:
        return f"{operation} has a shape that follows from values"
    return None


class Listener(TorchDispatchMode):
    """Writes down every operation, with the very tensors that it was given and gave, and what memory from outside held
    before."""

    def __init__(self, before: dict[int, tuple[Any, Any]], own: set[int]):
        super().__init__()
        self.operations: list[tuple] = []
        self.before, self.own = before, own

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        reason = reason_against(operation, arguments)
        if reason is not None:
            raise RuntimeError(reason)
        for memory in memories((arguments, named)):
            if memory.data_ptr() not in self.own and memory.data_ptr() not in self.before:
                self.before[memory.data_ptr()] = memory, memory.clone()
        given = operation(*arguments, **named)
        self.own.update(memory.data_ptr() for memory in memories(given) if memory.data_ptr() not in self.before)
        # aliases: what is turned around or reshaped in place later was not so here
        self.operations.append((operation, *tree_map_only(Tensor, Tensor.detach, (arguments, named, given))))
        return given


def memories(tree: Any) -> Iterator[Any]:
    return (leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor) and leaf.numel())


class Tape:
    """A :class:`dalle.training.capture.Recorder` whose pieces are lists of operations.

    Taking down an operation runs it, where a CUDA graph does not; so the first replay finds the memory from outside
    (weights, states, buffers) as it was before.
    """

    def __init__(self):
        self.pieces: list[list[tuple]] = []
        self.warmed = self.replayed = 0
        self._listener: Listener | None = None
        self._before: dict[int, tuple[Any, Any]] = {}
        self._own: set[int] = set()

    @contextmanager
    def warming(self) -> Iterator[None]:
        self.warmed += 1
        yield

    def start(self) -> None:
        self._listener = Listener(self._before, self._own)
        self._listener.__enter__()

    def stop(self) -> None:
        if self._listener is not None:
            listener, self._listener = self._listener, None
            listener.__exit__(None, None, None)
            self.pieces.append(listener.operations)

    def abandon(self) -> None:
        self.stop()
        self._put_back()

    def replay(self, piece: int) -> None:
        if piece == 0:
            self._put_back()
            self.replayed += 1
        with torch.no_grad():
            for operation, arguments, named, given in self.pieces[piece]:
                repeat(operation, arguments, named, given)

    def _put_back(self) -> None:
        for memory, values in self._before.values():
            memory.copy_(values)
        self._before.clear()


def repeat(operation: Any, arguments: tuple, named: dict, given: Any) -> None:
    """The operation once more, its result where it was before."""
    schema = operation._schema
    views = [returned.alias_info is not None and not returned.alias_info.is_write for returned in schema.returns]
    if views and all(views):
        return                     # an alias of memory that is where it was
    result = operation(*arguments, **named)
    for returned, old, new in zip(schema.returns, as_tuple(given), as_tuple(result), strict=False):
        if returned.alias_info is None:
            for before, after in zip(tree_leaves(old), tree_leaves(new), strict=True):
                if isinstance(before, Tensor) and before.data_ptr() != after.data_ptr():
                    before.copy_(after)


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


@dataclass
class Trained:
    """What some steps left."""

    state: dict[str, Tensor]                # all that evolves
    figures: dict[str, list[float]]         # what was to be logged
    tapes: list[Tape]                       # of the combinations of phases and shapes

    def different_from(self, other: "Trained") -> list[str]:
        """What is not the same, bit for bit."""
        assert self.state.keys() == other.state.keys() and self.figures.keys() == other.figures.keys()
        return [key for key, value in self.state.items() if not torch.equal(value, other.state[key])] \
            + [key for key, values in self.figures.items() if values != other.figures[key]]


def trained(task: Task, config: Any, batches: Iterable[dict], folder: Any, *, recorded: bool) -> Trained:
    """A step of ``task`` on each of ``batches``: plain ones, or recorded and replayed ones."""
    engine, tapes = Engine(config, torch.device("cpu")), []
    engine.prepare(task, folder)

    def new_tape() -> Tape:
        tapes.append(Tape())
        return tapes[-1]

    engine.record_steps(new_tape)
    if not recorded:        # but with the learning rates of before, in tensors of fp32
        engine.capture = None
    meter = Meter()
    for step, batch in enumerate(batches):
        train_step(engine, task, batch, step, config, meter)
    state = {f"{name}/{section}/{key}": value.clone() for name, member in engine.members.items()
             for section, key, value in engine.whole_state(member)}
    return Trained(state, {name: [float(value) for value in values] for name, values in meter._figures.items()}, tapes)


def assert_replay_trains_alike(make: Callable[[], Task], config: Any, batches: list[dict], folder: Any) -> None:
    """Every phase of the task declares itself capturable, and is right to."""
    with patch.object(capture, "PLAIN_STEPS", PLAIN_STEPS):
        plain, replayed = (trained(make(), config, batches, folder, recorded=recorded) for recorded in (False, True))
    assert sum(tape.replayed for tape in replayed.tapes) > 1
    different = replayed.different_from(plain)
    assert different == [], different
