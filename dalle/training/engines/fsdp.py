"""FSDP2: one player, with its weights, gradients, optimiser state and average in equal parts on all ranks.

torch's ``fully_shard`` is called directly: accelerate drops it without a word on CPU cores. Each child of an
``nn.ModuleList`` is a block that is gathered as its turn comes; everything else is gathered with the module itself. The
weights are fp32 and so are the gradients that the ranks exchange, unless ``engine.gradient_dtype`` says otherwise.
Under bf16 the blocks are gathered in bf16, which is what autocast would make of their weights; their norms stay whole
and fp32 on every rank, and what is outside of the blocks (embeddings, heads) is gathered in fp32, so that autocast,
which stays on, rounds where it does under DDP. The optimiser and the average see each rank's rows as plain tensors over
the same memory: the same code as elsewhere.

With ``engine.shard_size`` (HSDP) so many neighbouring ranks share one copy, and the copies average their gradients. A
deferred module (``dalle/training/deferred.py``) gets its memory block by block, as it is split.

Every rank has to call the module equally often, with the same parameters taking part in the loss.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
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
from dalle.training.deferred import is_deferred, materialise
from dalle.training.ema import EMA
from dalle.training.engines.base import Member, state_keys
from dalle.training.engines.environment import is_set, launched_size, wants_cpu
from dalle.training.engines.gradients import fill_gradients, total_norm
from dalle.training.engines.group import GroupEngine, average_gradients
from dalle.training.memory import Blocks
from dalle.training.run import RunConfig
from dalle.training.task import Task


class FSDPEngine(GroupEngine):
    """Fully sharded data parallelism."""

    kind = "fsdp2"
    splits_parameters = True
    defers_weights = True

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
        engine.mesh = build_mesh(device.type, engine.world_size, config.engine.shard_size)
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

    def place(self, module: nn.Module) -> nn.Module:
        return module if is_deferred(module) else super().place(module)

    def wrap(self, member: Member, folder: Path) -> None:
        names = {parameter: name for name, parameter in member.module.named_parameters()}
        trainable = [names[parameter] for parameter in member.trainable]
        groups = [[names[parameter] for parameter in group["params"]] for group in member.optimizer.param_groups]
        exchanged = torch.bfloat16 if self.options.gradient_dtype == "bf16" else torch.float32
        shard(member.module, self.mesh, exchanged, torch.bfloat16 if self.bf16 else None)
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
        # each micro-batch's gradients are split at once: whole ones would take as much memory as whole weights
        self.active.module.set_requires_all_reduce(last)

    def exchange_gradients(self, member: Member) -> None:
        """FSDP has averaged the split gradients while the backward ran; those of whole parameters follow."""
        rows = member.wrapper
        rows.take_gradients()
        fill_gradients(rows.trainable)
        if rows.whole:
            average_gradients(rows.whole, self.world_size, self.options.gradient_dtype)

    def gradient_norm(self, member: Member) -> Tensor:
        """Over all ranks, so that all skip a step or none."""
        rows = member.wrapper
        square = torch.zeros((), device=self.device)
        if rows.split:
            square = total_norm([parameter.grad for parameter in rows.split]).square()
        dist.all_reduce(square)      # over the copies, too: one number, bit for bit, on all ranks
        square /= self.world_size // self.mesh["shard"].size()
        if rows.whole:
            square = square + total_norm([parameter.grad for parameter in rows.whole]).square()
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

    @contextmanager
    def whole_networks(self) -> Iterator[None]:
        """Sampling computes in the type of the weights, which has to be one: under bf16 that of the gathered blocks."""
        with ExitStack() as stack:
            for member in self.members.values():
                if self.bf16 and blocks_of(member.module):
                    stack.enter_context(all_in(member.module, torch.bfloat16))
            yield

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

    A parameter that is not split (a single number, a block's norm under bf16) is whole on every rank.
    """

    def __init__(self, module: nn.Module):
        self.parameters = dict(module.named_parameters())
        self.rows = {name: nn.Parameter(own_rows(parameter), parameter.requires_grad)
                     if isinstance(parameter, DTensor) else parameter for name, parameter in self.parameters.items()}
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self.trainable = [rows for rows in self.rows.values() if rows.requires_grad]
        self.split = [rows for rows in self.trainable if rows not in self._names]
        self.whole = [rows for rows in self.trainable if rows in self._names]

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

def build_mesh(device: str, world_size: int, shard_size: int | None) -> DeviceMesh:
    """All ranks as (replicate, shard) where several copies are kept, else as (shard,)."""
    size = shard_size or world_size
    if world_size % size:
        raise UserError(f"engine.shard_size {size} does not divide the {world_size} processes into equal groups")
    if size == world_size:
        return init_device_mesh(device, (size,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (world_size // size, size), mesh_dim_names=("replicate", "shard"))


def shard(module: nn.Module, mesh: DeviceMesh, exchanged: torch.dtype, blocks_in: torch.dtype | None) -> None:
    """Split the parameters of ``module`` over ``mesh``, in place: each block apart, gathered in ``blocks_in``, the rest
    together. One that is deferred gets its memory a block at a time."""
    blocks = blocks_of(module)
    for part in [*blocks, module]:
        materialise(part, torch.device(mesh.device_type, torch.cuda.current_device())
                    if mesh.device_type == "cuda" else torch.device("cpu"))
        for parameter in part.parameters():
            if not isinstance(parameter, DTensor):
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)     # FSDP refuses others
        policy = MixedPrecisionPolicy(param_dtype=None if part is module else blocks_in, reduce_dtype=exchanged,
                                      cast_forward_inputs=False)
        fully_shard(part, mesh=mesh, reshard_after_forward=part is not module, mp_policy=policy,
                    ignored_params=whole_parameters(module, blocks_in))


def blocks_apart(module: nn.Module, bf16: bool) -> Blocks:
    """The parameters of a module as :func:`shard` deals them out."""
    whole = whole_parameters(module, torch.bfloat16 if bf16 else None)
    seen, blocks = set(whole), []
    for part in [*blocks_of(module), module]:
        blocks.append(tuple(parameter for parameter in part.parameters() if parameter not in seen))
        seen.update(blocks[-1])
    return Blocks(tuple(blocks[:-1]), blocks[-1], tuple(whole))


def whole_parameters(module: nn.Module, blocks_in: torch.dtype | None) -> set[nn.Parameter]:
    """What is not split: single numbers, which FSDP refuses, and the blocks' norms where those are gathered in fewer
    bits, for FSDP gathers a block in one type."""
    norms = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
    return {parameter for parameter in module.parameters() if parameter.ndim == 0} | {
        parameter for block in blocks_of(module) if blocks_in is not None for part in block.modules()
        if isinstance(part, norms) for parameter in part.parameters(recurse=False)}


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


@contextmanager
def all_in(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Every gathered parameter in ``dtype`` meanwhile; those that are not are replaced by copies."""
    replaced = [(part, name, parameter) for part in module.modules() for name, parameter in part._parameters.items()
                if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype]
    try:
        for part, name, parameter in replaced:
            part._parameters[name] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        yield
    finally:
        for part, name, parameter in replaced:
            part._parameters[name] = parameter


def free_after_forward(module: nn.Module) -> None:
    """Blocks give back what they gathered after each forward; the module itself, needed at once again, does not."""
    for part in sharded_parts(module):
        part.set_reshard_after_forward(part is not module, recurse=False)
