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
from typing import Any

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.text_file import read_text_file
from dalle.training.checkpoint import OPTIMIZER, WEIGHTS, SavedPlayer
from dalle.training.ema import EMA, full_access
from dalle.training.engines.base import Member, Outcome, state_keys
from dalle.training.engines.environment import launched_size, wants_cpu
from dalle.training.engines.gradients import poisoned
from dalle.training.engines.group import GroupEngine
from dalle.training.engines.launcher_settings import check_deepspeed_file
from dalle.training.run import RunConfig
from dalle.training.task import Task

NEVER = 10**12
BUCKET_ELEMENTS = 50_000_000
SAMPLING = -1       # among the numbers of the modules that still need a parameter under ZeRO-3: none of them


class DeepSpeedEngine(GroupEngine):
    """Optimiser state (1), gradients (2) and parameters (3) split over the ranks."""

    @classmethod
    def start(cls, config: RunConfig) -> "DeepSpeedEngine":
        zero = launched_zero(config)
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
        engine = cls(config, device, int(os.environ.get("RANK", "0")), launched_size(), zero)
        engine.open_control_group()
        return engine

    def __init__(self, config: RunConfig, device: torch.device, rank: int, world_size: int, zero: dict[str, Any]):
        super().__init__(config, device, rank, world_size)
        self.zero, self.stage = zero, zero["stage"]
        self.kind = f"zero{self.stage}"
        self.splits_parameters = self.evaluates_in_step = self.stage == 3

    # -- before the first step

    def check(self, task: Task) -> None:
        super().check(task)
        if self.stage == 3 and self.precision == "fp8":
            raise UserError("train.precision=fp8 does not go with ZeRO-3, which gathers each layer by itself: launch "
                            "with launch/engines/fsdp2.yaml, or set train.precision=bf16")
        if self.stage == 3 and len(task.players) > 1 and not self.options.allow_zero3_players:
            raise UserError(f"ZeRO-3 with {len(task.players)} players costs more than it saves on networks this small: "
                            "launch with DDP or ZeRO-1/2, or set engine.allow_zero3_players=true")
        muon = [name for name, player in task.players.items() if player.optimizer.name == "muon"]
        if muon:
            raise UserError(f"player {muon[0]!r} uses Muon, which needs the matrices that ZeRO splits: launch with "
                            "DDP, or set the optimizer's name to adamw")

    def place(self, module: nn.Module) -> nn.Module:
        """Under ZeRO-3 the parameters stay in host memory until :meth:`wrap` splits them: a device may be too small for
        all of them at once."""
        if self.stage < 3:
            return super().place(module)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                setattr(part, name, buffer.to(self.device))
        return module

    def wrap(self, member: Member, folder: Path) -> None:
        import deepspeed

        settings = self.settings(member)
        if self.is_rank0:
            (folder / f"deepspeed_{member.name}.json").write_text(json.dumps(settings, indent=2) + "\n")
        for parameter in member.module.parameters():
            # flattened anyway; DeepSpeed refuses channels_last, even in 1x1 convolutions, which `contiguous()` leaves
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        if self.stage == 3:      # one parameter after the other goes to the device, and this rank's part of it stays
            deepspeed.zero.Init(module=member.module, config_dict_or_path=settings)
        member.wrapper, *_ = deepspeed.initialize(model=member.module, optimizer=member.optimizer, config=settings,
                                                  dist_init_required=False)
        if self.bf16:
            communicate_in_bf16(member.module, member.wrapper.optimizer, gathers=self.stage == 3)

    def compiles(self, module: nn.Module) -> bool:
        """Nothing under ZeRO-3: its hooks gather the weights of every layer, and torch compiles only what lies between
        two of them (23 pieces of a block of one matrix, each compiled again in the next block)."""
        if self.stage < 3:
            return super().compiles(module)
        if self.compile:
            self.remarks.append("not compiled, for ZeRO-3 gathers each layer by itself")
        return False

    def settings(self, member: Member) -> dict[str, Any]:
        """DeepSpeed's JSON for one player, with no "auto" left for anyone to guess."""
        bucket = self.options.bucket_elements or BUCKET_ELEMENTS
        zero: dict[str, Any] = {
            "contiguous_gradients": True, "overlap_comm": self.device.type != "cpu",
            "reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
            **self.zero}
        offload = {"device": "cpu", "pin_memory": self.device.type != "cpu"}
        if self.options.offload_optimizer or "offload_optimizer" in zero:
            zero["offload_optimizer"] = offload | zero.get("offload_optimizer", {})
        if self.stage == 3 and (self.options.offload_parameters or "offload_param" in zero):
            zero["offload_param"] = offload | zero.get("offload_param", {})
        return {
            "train_micro_batch_size_per_gpu": self.local_batch // self.accumulation,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.local_batch * self.world_size,
            "gradient_clipping": member.settings.clip,
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "communication_data_type": self.options.gradient_dtype,
            # weights stay fp32; the layers listed (none, or DeepSpeed's own list) exchange their gradients in bf16
            "torch_autocast": {"enabled": self.bf16, "dtype": "bfloat16",
                               **({} if self.options.gradient_dtype == "bf16"
                                  else {"lower_precision_safe_modules": []})},
            "steps_per_print": NEVER, "wall_clock_breakdown": False,
        }

    def build_ema(self, member: Member) -> EMA:
        owners = self.world_size if self.stage == 3 else 1
        offloads = "offload_param" in self.settings(member)["zero_optimization"]
        return EMA(member.module, member.settings.ema, member.settings.ema_every, warmup=member.settings.ema_warmup,
                       access=self.access, rank=self.rank, owners=owners,
                       device=torch.device("cpu") if offloads else None)

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

    @contextmanager
    def whole_networks(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        parameters = [parameter for member in self.members.values() for parameter in member.module.parameters()]
        with gathered([one for one in parameters if one.ds_status is not ZeroParamStatus.AVAILABLE], None):
            for parameter in parameters:
                parameter.ds_active_sub_modules.add(SAMPLING)      # or each block's forward would give its own back
            try:
                yield
            finally:
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(SAMPLING)

    # -- state

    def whole(self, tensor: Tensor) -> Tensor:
        if self.stage < 3 or not isinstance(tensor, nn.Parameter):
            return tensor
        with gathered([tensor], None):
            return tensor.detach().clone()

    def optimizer_state(self, member: Member, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        first = member.wrapper.optimizer.optimizer.state.get(self.partitions(member)[0], {})
        return {key: value if value.dim() == 0 else safe_get_full_optimizer_state(parameter, key)
                for key, value in first.items()}

    def whole_state(self, member: Member) -> Iterator[tuple[str, str, Tensor]]:
        self.link_optimizer_state(member)
        return super().whole_state(member)

    def link_optimizer_state(self, member: Member) -> None:
        """Have ZeRO-1/2 look up where each parameter's state lies: by itself it does so after the step of the first
        parameter group, when the others have no state yet (there is no public way)."""
        zero = member.wrapper.optimizer
        if self.stage < 3 and zero.optimizer.state:
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    def partitions(self, member: Member) -> list[Tensor]:
        """The flat fp32 tensors that the optimiser really moves: this rank's part of every group."""
        zero = member.wrapper.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def load_weights(self, member: Member, saved: SavedPlayer) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        if self.stage < 3:
            super().load_weights(member, saved)
            for _, parameter in member.named_trainable():
                safe_set_full_fp32_param(parameter, parameter.detach())
            return
        state = member.module.state_dict(keep_vars=True)
        different = sorted(state.keys() ^ set(saved.keys(WEIGHTS)))
        if different:
            raise ValueError(f"{different[0]!r} is only on one side")
        for key, tensor in state.items():
            value = saved.tensor(WEIGHTS, key).to(self.device)
            with gathered([tensor] if isinstance(tensor, nn.Parameter) else [], 0):
                if tensor.shape != value.shape:
                    raise ValueError(f"{key!r} is {list(value.shape)}, here {list(tensor.shape)}")
                tensor.detach().copy_(value)
        for name, parameter in member.named_trainable():
            safe_set_local_fp32_param(parameter, self.local_part(parameter, saved.tensor(WEIGHTS, name)))

    def load_optimizer(self, member: Member, saved: SavedPlayer) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        keys = state_keys(saved)
        if not keys:
            return
        name, states = next(iter(keys.items()))
        samples = {key: saved.tensor(OPTIMIZER, f"{name}/{key}") for key in states}
        zero = member.wrapper.optimizer
        for partition in self.partitions(member):
            zero.optimizer.state[partition] = {
                key: value.to(partition.device, copy=True) if value.dim() == 0 else torch.zeros_like(partition)
                for key, value in samples.items()}
        self.link_optimizer_state(member)
        for name, parameter in member.named_trainable():
            for key in (key for key, value in samples.items() if value.dim()):
                whole = saved.tensor(OPTIMIZER, f"{name}/{key}")
                if self.stage == 3:
                    safe_set_local_optimizer_state(parameter, self.local_part(parameter, whole), key)
                else:
                    safe_set_full_optimizer_state(parameter, whole.to(self.device), key)

    def local_part(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This rank's part of a ZeRO-3 parameter, zeros behind its end."""
        size = parameter.ds_tensor.numel()
        flat = torch.zeros(size * self.world_size, dtype=whole.dtype)
        flat[:whole.numel()] = whole.flatten()
        return flat[size * self.rank:size * (self.rank + 1)].to(self.device)


def launched_zero(config: RunConfig) -> dict[str, Any]:
    """DeepSpeed's ``zero_optimization`` as the launcher's files have it: its own JSON, or accelerate's YAML."""
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path:
        zero = read_deepspeed_file(Path(path), config)
    else:
        devices = {part: os.environ.get(f"ACCELERATE_DEEPSPEED_{part.upper()}_DEVICE", "none")
                   for part in ("offload_optimizer", "offload_param")}
        zero = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")),
                **{part: {"device": device} for part, device in devices.items() if device != "none"}}
    if zero.get("stage") not in (1, 2, 3):
        raise UserError(f"ZeRO stage {zero.get('stage')} is not one of 1, 2, 3; without ZeRO, launch with DDP")
    return zero


def read_deepspeed_file(path: Path, config: RunConfig) -> dict[str, Any]:
    """The ``zero_optimization`` section of a DeepSpeed JSON, without what it leaves to be guessed; the rest of the file
    must say what ``config`` says."""
    try:
        tree = json.loads(read_text_file(path))
    except UserError as error:
        raise UserError(f"the DeepSpeed file {error}") from None
    except ValueError as error:
        raise UserError(f"the DeepSpeed file {path} cannot be read: {error}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("zero_optimization"), dict):
        raise UserError(f"the DeepSpeed file {path} has no zero_optimization section")
    check_deepspeed_file(str(path), tree, config, launched_size())
    return {key: value for key, value in tree["zero_optimization"].items() if value != "auto"}


def communicate_in_bf16(module: nn.Module, zero: Any, gathers: bool) -> None:
    """Under autocast: with ``gathers`` (ZeRO-3), the ranks gather the weights of products in bf16, which is what
    autocast would round them to anyway; their parts, which are saved and moved, stay fp32. Small parameters that
    DeepSpeed never splits again are left out: what is gathered of those stays, and is what is saved.

    DeepSpeed has one mark on a parameter for that and for the exchange of its gradient, and under autocast none for the
    gradients of other layers; here ``engine.gradient_dtype`` alone decides what all gradients are exchanged in.
    """
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES, PARAM_COMM_DTYPE_ATTR_NAME

    exchanged_in = torch.bfloat16 if torch.bfloat16 in zero.ipg_buckets else torch.float32
    zero.get_param_comm_dtype = lambda parameter: exchanged_in
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            parameter.__dict__.pop(PARAM_COMM_DTYPE_ATTR_NAME, None)
            if gathers and not parameter.ds_persist and isinstance(part, tuple(LOWER_PRECISION_SAFE_MODULES)):
                setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, torch.bfloat16)


@contextmanager
def gathered(parameters: list[nn.Parameter], owner: int | None) -> Iterator[None]:
    """ZeRO-3 parameters in full, and in fp32, on every rank; what rank ``owner`` writes to them meanwhile is kept."""
    import deepspeed
    from deepspeed.runtime.torch_autocast import PARAM_COMM_DTYPE_ATTR_NAME
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    marks = [(parameter, parameter.__dict__.pop(PARAM_COMM_DTYPE_ATTR_NAME)) for parameter in parameters
             if PARAM_COMM_DTYPE_ATTR_NAME in parameter.__dict__]
    for parameter, _ in marks:
        if parameter.ds_status is ZeroParamStatus.AVAILABLE:
            parameter.partition()      # a forward left it there, rounded, and it would be taken as it is
    try:
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=owner):
            yield
    finally:
        for parameter, dtype in marks:
            setattr(parameter, PARAM_COMM_DTYPE_ATTR_NAME, dtype)
