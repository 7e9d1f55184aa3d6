"""The discrete VAE: a picture into a small grid of codes and back (arXiv 2102.12092, section 2.1).

One class, two networks inside it. ``openai`` is the released one, layer by layer and key by key, so that its published
weights fit. ``compact`` does its work at a quarter of the picture's side and below, with strided convolutions and pixel
shuffles: a thousandth of the arithmetic, for pictures of 64 pixels on a CPU.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle.models.base import ModelConfig
from dalle.models.codec import Codec, CodecConfig
from dalle.models.precision import at_least_single
from dalle.models.quantizers import (
    FSQConfig,
    FullPrecisionConv,
    GumbelConfig,
    Quantizer,
    QuantizerConfig,
    build_quantizer,
    full_precision,
)

PIXEL_MARGIN = 0.1       # e of the pixel map
FIRST_CONTRAST = 0.1     # of a compact decoder's pictures at the start, against what its layers would give
OPENAI_GROUPS = 4
OPENAI_DOWNSAMPLING = 8  # three of the four groups end with a 2x2 max-pool


class OpenAINetworkConfig(ModelConfig):
    """Appendix A.1 of the paper; the defaults are the released encoder and decoder."""

    kind: Literal["openai"] = "openai"
    hidden: int = Field(256, ge=4, multiple_of=4)
    blocks_per_group: int = Field(2, ge=1)
    decoder_input: int = Field(128, ge=1, description="length of a code's vector in the decoder")

    @property
    def downsampling(self) -> int:
        return OPENAI_DOWNSAMPLING


class CompactNetworkConfig(ModelConfig):
    """Patches of ``patch`` x ``patch`` pixels, then one stage a width, each at half the side of the one before."""

    kind: Literal["compact"] = "compact"
    patch: Literal[2, 4] = 4
    widths: tuple[Annotated[int, Field(ge=2)], ...] = Field((64, 128), min_length=1,
                                                           description="channels of each stage, finest first")
    blocks: int = Field(2, ge=0, description="residual blocks a stage")
    tail: int = Field(32, ge=2, description="channels of the decoder's block between the patches and the pixels")
    gain: float = Field(0.5, gt=0, description="factor on each residual branch")

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.widths) - 1)


NetworkConfig = Annotated[OpenAINetworkConfig | CompactNetworkConfig, Field(discriminator="kind")]


class DVAEConfig(CodecConfig):
    """``preset`` names an entry of :data:`PRESETS`; the other keys given beside it replace its values."""

    image_size: int = Field(256, ge=1)
    likelihood: Literal["logit_laplace", "gaussian"] = Field(
        "logit_laplace", description="what the decoder says of a pixel: mu and ln b of eq. 2, or a mean alone"
    )
    network: NetworkConfig = OpenAINetworkConfig()
    quantizer: QuantizerConfig = GumbelConfig()

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
        with full_precision(features):
            quantized = self.quantizer(features, temperature, generator)
        mean, log_scale = self._decoded(quantized.entry)
        return DVAEOutput(mean, log_scale, quantized.logits, quantized.codes.flatten(1))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """The codes of ``images`` (float [B, 3, H, W] on [0, 1]), row after row: int64 [B, h*w]."""
        features = self._features(images)
        with full_precision(features):
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


def dtype_of(module: nn.Module) -> torch.dtype:
    """The type of the weights: fp32 under autocast, bf16 where an engine has cast the module itself."""
    return next(module.parameters()).dtype


# --- the released network ---------------------------------------------------------------------------------------------


class ReleasedConv(nn.Module):
    """A same-size convolution with weight ``w`` ~ N(0, 1 / fan_in) and bias ``b`` = 0."""

    def __init__(self, channels: int, out_channels: int, kernel: int):
        super().__init__()
        self.w = nn.Parameter(torch.randn(out_channels, channels, kernel, kernel) / math.sqrt(channels * kernel**2))
        self.b = nn.Parameter(torch.zeros(out_channels))
        self.padding = kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.w, self.b, padding=self.padding)


class ReleasedLogits(ReleasedConv):
    """The same in fp32, for the logits of the codes (the released code leaves half precision here too)."""

    def forward(self, x: Tensor) -> Tensor:
        with full_precision(x):
            return F.conv2d(*map(at_least_single, (x, self.w, self.b)), padding=self.padding)


class ReleasedBlock(nn.Module):
    """id(x) + gain * res(x): a bottleneck of four convolutions, a ReLU before each.

    The 1x1 of the four lies on the side of the relaxation: last in the encoder, first in the decoder.
    """

    def __init__(self, channels: int, out_channels: int, gain: float, kernels: tuple[int, int, int, int]):
        super().__init__()
        hidden = out_channels // 4
        widths = (channels, hidden, hidden, hidden, out_channels)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for i, kernel in enumerate(kernels, start=1):
            layers[f"relu_{i}"] = nn.ReLU()
            layers[f"conv_{i}"] = ReleasedConv(widths[i - 1], widths[i], kernel)
        self.res_path = nn.Sequential(layers)
        self.id_path = ReleasedConv(channels, out_channels, 1) if channels != out_channels else nn.Identity()
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return self.id_path(x) + self.gain * self.res_path(x)


class ReleasedEncoder(nn.Module):
    """[B, 3, H, W] on [0.1, 0.9] -> features [B, out_channels, H/8, W/8]."""

    def __init__(self, config: OpenAINetworkConfig, out_channels: int):
        super().__init__()
        hidden, gain = config.hidden, 1 / (OPENAI_GROUPS * config.blocks_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=ReleasedConv(3, hidden, 7))
        channels = hidden
        for group in range(1, OPENAI_GROUPS + 1):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, config.blocks_per_group + 1):
                width = hidden * 2 ** (group - 1)
                blocks[f"block_{block}"] = ReleasedBlock(channels, width, gain, kernels=(3, 3, 3, 1))
                channels = width
            if group < OPENAI_GROUPS:
                blocks["pool"] = nn.MaxPool2d(2)
            layers[f"group_{group}"] = nn.Sequential(blocks)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=ReleasedLogits(channels, out_channels, 1)))
        self.blocks = nn.Sequential(layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)


class ReleasedDecoder(nn.Module):
    """What the quantiser enters, at [h, w] -> [B, out_channels, 8h, 8w]."""

    def __init__(self, config: OpenAINetworkConfig, input_layer: nn.Module, out_channels: int):
        super().__init__()
        hidden, gain = config.hidden, 1 / (OPENAI_GROUPS * config.blocks_per_group) ** 2
        layers: OrderedDict[str, nn.Module] = OrderedDict(input=input_layer)
        channels = config.decoder_input
        for group in range(1, OPENAI_GROUPS + 1):
            blocks: OrderedDict[str, nn.Module] = OrderedDict()
            for block in range(1, config.blocks_per_group + 1):
                width = hidden * 2 ** (OPENAI_GROUPS - group)
                blocks[f"block_{block}"] = ReleasedBlock(channels, width, gain, kernels=(1, 3, 3, 3))
                channels = width
            if group < OPENAI_GROUPS:
                blocks["upsample"] = nn.Upsample(scale_factor=2, mode="nearest")
            layers[f"group_{group}"] = nn.Sequential(blocks)
        layers["output"] = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=ReleasedConv(channels, out_channels, 1)))
        self.blocks = nn.Sequential(layers)

    def forward(self, entry: Tensor) -> Tensor:
        x = self.blocks.input(entry)                                           # fp32
        return self.blocks[1:](x.to(dtype_of(self)))


def build_openai(
    config: OpenAINetworkConfig, quantizer: Quantizer, out_channels: int
) -> tuple[ReleasedEncoder, ReleasedDecoder]:
    encoder = ReleasedEncoder(config, quantizer.feature_channels)
    decoder = ReleasedDecoder(config, quantizer.entry_layer(config.decoder_input, kernel=1), out_channels)
    return encoder, decoder


# --- the compact network ----------------------------------------------------------------------------------------------


class CompactBlock(nn.Module):
    """x + gain * conv(relu(conv(relu(x)))), through half the channels."""

    def __init__(self, channels: int, gain: float):
        super().__init__()
        self.first = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.second = nn.Conv2d(channels // 2, channels, 3, padding=1)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gain * self.second(self.first(x.relu()).relu())


def compact_stage(channels: int, config: CompactNetworkConfig) -> list[nn.Module]:
    return [CompactBlock(channels, config.gain) for _ in range(config.blocks)]


class CompactEncoder(nn.Module):
    """[B, 3, H, W] on [-1, 1] -> features [B, out_channels, H/f, W/f] in fp32."""

    def __init__(self, config: CompactNetworkConfig, out_channels: int):
        super().__init__()
        widths = config.widths
        layers = [nn.PixelUnshuffle(config.patch), nn.Conv2d(3 * config.patch**2, widths[0], 3, padding=1)]
        layers += compact_stage(widths[0], config)
        for finer, coarser in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(finer, coarser, 4, stride=2, padding=1), *compact_stage(coarser, config)]
        self.stages = nn.Sequential(*layers, nn.ReLU())
        self.output = FullPrecisionConv(widths[-1], out_channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.output(self.stages(images))


class CompactDecoder(nn.Module):
    """What the quantiser enters, at [h, w] -> [B, out_channels, f*h, f*w]."""

    def __init__(self, config: CompactNetworkConfig, input_layer: nn.Module, out_channels: int):
        super().__init__()
        widths = config.widths[::-1]
        self.input = input_layer
        layers = compact_stage(widths[0], config)
        for coarser, finer in zip(widths, widths[1:], strict=False):
            layers += [nn.Conv2d(coarser, 4 * finer, 1), nn.PixelShuffle(2), *compact_stage(finer, config)]
        channels = widths[-1]
        if config.patch == 4:
            layers += [nn.Conv2d(channels, 4 * config.tail, 1), nn.PixelShuffle(2)]
            layers += [CompactBlock(config.tail, config.gain)]
            channels = config.tail
        self.stages = nn.Sequential(*layers)
        self.output = nn.Conv2d(channels, 4 * out_channels, 3, padding=1)
        self.to_pixels = nn.PixelShuffle(2)

    def forward(self, entry: Tensor) -> Tensor:
        x = self.input(entry)                                                  # fp32
        x = self.stages(x.to(dtype_of(self), memory_format=torch.channels_last))
        return self.to_pixels(self.output(x))


def build_compact(
    config: CompactNetworkConfig, quantizer: Quantizer, out_channels: int
) -> tuple[CompactEncoder, CompactDecoder]:
    encoder = CompactEncoder(config, quantizer.feature_channels)
    decoder = CompactDecoder(config, quantizer.entry_layer(config.widths[-1], kernel=3), out_channels)
    for part in (encoder, decoder):
        part.apply(_he_init)
        part.to(memory_format=torch.channels_last)          # twice as fast on a CPU, and what tensor cores want
    with torch.no_grad():
        decoder.output.weight.mul_(FIRST_CONTRAST)          # wild first pictures would saturate FSQ's tanh
    return encoder, decoder


def _he_init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


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
