"""Copies between the processor and a device: batches on their way in, what a checkpoint takes on its way out."""

import logging
import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dalle.data.batch import Batch

log = logging.getLogger(__name__)

MARGIN = 0.05      # of a GPU's memory, left free by what is staged there for a checkpoint


class Copies:
    """Where networks live in the processor's own memory: nothing is on its way, ever."""

    def __init__(self, device: torch.device):
        self.device = device

    def to_device(self, batch: Batch) -> Batch:
        """``batch`` with its tensors where the networks are, ready for what is called next."""
        return {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()}

    def begin(self) -> None:
        """A checkpoint's tensors follow, of all players."""

    def to_host(self, key: str, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` as it is now, in host memory, whole once :meth:`wait` was called."""
        return tensor.to("cpu", copy=True).contiguous()

    def end(self) -> None:
        """No more tensors follow."""

    def wait(self) -> None:
        """Until all copies to the host are whole; in any thread."""


class StreamCopies(Copies):
    """On a GPU: both directions have a stream of their own, so that neither the step nor its host waits for a copy.

    In: the host asks for the next batch as soon as it has launched a step, while the device still computes. The copy is
    not ordered behind that step: the incoming stream waits for nothing, and the step's stream waits for it. From pinned
    memory it runs meanwhile; from pageable memory it holds up the host, but not behind the step. Memory: one batch.

    Out: what is copied must be the state of now, and the next step changes it in place. So a tensor is first staged, a
    copy on the device in the step's own stream: after all that this step does to it, before all that the next one does.
    At several TB/s that takes some 10 ms for 20 GB. The outgoing stream waits for the staging and copies into pinned
    host memory, for as long as it takes beside the steps that follow; the thread that writes waits for its event. What
    has no room to be staged is copied to the host in the step's stream itself: as right, but the device's next step
    waits for it.
    Room is what the GPU has left beside the largest step before the first staging, less a margin; should a later step
    want more, torch's allocator waits for the copies and takes the memory back before it gives up. The first checkpoint
    of a start is not staged: usually that of step 0, before any step has shown what it needs. Staged memory is freed by
    ``record_stream``: not before the outgoing stream has read it.

    The host's buffers are kept (pinned memory is slow to come by) and overwritten by the next checkpoint, which
    :class:`dalle.training.saving.Saver` does not begin before this one is written. ``cuda``: what of :mod:`torch.cuda`
    is used, for a test to put something in its place.
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        super().__init__(device)
        self.cuda = cuda
        self._buffers: dict[str, Tensor] = {}
        self._staged: list[tuple[Tensor, Tensor]] = []      # (copy on the device, its buffer)
        self._saves = 0
        self._peak = self._room = self._in_step = 0         # bytes: of a step, left for staging, copied without
        self._most = math.inf                               # bytes that were ever staged, where more have failed
        self._has_said = False

    @cached_property
    def incoming(self) -> Any:
        return self.cuda.Stream(self.device)

    @cached_property
    def outgoing(self) -> Any:
        return self.cuda.Stream(self.device)

    @cached_property
    def whole(self) -> Any:
        """After the last copy to the host; a thread that waits for it sleeps."""
        return self.cuda.Event(blocking=True)

    def to_device(self, batch: Batch) -> Batch:
        if not any(self._is_elsewhere(value) for value in batch.values()):
            return batch
        step = self.cuda.current_stream(self.device)
        with self.cuda.stream(self.incoming):
            moved = {key: value.to(self.device, non_blocking=True) if self._is_elsewhere(value) else value
                     for key, value in batch.items()}
        step.wait_stream(self.incoming)
        for key, value in moved.items():
            if value is not batch[key]:
                value.record_stream(step)            # its memory is the incoming stream's: not before the step is done
        return moved

    def begin(self) -> None:
        self._saves += 1
        if self._saves == 2:
            self._peak = self.cuda.max_memory_allocated(self.device)
        free, total = self.cuda.mem_get_info(self.device)
        left = free + self.cuda.memory_reserved(self.device) - self._peak
        self._room = 0 if self._saves == 1 else min(left - MARGIN * total, self._most)
        self._in_step = 0

    def to_host(self, key: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            return super().to_host(key, tensor)
        buffer, staged = self._buffer(key, tensor), self._stage(tensor)
        if staged is None:
            self._in_step += tensor.nbytes
            return buffer.copy_(tensor, non_blocking=True)
        self._staged.append((staged, buffer))
        return buffer

    def end(self) -> None:
        self.outgoing.wait_stream(self.cuda.current_stream(self.device))      # also for what was copied in that stream
        with self.cuda.stream(self.outgoing):
            for staged, buffer in self._staged:
                buffer.copy_(staged, non_blocking=True)
                staged.record_stream(self.outgoing)
        self._staged.clear()
        self.whole.record(self.outgoing)
        if self._saves > 1 and self._in_step and not self._has_said:
            self._has_said = True
            log.warning("the GPU has no room for a copy of %.2f GB of what a checkpoint takes: the next step waits "
                        "until they are in host memory", self._in_step / 1e9)

    def wait(self) -> None:
        self.whole.synchronize()

    def _stage(self, tensor: Tensor) -> Tensor | None:
        """A copy on the device; None where there is no room for it."""
        if tensor.nbytes > self._room:
            return None
        try:
            staged = tensor.clone(memory_format=torch.contiguous_format)
        except torch.OutOfMemoryError:      # what is left lies in pieces that are too small, or is a CUDA graph's own
            self._room, self._most = 0, sum(staged.nbytes for staged, _ in self._staged)
            return None
        self._room -= tensor.nbytes
        return staged

    def _is_elsewhere(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.device != self.device

    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[key] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return buffer


def copies_of(device: torch.device) -> Copies:
    """What copies between the host and ``device``."""
    return StreamCopies(device) if device.type == "cuda" else Copies(device)
