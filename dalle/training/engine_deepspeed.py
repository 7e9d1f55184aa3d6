"""ZeRO-1, 2 and 3 through DeepSpeed: one DeepSpeed engine for each player.

What holds here and not under DDP (each row of it is in the parity tests): only the active player is called through its
engine, all others through the bare module, or their backward would step into the wrong engine; a forward that is
differentiated twice goes through the bare module too; gradients are clipped by DeepSpeed; its ``step`` skips a
non-finite gradient on all ranks.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.training.ema import Average, full_access
from dalle.training.engine import (
    AVERAGE,
    Engine,
    Member,
    Outcome,
    launched_size,
    poisoned,
    settings_kept,
    unshared,
    wants_cpu,
)
from dalle.training.engine_ddp import GroupEngine
from dalle.training.task import Task

if TYPE_CHECKING:
    from dalle.training.run import RunConfig

TAG = "zero"
NEVER = 10**12


class DeepSpeedEngine(GroupEngine):
    """Optimiser state (1), gradients (2) and parameters (3) split over the ranks."""

    @classmethod
    def start(cls, config: "RunConfig") -> "DeepSpeedEngine":
        stage = int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
        if stage not in (1, 2, 3):
            raise UserError(f"ZeRO stage {stage} is not one of 1, 2, 3; without ZeRO, launch with DDP")
        on_cpu = wants_cpu()
        if on_cpu:
            os.environ["DS_ACCELERATOR"] = "cpu"      # read when deepspeed is first imported
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("WARNING")
        # gloo by name: on a CPU deepspeed's own choice leaves every rank believing that it is alone
        deepspeed.init_distributed(dist_backend="gloo" if on_cpu else "nccl", verbose=False,
                                   timeout=timedelta(minutes=config.engine.timeout_minutes))
        local = int(os.environ.get("LOCAL_RANK", "0"))
        device = torch.device("cpu") if on_cpu else torch.device("cuda", local)
        if not on_cpu:
            torch.cuda.set_device(device)
        engine = cls(config, device, int(os.environ.get("RANK", "0")), launched_size())
        engine.stage, engine.kind, engine.splits_parameters = stage, f"zero{stage}", stage == 3
        engine.open_control_group()
        return engine

    @property
    def layout(self) -> dict[str, Any]:
        return {"format": self.kind, "world_size": self.world_size}

    # -- before the first step

    def check(self, task: Task) -> None:
        super().check(task)
        if self.stage == 3 and len(task.players) > 1 and not self.options.allow_zero3_players:
            raise UserError(f"ZeRO-3 with {len(task.players)} players costs more than it saves on networks this small: "
                            "launch with DDP or ZeRO-1/2, or set engine.allow_zero3_players=true")
        muon = [name for name, player in task.players.items() if player.optimizer.name == "muon"]
        if muon:
            raise UserError(f"player {muon[0]!r} uses Muon, which needs the matrices that ZeRO splits: launch with "
                            "DDP, or set the optimizer's name to adamw")

    def wrap(self, member: Member, folder: Path) -> None:
        import deepspeed

        settings = self.settings(member)
        if self.is_main:
            (folder / f"deepspeed_{member.name}.json").write_text(json.dumps(settings, indent=2) + "\n")
        for parameter in member.module.parameters():
            # flattened anyway; DeepSpeed refuses channels_last, even in 1x1 convolutions, which `contiguous()` leaves
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        member.wrapper, *_ = deepspeed.initialize(model=member.module, optimizer=member.optimizer, config=settings,
                                                  dist_init_required=False)
        member.wrapper.checkpoint_engine.load = load_without_code

    def settings(self, member: Member) -> dict[str, Any]:
        """DeepSpeed's JSON for one player, with no "auto" left for anyone to guess."""
        zero: dict[str, Any] = {
            "stage": self.stage, "contiguous_gradients": True, "overlap_comm": self.device.type != "cpu",
            "reduce_bucket_size": self.options.bucket_elements, "allgather_bucket_size": self.options.bucket_elements}
        if self.options.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
        if self.options.offload_parameters and self.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
        return {
            "train_micro_batch_size_per_gpu": self.local_batch // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.local_batch * self.world_size,
            "gradient_clipping": member.settings.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": self.options.gradient_dtype,
            # weights stay fp32; the list of modules whose gradients would be exchanged in bf16 stays empty
            "torch_autocast": {"enabled": self.bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
            "steps_per_print": NEVER, "wall_clock_breakdown": False,
        }

    def build_average(self, member: Member) -> Average:
        owners = self.world_size if self.stage == 3 else 1
        return Average(member.module, member.settings.ema, member.settings.ema_every,
                       access=self.access, rank=self.rank, owners=owners)

    @property
    def access(self) -> Callable[..., AbstractContextManager]:
        return gathered if self.stage == 3 else full_access

    # -- one phase

    def clear_gradients(self, member: Member) -> None:
        """DeepSpeed does it in its own step."""

    def begin_micro_batch(self, last: bool) -> None:
        self.active.wrapper.set_gradient_accumulation_boundary(is_boundary=last)

    def backward(self, loss: Tensor) -> None:
        self.active.wrapper.backward(poisoned(loss), scale_wrt_gas=False)

    def step(self) -> Outcome:
        engine = self.active.wrapper
        engine.step()
        applied = engine.was_step_applied()
        norm = engine.get_global_grad_norm() if applied else None
        norm = torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)
        return Outcome(norm.detach().clone(), torch.tensor(0.0 if applied else 1.0, device=self.device))

    def forward_of(self, name: str) -> Callable[..., Any]:
        member = self.members[name]
        return member.wrapper if member is self.active and torch.is_grad_enabled() else member.module

    def penalty_forward_of(self, name: str) -> Callable[..., Any]:
        if self.stage == 3:
            raise UserError("a penalty on gradients cannot be differentiated under ZeRO-3: launch with DDP or ZeRO-1/2")
        return super().penalty_forward_of(name)

    # -- state

    def save_player(self, name: str, folder: Path) -> None:
        member = self.members[name]
        member.wrapper.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if member.average is not None and (self.stage == 3 or self.is_main):
            save_file(unshared(member.average.state_dict()), folder / self._average_file())

    def load_player(self, name: str, folder: Path) -> None:
        member = self.members[name]
        with settings_kept(member.wrapper.optimizer):
            loaded, _ = member.wrapper.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if loaded is None:
            raise ValueError(f"DeepSpeed finds nothing in {folder}")
        self.load_average(member, folder / self._average_file())

    def _average_file(self) -> str:
        return f"rank{self.rank}_{AVERAGE}" if self.stage == 3 else AVERAGE

    def full_state(self, name: str) -> dict[str, Tensor]:
        if self.stage < 3:
            return Engine.full_state(self, name)
        state = {}
        for key, value in self.members[name].module.state_dict(keep_vars=True).items():
            with gathered([value] if isinstance(value, nn.Parameter) else [], None):
                if self.is_main:
                    state |= unshared({key: value})
        return state


@contextmanager
def gathered(parameters: list[nn.Parameter], owner: int | None) -> Iterator[None]:
    """ZeRO-3 parameters in full on every rank; what rank ``owner`` writes to them meanwhile is kept."""
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters, modifier_rank=owner):
        yield


def load_without_code(path: str, map_location: Any = None) -> Any:
    """What DeepSpeed's own loader gives, from files that may hold tensors and plain values but nothing that runs."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        return torch.load(path, map_location=map_location, weights_only=True)
