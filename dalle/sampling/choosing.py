"""How the next code is chosen from logits: guidance, temperature, top-k, top-p, and one number in [0, 1).

Everything here is a function of each row alone, computed by operations whose result does not depend on the order in
which a device takes them: maxima, element by element, and sums of whole numbers. A row chooses the same code in any
company. No step waits for the device.
"""

import torch
from pydantic import Field
from torch import Tensor

from dalle.config import FREE, Section

SUM_BITS = 38       # a sum of all weights stays below 2 to this power, and exact in fp64 when it is multiplied


class SamplingConfig(Section, json_schema_extra=FREE):
    """How the next code is chosen. The defaults are the paper's: the model's own distribution."""

    temperature: float = Field(default=1.0, ge=0, description="what logits are divided by; 0 takes the most probable "
                               "code, and so does all that is near enough to 0")
    top_k: int | None = Field(default=None, ge=1, description="codes to choose among, the most probable; of equal "
                              "ones the lower come first; null: all")
    top_p: float | None = Field(default=None, gt=0, le=1, description="probability in (0, 1] that the fewest most "
                                "probable codes must hold to be chosen among; null: all")
    guidance: float = Field(default=1.0, ge=0, le=10_000,      # far beyond use, and far from an overflow
                            description="scale of classifier-free guidance, from the logits u without the caption to c "
                            "with it: u + guidance (c - u); 1 is off (arXiv 2406.06525)")

    @property
    def streams(self) -> int:
        """Sequences decoded for each candidate: guidance needs a second one, without its caption."""
        return 1 if self.guidance == 1.0 else 2


def guide(logits: Tensor, options: SamplingConfig) -> Tensor:
    """u + guidance * (c - u) from [c; u] stacked along the batch; with guidance 1 there is only c."""
    if options.streams == 1:
        return logits
    conditioned, unconditioned = logits.chunk(2)
    return torch.lerp(unconditioned, conditioned, options.guidance)


def choose_codes(logits: Tensor, numbers: Tensor, options: SamplingConfig) -> Tensor:
    """One code [B] for each row of ``logits`` [B, K] by inverting its distribution at ``numbers`` [B] in [0, 1).

    Filters apply in the usual order: temperature, top-k, top-p. They are written out here because transformers' warpers
    each sort and scatter anew, at every code. Logits that are not finite give some code; the caller has to look.
    """
    if options.temperature == 0:
        return logits.argmax(dim=-1)
    if options.temperature != 1:
        logits = cooled(logits, options.temperature)
    if options.top_k is not None and options.top_k < logits.shape[-1]:
        logits = logits.masked_fill(~among_largest(logits, options.top_k), float("-inf"))
    weights = whole_weights(logits)
    if options.top_p is not None and options.top_p < 1:
        weights = weights.masked_fill(~in_nucleus(weights, options.top_p), 0)
    cumulative = weights.cumsum(dim=-1)
    target = (numbers.double() * cumulative[:, -1]).long()
    found = torch.searchsorted(cumulative, target[:, None], right=True).squeeze(1)
    return found.clamp(max=logits.shape[-1] - 1)             # a number finds no place among NaNs


def whole_weights(logits: Tensor) -> Tensor:
    """int64 [B, K] in proportion to the probabilities; the most probable code has 2 ** (38 - log2 K), at most 2 ** 30.

    A number has 24 bits, and so a code that gets none here would be met by one in 2 ** 24 at most: with 8,192 codes it
    has less than 2 ** -26 of the best one's probability. Whole numbers make the sums exact: in fp32 a sum depends on
    its order, and a number near a boundary would choose another code on another device or in another batch.
    """
    bits = min(30, SUM_BITS - (logits.shape[-1] - 1).bit_length())
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best).exp_().mul_(2.0 ** bits).round_().long()


def cooled(logits: Tensor, temperature: float) -> Tensor:
    """``logits`` / temperature, less a constant of each row: the best is 0, whatever the others fall to.

    Divided as they are, logits overflow below 1e-37 and the best of them have no difference left. From the best on,
    only what is worse overflows, to a probability of 0, which is the limit. Below its smallest normal number fp32 may
    take a divisor for 0.
    """
    best = logits.amax(dim=-1, keepdim=True)
    return (logits - best) / max(temperature, torch.finfo(logits.dtype).tiny)


def among_largest(logits: Tensor, count: int) -> Tensor:
    """bool [B, K]: the ``count`` largest of each row, of equal ones the first (``topk`` leaves open which)."""
    smallest = logits.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    larger = logits > smallest
    return first_of_equals(larger, logits == smallest, count - larger.sum(dim=-1, keepdim=True))


def in_nucleus(weights: Tensor, mass: float) -> Tensor:
    """bool [B, K]: the fewest, most probable codes that have ``mass``, one at least; of equal ones the first.

    From whole ``weights`` [B, K]: sorted once, for the weight of the last code that is needed and its rank.
    """
    ranked = weights.sort(dim=-1, descending=True).values
    mass_before = ranked.cumsum(dim=-1) - ranked
    needed = mass_before < mass * mass_before[:, -1:].add(ranked[:, -1:]).double()
    count = needed.sum(dim=-1, keepdim=True).clamp(min=1)          # rises from the first on: needed codes are a prefix
    smallest = ranked.gather(-1, count - 1)
    larger = weights > smallest
    return first_of_equals(larger, weights == smallest, count - larger.sum(dim=-1, keepdim=True))


def first_of_equals(larger: Tensor, equal: Tensor, room: Tensor) -> Tensor:
    """``larger``, and of the ``equal`` codes the first ``room`` [B, 1]."""
    return larger | (equal & (equal.cumsum(dim=-1, dtype=torch.int32) <= room))
