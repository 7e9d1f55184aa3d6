"""The engine: how losses become steps on one process, under DDP or DeepSpeed. Loop and tasks see only this.

``engine*.py`` are the only files that know accelerate and deepspeed. What goes through a wrapper and what through the
bare module differs from backend to backend, and the wrong choice is sometimes silent; here it is made once, and the
parity tests hold every backend against plain torch.

Three rules are the same everywhere. A parameter that a phase gave no gradient counts as having gradient zero. A
non-finite loss or gradient on any rank skips the player's step on all of them. In a phase only its player is trainable.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dalle.config import Section
from dalle.errors import UserError
from dalle.training.ema import Average
from dalle.training.optimizers import OptimizerConfig, build_optimizer, set_learning_rate
from dalle.training.task import Batch, Phase, Task

if TYPE_CHECKING:
    from dalle.training.run import RunConfig

WEIGHTS, OPTIMIZER, AVERAGE = "weights.safetensors", "optimizer.pt", "average.safetensors"


class EngineConfig(Section):
    """What the launcher does not say about the backend; DDP or ZeRO, and its stage, come from ``accelerate launch``."""

    gradient_dtype: str = Field(default="fp32", pattern="^(fp32|bf16)$", description="what the ranks exchange")
    offload_optimizer: bool = Field(default=False, description="ZeRO: optimiser state in host memory")
    offload_parameters: bool = Field(default=False, description="ZeRO-3: parameters in host memory")
    bucket_elements: int = Field(default=50_000_000, ge=1, description="ZeRO: elements exchanged at once")
    allow_zero3_players: bool = Field(default=False, description="ZeRO-3 for a task of several players")
    timeout_minutes: float = Field(default=10, gt=0, description="a collective that takes longer ends the run")


@dataclass
class Member:
    """A player as the engine holds it."""

    name: str
    module: nn.Module
    settings: OptimizerConfig
    trainable: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: Average | None = None
    wrapper: Any = None       # what DDP or DeepSpeed put around the module
    is_open: bool = True      # whether ``trainable`` has requires_grad on


@dataclass
class Outcome:
    """One player's step: gradient norm before clipping, and 1.0 where the step was skipped; both 0-d on the device."""

    grad_norm: Tensor
    skipped: Tensor


class EngineNetworks:
    """What a task sees of the engine; see :class:`dalle.training.task.Networks`."""

    def __init__(self, engine: "Engine", modules: Mapping[str, nn.Module]):
        self._engine, self._modules = engine, modules
        self.rank, self.world_size = engine.rank, engine.world_size

    def __getitem__(self, name: str) -> Callable[..., Any]:
        module = self.bare(name)
        return self._engine.forward_of(name) if name in self._engine.members else module

    def penalty(self, name: str) -> Callable[..., Any]:
        module = self.bare(name)
        return self._engine.penalty_forward_of(name) if name in self._engine.members else module

    def bare(self, name: str) -> nn.Module:
        if name not in self._modules:
            raise KeyError(f"unknown network {name!r}; known: {', '.join(sorted(self._modules))}")
        return self._modules[name]

    def mean(self, value: Tensor) -> Tensor:
        """``value`` averaged over the ranks, without gradient; every rank must ask."""
        return self._engine.mean(value)


class Engine:
    """One process; the base of the others. Used in this order: prepare, then for every phase begin, backward, step."""

    kind = "single"
    splits_parameters = False

    def __init__(self, config: "RunConfig", device: torch.device, rank: int = 0, world_size: int = 1):
        self.device, self.rank, self.world_size = device, rank, world_size
        self.options, self.compile = config.engine, config.train.compile
        self.bf16 = config.train.precision == "bf16"
        self.local_batch, self.accumulation = split_batch(config.train.batch_size, config.train.micro_batch_size,
                                                          world_size)
        self.members: dict[str, Member] = {}
        self.active: Member | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def layout(self) -> dict[str, Any]:
        """What a checkpoint of this engine can be loaded into: equal layouts, nothing else."""
        return {"format": "full"}

    # -- before the first step

    def prepare(self, task: Task, folder: Path) -> None:
        """Move, wrap and give an optimiser to the task's networks; generated settings go into ``folder``."""
        self.check(task)
        for module in task.frozen.values():
            module.to(self.device).eval().requires_grad_(False)
        for name, player in task.players.items():
            module = player.module.to(self.device).train()
            if self.compile:
                module.compile()
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            member = Member(name, module, player.optimizer, trainable, build_optimizer(module, player.optimizer))
            self.wrap(member, folder)
            if player.optimizer.ema > 0:
                member.average = self.build_average(member)
            self.members[name] = member
        modules = {**task.frozen, **{name: member.module for name, member in self.members.items()}}
        self.networks = EngineNetworks(self, modules)

    def check(self, task: Task) -> None:
        """Raise :class:`UserError` for what this backend cannot do with the task."""
        if self.accumulation > 1 and not task.splits_batch:
            raise UserError(f"{type(task).__name__} compares the samples of a batch with one another, so it cannot be "
                            f"split into {self.accumulation} micro-batches: remove train.micro_batch_size")
        unknown = {phase.player for phase in task.phases} - set(task.players)
        if unknown:
            raise ValueError(f"a phase moves {sorted(unknown)[0]!r}; players: {', '.join(task.players)}")

    def wrap(self, member: Member, folder: Path) -> None:
        """Put the backend's wrapper around the member's module."""

    def build_average(self, member: Member) -> Average:
        return Average(member.module, member.settings.ema, member.settings.ema_every)

    # -- one phase

    def to_device(self, batch: Batch) -> Batch:
        return {key: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()}

    def autocast(self) -> AbstractContextManager:
        """bf16 for the operations that are safe in it, where the run asks for bf16; weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def begin_phase(self, phase: Phase, step: int, steps: int) -> None:
        """Make the phase's player the one that learns: the others frozen, its learning rate set, its gradients gone."""
        self.active = self.members[phase.player]
        for member in self.members.values():
            if member.is_open != (member is self.active):
                member.is_open = member is self.active
                for parameter in member.trainable:
                    parameter.requires_grad_(member.is_open)
        set_learning_rate(self.active.optimizer, self.active.settings.factor(step, steps))
        self.clear_gradients(self.active)

    def begin_micro_batch(self, last: bool) -> None:
        """Called before the forward of every micro-batch: only after the last one are gradients exchanged."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss`` (already divided by the number of micro-batches) into the active player."""
        poisoned(loss).backward()

    def step(self) -> Outcome:
        """Exchange, clip, and move the active player, unless its gradient is not finite."""
        member = self.active
        self.exchange_gradients(member)
        gradients = [parameter.grad for parameter in member.trainable]
        norm = torch.nn.utils.get_total_norm(gradients)
        if member.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(member.trainable, member.settings.clip, norm)
        skipped = 1.0 - norm.isfinite().float()
        member.optimizer.found_inf = skipped     # read by the optimiser on the device: no host synchronisation
        member.optimizer.step()
        self.clear_gradients(member)
        return Outcome(norm, skipped)

    def clear_gradients(self, member: Member) -> None:
        member.optimizer.zero_grad(set_to_none=True)

    def exchange_gradients(self, member: Member) -> None:
        """The mean gradient of all ranks on every rank; absent gradients become zeros."""
        fill_gradients(member.trainable)

    def forward_of(self, name: str) -> Callable[..., Any]:
        """What a loss calls for player ``name``."""
        return self.members[name].module

    def penalty_forward_of(self, name: str) -> Callable[..., Any]:
        """What a loss calls for player ``name`` when it differentiates the outcome twice."""
        return self.twice_differentiable(self.members[name].module)

    def twice_differentiable(self, module: nn.Module) -> Callable[..., Any]:
        if not self.compile:
            return module

        def eager(*arguments: Any, **named: Any) -> Any:
            with torch.compiler.set_stance("force_eager"):    # compiled code has no second derivative
                return module(*arguments, **named)

        return eager

    def update_averages(self, step: int) -> None:
        """Take the weights after ``step`` finished steps into the averages."""
        for member in self.members.values():
            if member.average is not None:
                member.average.update(step)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Averaged weights where there are any, evaluation mode, no gradient."""
        with torch.no_grad(), ExitStack() as applied:
            for member in self.members.values():
                if member.average is not None:
                    applied.enter_context(member.average.applied())
                member.module.eval()
            try:
                yield
            finally:
                for member in self.members.values():
                    member.module.train()

    # -- between processes

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        return [value]

    def largest(self, value: int) -> int:
        """The largest of the ranks' small integers: one cheap agreement a step."""
        return value

    def mean(self, value: Tensor) -> Tensor:
        return value.detach()

    def barrier(self) -> None:
        """Wait for all ranks."""

    def together(self, action: Callable[[], Any], only_main: bool = False) -> Any:
        """Run ``action`` (on rank 0 alone with ``only_main``); where it fails for one rank it fails for all.

        Returns this rank's result, or rank 0's with ``only_main``. A :class:`UserError` or ``OSError`` of any rank is
        raised on each, so that none is left waiting in a collective.
        """
        result, error = None, None
        if self.is_main or not only_main:
            try:
                result = action()
            except (UserError, OSError) as caught:
                error = caught
        answers = self.gather((result if only_main else None, error))
        for _, failure in answers:
            if failure is not None:
                raise error or failure
        return answers[0][0] if only_main else result

    def close(self) -> None:
        """Leave the process group."""

    def leave(self, status: int) -> int:
        """The last call of a command, after :meth:`close`: what its process ends with."""
        return status

    # -- state

    def save_player(self, name: str, folder: Path) -> None:
        """Write everything about a player that evolves into ``folder``; called on every rank."""
        member = self.members[name]
        if not self.is_main:
            return
        save_file(unshared(member.module.state_dict()), folder / WEIGHTS)
        torch.save(member.optimizer.state_dict(), folder / OPTIMIZER)
        if member.average is not None:
            save_file(unshared(member.average.state_dict()), folder / AVERAGE)

    def load_player(self, name: str, folder: Path) -> None:
        """Read what :meth:`save_player` wrote; raises ``ValueError`` or ``RuntimeError`` where it does not fit."""
        member = self.members[name]
        member.module.load_state_dict(load_file(folder / WEIGHTS))
        saved = torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True)
        with settings_kept(member.optimizer):
            member.optimizer.load_state_dict(saved)
        self.load_average(member, folder / AVERAGE)

    def load_average(self, member: Member, path: Path) -> None:
        if member.average is not None and path.is_file():   # an average switched on at a resume starts at the weights
            member.average.load_state_dict(load_file(path, device=str(self.device)))
        elif member.average is not None:
            member.average = self.build_average(member)

    def full_state(self, name: str) -> dict[str, Tensor]:
        """The player's whole state dict on the CPU (on rank 0; the others may get nothing); called on every rank."""
        return unshared(self.members[name].module.state_dict()) if self.is_main else {}


def poisoned(loss: Tensor) -> Tensor:
    """``loss`` with a non-finite value made to spoil every gradient, so that all ranks see it without asking."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def fill_gradients(parameters: list[nn.Parameter]) -> bool:
    """Give zeros to parameters without a gradient; whether there were any."""
    missing = [parameter for parameter in parameters if parameter.grad is None]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    return bool(missing)


@contextmanager
def settings_kept(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Keep learning rates, decay and the like as the config built them while a state is loaded into ``optimizer``."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    yield
    for group, kept in zip(optimizer.param_groups, settings, strict=True):
        group.update(kept)


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU copies, no two of which share memory, as safetensors wants them."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def split_batch(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """(samples a process, micro-batches a step) of a global batch; :class:`UserError` where they do not divide."""
    if batch_size % world_size:
        legal = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
        raise UserError(f"train.batch_size {batch_size} does not divide over {world_size} processes; "
                        f"it does over {', '.join(map(str, legal))}")
    local = batch_size // world_size
    micro = local if micro_batch_size is None else min(micro_batch_size, local)
    if local % micro:
        raise UserError(f"train.micro_batch_size {micro} does not divide the {local} samples of each process "
                        f"(train.batch_size {batch_size} over {world_size})")
    return local, local // micro


def launched_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def wants_cpu() -> bool:
    return is_set("ACCELERATE_USE_CPU") or os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def asked_for_more_processes() -> bool:
    """Whether this is the one process that ``accelerate launch --num_processes N`` starts where there is no GPU.

    Without a GPU and without ``--multi_gpu``, accelerate prepares the environment of N processes, then starts one.
    """
    return ("ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
            and "WORLD_SIZE" not in os.environ)


def relaunch() -> NoReturn:
    """Become torchrun with as many processes as ``accelerate launch`` was asked for; its command line says how many."""
    asked = asked_processes(psutil.Process().parent().cmdline())
    if asked is None:
        raise UserError("accelerate launch started one process where several were asked for: on CPU cores give it "
                        "--config_file launch/engines/ddp.yaml --num_processes N")
    print(f"accelerate launch starts one process where there is no GPU; starting {asked} with torchrun", flush=True)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)      # torchrun finds a free port of its own
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                              str(asked), *sys.argv])


def asked_processes(command: list[str]) -> int | None:
    """The value of ``--num_processes`` in a launcher's command line."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.replace("-", "_").partition("=")
        if option == "__num_processes":
            number = value if equals else following
            return int(number) if number.isdecimal() else None
    return None


def create_engine(config: "RunConfig") -> Engine:
    """The engine that the launcher's environment asks for; before loaders and networks, since it knows the rank."""
    if is_set("ACCELERATE_USE_FSDP"):
        raise UserError("FSDP is not one of the engines: launch with DDP or ZeRO (launch/engines)")
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        from dalle.training.engine_deepspeed import DeepSpeedEngine

        return DeepSpeedEngine.start(config)
    if asked_for_more_processes():
        relaunch()
    if launched_size() > 1:
        from dalle.training.engine_ddp import DistributedEngine

        return DistributedEngine.start(config)
    return Engine(config, torch.device("cpu") if wants_cpu() else torch.device("cuda", 0))
