"""Several processes, each with the whole of every player: DDP through accelerate."""

import os
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from dalle.errors import UserError
from dalle.training.engine import Engine, Member, fill_gradients, launched_size, wants_cpu
from dalle.training.task import Phase

if TYPE_CHECKING:
    from dalle.training.run import RunConfig

BUCKET_BYTES = 25 * 2**20


class GroupEngine(Engine):
    """What DDP and DeepSpeed share: a process group, and a CPU group for agreements that need no accelerator."""

    def open_control_group(self) -> None:
        if dist.get_world_size() != launched_size():
            raise UserError(f"the launcher started {launched_size()} processes but the process group has "
                            f"{dist.get_world_size()}: check the launcher's settings")
        # gloo: agreeing on a signal every step must not wait for the accelerator
        self.control = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")

    def gather(self, value: Any) -> list[Any]:
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def largest(self, *values: int) -> tuple[int, ...]:
        box = torch.tensor(values)
        dist.all_reduce(box, dist.ReduceOp.MAX, group=self.control)
        return tuple(box.tolist())

    def mean(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value)
        return value / self.world_size

    def share_buffers(self) -> None:
        """Each rank's BatchNorm sees its own samples, so without ``sync_batch_norm`` the statistics drift apart. Those
        of rank 0 count, as under DDP, which broadcasts them in each forward: in training nothing reads them."""
        for member in self.members.values():
            for buffer in saved_buffers(member.module):
                dist.broadcast(buffer, 0)

    def barrier(self) -> None:
        self.largest(0)

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def leave(self, status: int) -> int:
        """End the process at once: an ordinary exit destroys C++ statics under threads that gloo leaves behind, and
        about one finished run in ten is aborted there."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


class DistributedEngine(GroupEngine):
    """DDP: gradients are averaged while the backward runs, wherever its hooks can be trusted with that.

    The hooks miss what does not go through the wrapper's forward (a penalty that is differentiated twice), and never
    finish when a parameter gets no gradient. So the first run of each phase exchanges all gradients by hand, after the
    backward, and watches; the hooks take over from the second run where the phase went through the wrapper alone and
    reached every parameter. The other phases (R1 and its like, rare and small) stay with the exchange by hand.
    """

    kind = "ddp"

    @classmethod
    def start(cls, config: "RunConfig") -> "DistributedEngine":
        from accelerate import Accelerator
        from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs

        hook = DDPCommunicationHookType.BF16 if config.engine.gradient_dtype == "bf16" else DDPCommunicationHookType.NO
        accelerator = Accelerator(cpu=wants_cpu(), mixed_precision="no", kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.engine.timeout_minutes)),
            # buffers: broadcasting them between two forwards of one backward changes what the graph has saved
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook)])
        if accelerator.num_processes != launched_size() or "MULTI" not in accelerator.distributed_type.value:
            raise UserError(f"the launcher started {launched_size()} processes, accelerate sees "
                            f"{accelerator.num_processes} ({accelerator.distributed_type.value}): check its settings")
        device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device    # not "cpu:0"
        engine = cls(config, device, accelerator.process_index, accelerator.num_processes)
        engine.accelerator = accelerator
        engine.open_control_group()
        return engine

    def wrap(self, member: Member, folder: Path) -> None:
        with warnings.catch_warnings():
            # newer torch renames the option, older torch knows only this name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            member.wrapper = self.accelerator.prepare_model(member.module)
        self.hooks_suffice: dict[str, bool] = {}    # by phase, known after its first run
        self.through: set[str] = set()              # phases with a forward through the wrapper, before their exchange

    def begin_phase(self, phase: Phase, step: int, steps: int) -> None:
        super().begin_phase(phase, step, steps)
        self.phase = phase
        # made ahead, the forwards of all micro-batches wait together: the first backward would set off the exchange
        waits = bool(phase.ahead) and self.accumulation > 1
        self.hooked = self.hooks_suffice.get(phase.name, False) and not waits

    def begin_micro_batch(self, last: bool) -> None:
        self.went_around = False
        if not self.phase.ahead:                    # else its forward may have been one of before
            self.through.discard(self.phase.name)
        self.active.wrapper.require_backward_grad_sync = last and self.hooked

    def forward_of(self, name: str) -> Callable[..., Any]:
        member = self.members[name]
        if member is not self.active or not torch.is_grad_enabled():
            return member.module
        self.through.add(self.phase.name)
        return member.wrapper if self.hooked else member.module

    def penalty_forward_of(self, name: str) -> Callable[..., Any]:
        self.went_around = True
        return super().penalty_forward_of(name)

    def exchange_gradients(self, member: Member) -> None:
        missing, went_through = fill_gradients(member.trainable), self.phase.name in self.through
        self.through.discard(self.phase.name)
        if self.hooked and went_through:
            return
        average_gradients(member.trainable, self.world_size, self.options.gradient_dtype)
        if self.phase.name not in self.hooks_suffice:
            hinders = missing or self.went_around or not went_through
            self.hooks_suffice[self.phase.name] = not self.largest(int(hinders))[0]


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
