"""GAWWN (Reed et al., arXiv 1610.02454): learning what and where to draw, from a text and a box or key points.

After the authors' code (``reedscot/nips2016``). ``condition`` chooses between the paper's two models. Of the box
(section 4.1), features of the text are pasted where the box is, a local path paints into the box and a global one
around it; the discriminator crops its features there. Of key points (section 4.2), binary maps of the parts gate the
text and stand beside the features, and the discriminator's features are looked at where a part is.

``places`` names a finished ``gans/gawwn_keypoints.py`` of the same condition: by it pictures are painted from a caption
alone. It is a part of the exported generator and draws on a noise of its own, ``z_places``.

Where paper and code differ the code is followed: the mean of four captions, convolutions with biases, a wrong *text*
for mismatched pairs, drawn by a permutation of the batch that may leave some where they are, and warping the text of
the discriminator's global path by the matrix that crops. Repaired: the generator's step judges the step's pictures with
the discriminator as it is by then, where the code walks back through what was computed before it moved. Different: one
box a picture, as the code's for birds (it averages over several); boxes are cut at the picture's edges, and key points
that are cut off are not seen, where the code moves them to the edge. Below 128 pixels the joint map of 16 x 16 stays,
and there are fewer doublings behind it and halvings before it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.metrics.judge_report import judge_report
from dalle.models.base import ModelConfig
from dalle.pictures import signed_to_bytes
from dalle.training.companions import Companion
from dalle.training.figures import Mean
from dalle.training.task import Batch, Loss, Networks
from gans.gan_int_cls import discriminator_loss
from gans.gawwn_keypoints import (
    GAWWNKeypointsConfig,
    GAWWNKeypointsGenerator,
    check_places,
    load_places,
    located,
    shuffled,
)
from gans.generator import Noise, Painter, noise_of_seeds
from gans.layers import bottleneck, dcgan_init, leaky, relu, sequence, tile
from gans.locations import (
    Condition,
    Which,
    clipped,
    crop_matrix,
    drawn_places,
    gate,
    inverse_matrix,
    keypoint_maps,
    places_in,
    read_box,
    read_keypoints,
    read_switch,
    resampled,
)
from gans.looking import IMAGE, seen
from gans.losses import bce
from gans.outputs import Painted
from gans.sizes import ImageSize, NoiseDim, SentenceDim
from gans.task import GanBatch, GANRun, GANTask, filled, load_encoder
from gans.text import Text

MAP = 16            # side of the maps on which places are told
PLACES = "place"    # what paint calls them

Activation = Callable[[], nn.Module] | None


# -- layers: every convolution has a bias, as the authors' have

def conv(inputs: int, outputs: int, kernel: int = 4, activation: Activation = leaky,
         norm: bool = True) -> nn.Sequential:
    """4: halves height and width; 3 and 1: keeps them."""
    return sequence(nn.Conv2d(inputs, outputs, kernel, 2 if kernel == 4 else 1, (kernel - 1) // 2),
                    nn.BatchNorm2d(outputs) if norm else None, activation and activation())


def whole(inputs: int, outputs: int, activation: Activation, norm: bool = True) -> nn.Sequential:
    """[B, inputs, 4, 4] -> [B, outputs], nothing left of places."""
    return sequence(nn.Conv2d(inputs, outputs, 4), nn.BatchNorm2d(outputs) if norm else None, activation(),
                    nn.Flatten())


def deconv(inputs: int, outputs: int, kernel: int = 4, activation: Activation = relu) -> nn.Sequential:
    """4: doubles height and width; 3: keeps them."""
    return sequence(nn.ConvTranspose2d(inputs, outputs, kernel, 2 if kernel == 4 else 1, 1), nn.BatchNorm2d(outputs),
                    activation and activation())


def first(inputs: int, outputs: int, activation: Activation = relu) -> nn.Sequential:
    """[B, inputs, 1, 1] -> [B, outputs, 4, 4]."""
    return sequence(nn.ConvTranspose2d(inputs, outputs, 4), nn.BatchNorm2d(outputs), activation and activation())


def doublings(image_size: int) -> int:
    """From the joint map to the picture."""
    return (image_size // MAP).bit_length() - 1


def painter(inputs: int, widths: Sequence[int], image_size: int) -> nn.Sequential:
    """[B, inputs, 16, 16] -> [B, 3, S, S]: a doubling to each of ``widths`` as far as they are needed, the last to
    colours."""
    count = doublings(image_size)
    channels = [inputs, *(widths[min(place, len(widths) - 1)] for place in range(count - 1))]
    return nn.Sequential(*(deconv(wide, narrow) for wide, narrow in zip(channels, channels[1:], strict=False)),
                         nn.ConvTranspose2d(channels[-1], 3, 4, 2, 1), nn.Tanh())


# -- generators

class GAWWNConfig(ModelConfig):
    """Sizes of the generator; the paper's for birds."""

    condition: Condition = Field(default="box", description="what a picture is painted around: a box, or key points")
    image_size: ImageSize = Field(default=128, ge=2 * MAP)
    width: int = Field(default=128, ge=4, description="ngf: an eighth of the channels at 4x4")
    num_parts: int = Field(default=15, ge=1, description="key points of a picture, at most")
    noise_dim: NoiseDim = 100
    sentence_dim: SentenceDim = 1024
    places: GAWWNKeypointsConfig = Field(default=GAWWNKeypointsConfig(condition="box"), description="sizes of the "
                                         "generator of places; follow from its run")

    @model_validator(mode="after")
    def _sizes_fit(self) -> "GAWWNConfig":
        if self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size is {self.image_size}; it must be a power of two")
        return self


class Readers(nn.Module):
    """z and a sentence to 4 widths of features each."""

    def __init__(self, config: GAWWNConfig):
        super().__init__()
        self.noise = nn.Linear(config.noise_dim, 4 * config.width)
        self.text = nn.Linear(config.sentence_dim, 4 * config.width)

    def forward(self, noise: Tensor, sentence: Tensor) -> Tensor:
        """[B, 8 width]."""
        return torch.cat([self.noise(noise), self.text(sentence)], dim=1).relu()


class BoxGenerator(nn.Module):
    """Noise, a text and a box to a picture: a global path of all, and a local one that is pasted into the box."""

    def __init__(self, config: GAWWNConfig):
        super().__init__()
        width = config.width
        self.read = Readers(config)
        self.global_noise = nn.Linear(config.noise_dim, 4 * width)
        self.global_text = nn.Sequential(conv(4 * width, 4 * width, activation=relu),
                                         conv(4 * width, 4 * width, activation=relu),
                                         whole(4 * width, 4 * width, relu))
        self.global_path = nn.Sequential(first(8 * width, 8 * width), deconv(8 * width, 4 * width),
                                         deconv(4 * width, 2 * width))
        self.local_path = nn.Sequential(
            first(8 * width, 8 * width, None), bottleneck(8 * width, 2 * width, relu, nn.ReLU(), bias=True),
            deconv(8 * width, 4 * width, activation=None), bottleneck(4 * width, width, relu, nn.ReLU(), bias=True),
            deconv(4 * width, 2 * width, activation=None))
        self.paint = nn.Sequential(deconv(4 * width, 2 * width, 3),
                                   painter(2 * width, (width, max(width // 4, 1)), config.image_size))
        dcgan_init(self)

    def forward(self, noise: Tensor, sentence: Tensor, box: Tensor) -> Tensor:
        """[B, Z], [B, D] and [B, 4] -> [B, 3, S, S]."""
        paste = inverse_matrix(crop_matrix(box))
        text = self.read.text(sentence)
        pasted = self.global_text(resampled(tile(text, MAP), paste))
        around = self.global_path(torch.cat([self.global_noise(noise).relu(), pasted], dim=1)[:, :, None, None])
        inside = self.local_path(torch.cat([self.read.noise(noise), text], dim=1).relu()[:, :, None, None])
        return self.paint(torch.cat([around, resampled(inside, paste).relu()], dim=1))


class KeypointGenerator(nn.Module):
    """Noise, a text and maps of the parts to a picture: a global path of all, and a local one where parts are."""

    def __init__(self, config: GAWWNConfig):
        super().__init__()
        width, parts = config.width, config.num_parts
        self.read = Readers(config)
        self.local, self.everywhere = (
            nn.Sequential(nn.Linear(8 * width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU()) for _ in range(2))
        self.local_path = deconv(4 * width, 4 * width, 3)
        self.parts = nn.Sequential(conv(parts, width, activation=relu), conv(width, 2 * width, activation=relu),
                                   whole(2 * width, 4 * width, relu))
        self.global_path = nn.Sequential(first(8 * width, 4 * width), deconv(4 * width, 2 * width),
                                         deconv(2 * width, width))
        self.paint = nn.Sequential(deconv(5 * width + parts, 4 * width, 3), deconv(4 * width, 4 * width, 3, None),
                                   bottleneck(4 * width, width, relu, nn.ReLU(), bias=True),
                                   painter(4 * width, (2 * width, width), config.image_size))
        dcgan_init(self)

    def gated(self, features: Tensor, maps: Tensor) -> Tensor:
        """[B, C] and [B, n, 16, 16] -> [B, C, 16, 16]: the features where a part is, 0 elsewhere."""
        return tile(features, MAP) * gate(maps).to(features.dtype)

    def forward(self, noise: Tensor, sentence: Tensor, points: Tensor) -> Tensor:
        """[B, Z], [B, D] and [B, n, 3] -> [B, 3, S, S]."""
        maps = keypoint_maps(points, MAP)
        read = self.read(noise, sentence)
        inside = self.local_path(self.gated(self.local(read), maps))
        around = self.global_path(torch.cat([self.everywhere(read), self.parts(maps)], dim=1)[:, :, None, None])
        return self.paint(torch.cat([around, inside, maps.to(inside.dtype)], dim=1))


class GAWWNGenerator(Painter):
    """Noise, a text and places to a picture; to sample, places come from the generator of places where none are given.
    """

    model_type = "gawwn"
    Config = GAWWNConfig
    config: GAWWNConfig

    def __init__(self, config: GAWWNConfig):
        super().__init__(config)
        self.layers = BoxGenerator(config) if config.condition == "box" else KeypointGenerator(config)
        self.places = GAWWNKeypointsGenerator(config.places).requires_grad_(False)
        self.train()

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.noise_dim, "z_places": self.config.places.noise_dim}

    def train(self, mode: bool = True) -> "GAWWNGenerator":
        super().train(mode)
        self.places.eval()
        return self

    def forward(self, noise: Noise, sentence: Tensor, places: Tensor) -> Tensor:
        """z [B, Z], sentences [B, D] and boxes [B, 4] or key points [B, n, 3] -> [B, 3, S, S] in [-1, 1]."""
        return self.layers(noise["z"], sentence, places)

    # -- to sample

    def options(self, **given: Any) -> dict[str, Any]:
        """``box``, "X,Y,WIDTH,HEIGHT" in shares of the side; or ``keypoints``, "X:Y,X:Y,...", a part each in their
        order, "-" for one that is not given, and ``complete``: the others come from the caption."""
        own = ("box",) if self.config.condition == "box" else ("keypoints", "complete")
        for name in ("box", "keypoints", "complete"):
            if name in given and name not in own:
                raise UserError(f"this gawwn model is told where by {self.config.condition}: {name} is not an option "
                                "of it")
        if self.config.condition == "box":
            read = {"box": read_box(given.pop("box", None))}
        else:
            read = {"keypoints": read_keypoints(given.pop("keypoints", None), self.config.num_parts),
                    "complete": read_switch(given.pop("complete", False))}
        super().options(**given)
        return read

    def conditions(self, captions: Sequence[str], text: Text | None, box: tuple[float, ...] | None = None,
                   keypoints: tuple[tuple[float, float] | None, ...] | None = None, complete: bool = False
                   ) -> dict[str, Tensor]:
        """What is given, for every picture: ``places``, or ``given`` where the rest is to be found."""
        device = next(self.parameters()).device
        if box is not None:
            return {"places": torch.tensor(box, device=device).expand(len(captions), -1)}
        if keypoints is None:
            return {}
        points = torch.zeros(self.config.num_parts, 3, device=device)
        for number, point in enumerate(keypoints):
            if point is not None:
                points[number] = torch.tensor([*point, 1.0], device=device)
        return {"given" if complete else "places": points.expand(len(captions), -1, -1)}

    def paint(self, noise: Noise, text: Text, places: Tensor | None = None, given: Tensor | None = None
              ) -> tuple[Tensor, dict[str, Tensor]]:
        """Also ``place``: the box [B, 4] or the key points [B, n, 3] that each was painted around."""
        if places is None:
            sentence = text.sentence
            given = self.places.nothing_given(sentence) if given is None else given
            places = located(self.places({"z": noise["z_places"]}, sentence, given), self.config.condition)
        image = self(noise, text.sentence, clipped(places) if self.config.condition == "box" else places)
        return image, {**seen(Painted([image], None)), PLACES: places}

    def pictures(self, values: Mapping[str, Tensor], caption: str) -> dict[str, Tensor]:
        """``places``: the picture with its box or key points."""
        image = next(value for name, value in values.items() if name.startswith(IMAGE))
        return {**super().pictures(values, caption), "places": drawn_places(image, values[PLACES])}


# -- discriminators

class GAWWNDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminator; the paper's."""

    width: int = Field(default=128, ge=1, description="ndf: channels of the first feature map")
    text_dim: int = Field(default=128, ge=1, description="nt: numbers that the text is projected to")
    vector_norm: bool = Field(default=True, description="whether what each path says of a whole picture is normalised, "
                              "as published; false: a batch of nothing but fakes can then be told by its mean")


class GAWWNDiscriminator(nn.Module):
    """A picture, places and a text to whether they belong together: a path that looks at the places, and one at all."""

    def __init__(self, config: GAWWNDiscriminatorConfig, sizes: GAWWNConfig):
        super().__init__()
        width, text, self.condition = config.width, config.text_dim, sizes.condition
        parts = sizes.num_parts if self.condition == "keypoints" else 0
        count = doublings(sizes.image_size)
        channels = [3, *[width] * (count - 1), 2 * width]
        self.trunk = nn.Sequential(
            *(conv(inputs, outputs, norm=place == count - 1)
              for place, (inputs, outputs) in enumerate(zip(channels, channels[1:], strict=False))),
            conv(2 * width, 2 * width, 3))
        self.text = nn.Sequential(nn.Linear(sizes.sentence_dim, text), leaky())
        self.region = conv(2 * width + text, 2 * width, 3)
        self.within = nn.Sequential(conv(2 * width + parts, 2 * width, 1), nn.Conv2d(2 * width, width, 1))
        self.everywhere = nn.Sequential(conv(2 * width, 4 * width), conv(4 * width, 8 * width))
        told = text
        if self.condition == "box":
            self.warped, told = nn.Sequential(conv(text, 4 * width, activation=relu),
                                              conv(4 * width, width, activation=relu)), width
        norm = config.vector_norm
        self.all = nn.Sequential(conv(8 * width + told, 4 * width, 1), whole(4 * width, width, leaky, norm))
        self.join = sequence(nn.Linear(2 * width, width), nn.BatchNorm1d(width) if norm else None, leaky(),
                             nn.Linear(width, 1))
        self.activation = leaky()
        dcgan_init(self)

    def forward(self, image: Tensor, sentence: Tensor, places: Tensor) -> Tensor:
        """[B, 3, S, S], [B, D] and [B, 4] or [B, n, 3] -> logits [B]."""
        features, text = self.trunk(image), self.text(sentence)
        tiled = tile(text, MAP)
        region = self.region(torch.cat([features, tiled], dim=1))
        if self.condition == "box":
            crop = crop_matrix(places)
            looked_at, told = resampled(region, crop), self.warped(resampled(tiled, crop))
        else:
            maps = keypoint_maps(places, MAP).to(region.dtype)
            looked_at, told = torch.cat([region * gate(maps), maps], dim=1), tile(text, 4)
        local = self.activation(self.within(looked_at).mean(dim=(2, 3)))
        everything = self.all(torch.cat([self.everywhere(features), told], dim=1))
        return self.join(torch.cat([local, everything], dim=1))[:, 0]


# -- training

class GAWWNLoss(Section, json_schema_extra=FREE):
    """What the discriminator is shown as wrong."""

    mismatched: float = Field(default=0.5, ge=0, le=1, description="weight of the wrong text among the fakes; the "
                              "paper's is 1/2")


class GAWWNRun(GANRun):
    """A GAWWN's run."""

    task: Literal["gawwn"] = Field(default="gawwn", description="the kind of run: a GAWWN")
    places: str = Field(description="the run or model folder of the generator of places, which paints from a caption "
                        "alone; frozen", json_schema_extra=FREE)
    which: Which = Field(default="all", description="the box of several: the one around all, or the first",
                         json_schema_extra=FIXED)
    generator: GAWWNConfig = Field(default=GAWWNConfig(), description="sizes of the generator")
    discriminator: GAWWNDiscriminatorConfig = Field(default=GAWWNDiscriminatorConfig(),
                                                    description="sizes of the discriminator")
    loss: GAWWNLoss = Field(default=GAWWNLoss(), description="what the discriminator is shown as wrong")

    @model_validator(mode="after")
    def _places_are_read(self) -> "GAWWNRun":
        check_places(self.data.places, self.generator.condition)
        return self


class GAWWNBatch(GanBatch, total=False):
    """With where things are."""

    places: Tensor         # boxes [b, 4] or key points [b, n, 3]
    wrong_text: Tensor     # [b, D]: sentences of the global batch, shuffled


class GAWWNTask(GANTask):
    """One step of the discriminator and one of the generator, on the same pictures."""

    paints_once = capturable = True
    companion_settings = {"text": "text_encoder", "places": "places"}
    unpacked = frozenset({"places"})       # its weights are in the checkpoint
    config: GAWWNRun

    def __init__(self, config: GAWWNRun):
        encoder = load_encoder(config)
        places = load_places(config.places, config.generator.condition, config.generator.num_parts)
        sizes = filled(config.generator, image_size=config.data.image_size, sentence_dim=encoder.sentence_dim,
                       places=places.config)
        if places.config.sentence_dim != sizes.sentence_dim:
            raise UserError(f"places {config.places} reads sentences of {places.config.sentence_dim} numbers, the "
                            f"text_encoder gives {sizes.sentence_dim}: use the one that it was trained with")
        generator = GAWWNGenerator(sizes)
        generator.places.load_state_dict(places.state_dict())
        self.assemble(config, generator, GAWWNDiscriminator(config.discriminator, sizes), encoder)

    def companions(self) -> dict[str, Companion]:
        return {**super().companions(), "places": Companion(self.network.places, "places")}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> GAWWNBatch:
        prepared: GAWWNBatch = super().prepare(batch, networks, step)
        prepared["places"] = self.places_of(batch)
        prepared["wrong_text"] = shuffled(self.exchange(networks), prepared["text"].sentence, self.config.seed, step)
        return prepared

    def places_of(self, batch: Batch) -> Tensor:
        """Where the samples' things are: boxes [b, 4] or key points [b, n, 3]."""
        return places_in(batch, self.config.generator.condition, self.config.generator.num_parts, self.config.which)

    def paint(self, networks: Networks, batch: GAWWNBatch, step: int) -> Painted:
        return Painted([networks["generator"](batch["noise"], batch["text"].sentence, batch["places"])], None)

    def d_loss(self, networks: Networks, batch: GAWWNBatch, step: int) -> Loss:
        discriminator, sentence, places = networks["discriminator"], batch["text"].sentence, batch["places"]
        real = discriminator(batch["image"], sentence, places)
        wrong = discriminator(batch["image"], batch["wrong_text"], places)
        fake = discriminator(batch["painted"].image, sentence, places)
        parts = {"real": real.mean(), "wrong": wrong.mean(), "fake": fake.mean()}
        return Loss(discriminator_loss(real, wrong, fake, self.config.loss.mismatched),
                    {name: value.detach() for name, value in parts.items()})

    def g_loss(self, networks: Networks, batch: GAWWNBatch, step: int) -> Loss:
        fake = networks["discriminator"](batch["painted"].image, batch["text"].sentence, batch["places"])
        return Loss(bce(fake, 1))

    def real_scores(self, discriminator: Callable[..., Any], batch: GAWWNBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence, batch["places"])]

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """``given/...``: what the judge of shapes sees in pictures that are painted around the samples' own places.

        The figures of ``evaluation/judge`` are of pictures from captions alone; nothing is measured on other data.
        """
        generator, figures = self.generator(networks).network, {}
        for batch in batches:
            text, places = self.encode(networks, batch), self.places_of(batch)
            noise = noise_of_seeds(batch["position"].tolist(), generator.noise_dims, generator.noise_law)
            image, _ = generator.paint({name: values.to(places.device) for name, values in noise.items()}, text,
                                       places=places)
            try:
                report = judge_report(signed_to_bytes(image), batch["caption"])
            except ValueError:                        # captions of other pictures
                return {}
            for name, value in report.accuracy.items():
                about = name.removeprefix("object_")
                count = report.confusion[about].said if name.startswith("object_") else report.asked[name]
                figures.setdefault(f"given/{name}", Mean()).add(value, count)
        return figures
