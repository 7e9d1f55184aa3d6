"""PPAN (Gao et al., AAAI 2019, doi 10.1609/aaai.v33i01.33018312): one pyramid, three discriminators, four losses.

Coarse features enter a level, a picture is made there, and convolutions lead on to the next one. L1 asks for the right
caption and L2 for real patches at every level; of the last picture alone L3 asks for its class, and L4 for the features
of the real picture that the caption describes. There is no distance of pixels.

No code was released, and what is public says no widths, weights, adversarial form or layer of the VGG. The pyramid and
its discriminators are HDGAN's (``gans/hdgan.py``), whose paper it builds on, with skips over each scale as an option;
the scores are least squares, or cross-entropies (``loss.adversarial``); L4 takes VGG-16's relu3_3, or any other
(``features``). The class head's convolution has a normalisation and an activation behind it as all of the
discriminators' have: with nothing there, it would be one linear map with the layer that follows.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FREE, Section
from dalle.models.precision import at_least_single
from dalle.training.task import Batch, Loss, Networks
from gans.acgan import ClassCheck, class_accuracy
from gans.generator import Noise, Painter
from gans.hdgan import (
    PATCHES_FROM,
    Error,
    HDGANDiscriminatorConfig,
    Hierarchy,
    HierarchyConfig,
    Looked,
    PatchScores,
    ScaleDiscriminator,
    adversarial_loss,
)
from gans.hdgan import discriminator_loss as matching_and_local
from gans.layers import conv1, dcgan_init, leaky
from gans.looking import seen
from gans.losses import bce, mse, perceptual_loss
from gans.outputs import Painted
from gans.perceptual import load_features
from gans.task import GanBatch, GANRun, GANTask, filled, load_encoder, pyramid
from gans.text import Text

ERRORS: dict[str, Error] = {"lsgan": mse, "bce": bce}


# -- the generator

class PPANConfig(HierarchyConfig):
    """Sizes of the generator; the defaults are those of HDGAN for 256 pixels."""

    skips: bool = Field(default=False, description="every scale adds to what came into it, enlarged")


class PPANGenerator(Painter):
    """z and a sentence vector to pictures of growing side."""

    model_type = "ppan"
    Config = PPANConfig
    config: PPANConfig

    def __init__(self, config: PPANConfig):
        super().__init__(config)
        self.base = Pyramid(config)
        dcgan_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.z_dim, "eps": self.config.condition_dim}

    def forward(self, noise: Noise, text: Text) -> Painted:
        return self.base(noise, text.sentence)[0]

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text) -> tuple[Tensor, dict[str, Tensor]]:
        painted = self(noise, text)
        return painted.image, seen(painted)


class Pyramid(Hierarchy):
    """HDGAN's, with a way around each scale where asked."""

    def __init__(self, config: PPANConfig):
        super().__init__(config)
        if config.skips:
            before = None
            for side, scale in self.scales.items():
                after = config.channels(int(side))
                if before is not None:
                    self.scales[side] = Skipped(scale, before, after)
                before = after


class Skipped(nn.Module):
    """body(x) + x enlarged: [B, inputs, S, S] -> [B, outputs, 2S, 2S]; a 1x1 convolution where the channels change."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int):
        super().__init__()
        self.body = body
        self.around = nn.Sequential(*([conv1(inputs, outputs)] if inputs != outputs else []),
                                    nn.Upsample(scale_factor=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.around(x)


# -- the discriminators

class PyramidScores(NamedTuple):
    """What the discriminators say of the pictures of all levels with one caption each."""

    levels: list[PatchScores]
    classes: Tensor | None       # [B, K], logits of the last one; None without a class head


class PPANDiscriminator(nn.Module):
    """D1, D2, D3, as one player that shares nothing; the last one also names the class. ``num_classes`` 0: it does
    not."""

    def __init__(self, sides: Sequence[int], sentence_dim: int, num_classes: int, width: int = 512,
                 text_dim: int = 128):
        super().__init__()
        self.scales = nn.ModuleList(ScaleDiscriminator(side, sentence_dim, width, text_dim, level >= PATCHES_FROM)
                                    for level, side in enumerate(sides))
        self.classes = ClassHead(width, num_classes) if num_classes else None
        dcgan_init(self)

    def forward(self, images: Sequence[Tensor], *sentences: Tensor) -> list[PyramidScores]:
        """Pictures [B, 3, S, S] of each level, with each of the ``sentences`` [B, D]: they are looked at once."""
        looked = [scale.look(image) for scale, image in zip(self.scales, images, strict=True)]
        patches = [scale.patch_scores(one) for scale, one in zip(self.scales, looked, strict=True)]
        classes = self.classes(looked[-1]) if self.classes is not None else None
        return [PyramidScores([PatchScores(scale.match(one, sentence), local) for scale, one, local
                               in zip(self.scales, looked, patches, strict=True)], classes) for sentence in sentences]


class ClassHead(nn.Module):
    """The 8x8 map of a picture to logits of its class [B, K]: a 4x4 convolution, the mean over places, a layer."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(width, width, 4, bias=False), nn.BatchNorm2d(width), leaky())
        self.logits = nn.Linear(width, num_classes)

    def forward(self, looked: Looked) -> Tensor:
        return self.logits(self.features(looked.map).mean(dim=(2, 3)))


# -- the losses: L1 and L2, which the three share, are HDGAN's

def class_loss(classes: Tensor, class_id: Tensor) -> Tensor:
    """H(C(I), c), mean: logits [B, K] against int64 [B]."""
    return F.cross_entropy(at_least_single(classes), class_id)


def discriminator_class_loss(real: Tensor, wrong: Tensor, fake: Tensor, class_id: Tensor,
                             wrong_class_id: Tensor) -> Tensor:
    """L3 = H(C(I_r), c_r) + H(C(I_w), c_w) + H(C(I_f), c_r); I_w and c_w: the picture of the wrong pair, its class."""
    return class_loss(real, class_id) + class_loss(wrong, wrong_class_id) + class_loss(fake, class_id)


def discriminator_loss(real: PyramidScores, wrong: PyramidScores, fake: PyramidScores, class_id: Tensor,
                       wrong_class_id: Tensor, error: Error = mse, class_weight: float = 1.0) -> Tensor:
    """L1 + L2 of D1, D2 and D3, and L3 of the last."""
    loss = matching_and_local(real.levels, wrong.levels, fake.levels, error)
    if fake.classes is None:
        return loss
    return loss + class_weight * discriminator_class_loss(real.classes, wrong.classes, fake.classes, class_id,
                                                          wrong_class_id)


def generator_loss(fake: PyramidScores, class_id: Tensor, perceptual: Tensor, kl: Tensor,
                   weights: "PPANLossConfig") -> Tensor:
    """L1 + L2 of every level, L3 = H(C(I_f), c_r) and L4 of the last, and the conditioning's divergence."""
    loss = adversarial_loss(fake.levels, ERRORS[weights.adversarial])
    if fake.classes is not None:
        loss = loss + weights.class_weight * class_loss(fake.classes, class_id)
    return loss + weights.perceptual * perceptual + weights.kl * kl


# -- the run

class PPANDiscriminatorConfig(HDGANDiscriminatorConfig):
    """Sizes of the discriminators."""

    num_classes: int = Field(default=150, ge=0, description="number of classes, of which class_id counts from 0; 0: "
                             "samples have none, and L3 is left out (loss.class_weight: 0)")


class PPANLossConfig(Section, json_schema_extra=FREE):
    """The form of the scores and the weights; no number of the paper's is known."""

    adversarial: Literal["lsgan", "bce"] = Field(default="lsgan", description="L1 and L2 as least squares, or as "
                                                 "cross-entropies")
    mismatch: Literal["text", "image"] = Field(default="text", description="the wrong pair: the real picture with "
                                               "another sample's text, or as HDGAN has it a picture of another class "
                                               "with the text")
    class_weight: float = Field(default=1.0, ge=0, description="lambda_3, of the class loss L3")
    perceptual: float = Field(default=1.0, ge=0, description="lambda_4, of the perceptual loss L4")
    kl: float = Field(default=2.0, ge=0, description="weight of the conditioning augmentation's divergence")


class PPANRun(GANRun):
    """A PPAN's run."""

    task: Literal["ppan"] = Field(default="ppan", description="the kind of run: a PPAN")
    generator: PPANConfig = Field(default=PPANConfig(), description="sizes of the generator")
    discriminator: PPANDiscriminatorConfig = Field(default=PPANDiscriminatorConfig(),
                                                   description="sizes of the discriminators")
    features: str = Field(default="vgg16_relu3_3", description="frozen features that L4 compares: vgg16_relu3_3 (or "
                          "another ReLU), with nothing, :FILE or :random behind it, or a run or model folder of a "
                          "damsm with a small trunk", json_schema_extra=FREE)
    loss: PPANLossConfig = Field(default=PPANLossConfig(), description="form and weights of the losses")

    @model_validator(mode="after")
    def _classes_are_named_or_not(self) -> "PPANRun":
        if self.loss.class_weight and not self.discriminator.num_classes:
            raise ValueError("without classes there is no L3: set loss.class_weight to 0, or discriminator.num_classes "
                             "to the number of classes")
        return self


class PPANTask(GANTask):
    """The same fakes for both players, first the discriminators, then the generator."""

    paints_once = capturable = True
    companion_settings = {"text": "text_encoder", "features": "features"}
    unpacked = frozenset({"features"})         # sampling does without it
    config: PPANRun

    def __init__(self, config: PPANRun):
        encoder = load_encoder(config)
        sizes = filled(config.generator, sentence_dim=encoder.sentence_dim, image_size=config.data.image_size)
        classes = config.discriminator.num_classes
        self.sides, self.needs_classes = sizes.sides, bool(classes)
        self.check = ClassCheck("PPAN", "discriminator.num_classes", classes) if classes else None
        if config.loss.mismatch == "text":
            self.wrong_texts = "rolled"
        else:
            self.wrong_images = "other_class"
        discriminator = PPANDiscriminator(self.sides, encoder.sentence_dim, classes, config.discriminator.width,
                                          config.discriminator.text_dim)
        self.assemble(config, PPANGenerator(sizes), discriminator, encoder,
                      {"features": load_features(config.features)})

    def prepare(self, batch: Batch, networks: Networks, step: int) -> GanBatch:
        if self.check is None:
            return super().prepare(batch, networks, step)
        exchange = self.exchange(networks)
        everyones = self.check(exchange.everyone(batch["class_id"]))
        return super().prepare({**batch, "class_id": exchange.mine(everyones)}, networks, step)

    def paint(self, networks: Networks, batch: GanBatch, step: int) -> Painted:
        return networks["generator"](batch["noise"], batch["text"])

    def d_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        """Also the share of the real pictures' classes that are named right."""
        real, wrong, wrong_class_id = self.real_pairs(networks["discriminator"], batch)
        (fake,) = networks["discriminator"](batch["painted"].images, batch["text"].sentence)
        settings = self.config.loss
        total = discriminator_loss(real, wrong, fake, batch["class_id"], wrong_class_id, ERRORS[settings.adversarial],
                                   settings.class_weight)
        parts = {name: scores.levels[-1].pair.mean().detach()
                 for name, scores in (("real", real), ("wrong", wrong), ("fake", fake))}
        return Loss(total, parts | accuracy("real_accuracy", real, batch["class_id"]))

    def real_pairs(self, discriminator: Callable[..., Any],
                   batch: GanBatch) -> tuple[PyramidScores, PyramidScores, Tensor]:
        """The scores of the real pictures with their captions, those of the wrong pairs, and their pictures' classes.

        With the text exchanged the pictures of both are the same, and so are their patches and classes.
        """
        reals, sentence = pyramid(batch["image"], self.sides), batch["text"].sentence
        if self.config.loss.mismatch == "text":
            real, wrong = discriminator(reals, sentence, batch["wrong_text"].sentence)
            return real, wrong, batch["class_id"]
        (real,) = discriminator(reals, sentence)
        (wrong,) = discriminator(pyramid(batch["wrong_image"], self.sides), sentence)
        return real, wrong, batch["wrong_class_id"]

    def g_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        painted = batch["painted"]
        (fake,) = networks["discriminator"](painted.images, batch["text"].sentence)
        features = networks["features"]
        with torch.no_grad():
            wanted = features(batch["image"])
        perceptual = perceptual_loss(features(painted.image), wanted)
        kl = self.network.base.augmentation.kl(painted.augmented)
        total = generator_loss(fake, batch["class_id"], perceptual, kl, self.config.loss)
        return Loss(total, {"perceptual": perceptual.detach(), "kl": kl.detach(),
                            **accuracy("accuracy", fake, batch["class_id"])})

    def real_scores(self, discriminator: Callable[..., Any], batch: GanBatch, image: Tensor) -> list[Tensor]:
        (scores,) = discriminator(pyramid(image, self.sides), batch["text"].sentence)
        return [score for level in scores.levels for score in level]


def accuracy(name: str, scores: PyramidScores, class_id: Tensor) -> dict[str, Tensor]:
    return {} if scores.classes is None else {name: class_accuracy(scores.classes, class_id)}
