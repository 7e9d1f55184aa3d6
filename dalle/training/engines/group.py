"""What the engines of several processes share: a process group, and how they agree and average in it."""

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dalle.errors import UserError
from dalle.training.engines.base import Engine
from dalle.training.engines.environment import launched_size
from dalle.training.run import RunConfig

BUCKET_BYTES = 25 * 2**20


class GroupEngine(Engine):
    """What DDP and DeepSpeed share: a process group, and a CPU group for agreements that need no accelerator."""

    def __init__(self, config: RunConfig, device: torch.device, rank: int, world_size: int):
        super().__init__(config, device, rank, world_size)
        self.control: dist.ProcessGroup | None = None
        self.agreement: dist.ProcessGroup | None = None

    def open_control_group(self) -> None:
        if dist.get_world_size() != launched_size():
            raise UserError(f"the launcher started {launched_size()} processes but the process group has "
                            f"{dist.get_world_size()}: check the launcher's settings")
        # gloo: agreeing on a signal every step must not wait for the accelerator
        self.control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        # of its own: an agreement is under way while a step, or a save, exchanges something else
        self.agreement = dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        box = torch.tensor(values)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return tuple(box.tolist())

    def start_max(self, *values: int) -> Callable[[], tuple[int, ...]]:
        box = torch.tensor(values)
        work = dist.all_reduce(box, dist.ReduceOp.MAX, group=self.agreement, async_op=True)

        def answer() -> tuple[int, ...]:
            work.wait()
            return tuple(box.tolist())

        return answer

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def share_rows(self, rows: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Rank r does rows r * k to (r + 1) * k, of k = ceil(n / ranks); with fewer rows than ranks each does all."""
        count, size = len(rows), -(-len(rows) // self.world_size)
        if count < self.world_size:
            return work(rows)
        own = work(rows[self.rank * size:(self.rank + 1) * size]) if self.rank * size < count else rows[:0]
        padded = own.new_zeros(size, *rows.shape[1:])
        padded[:len(own)] = own
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        # as bytes: not every backend knows every type
        dist.all_gather([part.view(torch.uint8) for part in parts], padded.view(torch.uint8))
        return torch.cat(parts)[:count]

    def share_buffers(self) -> None:
        """Each rank's BatchNorm sees its own samples, so without ``sync_batch_norm`` the statistics drift apart. Those
        of rank 0 count, as under DDP, which broadcasts them in each forward: in training nothing reads them."""
        for member in self.members.values():
            for buffer in saved_buffers(member.module):
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        self.all_reduce_max(0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def leave(self, status: int) -> int:
        """End the process at once: an ordinary exit destroys C++ statics under threads that gloo leaves behind, and
        about one finished run in ten is aborted there."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def saved_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers of ``module`` that its checkpoint has, in the same order on all ranks."""
    return [value for value in module.state_dict(keep_vars=True).values() if not isinstance(value, nn.Parameter)]


def average_gradients(parameters: list[nn.Parameter], world_size: int, dtype: str) -> None:
    """Replace every gradient by its mean over the ranks, a bucket at a time."""
    bucket: list[Tensor] = []
    size = 0
    for index, parameter in enumerate(parameters):
        bucket.append(parameter.grad)
        size += parameter.grad.numel() * parameter.grad.element_size()
        if size >= BUCKET_BYTES or index + 1 == len(parameters):
            flat = _flatten_dense_tensors(bucket) / world_size
            flat = flat.bfloat16() if dtype == "bf16" else flat
            dist.all_reduce(flat)
            flat = flat.to(bucket[0].dtype)
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))
            bucket, size = [], 0
