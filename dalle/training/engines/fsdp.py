"""FSDP2: one player, with its weights, gradients, optimiser state and average in equal parts on all ranks.

torch's ``fully_shard`` is called directly: accelerate drops it without a word on CPU cores. Each child of an
``nn.ModuleList`` is a block that is gathered as its turn comes; everything else is gathered with the module itself. The
weights are fp32 and so is what the ranks exchange, unless ``engine.gradient_dtype`` says otherwise; bf16 is autocast,
as under DDP, whose bf16 copies of a block's weights stay until its backward unless the model is checkpointed. The
optimiser and the average see each rank's rows as plain tensors over the same memory: the same code as elsewhere.

Every rank has to call the module equally often, with the same parameters taking part in the loss.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dalle.errors import UserError
from dalle.training.checkpoint import OPTIMIZER, WEIGHTS, SavedPlayer
from dalle.training.compiling import blocks_of
from dalle.training.ema import EMA
from dalle.training.engines.base import Member, Outcome, state_keys
from dalle.training.engines.environment import is_set, launched_size, wants_cpu
from dalle.training.engines.gradients import fill_gradients
from dalle.training.engines.group import GroupEngine, average_gradients
from dalle.training.run import RunConfig
from dalle.training.task import Task


class FSDPEngine(GroupEngine):
    """Fully sharded data parallelism."""

    kind = "fsdp2"
    splits_parameters = True

    @classmethod
    def start(cls, config: RunConfig) -> "FSDPEngine":
        from accelerate import PartialState

        if os.environ.get("FSDP_VERSION", "2") != "2":
            raise UserError("this is FSDP2 only: set fsdp_version to 2 (launch/engines/fsdp2.yaml)")
        if is_set("FSDP_OFFLOAD_PARAMS"):
            raise UserError("FSDP keeps everything on the device: set fsdp_offload_params to false, "
                            "or launch with ZeRO and offload")
        if "RANK" not in os.environ:
            raise UserError("FSDP needs a launcher: accelerate launch --config_file launch/engines/fsdp2.yaml")
        on_cpu = wants_cpu()
        state = PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "nccl",
                             timeout=timedelta(minutes=config.engine.timeout_minutes))
        device = torch.device("cpu") if on_cpu else state.device
        engine = cls(config, device, state.process_index, launched_size())
        engine.open_control_group()
        engine.mesh = init_device_mesh(device.type, (engine.world_size,), mesh_dim_names=("shard",))
        return engine

    def __init__(self, config: RunConfig, device: torch.device, rank: int, world_size: int):
        super().__init__(config, device, rank, world_size)
        self.mesh: DeviceMesh | None = None

    # -- before the first step

    def check(self, task: Task) -> None:
        super().check(task)
        if len(task.players) > 1:
            raise UserError(f"FSDP trains one player and this task has {len(task.players)}, on networks too small to "
                            "gain from it: launch with DDP or ZeRO-1/2")
        name, player = next(iter(task.players.items()))
        if player.optimizer.name == "muon":
            raise UserError(f"player {name!r} uses Muon, which needs the matrices that FSDP splits: launch with DDP, "
                            "or set the optimizer's name to adamw")
        if self.options.offload_optimizer or self.options.offload_parameters:
            raise UserError("engine.offload_optimizer and engine.offload_parameters are for ZeRO: set them to false")

    def wrap(self, member: Member, folder: Path) -> None:
        names = {parameter: name for name, parameter in member.module.named_parameters()}
        trainable = [names[parameter] for parameter in member.trainable]
        groups = [[names[parameter] for parameter in group["params"]] for group in member.optimizer.param_groups]
        shard(member.module, self.mesh, torch.bfloat16 if self.options.gradient_dtype == "bf16" else None)
        member.wrapper = Rows(member.module)
        member.trainable = [member.wrapper.parameters[name] for name in trainable]
        for group, members in zip(member.optimizer.param_groups, groups, strict=True):
            group["params"] = [member.wrapper.rows[name] for name in members]

    def build_ema(self, member: Member) -> EMA:
        return ShardedEMA(member.wrapper, member.settings.ema, member.settings.ema_every, member.settings.ema_warmup)

    # -- one phase

    def autocast(self) -> AbstractContextManager:
        # in training without its cache, which would hold bf16 copies of all blocks until the forward is over
        return (torch.autocast(self.device.type, torch.bfloat16, cache_enabled=not torch.is_grad_enabled())
                if self.bf16 else nullcontext())

    def begin_micro_batch(self, last: bool) -> None:
        self.active.module.set_requires_gradient_sync(last)

    def step(self) -> Outcome:
        member, rows = self.active, self.active.wrapper
        self.exchange_gradients(member)
        norm = self.gradient_norm(rows)
        if member.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(rows.trainable, member.settings.clip, norm)
        skipped = 1.0 - norm.isfinite().float()      # of the norm over all ranks, so all ranks skip or none
        member.optimizer.found_inf = skipped
        member.optimizer.step()
        self.clear_gradients(member)
        return Outcome(norm, skipped)

    def exchange_gradients(self, member: Member) -> None:
        """FSDP has averaged the split gradients while the backward ran; those of single numbers follow."""
        rows = member.wrapper
        rows.take_gradients()
        fill_gradients(rows.trainable)
        if rows.numbers:
            average_gradients(rows.numbers, self.world_size, self.options.gradient_dtype)

    def gradient_norm(self, rows: "Rows") -> Tensor:
        square = torch.nn.utils.get_total_norm([parameter.grad for parameter in rows.split]).square()
        dist.all_reduce(square)
        for number in rows.numbers:
            square = square + number.grad.square()
        return square.sqrt()

    def clear_gradients(self, member: Member) -> None:
        member.module.zero_grad(set_to_none=True)
        member.optimizer.zero_grad(set_to_none=True)

    def penalty_forward_of(self, name: str) -> Callable[..., Any]:
        raise UserError("a penalty on gradients cannot be differentiated under FSDP: launch with DDP or ZeRO-1/2")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Every rank has the whole weights meanwhile: sampling calls blocks in ways and numbers that FSDP cannot see,
        and gathering them for each token would cost far more than it saves."""
        modules = [member.module for member in self.members.values()]
        with super().evaluation():
            try:
                for module in modules:
                    gather(module)
                yield
            finally:
                for module in modules:
                    reshard(module)
                    free_after_forward(module)

    # -- state

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor

    def optimizer_state(self, member: Member, parameter: nn.Parameter) -> dict[str, Tensor]:
        rows = member.wrapper.rows_of(parameter)
        return {key: self.whole(joined(value, parameter) if value.shape == rows.shape else value)
                for key, value in member.optimizer.state.get(rows, {}).items()}

    def load_weights(self, member: Member, saved: SavedPlayer) -> None:
        state = member.module.state_dict(keep_vars=True)      # torch splits again what is gathered, first
        different = sorted(state.keys() ^ set(saved.keys(WEIGHTS)))
        if different:
            raise ValueError(f"{different[0]!r} is only on one side")
        with torch.no_grad():
            for key, tensor in state.items():
                own_rows(tensor).copy_(rows_for(tensor, saved.tensor(WEIGHTS, key), key))

    def load_optimizer(self, member: Member, saved: SavedPlayer) -> None:
        keys = state_keys(saved)
        for name, parameter in member.named_trainable():
            state = {key: saved.tensor(OPTIMIZER, f"{name}/{key}") for key in keys.get(name, ())}
            if state:
                member.optimizer.state[member.wrapper.rows[name]] = {
                    key: rows_for(parameter, value, f"{name}/{key}") if value.shape == parameter.shape
                    else value.to(self.device, copy=True) for key, value in state.items()}


class Rows:
    """The parameters of a sharded module by name, and this rank's rows of each as plain tensors over their memory.

    A parameter that is a single number has no rows to deal out; every rank has all of it.
    """

    def __init__(self, module: nn.Module):
        self.parameters = dict(module.named_parameters())
        self.rows = {name: nn.Parameter(own_rows(parameter), parameter.requires_grad)
                     if isinstance(parameter, DTensor) else parameter for name, parameter in self.parameters.items()}
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self.trainable = [rows for rows in self.rows.values() if rows.requires_grad]
        self.split = [rows for rows in self.trainable if rows.ndim > 0]
        self.numbers = [rows for rows in self.trainable if rows.ndim == 0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return iter(self.rows.items())

    def rows_of(self, parameter: nn.Parameter) -> nn.Parameter:
        return self.rows[self._names[parameter]]

    def take_gradients(self) -> None:
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor):
                self.rows[name].grad = None if parameter.grad is None else own_rows(parameter.grad)


class ShardedEMA(EMA):
    """An average of which each rank keeps its own rows."""

    def __init__(self, rows: Rows, decay: float, every: int, warmup: bool):
        super().__init__(rows, decay, every, warmup=warmup)
        self._whole = rows.parameters

    def state_dict(self) -> dict[str, Tensor]:
        return {name: joined(value, self._whole[name]) for name, value in super().state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        super().load_state_dict({name: rows_for(self._whole[name], value, name) if name in self._whole else value
                                 for name, value in state.items()})


# -- tensors in parts

def own_rows(tensor: Tensor) -> Tensor:
    """This rank's rows of a split tensor, in the same memory; any other tensor as it is."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def joined(rows: Tensor, pattern: Tensor) -> Tensor:
    """The tensor, split as ``pattern`` is, of which this rank has ``rows``."""
    if not isinstance(pattern, DTensor):
        return rows
    return DTensor.from_local(rows, pattern.device_mesh, pattern.placements, run_check=False, shape=pattern.shape,
                              stride=pattern.stride())


def rows_for(pattern: Tensor, whole: Tensor, name: str) -> Tensor:
    """This rank's rows of ``whole``, dealt out as ``pattern`` is, and where it is; needs no other rank."""
    if whole.shape != pattern.shape:
        raise ValueError(f"{name!r} is {list(whole.shape)}, here {list(pattern.shape)}")
    if not isinstance(pattern, DTensor):
        return whole.to(pattern.device, copy=True)
    part = distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)
    return part.to_local().clone(memory_format=torch.contiguous_format)


# -- modules in parts

def shard(module: nn.Module, mesh: DeviceMesh, gradient_dtype: torch.dtype | None) -> None:
    """Split the parameters of ``module`` over ``mesh``, in place: each block apart, the rest together."""
    numbers = {parameter for parameter in module.parameters() if parameter.ndim == 0}    # FSDP refuses them
    for parameter in module.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)     # and other strides
    for part in [*blocks_of(module), module]:
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not module, ignored_params=numbers,
                    mp_policy=MixedPrecisionPolicy(reduce_dtype=gradient_dtype))


def sharded_parts(module: nn.Module) -> list[FSDPModule]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def gather(module: nn.Module) -> None:
    """Give every rank the whole parameters of ``module``, until :func:`reshard`."""
    for part in sharded_parts(module):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def reshard(module: nn.Module) -> None:
    for part in sharded_parts(module):
        part.reshard()


def free_after_forward(module: nn.Module) -> None:
    """Blocks give back what they gathered after each forward; the module itself, needed at once again, does not."""
    for part in sharded_parts(module):
        part.set_reshard_after_forward(part is not module, recurse=False)
