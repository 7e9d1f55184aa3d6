"""Where a caption's things are: the generator of key points of GAWWN (Reed et al., arXiv 1610.02454, section 4.3).

A text and some given parts to all parts: a GAN of fully connected layers, after the authors' code
(``main_gen_keypoints.lua`` of ``reedscot/nips2016``). What is given stays: ``(1 - s) G(z, t, given) + s given``, s 1
for a part that is given. In training each part is given with probability 1/10, so that most captions come alone.

``condition: box`` learns one box in the same way, for GAWWN's model of boxes, which the authors sample with boxes of
the data set. Its element is (x, y, width, height, visible). Pictures are decoded, for where a thing is depends on how
its picture is cut, and then not looked at. Differences: the generator's phase has noise of its own and a fresh forward
of both networks, where the code takes the discriminator's step's; ``loss.mismatched`` is not the paper's, and 0.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.pictures import grid
from dalle.store import load_model, model_folder, model_kind
from dalle.training.figures import Mean
from dalle.training.task import Batch, Loss, Networks
from gans.generator import Noise, Painter, noise_of_seeds
from gans.layers import dcgan_init, leaky
from gans.locations import Condition, Which, drawn_places, places_in
from gans.losses import bce
from gans.sizes import NoiseDim, SentenceDim
from gans.task import Exchange, GanBatch, GANRun, GANTask, filled, load_encoder, step_generator

NUMBERS: dict[Condition, int] = {"keypoints": 3, "box": 5}     # of an element; the last: is it there
PREVIEW_SIDE = 128


def fully(inputs: int, outputs: int, activation: Callable[[], nn.Module]) -> nn.Sequential:
    """[B, inputs] -> [B, outputs], normalised."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), activation())


# -- networks

class GAWWNKeypointsConfig(ModelConfig):
    """Sizes of the generator; the paper's for the 15 parts of CUB's birds."""

    condition: Condition = Field(default="keypoints", description="what is generated: key points, or one box")
    num_parts: int = Field(default=15, ge=1, description="key points of a picture, at most")
    width: int = Field(default=128, ge=1, description="ngf: a quarter of the widths of the readers of noise and text")
    noise_dim: NoiseDim = 100
    sentence_dim: SentenceDim = 1024

    @property
    def elements(self) -> tuple[int, int]:
        """How many there are, and the numbers of each."""
        return 1 if self.condition == "box" else self.num_parts, NUMBERS[self.condition]


class GAWWNKeypointsGenerator(Painter):
    """Noise, a text and given places to all places."""

    model_type = "gawwn_keypoints"
    Config = GAWWNKeypointsConfig
    config: GAWWNKeypointsConfig

    def __init__(self, config: GAWWNKeypointsConfig):
        super().__init__(config)
        width, self.shape = config.width, config.elements
        numbers = self.shape[0] * self.shape[1]
        self.noise = nn.Sequential(nn.Linear(config.noise_dim, 4 * width), nn.ReLU())
        self.text = nn.Sequential(nn.Linear(config.sentence_dim, 4 * width), nn.ReLU())
        self.given = nn.Sequential(nn.Flatten(), fully(numbers, 4 * width, nn.ReLU),
                                   fully(4 * width, 2 * width, nn.ReLU))
        self.layers = nn.Sequential(fully(10 * width, 8 * width, nn.ReLU), fully(8 * width, 4 * width, nn.ReLU),
                                    fully(4 * width, 2 * width, nn.ReLU), nn.Linear(2 * width, numbers), nn.Sigmoid())
        dcgan_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.noise_dim}

    def forward(self, noise: Noise, sentence: Tensor, given: Tensor) -> Tensor:
        """z [B, Z], sentences [B, D] and given places [B, n, numbers], 0 where nothing is -> [B, n, numbers]."""
        read = torch.cat([self.noise(noise["z"]), self.text(sentence), self.given(given)], dim=1)
        return kept(self.layers(read).unflatten(1, self.shape), given)

    def nothing_given(self, like: Tensor) -> Tensor:
        """[B, n, numbers] of zeros for as many as ``like``."""
        return like.new_zeros(len(like), *self.shape)


def kept(generated: Tensor, given: Tensor) -> Tensor:
    """(1 - s) generated + s given, [B, n, numbers]; s, the last number of what is given, is 1 where it counts."""
    there = given[..., -1:].to(generated.dtype)
    return (1 - there) * generated + there * given


class GAWWNKeypointsDiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminator."""

    width: int = Field(default=128, ge=1, description="ndf: a quarter of the widths of the readers of places and text")


class GAWWNKeypointsDiscriminator(nn.Module):
    """Whether places are those of a picture with this text."""

    def __init__(self, config: GAWWNKeypointsDiscriminatorConfig, elements: tuple[int, int], sentence_dim: int):
        super().__init__()
        width = config.width
        self.places, self.text = (
            nn.Sequential(nn.Flatten(), fully(inputs, 4 * width, leaky), fully(4 * width, 2 * width, leaky))
            for inputs in (elements[0] * elements[1], sentence_dim))
        self.joint = nn.Sequential(fully(4 * width, 2 * width, leaky), nn.Linear(2 * width, 1))
        dcgan_init(self)

    def forward(self, places: Tensor, sentence: Tensor) -> Tensor:
        """[B, n, numbers] and [B, D] -> logits [B]."""
        return self.joint(torch.cat([self.places(places), self.text(sentence)], dim=1))[:, 0]


# -- losses

def discriminator_loss(real: Tensor, fake: Tensor, wrong: Tensor | None = None, weight: float = 0.0) -> Tensor:
    """BCE(real, 1) + (1 - w) BCE(fake, 0) + w BCE(wrong, 0); w = 0 is the paper's plain GAN."""
    loss = bce(real, 1) + (1 - weight) * bce(fake, 0)
    return loss if wrong is None else loss + weight * bce(wrong, 0)


# -- training

class GAWWNKeypointsLoss(Section, json_schema_extra=FREE):
    """What the discriminator is shown as wrong."""

    mismatched: float = Field(default=0.0, ge=0, le=1, description="weight of real places with another text among the "
                              "fakes; the paper has none")
    given: float = Field(default=0.1, ge=0, le=1, description="probability that a part is given to the generator")


class GAWWNKeypointsRun(GANRun):
    """A run of the generator of places."""

    task: Literal["gawwn_keypoints"] = Field(default="gawwn_keypoints", description="the kind of run: GAWWN's "
                                             "generator of key points")
    which: Which = Field(default="all", description="the box of several: the one around all, or the first",
                         json_schema_extra=FIXED)
    generator: GAWWNKeypointsConfig = Field(default=GAWWNKeypointsConfig(), description="sizes of the generator")
    discriminator: GAWWNKeypointsDiscriminatorConfig = Field(default=GAWWNKeypointsDiscriminatorConfig(),
                                                             description="sizes of the discriminator")
    loss: GAWWNKeypointsLoss = Field(default=GAWWNKeypointsLoss(), description="what the discriminator is shown as "
                                     "wrong, and what the generator is given")

    @model_validator(mode="after")
    def _places_are_read(self) -> "GAWWNKeypointsRun":
        check_places(self.data.places, self.generator.condition)
        return self

    @property
    def makes_pairs(self) -> bool:
        return bool(self.loss.mismatched)


def check_places(places: str | None, condition: Condition) -> None:
    """``ValueError`` unless the data say what the condition is made of."""
    needed = "boxes" if condition == "box" else "keypoints"
    if places != needed:
        raise ValueError(f"generator.condition {condition} is learnt from {needed}: set data.places to {needed}")


class GAWWNKeypointsBatch(GanBatch, total=False):
    """With the places of each sample."""

    places: Tensor         # float [b, n, numbers], 0 where a part is not there
    given: Tensor          # the same, with most parts taken away
    wrong_text: Tensor     # with loss.mismatched: [b, D], sentences of others


class GAWWNKeypointsTask(GANTask):
    """One step of the discriminator, then one of the generator with noise of its own."""

    paints = False
    fresh_noise = capturable = True
    config: GAWWNKeypointsRun

    def __init__(self, config: GAWWNKeypointsRun):
        encoder = load_encoder(config)
        generator = GAWWNKeypointsGenerator(filled(config.generator, sentence_dim=encoder.sentence_dim))
        discriminator = GAWWNKeypointsDiscriminator(config.discriminator, generator.shape, encoder.sentence_dim)
        self.assemble(config, generator, discriminator, encoder)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> GAWWNKeypointsBatch:
        prepared: GAWWNKeypointsBatch = super().prepare(batch, networks, step)
        exchange = self.exchange(networks)
        places = places_in(batch, self.config.generator.condition, self.config.generator.num_parts, self.config.which)
        if self.config.generator.condition == "box":
            places = torch.cat([places, torch.ones_like(places[:, :1])], dim=1)[:, None]
        chosen = torch.rand(exchange.size(len(places)), places.shape[1],
                            generator=step_generator(self.config.seed, step, 102)) < self.config.loss.given
        chosen = exchange.mine(chosen).to(places.device, non_blocking=True)
        prepared |= {"places": places, "given": places * chosen[..., None]}
        if self.config.loss.mismatched:
            prepared["wrong_text"] = shuffled(exchange, prepared["text"].sentence, self.config.seed, step)
        return prepared

    def d_loss(self, networks: Networks, batch: GAWWNKeypointsBatch, step: int) -> Loss:
        discriminator, sentence = networks["discriminator"], batch["text"].sentence
        with torch.no_grad():
            made = networks["generator"](batch["noise"], sentence, batch["given"])
        real, fake = discriminator(batch["places"], sentence), discriminator(made, sentence)
        wrong = discriminator(batch["places"], batch["wrong_text"]) if "wrong_text" in batch else None
        return Loss(discriminator_loss(real, fake, wrong, self.config.loss.mismatched),
                    {"real": real.mean().detach(), "fake": fake.mean().detach()})

    def g_loss(self, networks: Networks, batch: GAWWNKeypointsBatch, step: int) -> Loss:
        made = networks["generator"](batch["noise_g"], batch["text"].sentence, batch["given"])
        return Loss(bce(networks["discriminator"](made, batch["text"].sentence), 1))

    def r1_loss(self, networks: Networks, batch: GAWWNKeypointsBatch, step: int) -> Loss:
        """Of the places, which are what the discriminator sees."""
        seen: GanBatch = {**batch, "image": batch["places"]}
        return super().r1_loss(networks, seen, step)

    def real_scores(self, discriminator: Callable[..., Any], batch: GAWWNKeypointsBatch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence)]

    # -- looking

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """``places``: a row for each caption, a column for each seed."""
        settings, network = self.config.preview, networks.bare("generator")
        captions = [caption for caption in settings.captions for _ in range(settings.columns)]
        if not captions:
            return {}
        made = self.made(networks, captions, list(range(settings.columns)) * len(settings.captions))
        blank = torch.zeros(3, PREVIEW_SIDE, PREVIEW_SIDE)
        drawn = [drawn_places(blank, located(row[None], network.config.condition)[0]) for row in made.cpu()]
        return {"places": grid(torch.stack(drawn), settings.columns)}

    def made(self, networks: Networks, captions: list[str], seeds: list[int]) -> Tensor:
        """[N, n, numbers]: places from captions alone."""
        network, sentence = networks.bare("generator"), networks.bare("text")(captions).sentence
        noise = noise_of_seeds(seeds, network.noise_dims, network.noise_law)
        was_training = network.training
        places = network.eval()({name: values.to(sentence.device) for name, values in noise.items()}, sentence,
                                network.nothing_given(sentence))
        network.train(was_training)
        return places

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """``distance``: of a generated place from the sample's, in shares of the side (of a box, the mean over its
        numbers); ``seen``: the share of parts of which it is said rightly whether they are there."""
        config = self.config.generator
        distance, seen = Mean(), Mean()
        for batch in batches:
            real = places_in(batch, config.condition, config.num_parts, self.config.which)
            made = self.made(networks, batch["caption"], batch["position"].tolist())
            if config.condition == "box":
                distance.add((made[:, 0, :4] - real).abs().mean(), len(real))
                continue
            there = real[..., 2] > 0
            apart = (made[..., :2] - real[..., :2]).norm(dim=-1)
            if there.any():
                distance.add(apart[there].mean(), int(there.sum()))
            seen.add(((made[..., 2] > 0.5) == there).float().mean(), there.numel())
        return {"distance": distance, **({"seen": seen} if config.condition == "keypoints" else {})}


def located(made: Tensor, condition: Condition) -> Tensor:
    """What GAWWN is conditioned on, of generated places [B, n, numbers]: a box [B, 4], or key points [B, n, 3], 1 or 0
    where a part is there or not; there is always one."""
    if condition == "box":
        return made[:, 0, :4]
    there = made[..., 2:]
    there = ((there > 0.5) | (there == there.amax(dim=1, keepdim=True))).to(made.dtype)
    return torch.cat([made[..., :2], there], dim=-1) * there


def load_places(name: str, condition: Condition, num_parts: int) -> GAWWNKeypointsGenerator:
    """The finished generator in a run or model folder; ``UserError`` unless it gives such places."""
    folder = model_folder(name)
    if model_kind(folder) != GAWWNKeypointsGenerator.model_type:
        raise UserError(f"places: {name} holds a {model_kind(folder)!r} model: give a run of gawwn_keypoints")
    places = load_model(GAWWNKeypointsGenerator, folder, "cpu")
    if places.config.condition != condition:
        raise UserError(f"places: {name} gives {places.config.condition}, but generator.condition is {condition}")
    if condition == "keypoints" and places.config.num_parts != num_parts:
        raise UserError(f"places: {name} gives {places.config.num_parts} parts, but generator.num_parts is {num_parts}")
    return places


def shuffled(exchange: Exchange, sentence: Tensor, seed: int, step: int) -> Tensor:
    """[b, D]: the sentences in a random order over the global batch, a function of seed and step; some may stay."""
    whole = exchange.everyone(sentence)
    order = torch.randperm(len(whole), generator=step_generator(seed, step, 101))
    return exchange.mine(whole[order.to(whole.device, non_blocking=True)])


