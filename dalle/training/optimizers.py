"""How a player's weights move: one config section, and the optimiser built from it."""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Protocol, Self, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.training.muon import Muon, Share, alone
from dalle.training.schedules import learning_rate_factor

LARGE = 100_000_000      # parameters, from which on an average costs about 1 % of a step
LARGE_EMA_EVERY = 10     # steps between two of its updates then

Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]


class OptimizerConfig(Section, json_schema_extra=FREE):
    """One player's optimiser, learning-rate schedule, clipping and weight average."""

    # the other optimiser's state is none of this one's
    name: Literal["adamw", "muon"] = Field(default="adamw", description="muon: Muon on the matrices of the blocks, "
                                           "AdamW on the rest", json_schema_extra=FIXED)
    lr: float = Field(default=3e-4, gt=0, description="peak learning rate of AdamW")
    betas: Betas = Field(default=(0.9, 0.95), description="AdamW's decays of the first and second moment, shares a "
                         "step")
    eps: float = Field(default=1e-8, gt=0, description="what AdamW adds to the root of the second moment")
    weight_decay: float = Field(default=0.0, ge=0, description="not applied to embeddings (position tables "
                                "and codebooks are some) and tensors below two axes")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the player's gradient; 0 turns clipping off")
    warmup: int = Field(default=0, ge=0, description="steps of linear warm-up")
    schedule: Literal["constant", "linear", "cosine", "step"] = Field(
        default="cosine", description="of the learning rate after the warm-up, down to the run's last step; step: a "
        "staircase")
    final_fraction: float = Field(default=0.0, ge=0, le=1, description="last learning rate as a share of the peak, "
                                  "of linear and cosine")
    step_every: int | None = Field(default=None, ge=1, description="of the schedule step: multiply every so many steps")
    step_factor: float = Field(default=0.5, gt=0, le=1, description="of the schedule step: by this")
    muon_lr: float = Field(default=0.02, gt=0, description="peak learning rate of Muon, for the block matrices")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1, description="Muon's decay of the momentum, a share a step")
    muon_scaling: Literal["original", "match_rms_adamw"] = Field(
        default="original", description="Muon's step by a matrix's shape: as published, or as large as AdamW's")
    ema: float = Field(default=0.0, ge=0, lt=1, description="decay of the weight average; 0 keeps none")
    ema_every: int | None = Field(default=None, ge=1, description="update the average every so many steps; null: "
                                  f"{LARGE_EMA_EVERY} from {LARGE // 10**6} million parameters on, else 1; an update "
                                  "decays by as much as the steps since the last would have")
    ema_warmup: bool = Field(default=True, description="shorter averages at the start of the run: the n-th update "
                             "decays by at most (1 + n) / (10 + n)")

    @model_validator(mode="after")
    def _steps_are_named(self) -> Self:
        if self.schedule == "step" and self.step_every is None:
            raise ValueError("schedule step needs step_every, the steps between two changes of the rate")
        if self.schedule != "step" and self.step_every is not None:
            raise ValueError(f"step_every is for schedule step, not {self.schedule}; set schedule to step, or leave "
                             "step_every out")
        return self

    def of(self, parameters: int) -> Self:
        """The settings of a player of so many parameters: nothing in them is left to be chosen."""
        if self.ema_every is not None:
            return self
        return self.model_copy(update={"ema_every": LARGE_EMA_EVERY if parameters >= LARGE else 1})

    def factor(self, step: int, steps: int) -> float:
        """What every peak learning rate is multiplied by at ``step`` of ``steps``."""
        return learning_rate_factor(step, steps, self.warmup, self.schedule, self.final_fraction, self.step_every,
                                    self.step_factor)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the block matrices and AdamW on everything else, as one optimiser over all parameter groups.

    Muon orthogonalises the momentum of a matrix, which makes no sense for embeddings, heads, gains and biases.
    ``found_inf`` (a 0-d tensor on the device, 1 to leave everything as it is) and ``grad_scale`` (another, which
    gradients are divided by) are honoured by both.
    """

    def __init__(self, muon: Muon, adamw: torch.optim.AdamW):
        self.muon, self.adamw = muon, adamw
        self.found_inf: torch.Tensor | None = None
        self.grad_scale: torch.Tensor | None = None
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        # the same dictionaries, so that a learning rate set here is the one that the parts read
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ValueError("MuonWithAdamW takes no closure")
        for part in (self.muon, self.adamw):
            part.found_inf, part.grad_scale = self.found_inf, self.grad_scale
            part.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self._share_groups()


@runtime_checkable
class NamesEmbeddings(Protocol):
    """A module, or a part of one, that has embeddings beside its ``nn.Embedding`` layers."""

    def embedding_parameters(self) -> list[str]:
        """Names of the parameters whose rows are taken as they are: position tables, codebooks. None of them decays."""


@runtime_checkable
class NamesMatrices(Protocol):
    """A player's module that Muon can train."""

    def matrix_parameters(self) -> list[str]:
        """Names of the two-dimensional weights inside the blocks, which are multiplied and no embeddings or heads."""


def build_optimizer(module: nn.Module, config: OptimizerConfig, share: Share = alone) -> torch.optim.Optimizer:
    """The optimiser over the trainable parameters of ``module``.

    AdamW is the fused one: fastest on every device, and it can skip a non-finite step on the device (``found_inf``).
    Nothing below two axes decays, no weight of an ``nn.Embedding``, and none of the parameters that a module, or a part
    of it, names as :class:`NamesEmbeddings`. With ``muon``, the module is a :class:`NamesMatrices`: those are what Muon
    moves; ``share`` is how the processes of a run share the work of that.
    Every group keeps its peak learning rate as ``peak_lr``. Raises ``ValueError`` when there is nothing to train, when
    a name is unknown or an embedding is listed for Muon, or when the module does not say which matrices that is for.
    """
    undecayed = _embedding_parameters(module)
    matrices = set(_matrix_names(module, undecayed)) if config.name == "muon" else set()
    muon_matrices, decayed, plain = [], [], []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in matrices:
            muon_matrices.append(parameter)
        elif parameter.ndim < 2 or id(parameter) in undecayed:
            plain.append(parameter)
        else:
            decayed.append(parameter)
    if not (muon_matrices or decayed or plain):
        raise ValueError(f"{type(module).__name__} has no trainable parameters")
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    # an empty AdamW is not allowed; without other parameters Muon stands alone
    adamw = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True) if groups else None
    if not muon_matrices:
        optimizer: torch.optim.Optimizer = adamw
    else:
        muon = Muon(muon_matrices, lr=config.muon_lr, weight_decay=config.weight_decay,
                    momentum=config.muon_momentum, scaling=config.muon_scaling, share=share)
        if adamw is None:
            raise ValueError(f"{type(module).__name__} lists all its parameters for Muon; heads and gains need AdamW")
        optimizer = MuonWithAdamW(muon, adamw)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
    return optimizer


def optimizer_parts(optimizer: torch.optim.Optimizer) -> list[torch.optim.Optimizer]:
    """The optimisers that hold state of their own."""
    return [optimizer.muon, optimizer.adamw] if isinstance(optimizer, MuonWithAdamW) else [optimizer]


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Scale every group's peak learning rate; one that is a tensor keeps its place in memory."""
    for group in optimizer.param_groups:
        rate = group["peak_lr"] * factor
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def rates_on(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Keep the learning rates in tensors on ``device``, where what is recorded reads them anew at each replay."""
    for group in optimizer.param_groups:
        group["lr"] = torch.full((), float(group["lr"]), dtype=torch.float32, device=device)


def _matrix_names(module: nn.Module, embeddings: set[int]) -> list[str]:
    if not isinstance(module, NamesMatrices):
        raise UserError(f"optimizer.name muon needs {type(module).__name__}.matrix_parameters(), which it does not "
                        "have; use adamw")
    names = module.matrix_parameters()
    for name in names:
        if id(_parameter(module, name, "matrix_parameters")) in embeddings:
            raise ValueError(f"matrix_parameters() lists {name!r}, which is an embedding: Muon is for products")
    return names


def _embedding_parameters(module: nn.Module) -> set[int]:
    """By identity: weights of embedding layers, and what the module and its parts declare."""
    found = {id(part.weight) for part in module.modules() if isinstance(part, (nn.Embedding, nn.EmbeddingBag))}
    declaring = [part for part in module.modules() if isinstance(part, NamesEmbeddings)]
    return found | {id(_parameter(part, name, "embedding_parameters"))
                    for part in declaring for name in part.embedding_parameters()}


def _parameter(module: nn.Module, name: str, declared_by: str) -> nn.Parameter:
    try:
        return module.get_parameter(name)
    except AttributeError:
        raise ValueError(f"{declared_by}() lists {name!r}, which {type(module).__name__} lacks") from None
