"""StackGAN's stage II (arXiv 1612.03242, section 3.4): the picture of a finished stage I is painted over, and larger.

The form of the paper and that of COCO, as ``gans/stackgan.py`` has them. Difference: stage I inside it normalises by
its running statistics unless ``stage1_train`` is set (the code left it in training mode).
"""

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FREE
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.store import load_model, model_folder, model_kind
from dalle.training.task import Companion
from gans.generator import TEXT_FOLDER, Noise
from gans.layers import conv3, down, join, residual_relu, same, up
from gans.outputs import Painted
from gans.sizes import ConditionDim, ImageSize, SentenceDim
from gans.stackgan import (
    StackGANGenerator,
    StackGANRun,
    StackGANTask,
    Variant,
    augmentation,
    augmentation_noise,
    power_of_two,
    start,
)
from gans.stackgan1 import StackGAN1Config, StackGAN1Generator
from gans.task import filled, load_encoder
from gans.text import load_text_encoder

PROBES = ("a small red circle", "this bird has wings that are brown and has a white belly", "two people on a beach")


class StackGAN2Config(ModelConfig):
    """Sizes of the second generator; the defaults are the paper's. COCO's: variant pytorch, width 192, residuals 2."""

    variant: Variant = "tf"
    image_size: ImageSize = Field(default=256, ge=1)
    width: int = Field(default=128, ge=2, description="channels of the first convolution over the small picture")
    residuals: int = Field(default=4, ge=0, description="residual blocks where the small picture meets the caption")
    condition_dim: ConditionDim = 128
    sentence_dim: SentenceDim = 1024
    stage1: StackGAN1Config = Field(default=StackGAN1Config(), description="sizes of the first generator; follow from "
                                    "the run of stage I")
    stage1_train: bool = Field(default=False, description="stage I normalises by the statistics of the batch, not by "
                               "its running ones")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "StackGAN2Config":
        power_of_two(self.image_size, self.stage1.image_size, "image_size")
        if self.sentence_dim != self.stage1.sentence_dim:
            raise ValueError(f"both stages read the same captions: sentence_dim {self.sentence_dim} is "
                             f"{self.stage1.sentence_dim} in stage I")
        return self


class StackGAN2Generator(StackGANGenerator):
    """Stage II: the picture of the frozen stage I, encoded, joined with the caption, and painted at the full size."""

    model_type = "stackgan2"
    Config = StackGAN2Config
    config: StackGAN2Config

    def __init__(self, config: StackGAN2Config):
        super().__init__(config)
        width, top = config.width, 4 * config.width
        self.augmentation = augmentation(config.variant, config.sentence_dim, config.condition_dim)
        self.encoder = nn.Sequential(conv3(3, width), nn.ReLU(), down(width, 2 * width, activation=nn.ReLU),
                                     down(2 * width, top, activation=nn.ReLU))
        self.joint = same(top + config.condition_dim, top, activation=nn.ReLU)
        self.residuals = nn.Sequential(*(residual_relu(top) for _ in range(config.residuals)))
        count = int(math.log2(4 * config.image_size // config.stage1.image_size))
        widths = [top // 2**level for level in range(count + 1)]
        self.painter = nn.Sequential(*(up(wide, narrow) for wide, narrow in zip(widths, widths[1:], strict=False)),
                                     conv3(widths[-1], 3), nn.Tanh())
        start(self, config.variant)
        self.stage1 = StackGAN1Generator(config.stage1).requires_grad_(False)
        self.train()

    @property
    def noise_dims(self) -> dict[str, int]:
        """Stage I's, and ``eps2`` for the second augmentation."""
        return {**self.stage1.noise_dims, "eps2": self.config.condition_dim}

    def train(self, mode: bool = True) -> "StackGAN2Generator":
        super().train(mode)
        self.stage1.train(mode and self.config.stage1_train)
        return self

    def forward(self, noise: Noise, sentence: Tensor) -> Painted:
        with torch.no_grad():
            small = self.stage1(noise, sentence).image
        eps = augmentation_noise(self.config.variant, noise["eps2"])
        augmented = self.augmentation(sentence, eps)
        hidden = self.joint(join(self.encoder(small), augmented.condition))       # [B, 4 width, s/4, s/4]
        return Painted([small, self.painter(self.residuals(hidden))], augmented)


class StackGAN2Run(StackGANRun):
    """A run of stage II. ``text_encoder`` may be left out: captions are read as stage I reads them."""

    task: Literal["stackgan2"] = Field(default="stackgan2", description="the kind of run: stage II of a StackGAN")
    stage1: str = Field(description="the run or model folder of stage I, which paints what is painted over; frozen",
                        json_schema_extra=FREE)
    generator: StackGAN2Config = Field(default=StackGAN2Config(), description="sizes of the generator")


class StackGAN2Task(StackGANTask):
    """Stage II (section 3.4); its export holds stage I, too."""

    companion_settings = {"text": "text_encoder", "stage1": "stage1"}
    unpacked = frozenset({"stage1"})       # its weights are in the checkpoint

    def __init__(self, config: StackGAN2Run):
        stage1, encoder = load_stage1(config)
        sizes = filled(config.generator, sentence_dim=encoder.sentence_dim, image_size=config.data.image_size,
                       stage1=stage1.config)
        generator = StackGAN2Generator(sizes)
        generator.stage1.load_state_dict(stage1.state_dict())
        self.set_up(config, generator, encoder, stage=2)

    def companions(self) -> dict[str, Companion]:
        return {**super().companions(), "stage1": Companion(self.network.stage1, "stage1")}


def load_stage1(config: StackGAN2Run) -> tuple[StackGAN1Generator, nn.Module]:
    """The finished first stage and its text encoder, which must be the run's own where that names one."""
    folder = model_folder(config.stage1)
    if model_kind(folder) != StackGAN1Generator.model_type:
        raise UserError(f"stage1: {config.stage1} holds a {model_kind(folder)!r} model: give a run of stackgan1")
    stage1, encoder = load_model(StackGAN1Generator, folder, "cpu"), load_text_encoder(str(folder / TEXT_FOLDER))
    if config.text_encoder is not None and not same_encoder(load_encoder(config), encoder):
        raise UserError(f"text_encoder {config.text_encoder} is not the one that stage1 {config.stage1} was trained "
                        "with: leave it out to read captions as stage I does")
    return stage1, encoder


def same_encoder(one: nn.Module, other: nn.Module) -> bool:
    """Whether two text encoders are of one kind, with the same weights, and read captions alike."""
    first, second = one.state_dict(), other.state_dict()
    if type(one) is not type(other) or first.keys() != second.keys():
        return False
    if not all(torch.equal(first[name], second[name]) for name in first):
        return False
    with torch.no_grad():
        return torch.allclose(one(PROBES).sentence, other(PROBES).sentence, atol=1e-5)
