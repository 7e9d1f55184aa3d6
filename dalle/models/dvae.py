"""The discrete VAE: a picture into a small grid of codes and back (arXiv 2102.12092, section 2.1).

The networks before and behind the codes are in ``dalle/models/dvae_networks.py``, what stands between them in
``dalle/models/quantizers.py``.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dalle.models.codec import Codec, CodecConfig
from dalle.models.dvae_networks import (
    CompactNetworkConfig,
    NetworkConfig,
    OpenAINetworkConfig,
    build_compact,
    build_openai,
    dtype_of,
)
from dalle.models.precision import at_least_single, full_precision
from dalle.models.quantizers import FSQConfig, GumbelConfig, Quantizer, QuantizerConfig, build_quantizer

PIXEL_MARGIN = 0.1    # e of the pixel map


class DVAEConfig(CodecConfig):
    """``preset`` names an entry of :data:`PRESETS`; the other keys given beside it replace its values."""

    image_size: int = Field(256, ge=1, description="side of the pictures, in pixels")
    likelihood: Literal["logit_laplace", "gaussian"] = Field(
        "logit_laplace", description="what the decoder says of a pixel: mu and ln b of eq. 2, or a mean alone"
    )
    network: NetworkConfig = Field(OpenAINetworkConfig(), description="the encoder and the decoder")
    quantizer: QuantizerConfig = Field(GumbelConfig(), description="how features become codes")

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "preset" not in values:
            return values
        name = values["preset"]
        if name not in PRESETS:
            raise ValueError(f"unknown dVAE preset {name!r}; known: {', '.join(PRESETS)}")
        given = {key: value for key, value in values.items() if key != "preset"}
        return _overlay(PRESETS[name].model_dump(), given)

    @model_validator(mode="after")
    def _grid_is_whole(self) -> "DVAEConfig":
        factor = self.network.downsampling
        if self.image_size % factor:
            raise ValueError(f"image_size {self.image_size} is not a multiple of the network's downsampling {factor}")
        return self


def _overlay(base: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``base``, key by key inside sections; a section that changes its ``kind`` starts afresh."""
    merged = dict(base)
    for key, value in given.items():
        below = base.get(key)
        same_kind = isinstance(value, Mapping) and isinstance(below, Mapping) and (
            value.get("kind", below.get("kind")) == below.get("kind")
        )
        merged[key] = _overlay(below, value) if same_kind else value
    return merged


class DVAEOutput(NamedTuple):
    """A training forward; all floats are fp32."""

    mean: Tensor                  # [B, 3, H, W]: mu of the logit-Laplace, or the picture on [0, 1], unclipped
    log_scale: Tensor | None      # [B, 3, H, W]: ln b; None for a gaussian
    code_logits: Tensor | None    # [B, K, h, w]; None for FSQ
    codes: Tensor                 # int64 [B, h*w]: the hard choices


class DiscreteVAE(Codec):
    """Pictures on [0, 1] -> codes -> pictures on [0, 1]; ``forward`` is the training path through the quantiser."""

    model_type = "dvae"
    Config = DVAEConfig
    config: DVAEConfig

    def __init__(self, config: DVAEConfig):
        super().__init__(config)
        self.quantizer: Quantizer = build_quantizer(config.quantizer)
        out_channels = 6 if config.likelihood == "logit_laplace" else 3
        build = build_openai if isinstance(config.network, OpenAINetworkConfig) else build_compact
        self.encoder, self.decoder = build(config.network, self.quantizer, out_channels)

    @property
    def num_codes(self) -> int:
        return self.quantizer.num_codes

    @property
    def grid(self) -> tuple[int, int]:
        side = self.config.image_size // self.config.network.downsampling
        return side, side

    def forward(self, images: Tensor, temperature: float, generator: torch.Generator | None = None) -> DVAEOutput:
        """``images`` float [B, 3, H, W] on [0, 1]; ``temperature`` of the relaxation; ``generator`` draws its noise."""
        features = self._features(images)
        with full_precision(features.device):
            quantized = self.quantizer(features, temperature, generator)
        mean, log_scale = self._decoded(quantized.entry)
        return DVAEOutput(mean, log_scale, quantized.logits, quantized.codes.flatten(1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes of ``images`` (float [B, 3, H, W] on [0, 1]), row after row: int64 [B, h*w]."""
        features = self._features(images)
        with full_precision(features.device):
            return self.quantizer.codes(features).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """The pictures of ``codes`` int64 [B, h*w]: float [B, 3, H, W] on [0, 1].

        Raises ``ValueError`` when the number of codes is not the grid's, or a code is not the codec's.
        """
        height, width = self.grid
        if codes.shape[-1] != height * width:
            raise ValueError(f"{codes.shape[-1]} codes a picture do not fill the grid of {height}x{width}")
        check_codes(codes, self.num_codes)
        mean, _ = self._decoded(self.quantizer.entry(codes.unflatten(-1, (height, width))))
        return self.pixels(mean)

    def pixels(self, mean: Tensor) -> Tensor:
        """The picture that a decoder's ``mean`` stands for, on [0, 1]; ln b plays no part in it."""
        if self.config.likelihood == "logit_laplace":
            return unmap_pixels(mean.sigmoid())
        return mean.clamp(0, 1)

    def training_flops(self) -> float:
        """FLOPs of one picture's forward and backward (twice the forward), counted on tensors without data."""
        with torch.device("meta"):
            model, images = DiscreteVAE(self.config), torch.empty(1, 3, self.config.image_size, self.config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(images, temperature=1.0)
        return 3.0 * counter.get_total_flops()

    def _features(self, images: Tensor) -> Tensor:
        factor = self.config.network.downsampling
        if images.shape[-1] % factor or images.shape[-2] % factor:
            raise ValueError(f"pictures of {tuple(images.shape[-2:])} do not divide into patches of {factor} pixels")
        shown = map_pixels(images) if self.config.likelihood == "logit_laplace" else 2 * images - 1
        return self.encoder(shown.to(dtype_of(self.encoder), memory_format=torch.channels_last))

    def _decoded(self, entry: Tensor) -> tuple[Tensor, Tensor | None]:
        out = at_least_single(self.decoder(entry))                             # [B, 3 or 6, H, W]
        if self.config.likelihood == "gaussian":
            return (out + 1) / 2, None
        mean, log_scale = out.chunk(2, dim=1)
        return mean, log_scale


def check_codes(codes: Tensor, num_codes: int) -> None:
    """``ValueError`` for a code outside 0 to ``num_codes`` - 1.

    On an accelerator, where reading the answer would wait for the device, it fails there: by an assertion on the
    device, as a look-up beyond a table does. FSQ has no table, its digits would wrap to another code's.
    """
    inside = ((codes >= 0) & (codes < num_codes)).all()
    if codes.device.type != "cpu":
        torch._assert_async(inside, f"a code is outside 0 to {num_codes - 1}")
    elif not inside:
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} where the codec has 0 to "
                         f"{num_codes - 1}")


def map_pixels(images: Tensor) -> Tensor:
    """phi of the paper's section A.3: [0, 1] -> [0.1, 0.9], where the logit is finite."""
    return (1 - 2 * PIXEL_MARGIN) * images + PIXEL_MARGIN


def unmap_pixels(mapped: Tensor) -> Tensor:
    """The inverse of :func:`map_pixels`, clipped to [0, 1]."""
    return ((mapped - PIXEL_MARGIN) / (1 - 2 * PIXEL_MARGIN)).clamp(0, 1)


# --- presets ----------------------------------------------------------------------------------------------------------

PRESETS: dict[str, DVAEConfig] = {
    "openai": DVAEConfig(),
    "openai_small": DVAEConfig(
        image_size=128,
        network=OpenAINetworkConfig(hidden=64, decoder_input=64),
        quantizer=GumbelConfig(num_codes=2048),
    ),
    "shapes": DVAEConfig(
        image_size=64,
        likelihood="gaussian",
        network=CompactNetworkConfig(),
        quantizer=FSQConfig(levels=(4, 4, 4, 4, 4)),
    ),
    "shapes_gumbel": DVAEConfig(
        image_size=64,
        likelihood="gaussian",
        network=CompactNetworkConfig(),
        quantizer=GumbelConfig(num_codes=512, logits="cosine"),
    ),
    "emoji": DVAEConfig(
        image_size=64,
        likelihood="gaussian",
        network=CompactNetworkConfig(),
        quantizer=FSQConfig(levels=(8, 8, 8, 8)),
    ),
    "tiny": DVAEConfig(
        image_size=16,
        likelihood="gaussian",
        network=CompactNetworkConfig(widths=(8, 16), blocks=1, tail=4),
        quantizer=FSQConfig(levels=(4, 4)),
    ),
}
