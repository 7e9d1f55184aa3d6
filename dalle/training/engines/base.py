"""The engine: how losses become steps on one process, under DDP or DeepSpeed. Loop and tasks see only this.

The files of this folder are the only ones that know accelerate and deepspeed. What goes through a wrapper and what
through the bare module differs from backend to backend, and the wrong choice is sometimes silent; here it is made once,
and the parity tests hold every backend against plain torch.

Three rules are the same everywhere. A parameter that a phase gave no gradient counts as having gradient zero. A
non-finite loss or gradient on any rank skips the player's step on all of them. In a phase only its player is trainable.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.training.capture import Capture, GraphRecorder, Recorder, reason_to_run_plainly
from dalle.training.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS, SavedPlayer
from dalle.training.compiling import compile_network, pays, uncompiled
from dalle.training.ema import EMA
from dalle.training.engines.copies import copies_of
from dalle.training.engines.gradients import clipping_divisor, fill_gradients, poisoned, total_norm
from dalle.training.float8 import check_float8, compute_in_float8
from dalle.training.optimizers import (
    OptimizerConfig,
    build_optimizer,
    optimizer_parts,
    rates_on,
    set_learning_rate,
)
from dalle.training.run import RunConfig
from dalle.training.settings import split_batch
from dalle.training.task import Batch, Phase, Task, parameter_count

log = logging.getLogger(__name__)

MOST_WRITERS = 8      # ranks that share the writing of a checkpoint, spread over the job

Snapshot = dict[str, dict[str, Tensor]]     # section -> key -> tensor on the CPU


def writing_ranks(world_size: int) -> list[int]:
    """The ranks that share the writing of a checkpoint."""
    count = min(world_size, MOST_WRITERS)
    return [index * world_size // count for index in range(count)]


@dataclass
class Member:
    """A player as the engine holds it."""

    name: str
    module: nn.Module
    settings: OptimizerConfig
    trainable: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None = None
    wrapper: Any = None       # what DDP or DeepSpeed put around the module
    is_open: bool = True      # whether ``trainable`` has requires_grad on
    factor: float | None = None       # of its learning rates, as they are set

    def named_trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        chosen = {id(parameter) for parameter in self.trainable}
        return ((name, parameter) for name, parameter in self.module.named_parameters() if id(parameter) in chosen)


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

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """``value`` averaged over the ranks, without gradient; every rank must ask."""
        return self._engine.all_reduce_mean(value)


class Engine:
    """One process; the base of the others. Used in this order: prepare, then for every phase begin, backward, step."""

    kind = "single"
    splits_parameters = False       # `evaluation` is a collective: every rank enters it, for previews, too
    defers_weights = False          # a large player comes without memory, and gets it part by part (`deferred.py`)
    evaluates_in_step = False       # and so is each forward in it

    def __init__(self, config: RunConfig, device: torch.device, rank: int = 0, world_size: int = 1):
        self.device, self.rank, self.world_size = device, rank, world_size
        self.options, self.compile, self.steps = config.engine, config.train.compile, config.train.steps
        self.precision = config.train.precision
        self.bf16 = config.train.bf16
        self.compiled = False                      # whether :meth:`prepare` had a player compiled
        self.remarks: list[str] = []               # and what it chose, for the first line of the run
        self.local_batch, self.accumulation = split_batch(config.train.batch_size, config.train.micro_batch_size,
                                                          world_size)
        self.members: dict[str, Member] = {}
        self.active: Member | None = None
        self.networks = EngineNetworks(self, {})      # those of a task, from :meth:`prepare` on
        self.copies = copies_of(device)
        self.capture: Capture | None = None           # what records and replays steps, where they are
        self._capture_wish = config.train.capture

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    # -- before the first step

    def prepare(self, task: Task, folder: Path) -> None:
        """Move, wrap and give an optimiser to the task's networks; generated settings go into ``folder``."""
        self.check(task)
        for module in task.frozen.values():
            module.to(self.device).eval().requires_grad_(False)
        for name, player in task.players.items():
            module = self.place(player.module).train()
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            if self.precision == "fp8":
                self.remarks.append(f"fp8: {compute_in_float8(module)} matrices of {name}")
            if self.compiles(module):
                self.compiled = True
                what = compile_network(module, hooked=self.splits_parameters)
                self.remarks.append(f"compiled: {what} of {name}")
            settings = player.optimizer.of(parameter_count(module))
            member = Member(name, module, settings, trainable, build_optimizer(module, settings, self.share_rows))
            self.wrap(member, folder)
            if settings.ema > 0:
                member.ema = self.build_ema(member)
            self.members[name] = member
        modules = {**task.frozen, **{name: member.module for name, member in self.members.items()}}
        self.networks = EngineNetworks(self, modules)
        reason = reason_to_run_plainly(
            self._capture_wish, task, alone_on_cuda=self.kind == "single" and self.device.type == "cuda",
            accumulation=self.accumulation, compiled=self.compiled)
        if reason is None:
            stream = torch.cuda.Stream(self.device)
            self.record_steps(lambda: GraphRecorder(stream))
        elif self._capture_wish:
            log.warning("train.capture: the steps are run plainly: %s", reason)

    def record_steps(self, new_recorder: Callable[[], Recorder]) -> None:
        """Have steps recorded and replayed from now on, with learning rates that a replay reads anew."""
        optimizers = [member.optimizer for member in self.members.values()]
        for optimizer in optimizers:
            rates_on(optimizer, self.device)
        self.capture = Capture(new_recorder, optimizers)

    def share_rows(self, rows: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """``work`` done to rows [n, ...] that are the same on all ranks; each rank may do a part, and all get all."""
        return work(rows)

    def place(self, module: nn.Module) -> nn.Module:
        """A player's network where it is trained."""
        return module.to(self.device)

    def compiles(self, module: nn.Module) -> bool:
        """Whether a player's network is compiled: as the config says, or, where it leaves that open, if it pays: in fp8
        always, whose roundings are passes over memory of their own unless they are fused."""
        if self.compile is not None:
            return self.compile
        return self.device.type == "cuda" if self.precision == "fp8" else pays(module, self.device, self.steps)

    @property
    def computes(self) -> str:
        """How the players are computed, in words; known after :meth:`prepare`."""
        return "; ".join([self.precision, *self.remarks])

    def check(self, task: Task) -> None:
        """Raise :class:`UserError` for what this backend cannot do with the task."""
        if self.accumulation > 1 and not task.splits_batch:
            raise UserError(f"{type(task).__name__} compares the samples of a batch with one another, so it cannot be "
                            f"split into {self.accumulation} micro-batches: remove train.micro_batch_size")
        if self.options.shard_size is not None and self.world_size > 1 and self.kind != "fsdp2":
            raise UserError("engine.shard_size is for FSDP2 (launch/engines/fsdp2.yaml): leave it out")
        task.check_share(self.local_batch // self.accumulation, self.world_size)
        if self.precision == "fp8":
            check_float8(self.device)
        unknown = {phase.player for phase in task.phases} - set(task.players)
        if unknown:
            raise ValueError(f"a phase moves {sorted(unknown)[0]!r}; players: {', '.join(task.players)}")

    def wrap(self, member: Member, folder: Path) -> None:
        """Put the backend's wrapper around the member's module."""

    def build_ema(self, member: Member) -> EMA:
        return EMA(member.module, member.settings.ema, member.settings.ema_every, warmup=member.settings.ema_warmup)

    # -- one phase

    def to_device(self, batch: Batch) -> Batch:
        return self.copies.to_device(batch)

    def autocast(self) -> AbstractContextManager:
        """bf16 for the operations that are safe in it, unless the run is fp32; weights stay fp32."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def begin_phase(self, phase: Phase) -> None:
        """Make the phase's player the one that learns: the others frozen, its gradients gone."""
        self.active = self.members[phase.player]
        for member in self.members.values():
            if member.is_open != (member is self.active):
                member.is_open = member is self.active
                for parameter in member.trainable:
                    parameter.requires_grad_(member.is_open)
        self.clear_gradients(self.active)

    def set_rates(self, step: int, steps: int) -> None:
        """The learning rates of all players, once a step."""
        for member in self.members.values():
            factor = member.settings.factor(step, steps)
            if factor != member.factor:
                set_learning_rate(member.optimizer, factor)
                member.factor = factor

    def begin_micro_batch(self, last: bool) -> None:
        """Called before the forward of every micro-batch: only after the last one are gradients exchanged."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of ``loss`` (already divided by the number of micro-batches) into the active player."""
        poisoned(loss).backward()

    def step(self) -> Outcome:
        """Exchange, clip, and move the active player, unless its gradient is not finite."""
        member = self.active
        self.exchange_gradients(member)
        norm = self.gradient_norm(member)
        skipped = 1.0 - norm.isfinite().float()
        # both are read by the optimiser, on the device: no host synchronisation, and no pass that only scales
        member.optimizer.grad_scale = clipping_divisor(norm, member.settings.clip)
        member.optimizer.found_inf = skipped
        member.optimizer.step()
        self.clear_gradients(member)
        return Outcome(norm, skipped)

    def gradient_norm(self, member: Member) -> Tensor:
        """That of the player's whole gradient, 0-d, the same on every rank."""
        return total_norm([parameter.grad for parameter in member.trainable])

    def clear_gradients(self, member: Member) -> None:
        for parameter in member.trainable:
            parameter.grad = None

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
        def eager(*arguments: Any, **named: Any) -> Any:
            with uncompiled():
                return module(*arguments, **named)

        return eager

    def update_ema(self, step: int) -> None:
        """Take the weights after ``step`` finished steps into the averages."""
        for member in self.members.values():
            if member.ema is not None:
                member.ema.update(step)

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Averaged weights where there are any, evaluation mode, no gradient."""
        with torch.no_grad(), ExitStack() as applied:
            for member in self.members.values():
                if member.ema is not None:
                    applied.enter_context(member.ema.applied())
                member.module.eval()
            try:
                yield
            finally:
                for member in self.members.values():
                    member.module.train()

    @contextmanager
    def whole_networks(self) -> Iterator[None]:
        """All weights on every rank meanwhile: sampling calls blocks, and reads weights, in no forward of the whole."""
        yield

    # -- between processes

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        return [value]

    def all_reduce_max(self, *values: int) -> tuple[int, ...]:
        """The largest over the ranks of each of some small integers: one cheap agreement a step."""
        return values

    def start_max(self, *values: int) -> Callable[[], tuple[int, ...]]:
        """Begin the same without waiting; what is returned waits, and gives the answer. Other exchanges may lie in
        between."""
        return lambda: values

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        return value.detach()

    def share_buffers(self) -> None:
        """Rank 0's buffers (the statistics of BatchNorm) on every rank: those that are saved and evaluated with."""

    def barrier(self) -> None:
        """Wait for all ranks."""

    def together(self, action: Callable[[], Any], only_rank0: bool = False) -> Any:
        """Run ``action`` (on rank 0 alone with ``only_rank0``); where it fails for one rank it fails for all.

        Returns this rank's result, or rank 0's with ``only_rank0``. A :class:`UserError` or ``OSError`` of any rank is
        raised on each, so that none is left waiting in a collective.
        """
        result, error = None, None
        if self.is_rank0 or not only_rank0:
            try:
                result = action()
            except (UserError, OSError) as caught:
                error = caught
        answers = self.gather((result if only_rank0 else None, error))
        for _, failure in answers:
            if failure is not None:
                raise error or failure
        return answers[0][0] if only_rank0 else result

    def close(self) -> None:
        """Leave the process group."""

    def leave(self, status: int) -> int:
        """The last call of a command, after :meth:`close`: what its process ends with."""
        return status

    # -- state

    def snapshot(self, name: str) -> Snapshot:
        """Copies, on the CPU, of what this rank writes of a player's state; called on every rank, between
        ``copies.begin()`` and ``copies.end()``, and to be read after ``copies.wait()``.

        All that evolves is in it once: the ranks of :attr:`writers` share the tensors by size.
        """
        self.share_buffers()
        member = self.members[name]
        copies: Snapshot = {WEIGHTS: {}, OPTIMIZER: {}, AVERAGE: {}}
        shares = dict.fromkeys(self.writers, 0)
        for section, key, tensor in self.whole_state(member):
            writer = min(shares, key=shares.__getitem__)
            shares[writer] += tensor.nbytes
            if writer == self.rank:
                copies[section][key] = self.copies.to_host(f"{name}/{section}/{key}", tensor)
        if member.ema is not None and member.ema.is_split:
            copies[AVERAGE] = {key: self.copies.to_host(f"{name}/{AVERAGE}/{key}", value)
                               for key, value in member.ema.state_dict().items()}
        return copies

    @property
    def writers(self) -> list[int]:
        return writing_ranks(self.world_size)

    def whole_state(self, member: Member) -> Iterator[tuple[str, str, Tensor]]:
        """(section, key, whole tensor) of the member's state, in the same order on all ranks, all of which must ask.

        An average that is split over the ranks by name is not among it.
        """
        for key, tensor in member.module.state_dict(keep_vars=True).items():
            yield WEIGHTS, key, self.whole(tensor).detach()
        for name, parameter in member.named_trainable():
            for key, value in self.optimizer_state(member, parameter).items():
                yield OPTIMIZER, f"{name}/{key}", value.detach()
        if member.ema is not None and not member.ema.is_split:
            for key, value in member.ema.state_dict().items():
                yield AVERAGE, key, self.whole(value).detach()

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor of the module, or of its average, in full; on every rank."""
        return tensor

    def optimizer_state(self, member: Member, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimiser keeps of one parameter, in full, by its own names; on every rank."""
        parts = optimizer_parts(member.optimizer)
        return next((dict(part.state[parameter]) for part in parts if parameter in part.state), {})

    def load_player(self, name: str, saved: SavedPlayer) -> None:
        """Take over a saved state; raises ``ValueError``, ``KeyError`` or ``RuntimeError`` where it does not fit."""
        member = self.members[name]
        if self.capture is not None:
            self.capture.forget()
        self.load_weights(member, saved)
        self.load_optimizer(member, saved)
        if member.ema is not None and saved.keys(AVERAGE):
            member.ema.load_state_dict({key: saved.tensor(AVERAGE, key) for key in member.ema.names})
        elif member.ema is not None:      # one switched on at a resume starts at the weights
            member.ema = self.build_ema(member)

    def load_weights(self, member: Member, saved: SavedPlayer) -> None:
        member.module.load_state_dict(saved.section(WEIGHTS))

    def load_optimizer(self, member: Member, saved: SavedPlayer) -> None:
        """Learning rates, decay and the like stay as the config built them: only what evolves was saved."""
        keys = state_keys(saved)
        moved_by = {parameter: part for part in optimizer_parts(member.optimizer)
                    for group in part.param_groups for parameter in group["params"]}
        for name, parameter in member.named_trainable():
            state = {key: like(parameter, saved.tensor(OPTIMIZER, f"{name}/{key}")) for key in keys.get(name, ())}
            if state:
                moved_by[parameter].state[parameter] = state


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """``value`` where the parameter is and, if it has its shape, with its strides: fused optimisers walk raw memory."""
    if value.shape != parameter.shape:
        return value.to(parameter.device)
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def state_keys(saved: SavedPlayer) -> dict[str, list[str]]:
    """Parameter -> the names of its saved optimiser state."""
    found: dict[str, list[str]] = {}
    for key in saved.keys(OPTIMIZER):
        name, _, state = key.rpartition("/")
        found.setdefault(name, []).append(state)
    return found
