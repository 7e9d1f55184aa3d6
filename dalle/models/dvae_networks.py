"""The encoders and decoders of the discrete VAE, in two kinds.

``openai`` is the released one (arXiv 2102.12092, appendix A.1), layer by layer and key by key, so that its published
weights fit. ``compact`` does its work at a quarter of the picture's side and below, with strided convolutions and pixel
shuffles: a thousandth of the arithmetic, for pictures of 64 pixels on a CPU.
"""

import math
from collections import OrderedDict
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single, full_precision
from dalle.models.quantizers import FullPrecisionConv, Quantizer

FIRST_CONTRAST = 0.1     # of a compact decoder's pictures at the start, against what its layers would give
OPENAI_GROUPS = 4
OPENAI_DOWNSAMPLING = 8  # three of the four groups end with a 2x2 max-pool


class OpenAINetworkConfig(ModelConfig):
    """Appendix A.1 of the paper; the defaults are the released encoder and decoder."""

    kind: Literal["openai"] = Field("openai", description="the released network")
    hidden: int = Field(256, ge=4, multiple_of=4, description="channels of the finest group; each coarser one doubles")
    blocks_per_group: int = Field(2, ge=1, description="residual blocks in each of the four groups")
    decoder_input: int = Field(128, ge=1, description="length of a code's vector in the decoder")

    @property
    def downsampling(self) -> int:
        return OPENAI_DOWNSAMPLING


class CompactNetworkConfig(ModelConfig):
    """Patches of ``patch`` x ``patch`` pixels, then one stage a width, each at half the side of the one before."""

    kind: Literal["compact"] = Field("compact", description="the network for small pictures and a CPU")
    patch: Literal[2, 4] = Field(4, description="side of the patches that the encoder begins with, in pixels")
    widths: tuple[Annotated[int, Field(ge=2)], ...] = Field((64, 128), min_length=1,
                                                           description="channels of each stage, finest first")
    blocks: int = Field(2, ge=0, description="residual blocks a stage")
    tail: int = Field(32, ge=2, description="channels of the decoder's block between the patches and the pixels")
    gain: float = Field(0.5, gt=0, description="factor on each residual branch")

    @property
    def downsampling(self) -> int:
        return self.patch * 2 ** (len(self.widths) - 1)


NetworkConfig = Annotated[OpenAINetworkConfig | CompactNetworkConfig, Field(discriminator="kind")]


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
        with full_precision(x.device):
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
