"""Copies beside the step, on a stand-in for a GPU whose streams run as late, as early and as mixed up as they may.

A stream is a queue of actions, done in its order. Whatever is not ordered by an event may happen at any time before or
after: an adversary draws when. Memory that is given back is overwritten with NaN by the stream that it came from, at
the earliest after the streams that ``record_stream`` named.
"""

import contextlib
import random
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dalle.training.engines.copies import Copies, StreamCopies, copies_of

GPU = torch.device("cuda", 0)
SEEDS = range(12)
SHAPE = (4,)
BYTES = 16


class Action:
    def __init__(self, do: Callable[[], object], after: list["Action"]):
        self.do, self.after, self.is_done = do, after, False

    def run(self) -> None:
        if not self.is_done:
            for action in self.after:
                action.run()
            self.is_done = True
            self.do()


class Stream:
    def __init__(self, gpu: "Gpu"):
        self.gpu, self.last = gpu, Action(lambda: None, [])

    def enqueue(self, do: Callable[[], object], *after: Action) -> None:
        self.last = Action(do, [self.last, *after])
        self.gpu.pending.append(self.last)
        self.gpu.let_the_adversary_act()

    def wait_stream(self, other: "Stream") -> None:
        self.enqueue(lambda: None, other.last)


class Gpu:
    """In place of ``torch.cuda``; ``left``: bytes that are free beside the largest step."""

    def __init__(self, seed: int, left: int = 0):
        self.random, self.left, self.in_pieces = random.Random(seed), left, False
        self.pending: list[Action] = []
        self.step = self.now = Stream(self)

    def let_the_adversary_act(self) -> None:
        while self.pending and self.random.random() < 0.4:
            self.pending.pop(self.random.randrange(len(self.pending))).run()       # with all that it waits for

    def Stream(self, device: torch.device) -> Stream:      # noqa: N802 (torch's name)
        return Stream(self)

    def Event(self, blocking: bool) -> "Event":            # noqa: N802 (torch's name)
        return Event()

    def current_stream(self, device: torch.device) -> Stream:
        return self.now

    @contextlib.contextmanager
    def stream(self, stream: Stream):
        before, self.now = self.now, stream
        yield
        self.now = before

    def max_memory_allocated(self, device: torch.device) -> int:
        return 1000

    def memory_reserved(self, device: torch.device) -> int:
        return 400

    def mem_get_info(self, device: torch.device) -> tuple[int, int]:
        return 600 + self.left, 0


class Event:
    def record(self, stream: Stream) -> None:
        self.action = stream.last

    def synchronize(self) -> None:
        self.action.run()


class Held(Tensor):
    """A handle on memory that the streams read and write when the adversary wants: ``cell``."""

    @classmethod
    def of(cls, gpu: Gpu, cell: Tensor) -> "Held":
        held = torch.empty(cell.shape).as_subclass(cls)
        held.gpu, held.cell, held.streams = gpu, cell, []
        return held

    def read_into(self, other: "Held") -> None:
        target, source = other.cell, self.cell
        self.gpu.now.enqueue(lambda: target.copy_(source))


class OnGpu(Held):
    device, is_cuda = GPU, True

    @classmethod
    def allocated(cls, gpu: Gpu) -> "OnGpu":
        """From the stream of the moment, which may use the memory again once it is given back."""
        held = cls.of(gpu, torch.full(SHAPE, torch.nan))
        owner, cell, streams = gpu.now, held.cell, held.streams
        weakref.finalize(held, lambda: gpu.pending.append(Action(lambda: cell.fill_(torch.nan), [
            one.last for one in (owner, *streams)])))
        return held

    def clone(self, memory_format=None) -> "OnGpu":
        if self.gpu.in_pieces:
            raise torch.OutOfMemoryError("CUDA out of memory")
        copy = OnGpu.allocated(self.gpu)
        self.read_into(copy)
        return copy

    def record_stream(self, stream: Stream) -> None:
        self.streams.append(stream)


class Pinned(Held):
    def copy_(self, source: OnGpu, non_blocking: bool) -> "Pinned":
        source.read_into(self)
        return self

    def to(self, device: torch.device, non_blocking: bool) -> OnGpu:
        moved = OnGpu.allocated(self.gpu)
        self.read_into(moved)
        return moved


class StandIn(StreamCopies):
    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        return self._buffers.setdefault(key, Pinned.of(self.cuda, torch.full(SHAPE, torch.nan)))


def steps(gpu: Gpu, state: list[OnGpu], count: int) -> None:
    """Each changes the whole state in place."""
    for held in state * count:
        cell = held.cell
        gpu.now.enqueue(lambda cell=cell: cell.add_(1))


@pytest.mark.parametrize("staged", [0, 2, 5], ids=["no room", "room for two of five", "room for all"])
@pytest.mark.parametrize("seed", SEEDS)
def test_a_checkpoint_has_the_state_of_its_step_whatever_the_streams_do(seed, staged):
    gpu = Gpu(seed, left=staged * BYTES)
    copies = StandIn(GPU, gpu)
    state = [OnGpu.of(gpu, torch.full(SHAPE, 10.0 * index)) for index in range(5)]
    for save in range(3):
        copies.begin()
        buffers = [copies.to_host(str(index), held) for index, held in enumerate(state)]
        copies.end()
        steps(gpu, state, count=4)
        copies.wait()
        assert [buffer.cell.tolist() for buffer in buffers] == [[10.0 * index + 4 * save] * 4 for index in range(5)]


@pytest.mark.parametrize("seed", SEEDS)
def test_room_that_turns_out_not_to_be_there_costs_time_alone_and_is_said_once(seed, caplog):
    gpu = Gpu(seed, left=5 * BYTES)
    copies = StandIn(GPU, gpu)
    state = [OnGpu.of(gpu, torch.full(SHAPE, 10.0 * index)) for index in range(5)]
    for save in range(4):
        copies.begin()
        buffers = []
        for index, held in enumerate(state):
            gpu.in_pieces = save == 2 and index > 2
            buffers.append(copies.to_host(str(index), held))
        assert len(copies._staged) == [0, 5, 3, 3][save]
        copies.end()
        steps(gpu, state, count=4)
        copies.wait()
        assert [buffer.cell.tolist() for buffer in buffers] == [[10.0 * index + 4 * save] * 4 for index in range(5)]
    (record,) = caplog.records
    assert "no room for a copy of 0.00 GB" in record.getMessage()


def test_from_the_second_checkpoint_on_what_has_room_is_staged_and_the_step_waits_for_the_rest_alone():
    gpu = Gpu(0, left=2 * BYTES)
    gpu.random.random = lambda: 1.0                   # nothing runs before it is waited for
    copies = StandIn(GPU, gpu)
    state = [OnGpu.of(gpu, torch.zeros(SHAPE)) for _ in range(5)]
    for on_the_way in (5, 3):
        copies.begin()
        buffers = [copies.to_host(str(index), held) for index, held in enumerate(state)]
        copies.end()
        steps(gpu, state, count=1)
        for buffer in buffers:
            buffer.cell.fill_(torch.nan)
        gpu.step.last.run()                           # the next step
        assert sum(bool(buffer.cell.isfinite().all()) for buffer in buffers) == on_the_way
        copies.wait()
        assert all(bool(buffer.cell.isfinite().all()) for buffer in buffers)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_batch_is_whole_in_its_step_and_its_memory_stays_until_then(seed):
    gpu = Gpu(seed)
    copies, seen = StandIn(GPU, gpu), []
    for number in range(6):
        batch = {"image": Pinned.of(gpu, torch.full(SHAPE, float(number))), "key": ["a"]}
        moved = copies.to_device(batch)
        assert moved["key"] == ["a"] and copies.to_device(moved) is moved
        cell = moved["image"].cell
        gpu.now.enqueue(lambda cell=cell: seen.append(cell.tolist()))
        del moved, cell
    gpu.step.last.run()
    assert seen == [[float(number)] * 4 for number in range(6)]


def test_a_batch_does_not_wait_for_the_step_before_it():
    gpu = Gpu(0)
    gpu.random.random = lambda: 1.0
    copies = StandIn(GPU, gpu)
    gpu.step.enqueue(lambda: pytest.fail("the copy waited for the step"))
    moved = copies.to_device({"image": Pinned.of(gpu, torch.ones(SHAPE))})
    copies.incoming.last.run()
    assert moved["image"].cell.tolist() == [1.0] * 4


def test_on_a_cpu_a_copy_is_there_at_once():
    copies = copies_of(torch.device("cpu"))
    assert type(copies) is Copies
    weight = torch.arange(6.0).view(2, 3).t()
    copies.begin()
    copy = copies.to_host("weight", weight)
    copies.end()
    expected = weight.clone()
    weight.zero_()
    assert torch.equal(copy, expected) and copy.is_contiguous()
    batch = {"x": weight, "key": ["a"]}
    assert copies.to_device(batch)["x"] is weight and copies.to_device(batch)["key"] == ["a"]
