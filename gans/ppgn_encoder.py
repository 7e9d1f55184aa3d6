"""The encoder E of PPGN (arXiv 1612.00005), which is also its classifier C: pictures to pool5, the code fc6, classes.

The paper takes a finished CaffeNet (AlexNet, arXiv 1408.5093) on the centred 227 of 256 pixels and cuts it behind the
ReLU of fc6: 4,096 numbers, none below 0. Here the network is trained by the loop, with the cross-entropy of
``class_id``. Layout ``caffenet`` has the released network's layers, groups and local response normalisation
(60,965,224 parameters with 1,000 classes); ``small`` is one for pictures of 64 pixels.

Not as released: RGB in [-1, 1] in place of BGR from 0 to 255 less the mean picture, which is a matter of scale; and the
centred square in training, too, in place of random ones.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.models.base import FREE, ModelConfig, PretrainedModel
from dalle.models.precision import at_least_single
from dalle.pictures import to_signed
from dalle.store import load_model, model_folder, model_kind
from dalle.training.optimizers import Betas
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Loss, Mean, Networks, Phase, Player, Task
from gans.classes import ClassCheck, class_accuracy
from gans.layers import he_init
from gans.sizes import ImageSize
from gans.task import Exchange, GANOptimizer, filled

CONVOLUTIONS = {"caffenet": 5, "small": 4}


# -- the network

class PPGNEncoderConfig(ModelConfig):
    """The defaults are CaffeNet's."""

    image_size: ImageSize = Field(default=256, ge=16)
    crop: int | None = Field(default=227, ge=16, description="side of the centred square that is seen, in pixels; "
                             "null: the whole picture")
    num_classes: int = Field(default=1000, ge=2, description="number of classes; class_id counts from 0")
    layout: Literal["caffenet", "small"] = Field(default="caffenet", description="which convolutions: CaffeNet's five, "
                                                 "or four that halve the side each")
    channels: tuple[PositiveInt, ...] = Field(default=(96, 256, 384, 384, 256), description="channels behind each "
                                              "convolution")
    code_dim: int = Field(default=4096, ge=1, description="numbers in the code h, fc6")
    hidden_dim: int = Field(default=4096, ge=1, description="numbers in fc7")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of fc6 and of fc7 set to 0 in training",
                           json_schema_extra=FREE)

    @model_validator(mode="after")
    def _pieces_fit(self) -> "PPGNEncoderConfig":
        if len(self.channels) != CONVOLUTIONS[self.layout]:
            raise ValueError(f"channels has {len(self.channels)} numbers, but layout {self.layout} has "
                             f"{CONVOLUTIONS[self.layout]} convolutions")
        if self.side > self.image_size:
            raise ValueError(f"crop {self.crop} is more than image_size {self.image_size}: set it to that or less, or "
                             "to null")
        if self.pooled_side < 1:
            raise ValueError(f"layout {self.layout} leaves nothing of {self.side} pixels: give larger pictures")
        return self

    @property
    def side(self) -> int:
        """Of the square that is seen."""
        return self.crop or self.image_size

    @property
    def pooled_side(self) -> int:
        """Of pool5."""
        if self.layout == "small":
            return self.side // 16
        side = (self.side - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        return side


class Features(NamedTuple):
    """Of pictures: pool5 [B, C, s, s], the code h [B, code_dim] with nothing below 0, and logits of classes [B, K]."""

    pooled: Tensor
    code: Tensor
    classes: Tensor


class PPGNEncoder(PretrainedModel):
    """Pictures float [B, 3, S, S] in [-1, 1], of the side of the crop or more, to :class:`Features`."""

    model_type = "ppgn_encoder"
    Config = PPGNEncoderConfig
    config: PPGNEncoderConfig

    def __init__(self, config: PPGNEncoderConfig):
        super().__init__(config)
        build = {"caffenet": caffenet, "small": small_convolutions}[config.layout]
        self.convolutions = build(config.channels)
        self.fc6 = nn.Linear(config.channels[-1] * config.pooled_side ** 2, config.code_dim)
        self.fc7 = nn.Linear(config.code_dim, config.hidden_dim)
        self.fc8 = nn.Linear(config.hidden_dim, config.num_classes)
        self.dropout = nn.Dropout(config.dropout)
        he_init(self)

    def forward(self, images: Tensor) -> Features:
        pooled = self.convolutions(centred(images, self.config.side))
        code = F.relu(self.fc6(pooled.flatten(1)))
        hidden = F.relu(self.fc7(self.dropout(code)))
        return Features(pooled, code, self.fc8(self.dropout(hidden)))

    @classmethod
    def load(cls, name: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model of a run or model folder, frozen; ``UserError`` for anything else."""
        folder = model_folder(str(name))
        if (kind := model_kind(folder)) != cls.model_type:
            raise UserError(f"{name} holds a {kind!r} model, not {cls.model_type!r}: give the folder of a "
                            f"{cls.model_type} run")
        return load_model(cls, folder, device).requires_grad_(False)


def centred(images: Tensor, side: int) -> Tensor:
    """[B, 3, H, W] -> the centred [B, 3, side, side]; as in the released code, an odd rest is left at the far end."""
    top, left = ((length - side) // 2 for length in images.shape[-2:])
    return images[..., top : top + side, left : left + side]


def caffenet(channels: tuple[int, ...]) -> nn.Sequential:
    """[B, 3, 227, 227] -> pool5 [B, channels[4], 6, 6]."""
    one, two, three, four, five = channels
    return nn.Sequential(
        nn.Conv2d(3, one, 11, stride=4), nn.ReLU(), nn.MaxPool2d(3, 2), response_norm(),                # [27]
        nn.Conv2d(one, two, 5, padding=2, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2), response_norm(),    # [13]
        nn.Conv2d(two, three, 3, padding=1), nn.ReLU(),
        nn.Conv2d(three, four, 3, padding=1, groups=2), nn.ReLU(),
        nn.Conv2d(four, five, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2))                   # [6]


def response_norm() -> nn.LocalResponseNorm:
    return nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75)


def small_convolutions(channels: tuple[int, ...]) -> nn.Sequential:
    """[B, 3, S, S] -> pool5 [B, channels[3], S / 16, S / 16]."""
    first, *others = channels
    layers = [nn.Conv2d(3, first, 5, stride=2, padding=2), nn.ReLU()]
    for before, after in zip(channels, others, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers)


# -- training

class PPGNEncoderOptimizer(GANOptimizer):
    """Adam with its own moments; CaffeNet was trained by SGD, at 0.01 and tenths of it."""

    betas: Betas = Field(default=(0.9, 0.999), description="of Adam: the share that each of its two moving averages, "
                         "of the gradient and of its square, keeps in a step")


class PPGNEncoderRun(RunConfig):
    """A run of the encoder: its sizes, and how its weights move."""

    task: Literal["ppgn_encoder"] = Field(default="ppgn_encoder", description="the kind of run: PPGN's encoder")
    model: PPGNEncoderConfig = Field(default=PPGNEncoderConfig(), description="sizes of the encoder")
    optimizer: PPGNEncoderOptimizer = Field(default=PPGNEncoderOptimizer(), description="how the weights move")

    @model_validator(mode="after")
    def _pictures_are_read(self) -> "PPGNEncoderRun":
        if not self.data.images:
            raise ValueError("the encoder looks at pictures: set data.images to true")
        return self


class PPGNEncoderTask(Task):
    """The cross-entropy of the classes, and the share that is named right."""

    needs_classes = True
    name = "encoder"

    def __init__(self, config: PPGNEncoderRun):
        self.config = config
        settings = filled(config.model, image_size=config.data.image_size)
        model = PPGNEncoder(settings).to(memory_format=torch.channels_last)
        self.check = ClassCheck("PPGN's encoder", "model.num_classes", settings.num_classes)
        self.players = {self.name: Player(model, config.optimizer)}
        self.frozen = {}
        self.phases = [Phase("classes", player=self.name, loss=self.class_loss, capturable=True)]

    def prepare(self, batch: Batch, networks: Networks, step: int) -> Batch:
        exchange = Exchange(networks)
        return {"image": to_signed(batch["image"]),
                "class_id": exchange.mine(self.check(exchange.everyone(batch["class_id"])))}

    def class_loss(self, networks: Networks, batch: Batch, step: int) -> Loss:
        classes = networks[self.name](batch["image"]).classes
        return Loss(F.cross_entropy(at_least_single(classes), batch["class_id"]),
                    {"accuracy": class_accuracy(classes, batch["class_id"])})

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """The share of all pictures whose class is named right."""
        figures = {}
        for batch in batches:
            classes = networks.bare(self.name)(to_signed(batch["image"])).classes
            right = class_accuracy(classes, batch["class_id"])
            figures.setdefault("accuracy", Mean()).add(float(right), count=len(classes))
        return figures

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        self.players[self.name].module.save_pretrained(folder, states[self.name])
