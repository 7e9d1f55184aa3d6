"""Several processes, each with the whole of every player: DDP through accelerate."""

import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dalle.errors import UserError
from dalle.training.engines.base import Member
from dalle.training.engines.environment import launched_size, wants_cpu
from dalle.training.engines.gradients import fill_gradients
from dalle.training.engines.group import GroupEngine, average_gradients
from dalle.training.run import RunConfig
from dalle.training.task import Phase


class DistributedEngine(GroupEngine):
    """DDP: gradients are averaged while the backward runs, wherever its hooks can be trusted with that.

    The hooks miss what does not go through the wrapper's forward (a penalty that is differentiated twice), and never
    finish when a parameter gets no gradient. So the first run of each phase exchanges all gradients by hand, after the
    backward, and watches; the hooks take over from the second run where the phase went through the wrapper alone and
    reached every parameter. The other phases (R1 and its like, rare and small) stay with the exchange by hand.
    """

    kind = "ddp"

    @classmethod
    def start(cls, config: RunConfig) -> "DistributedEngine":
        from accelerate import Accelerator
        from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, InitProcessGroupKwargs

        hook = DDPCommunicationHookType.BF16 if config.engine.gradient_dtype == "bf16" else DDPCommunicationHookType.NO
        elements = config.engine.bucket_elements      # by default DDP's first bucket is a small one of 1 MiB
        bucket = {} if elements is None else {"bucket_cap_mb": 4 * elements / 2**20}
        accelerator = Accelerator(cpu=wants_cpu(), mixed_precision="no", kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.engine.timeout_minutes)),
            # buffers: broadcasting them between two forwards of one backward changes what the graph has saved
            DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, comm_hook=hook,
                                          **bucket)])
        if accelerator.num_processes != launched_size() or "MULTI" not in accelerator.distributed_type.value:
            raise UserError(f"the launcher started {launched_size()} processes, accelerate sees "
                            f"{accelerator.num_processes} ({accelerator.distributed_type.value}): check its settings")
        device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device    # not "cpu:0"
        engine = cls(config, device, accelerator)
        engine.open_control_group()
        return engine

    def __init__(self, config: RunConfig, device: torch.device, accelerator: Any):
        super().__init__(config, device, accelerator.process_index, accelerator.num_processes)
        self.accelerator = accelerator
        self.phase: Phase | None = None
        self.hooked = self.went_around = False
        self.hooks_suffice: dict[str, bool] = {}    # by phase, known after its first run
        self.through: set[str] = set()              # phases with a forward through the wrapper, before their exchange

    def wrap(self, member: Member, folder: Path) -> None:
        with warnings.catch_warnings():
            # newer torch renames the option, older torch knows only this name
            warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
            member.wrapper = self.accelerator.prepare_model(member.module)

    def begin_phase(self, phase: Phase) -> None:
        super().begin_phase(phase)
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
            self.hooks_suffice[self.phase.name] = not self.all_reduce_max(int(hinders))[0]
