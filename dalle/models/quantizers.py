"""From continuous features to one code a position, and back: what stands between the dVAE's encoder and decoder.

Both kinds answer the same four questions: how many channels the encoder must give, what the decoder gets in training,
which code is the hard choice, and what the decoder gets for a known code. Everything here runs in fp32: the callers
leave autocast before they enter.

- :class:`GumbelQuantizer`: the paper's relaxation (arXiv 2102.12092, section 2.1; Gumbel-softmax is 1611.01144).
- :class:`FiniteScalarQuantizer`: FSQ (arXiv 2309.15505).
"""

import math
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor, nn

from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single, full_precision

UNIFORM_MARGIN = 1e-6
MOST_CODES = 2**31 - 1     # a cache keeps them as int32


class GumbelConfig(ModelConfig):
    """The categorical relaxation. ``linear`` logits are the paper's; ``cosine`` ties them to the codebook.

    With ``linear`` logits the encoder's last 1x1 convolution gives one logit a code and the decoder's first 1x1
    convolution holds the codebook: nothing links the two. With ``cosine`` the logit of a code is its scaled cosine
    with the encoder's feature, so a code that is pulled towards what the decoder needs also wins the positions that
    need it. The first takes hours to leave its first few dozen codes, the second minutes.
    """

    kind: Literal["gumbel"] = Field("gumbel", description="the Gumbel-softmax relaxation of a categorical")
    num_codes: int = Field(8192, ge=2, le=MOST_CODES, description="entries of the codebook")
    logits: Literal["linear", "cosine"] = Field(
        "linear", description="linear: the encoder's own, as the paper's; cosine: scaled cosines with the codes")
    dim: int = Field(32, ge=1, description="length of a code's vector (cosine logits only)")
    first_scale: float = Field(30.0, gt=0, description="factor on the cosines at the start; learned from there")
    straight_through: bool = Field(False, description="the decoder gets the sampled code, gradients the soft one")


class FSQConfig(ModelConfig):
    """Finite scalar quantisation: ``levels[i]`` values in channel i, the product of all is the number of codes."""

    kind: Literal["fsq"] = Field("fsq", description="finite scalar quantisation")
    levels: tuple[Annotated[int, Field(ge=2)], ...] = Field(
        (4, 4, 4, 4, 4), min_length=1, description="values of each channel; their product is the number of codes")

    @field_validator("levels")
    @classmethod
    def _codes_can_be_stored(cls, levels: tuple[int, ...]) -> tuple[int, ...]:
        if math.prod(levels) > MOST_CODES:
            raise ValueError(f"levels {list(levels)}: {math.prod(levels)} codes; at most {MOST_CODES} can be stored")
        return levels


QuantizerConfig = Annotated[GumbelConfig | FSQConfig, Field(discriminator="kind")]


class Quantized(NamedTuple):
    """What the training path gives."""

    entry: Tensor             # float [B, C, h, w]: what the decoder takes
    codes: Tensor             # int64 [B, h, w]: the hard choice, without noise
    logits: Tensor | None     # float [B, K, h, w] of the categorical over codes; None where there is none (FSQ)


class GumbelQuantizer(nn.Module):
    """y = softmax((logits + G) / temperature), a point inside the simplex over the codes.

    With linear logits the decoder gets y itself and its first layer is the codebook; with cosine logits it gets the
    y-weighted mean of the unit code vectors, [B, dim, h, w].
    """

    def __init__(self, config: GumbelConfig):
        super().__init__()
        self.config = config
        self.num_codes = config.num_codes
        self.tied = config.logits == "cosine"
        self.feature_channels = config.dim if self.tied else config.num_codes
        if self.tied:
            self.codebook = nn.Parameter(torch.randn(config.num_codes, config.dim))
            self.log_scale = nn.Parameter(torch.tensor(math.log(config.first_scale)))

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator | None = None) -> Quantized:
        """``features`` fp32 [B, feature_channels, h, w]; ``temperature`` > 0; ``generator`` draws the noise."""
        logits = self.logits(features).movedim(1, -1)                           # [B, h, w, K]: a softmax likes it last
        noisy = logits + gumbel_noise(logits, generator)
        weights = (noisy / temperature).softmax(dim=-1)                         # sums to 1 over the codes
        if self.config.straight_through:
            weights = straight_through_one_hot(weights)
        entry = weights @ self._unit_codes() if self.tied else weights
        return Quantized(entry.movedim(-1, 1), logits.argmax(dim=-1), logits.movedim(-1, 1))

    def logits(self, features: Tensor) -> Tensor:
        """[B, K, h, w]: the features themselves, or their scaled cosines with the codes."""
        if not self.tied:
            return features
        cosines = F.normalize(features.movedim(1, -1), dim=-1) @ self._unit_codes().T
        return (at_least_single(self.log_scale).exp() * cosines).movedim(-1, 1)

    def codes(self, features: Tensor) -> Tensor:
        """The likeliest code of each position, int64 [B, h, w]: no noise, no temperature."""
        return self.logits(features).argmax(dim=1)

    def entry(self, codes: Tensor) -> Tensor:
        """What the decoder takes for known ``codes`` [B, h, w]: unit vectors [B, dim, h, w], or the codes themselves,
        which a :class:`CodebookConv` gathers (a one-hot of 8,192 channels would be 32 MiB a picture)."""
        return F.embedding(codes, self._unit_codes()).movedim(-1, 1) if self.tied else codes

    def embedding_parameters(self) -> list[str]:
        """Names of what an optimiser treats as embeddings: the vectors of the codes, where they are not a layer's."""
        return ["codebook"] if self.tied else []

    def entry_layer(self, channels: int, kernel: int) -> nn.Module:
        """The decoder's first layer: the codebook where it is the decoder's, else an ordinary convolution."""
        if self.tied:
            return FullPrecisionConv(self.config.dim, channels, kernel, padding=kernel // 2)
        return CodebookConv(self.num_codes, channels)

    def _unit_codes(self) -> Tensor:
        return F.normalize(at_least_single(self.codebook), dim=-1)


class FiniteScalarQuantizer(nn.Module):
    """Each channel is squashed to its few levels and rounded; the gradient passes the rounding unchanged.

    No codebook, no noise, no extra loss: nothing can collapse. Values given to the decoder lie in [-1, 1].
    """

    def __init__(self, config: FSQConfig):
        super().__init__()
        self.config = config
        self.num_codes = math.prod(config.levels)
        self.feature_channels = len(config.levels)
        levels = torch.tensor(config.levels).view(1, -1, 1, 1)
        radix = torch.tensor([math.prod(config.levels[:i]) for i in range(len(config.levels))]).view(1, -1, 1, 1)
        self.register_buffer("levels", levels, persistent=False)
        self.register_buffer("radix", radix, persistent=False)

    def forward(self, features: Tensor, temperature: float, generator: torch.Generator | None = None) -> Quantized:
        """``features`` fp32 [B, len(levels), h, w]. ``temperature`` and ``generator`` have no meaning here."""
        bounded = self.bound(features)
        rounded = bounded + (bounded.round() - bounded).detach()               # straight-through
        return Quantized(rounded / self.halves, self._index(bounded), None)

    def bound(self, features: Tensor) -> Tensor:
        """Squash channel i into an interval that rounds to exactly levels[i] integers (arXiv 2309.15505, sec. 3.1).

        An even number of levels has no middle one, so its interval is moved down by a half; the shift inside the tanh
        keeps 0 at 0.
        """
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self.levels % 2 == 0, 0.5, 0.0)
        return (features + (offset / half).atanh()).tanh() * half - offset

    def codes(self, features: Tensor) -> Tensor:
        """The code of each position, int64 [B, h, w]."""
        return self._index(self.bound(features))

    def entry(self, codes: Tensor) -> Tensor:
        """[B, h, w] -> float [B, len(levels), h, w], the inverse of the mixed-radix index."""
        digits = codes[:, None].div(self.radix, rounding_mode="floor") % self.levels
        return (digits - self.halves) / self.halves

    def entry_layer(self, channels: int, kernel: int) -> nn.Module:
        return FullPrecisionConv(self.feature_channels, channels, kernel, padding=kernel // 2)

    @property
    def halves(self) -> Tensor:
        return self.levels // 2

    def _index(self, bounded: Tensor) -> Tensor:
        digits = bounded.round().long() + self.halves                          # 0 .. levels[i] - 1
        return (digits * self.radix).sum(dim=1)


Quantizer = GumbelQuantizer | FiniteScalarQuantizer


def build_quantizer(config: GumbelConfig | FSQConfig) -> Quantizer:
    return GumbelQuantizer(config) if isinstance(config, GumbelConfig) else FiniteScalarQuantizer(config)


class CodebookConv(nn.Module):
    """A 1x1 convolution over codes, named as the released decoder's: ``w`` [out, K, 1, 1] and ``b`` [out].

    A code's vector is its column of ``w``, plus ``b``.
    """

    def __init__(self, num_codes: int, out_channels: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(out_channels, num_codes, 1, 1) / math.sqrt(num_codes))
        self.b = nn.Parameter(torch.zeros(out_channels))

    def forward(self, entry: Tensor) -> Tensor:
        """Relaxed codes (float [B, K, h, w]) are mixed, hard ones (int64 [B, h, w]) looked up -> [B, out, h, w]."""
        with full_precision(entry.device):
            w, b = at_least_single(self.w), at_least_single(self.b)
            if entry.is_floating_point():
                return F.conv2d(at_least_single(entry), w, b)
            return (F.embedding(entry, w[:, :, 0, 0].T) + b).movedim(-1, 1)


class FullPrecisionConv(nn.Conv2d):
    """A convolution in fp32, whatever the autocast and the weights' own type: for the layers that touch the codes."""

    def forward(self, input: Tensor) -> Tensor:
        with full_precision(input.device):
            return self._conv_forward(*map(at_least_single, (input, self.weight, self.bias)))


def gumbel_noise(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """G = -ln(-ln U), U uniform in fp32 and kept off 0 and 1, of the shape of ``like``."""
    uniform = torch.rand(like.shape, device=like.device, generator=generator, dtype=torch.float32)
    return -(-uniform.clamp(UNIFORM_MARGIN, 1 - UNIFORM_MARGIN).log()).log()


def straight_through_one_hot(weights: Tensor) -> Tensor:
    """One-hot of the largest weight over the last dimension in the forward pass, ``weights`` in the backward pass."""
    hard = torch.zeros_like(weights).scatter_(-1, weights.argmax(dim=-1, keepdim=True), 1.0)
    return hard + weights - weights.detach()
