"""The sampler of PPGN (arXiv 1612.00005, equation 11): a chain of codes that climbs towards a condition.

    h <- clip(h + lr_t d / mean|d|),   d = e1 (E(G(h)) - h) + e2 dlogC(y|G(h))/dh + N(0, e3^2)

Functions of what paints, what encodes and what judges, whatever these are; ``gans/ppgn.py`` has the networks.
"""

from collections.abc import Callable, Iterator

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from dalle.config import FREE
from dalle.models.base import ModelConfig

LOWEST, HIGHEST = 0.0, 30.0     # a code's numbers, by the released code
TOWARDS_PICTURES = "weight of the step towards codes that pictures have"
RATE_AT_THE_END = "size of a step at the chain's end as a share of the first's; linear in between"


class ChainConfig(ModelConfig, json_schema_extra=FREE):
    """How a chain climbs; the defaults are those of the released code for classes."""

    steps: PositiveInt = Field(default=200, description="steps of a chain; each is a pass forward and back through the "
                               "generator and what judges, and one forward through the encoder")
    e1: NonNegativeFloat = Field(default=1e-5, description=TOWARDS_PICTURES)
    e2: NonNegativeFloat = Field(default=1.0, description="weight of the step towards the condition")
    e3: NonNegativeFloat = Field(default=1e-17, description="deviation of the noise in a step")
    lr: PositiveFloat = Field(default=1.0, description="mean size of the first step in each number of the code")
    final_fraction: NonNegativeFloat = Field(default=1.0, description=RATE_AT_THE_END)


class CaptionChainConfig(ChainConfig):
    """The defaults are those of the released code for captions: steps that become small, and more of the prior."""

    e1: NonNegativeFloat = Field(default=1e-3, description=TOWARDS_PICTURES)
    final_fraction: NonNegativeFloat = Field(default=1e-10, description=RATE_AT_THE_END)


def climb(code: Tensor, paint: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor],
          log_condition: Callable[[Tensor], Tensor], noise: Callable[[], Tensor], *, steps: int, e1: float, e2: float,
          e3: float, lr: float, lr_end: float, lowest: float = LOWEST, highest: float = HIGHEST) -> Iterator[Tensor]:
    """The codes of a chain, ``code`` [B, D] first and then one for each step; a sample without a direction stays.

    ``paint`` codes to pictures, ``encode`` pictures to codes, ``log_condition`` pictures to [B]; ``noise()`` gives
    another standard normal [B, D] at each call.
    """
    yield code
    for step in range(steps):
        direction = direction_of(code, paint, encode, log_condition, e1, e2)
        if e3:
            direction = direction + e3 * noise()
        moved = code + step_along(direction, lr + (lr_end - lr) * step / steps)
        moving = direction.any(dim=1, keepdim=True)
        code = torch.where(moving, moved.clamp(lowest, highest), code)
        yield code


def direction_of(code: Tensor, paint: Callable[[Tensor], Tensor], encode: Callable[[Tensor], Tensor],
                 log_condition: Callable[[Tensor], Tensor], e1: float, e2: float) -> Tensor:
    """e1 (E(G(h)) - h) + e2 dlogC(y|G(h))/dh, [B, D]."""
    with torch.enable_grad():
        code = code.detach().requires_grad_(True)
        images = paint(code)
        (gradient,) = torch.autograd.grad(log_condition(images).sum(), code)
    with torch.no_grad():
        return e1 * (encode(images) - code) + e2 * gradient


def step_along(direction: Tensor, size: float) -> Tensor:
    """``direction`` [B, D] at the length where each row's absolute values have the mean ``size``; a row of 0 stays."""
    mean = direction.abs().mean(dim=1, keepdim=True)
    return direction * (size / mean.clamp(min=torch.finfo(mean.dtype).tiny))


def class_log_likelihood(classes: Tensor, class_id: Tensor, alone: bool = True) -> Tensor:
    """log p of ``class_id`` [B] by logits [B, K]; ``alone``: with the gradient through its own logit only, 1 - p."""
    whole = classes.log_softmax(dim=1).gather(1, class_id[:, None])[:, 0]
    if not alone:
        return whole
    own = classes.gather(1, class_id[:, None])[:, 0]
    slope = 1 - whole.detach().exp()
    return whole.detach() + slope * (own - own.detach())


def noise_of_chains(numbers: Tensor, dim: int) -> Callable[[], Tensor]:
    """What gives a standard normal [B, dim] at each call, row i from ``numbers`` [B, 2], its i-th, alone."""
    seeds = numbers.float().cpu().contiguous().view(torch.int64)[:, 0].tolist()
    sources = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(dim, generator=source) for source in sources]).to(numbers.device)
