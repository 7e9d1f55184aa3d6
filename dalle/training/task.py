"""The contract between a model that wants to learn and the loop that trains it: task, player, phase.

A task owns networks and says how they learn. The loop owns devices, precision, accumulation, clipping, schedules,
averages, checkpoints, trackers and signals. A task never calls ``backward`` or ``step`` and never branches on its rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dalle.data.batch import Batch
from dalle.store import Generator
from dalle.training.figures import Figure, Max, Mean
from dalle.training.optimizers import OptimizerConfig

__all__ = ["Batch", "Figure", "Loss", "Max", "Mean", "Networks", "Phase", "Player", "Task", "parameter_count"]


@dataclass
class Player:
    """Networks that step together under one optimiser: the unit that is wrapped, clipped, averaged and saved.

    ``module.forward`` is what the losses call; everything that needs a gradient goes through it, because the wrapper of
    the engine (DDP, DeepSpeed) watches only that.
    """

    module: nn.Module
    optimizer: OptimizerConfig


@dataclass
class Loss:
    """One micro-batch's scalar ``total`` (with gradient) and its named ``parts``: detached scalars, whose mean is
    logged, or a :class:`Max` of one."""

    total: Tensor
    parts: dict[str, Tensor | Max] = field(default_factory=dict)


class Networks(Protocol):
    """What the engine hands to a phase, a preview or a validation in place of the bare modules."""

    rank: int
    world_size: int

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """The player or frozen network to call, forward only; the engine chose wrapper or module."""

    def penalty(self, name: str) -> Callable[..., Any]:
        """The callable for a forward whose outputs the loss itself differentiates (R1, penalties, adaptive weights)."""

    def bare(self, name: str) -> nn.Module:
        """The plain module, for calls without gradient (sampling a preview, encoding a validation batch)."""

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        """``value`` averaged over the ranks, without gradient (an adaptive weight); every rank must ask."""


@dataclass(frozen=True)
class Phase:
    """One scalar loss and the one player that it moves, every ``every`` steps, ``repeats`` times.

    ``ahead``: what the player makes before any of the step's phases moves anyone, for all of them to read in their
    batches under these names (a generator's pictures, painted once a step). Only this phase gets it with its graph, the
    others detached; a repeat makes it anew, for the player has moved. Where the phase is not due, it is made for the
    others alone.

    ``capturable``: what the phase does on the device, ``ahead`` included, follows from the tensors of its prepared
    batch and the networks alone: not from the step, nor from other values of the batch, and the host reads none of its
    results. Where nothing else stands in the way it is then recorded and replayed (``dalle/training/capture.py``).
    """

    name: str
    player: str
    loss: Callable[[Networks, Batch, int], Loss]   # (networks, prepared micro-batch, global step)
    every: int = 1
    repeats: int = 1
    ahead: Mapping[str, Callable[[Networks, Batch, int], Any]] = field(default_factory=dict, hash=False)
    capturable: bool = False

    def is_due(self, step: int) -> bool:
        return step % self.every == 0

    def make(self, networks: Networks, batch: Batch, step: int) -> Batch:
        """What is made ``ahead``, from a prepared micro-batch."""
        return {name: make(networks, batch, step) for name, make in self.ahead.items()}


def detached(made: Any) -> Any:
    """``made`` without its graph: a tensor, or tuples, lists and dicts of tensors, None among them."""
    if made is None:
        return None
    if isinstance(made, Tensor):
        return made.detach()
    if isinstance(made, dict):
        return {name: detached(part) for name, part in made.items()}
    if isinstance(made, tuple) and hasattr(made, "_fields"):
        return type(made)(*map(detached, made))
    if isinstance(made, (tuple, list)):
        return type(made)(map(detached, made))
    raise TypeError(f"a phase made a {type(made).__name__} ahead; it is a tensor, or tuples, lists and dicts of them")


@dataclass(frozen=True)
class Companion:
    """A network of another run that this one reads: a resume or an export with another one is refused."""

    module: nn.Module           # as it was loaded
    setting: str = ""           # the key of the config that names it
    made_from: str = ""         # a digest of what else its parts were computed from


class Task:
    """The whole of what a new model must say. Subclasses set the attributes in ``__init__``."""

    players: Mapping[str, Player]
    frozen: Mapping[str, nn.Module]       # companions from other runs: moved and cast, never stepped
    phases: Sequence[Phase]
    splits_batch: bool = True             # False where the loss couples samples (contrastive, batch statistics)
    needs_classes: bool = False           # True where `class_id` is read: a sample whose JSON is damaged has none
    paints: bool = False                  # True where captions are painted: it has a `generator`
    tokens_per_sample: int = 0            # for tokens/s in the log; 0 leaves it out
    flops_per_sample: float = 0.0         # training FLOPs of one sample, for the MFU; 0 leaves it out
    companion_settings: ClassVar[Mapping[str, str]] = {}      # companion -> the key of the config that names it
    unpacked: ClassVar[frozenset[str]] = frozenset()          # companions that an export takes nothing of

    def companions(self) -> dict[str, Companion]:
        """The networks from elsewhere by name, which make the run what it is: the frozen ones, unless a task says more.
        """
        return {name: Companion(module, self.companion_settings.get(name, name))
                for name, module in self.frozen.items()}

    def check_share(self, samples: int, world_size: int) -> None:
        """Raise :class:`UserError` where no step can be made of so many samples at once in each of the processes."""

    def on_host(self, batch: Batch, step: int) -> Batch:
        """What is decided by the values of a loaded micro-batch, while they are on the CPU: what is added here, tensors
        or not, :meth:`prepare` finds beside them. To read them later, the host would wait for the device."""
        return batch

    def prepare(self, batch: Batch, networks: Networks, step: int) -> Batch:
        """Turn a loaded micro-batch (already on the device) into what the losses take; runs once, without gradient."""
        return batch

    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """Named pictures for the log, each uint8 [3, H, W]; the same captions and seeds at every call."""
        return {}

    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Figure]:
        """Figures over this rank's share of the validation set; the loop joins them over the ranks."""
        return {}

    def metrics(self, step: int) -> dict[str, Figure | Tensor | float]:
        """Extra figures for the log line of ``step``: of this rank's share, or numbers that are the same on all ranks
        (a temperature)."""
        return {}

    def generator(self, networks: Networks) -> Generator:
        """What paints captions with the networks as they are now, where the task ``paints``."""
        raise TypeError(f"{type(self).__name__} paints no captions")

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """Write ``folder`` (config.json, model.safetensors, tokenizer...) from each player's ``states`` (EMA if on)."""
        raise TypeError(f"{type(self).__name__} does not say how it is exported")


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
