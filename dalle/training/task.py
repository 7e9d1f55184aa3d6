"""The contract between a model that wants to learn and the loop that trains it: task, player, phase.

A task owns networks and says how they learn. The loop owns devices, precision, accumulation, clipping, schedules,
averages, checkpoints, trackers and signals. A task never calls ``backward`` or ``step`` and never branches on its rank.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from dalle.training.optimizers import OptimizerConfig

Batch = dict[str, Any]


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
    """One micro-batch's scalar ``total`` (with gradient) and its named ``parts`` (detached scalars, for the log)."""

    total: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


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

    def mean(self, value: Tensor) -> Tensor:
        """``value`` averaged over the ranks, without gradient (an adaptive weight); every rank must ask."""


@dataclass(frozen=True)
class Phase:
    """One scalar loss and the one player that it moves, every ``every`` steps, ``repeats`` times."""

    name: str
    player: str
    loss: Callable[[Networks, Batch, int], Loss]   # (networks, prepared micro-batch, global step)
    every: int = 1
    repeats: int = 1


@dataclass
class Mean:
    """A sum and a count, so that averages over ranks and ragged batches are exact."""

    total: float = 0.0
    count: float = 0.0

    def add(self, value: float | Tensor, count: float = 1) -> None:
        """Add the mean ``value`` of ``count`` samples."""
        self.total += float(value) * count
        self.count += count

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


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
    tokens_per_sample: int = 0            # for tokens/s in the log; 0 leaves it out
    flops_per_sample: float = 0.0         # training FLOPs of one sample, for the MFU; 0 leaves it out
    companion_settings: ClassVar[Mapping[str, str]] = {}      # companion -> the key of the config that names it
    unpacked: ClassVar[frozenset[str]] = frozenset()          # companions that an export takes nothing of

    def companions(self) -> dict[str, Companion]:
        """The networks from elsewhere by name, which make the run what it is: the frozen ones, unless a task says more.
        """
        return {name: Companion(module, self.companion_settings.get(name, name))
                for name, module in self.frozen.items()}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> Batch:
        """Turn a loaded micro-batch (already on the device) into what the losses take; runs once, without gradient."""
        return batch

    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """Named pictures for the log, each uint8 [3, H, W]; the same captions and seeds at every call."""
        return {}

    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """Figures over this rank's share of the validation set; the loop adds them up over the ranks."""
        return {}

    def metrics(self, step: int) -> dict[str, Tensor | float]:
        """Extra figures for the log line of ``step`` (a temperature, codes in use)."""
        return {}

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """Write ``folder`` (config.json, model.safetensors, tokenizer...) from each player's ``states`` (EMA if on)."""
        raise TypeError(f"{type(self).__name__} does not say how it is exported")


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
