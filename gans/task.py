"""The one task of all GANs: what goes into a step, in which order the players move, and what is exported.

A system subclasses :class:`GANTask` and writes down its networks and its two losses. What a step is made of (texts,
mismatched pairs, noise) is a function of the seed, the step and the global batch, so that any number of processes
trains the same: sample i of the global batch is sample i // R of rank i mod R.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import Field, ValidationError, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.data.decode import BadSample
from dalle.data.index import ShardIndex
from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.evaluation.captions import CaptionSource
from dalle.evaluation.small_config import SmallEvaluationConfig
from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single
from dalle.pictures import grid, to_signed
from dalle.training.gathering import in_global_order
from dalle.training.optimizers import Betas, OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Companion, Loss, Networks, Phase, Player, Task
from gans.generator import TEXT_FOLDER, GANGenerator, Noise, Painter, draw_noise
from gans.layers import SynchronisedBatchNorm, spectrally_normalised, synchronised
from gans.losses import r1_penalty
from gans.outputs import Painted
from gans.text import CLIP, TRAINED_ENCODERS, StandardisedTextEncoder, Text, load_text_encoder

CAPTIONS_FOR_STATISTICS = 2000
PREVIEW_CAPTIONS = ("a red circle", "a blue square above a green star", "a small yellow triangle", "a purple heart")

Config = TypeVar("Config", bound=ModelConfig)


class GANOptimizer(OptimizerConfig):
    """Adam as DCGAN has it (arXiv 1511.06434): no clipping, no decay, a constant rate; encoders have other numbers."""

    lr: float = Field(default=2e-4, gt=0, description="peak learning rate")
    betas: Betas = Field(default=(0.5, 0.999), description="of Adam: the share that each of its two moving averages, "
                         "of the gradient and of its square, keeps in a step")
    clip: float = Field(default=0.0, ge=0, description="largest norm of the player's gradient; 0: not clipped")
    schedule: Literal["constant", "linear", "cosine", "step"] = Field(
        default="constant", description="how the learning rate goes on from its peak over the run")


class StabiliserConfig(Section, json_schema_extra=FREE):
    """What the classic systems did not have; off in their configs."""

    r1: float = Field(default=0.0, ge=0, description="gamma of the R1 penalty on real pictures, of every "
                      "head; patches count by their mean; 0: none")
    r1_every: int = Field(default=16, ge=1, description="steps between two penalties, each that much stronger")
    spectral_norm: bool = Field(default=False, description="hold the largest singular value of every layer of the "
                                "discriminator at 1", json_schema_extra=FIXED)


class GANPreviewConfig(Section, json_schema_extra=FREE):
    """The pictures in the log: each caption with ``columns`` seeds, counted from 0."""

    captions: tuple[str, ...] = Field(default=PREVIEW_CAPTIONS, description="captions that are painted, a row of "
                                      "pictures each")
    columns: int = Field(default=4, ge=1, description="pictures of each caption, with the seeds 0, 1, ...")


class PaintingRun(RunConfig):
    """What every run has whose network paints captions."""

    sync_batch_norm: bool = Field(default=False, description="batch normalisation by the statistics over the batches "
                                  "of all processes", json_schema_extra=FREE)
    preview: GANPreviewConfig = Field(default=GANPreviewConfig(), description="the pictures in the log, every "
                                      "train.preview_every steps")
    evaluation: SmallEvaluationConfig = Field(default=SmallEvaluationConfig(),
                                              description="what is measured every train.evaluate_every steps")

    @model_validator(mode="after")
    def _pairs_are_read(self) -> "PaintingRun":
        if not self.data.images:
            raise ValueError("a GAN is trained on pictures: leave data.images as it is")
        if self.reads_captions and self.data.caption == "none":
            raise ValueError(f"a {self.task} run reads captions, but data.caption is none: set it to random or first")
        return self

    @property
    def reads_captions(self) -> bool:
        return True

    @property
    def reads_several_captions(self) -> bool:
        """The mean of their sentences; a system that reads words has one caption of each sample, as published."""
        return self.reads_captions


class GANRun(PaintingRun):
    """What every GAN's run has; a system adds ``task``, ``generator``, ``discriminator`` and ``loss``."""

    text_encoder: str | None = Field(
        default=None, description=f"a run or model folder ({', '.join([*TRAINED_ENCODERS, CLIP])}), open_clip:NAME/TAG "
                                  "or transformers:NAME; frozen", json_schema_extra=FREE)
    standardise_text: bool = Field(default=False, description="each dimension of the text to mean 0 and deviation 1")
    generator_optimizer: GANOptimizer = Field(default=GANOptimizer(), description="how the generator's weights move")
    discriminator_optimizer: GANOptimizer = Field(default=GANOptimizer(),
                                                  description="how the discriminator's weights move")
    stabiliser: StabiliserConfig = Field(default=StabiliserConfig(), description="penalties and norms that the "
                                         "published systems did not have")

    @model_validator(mode="after")
    def _pairs_can_be_made(self) -> "GANRun":
        if self.makes_pairs and self.train.batch_size < 2:
            raise ValueError("wrong pairs are made within a batch: set train.batch_size to 2 or more")
        return self

    @property
    def makes_pairs(self) -> bool:
        """Whether a step puts pictures and captions of different samples together."""
        return True


class GanBatch(Batch, total=False):
    """A prepared batch: what a step of a GAN is made of. A system with keys of its own declares them in a subclass."""

    image: Tensor               # float [b, 3, S, S] in [-1, 1]
    text: Text                  # in the place of the ids: the frozen encoder's
    noise: Noise
    noise_g: Noise              # with ``fresh_noise``: the generator's phase has its own
    wrong_image: Tensor         # with ``wrong_images``: [b, 3, S, S] as ``image``, of other samples
    wrong_class_id: Tensor      # int64 [b]: their classes
    wrong_text: Text            # with ``wrong_texts``: of other samples
    painted: Painted            # with ``paints_once``: the generator's, made ahead of the phases


class Exchange:
    """Moves tensors between this rank's share of the global batch and all of it."""

    def __init__(self, networks: Networks):
        self._rank, self._world_size = networks.rank, networks.world_size

    def everyone(self, tensor: Tensor) -> Tensor:
        """[b, ...] -> [B, ...], in the order of the global batch; without gradient."""
        return in_global_order(tensor, self._world_size) if self._world_size > 1 else tensor

    def mine(self, tensor: Tensor) -> Tensor:
        """[B, ...] -> [b, ...]."""
        return tensor[self._rank::self._world_size]

    def size(self, own: int) -> int:
        """B for a share of ``own``."""
        return own * self._world_size


class GANTask(Task):
    """A generator against a discriminator: the base of every system's task.

    Class attributes say what a system's step needs. ``paints_once``: both players' phases judge the same fakes,
    ``painted``, which :meth:`paint` makes once a step; else each phase paints. ``fresh_noise``: the generator's phase
    gets a noise of its own, ``noise_g``. ``wrong_images``: ``wrong_image`` is drawn from the global batch, of another
    class where there are classes, or just another one. ``wrong_texts``: ``wrong_text`` is the text
    ``wrong_text_shift`` samples further on. ``capturable``: its losses, and what it paints once, depend on the tensors
    of the prepared batch alone, as :class:`dalle.training.task.Phase` has it; not on ``step``.
    """

    paints = True
    splits_batch = False       # batch normalisation and mismatched pairs couple the samples
    paints_once: bool = False
    fresh_noise: ClassVar[bool] = False
    wrong_images: ClassVar[Literal["other_class", "other"] | None] = None
    wrong_texts: ClassVar[Literal["rolled"] | None] = None
    wrong_text_shift: ClassVar[int] = 1
    capturable: ClassVar[bool] = False
    generator_repeats: ClassVar[int] = 1
    companion_settings: ClassVar[Mapping[str, str]] = {"text": "text_encoder"}
    config: PaintingRun
    players: dict[str, Player]

    # -- what a system writes

    def paint(self, networks: Networks, batch: GanBatch, step: int) -> Painted:
        """With ``paints_once``: what the phases find as ``painted``, all but the generator's without its graph."""
        raise NotImplementedError

    def d_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        """The discriminator's loss; what it paints itself it paints without gradient."""
        raise NotImplementedError

    def g_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        """The generator's loss."""
        raise NotImplementedError

    def real_scores(self, discriminator: Callable[..., Any], batch: GanBatch, image: Tensor) -> list[Tensor]:
        """The logits of real, matching pairs, for R1, [B] or, of patches, [B, ...] of each head; ``image`` takes the
        place of the batch's."""
        raise NotImplementedError

    # -- what it gets

    def assemble(self, config: GANRun, generator: Painter, discriminator: nn.Module,
                 text_encoder: nn.Module | None, frozen: Mapping[str, nn.Module] | None = None) -> None:
        """Set players, frozen networks and phases; the last line of a system's ``__init__``."""
        self.config = config
        generator, discriminator = made_ready(config, generator), made_ready(config, discriminator, judges=True)
        self.players = {"generator": Player(generator, config.generator_optimizer),
                        "discriminator": Player(discriminator, config.discriminator_optimizer)}
        self.frozen = {**({"text": text_encoder} if text_encoder is not None else {}), **(frozen or {})}
        self.phases = [Phase("discriminator", player="discriminator", loss=self.d_loss,
                             capturable=self.capturable)]
        if config.stabiliser.r1:
            self.phases.append(Phase("r1", player="discriminator", loss=self.r1_loss,
                                     every=config.stabiliser.r1_every, capturable=self.capturable))
        self.phases.append(Phase("generator", player="generator", loss=self.g_loss, repeats=self.generator_repeats,
                                 ahead={"painted": self.paint} if self.paints_once else {},
                                 capturable=self.capturable))

    @property
    def network(self) -> Painter:
        """The generator itself."""
        return self.players["generator"].module

    def companions(self) -> dict[str, Companion]:
        """The frozen networks. Statistics that were taken here differ by rounding from one processor to another: they
        are known by the encoder and the captions that they come from."""
        found = super().companions()
        return {name: Companion(one.module.encoder, one.setting, one.module.captions)
                if isinstance(one.module, StandardisedTextEncoder) and one.module.captions else one
                for name, one in found.items()}

    def exchange(self, networks: Networks) -> Exchange:
        return Exchange(networks)

    def check_share(self, samples: int, world_size: int) -> None:
        """A normalisation over the values of one sample alone has no deviation to divide by."""
        normalised = samples * world_size if self.config.sync_batch_norm else samples
        if normalised < 2 and any(isinstance(part, (nn.BatchNorm1d, SynchronisedBatchNorm))
                                  for player in self.players.values() for part in player.module.modules()):
            remedy = "" if self.config.sync_batch_norm or world_size == 1 else ", or sync_batch_norm to true"
            raise UserError(f"train.batch_size leaves each process one sample at once, and this system's batch "
                            f"normalisation needs two: set it to {2 * world_size} or more{remedy}")

    def prepare(self, batch: Batch, networks: Networks, step: int) -> GanBatch:
        """The step's tensors, those that :class:`GANTask`'s attributes ask for included."""
        exchange = self.exchange(networks)
        prepared: GanBatch = {"image": to_signed(batch["image"]), "class_id": batch["class_id"],
                              "caption": batch.get("caption")}
        if "text" in self.frozen:
            prepared["text"] = self.encode(networks, batch)
        for stream, name in enumerate(("noise", "noise_g") if self.fresh_noise else ("noise",)):
            prepared[name] = self.draw(exchange, len(batch["image"]), step, stream, batch["image"].device)
        if self.wrong_images is not None:
            prepared |= self.draw_wrong_images(exchange, batch, step)
        if self.wrong_texts is not None:
            prepared["wrong_text"] = self.roll_text(exchange, prepared["text"])
        return prepared

    def encode(self, networks: Networks, batch: Batch) -> Text:
        """The frozen encoder's text. Where a sample has several captions, the sentence is the mean of theirs, and the
        words are those of all, one caption after the other."""
        encoder = networks.bare("text")
        if "captions" not in batch:
            return floated(encoder(batch["caption"]))
        count = len(batch["captions"][0])
        text = floated(encoder([caption for captions in batch["captions"] for caption in captions]))
        sentence, words, mask = (part.unflatten(0, (-1, count)) for part in text)
        return Text(sentence.mean(dim=1), words.movedim(1, 2).flatten(2), mask.flatten(1))

    def draw(self, exchange: Exchange, own: int, step: int, stream: int, device: torch.device) -> Noise:
        """This rank's rows of the step's noise."""
        source = step_generator(self.config.seed, step, stream)
        noise = draw_noise(source, exchange.size(own), self.network.noise_dims, self.network.noise_law)
        return {name: exchange.mine(values).to(device, non_blocking=True) for name, values in noise.items()}

    def draw_wrong_images(self, exchange: Exchange, batch: Batch, step: int) -> GanBatch:
        """For each sample another picture of the global batch, and its class."""
        images, classes = exchange.everyone(batch["image"]), exchange.everyone(batch["class_id"])
        chosen = other_samples(classes, self.wrong_images == "other_class",
                               step_generator(self.config.seed, step, 100))
        mine = exchange.mine(chosen)
        return {"wrong_image": to_signed(images[mine]), "wrong_class_id": classes[mine]}

    def roll_text(self, exchange: Exchange, text: Text) -> Text:
        """Sample i gets the text of sample i + shift of the global batch."""
        return Text(*(exchange.mine(exchange.everyone(part).roll(-self.wrong_text_shift, 0)) for part in text))

    def r1_loss(self, networks: Networks, batch: GanBatch, step: int) -> Loss:
        """gamma / 2 of the gradient penalties of all heads, times the steps between two (lazy regularisation).

        Each head is penalised as if it judged alone: it has a loss of its own in ``d_loss``, which adds them up, too.
        The gradient of their sum would make gamma mean as many squared as there are heads that agree.
        """
        discriminator = networks.penalty("discriminator")
        return self.r1_of(lambda image: self.real_scores(discriminator, batch, image), batch["image"])

    def r1_of(self, scores: Callable[[Tensor], list[Tensor]], real: Tensor) -> Loss:
        """The penalty of a discriminator that gives ``real`` pictures these ``scores``, by head."""
        image = real.clone().requires_grad_(True)
        penalty = sum(r1_penalty(score, image) for score in scores(image))
        settings = self.config.stabiliser
        return Loss(0.5 * settings.r1 * settings.r1_every * penalty, {"gradient": penalty.detach()})

    # -- looking and keeping

    def generator(self, networks: Networks) -> GANGenerator:
        """What paints with the networks as they are now."""
        encoder = networks.bare("text") if "text" in self.frozen else None
        return GANGenerator(networks.bare("generator"), encoder)

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """``samples``: a row for each caption, a column for each seed; and NAME_N, what else there is to see of the
        first picture of the N-th caption."""
        settings = self.config.preview
        if not settings.captions or self.network.edits:
            return {}
        captions = [caption for caption in settings.captions for _ in range(settings.columns)]
        seeds = list(range(settings.columns)) * len(settings.captions)
        images, details = self.generator(networks).generate_with_details(captions, seeds)
        return {"samples": grid(images, settings.columns),
                **{f"{name}_{number}": picture for number, detail in enumerate(details[::settings.columns])
                   for name, picture in detail.get("pictures", {}).items()}}

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """The generator, and in ``text/`` the encoder: all that sampling needs."""
        self.network.save_pretrained(folder, states["generator"])
        if "text" in self.frozen:
            self.frozen["text"].save(Path(folder) / TEXT_FOLDER)


def made_ready(config: GANRun, module: nn.Module, judges: bool = False) -> nn.Module:
    """A player's network as the run has it: normalised over all processes, a discriminator spectrally, where asked."""
    if judges and config.stabiliser.spectral_norm:
        module = spectrally_normalised(module)
    if config.sync_batch_norm:
        module = synchronised(module)
    # as convolutions on CPU cores and tensor cores read them: a quarter of the step's time
    return module.to(memory_format=torch.channels_last)


def load_encoder(config: GANRun, default: str | None = None) -> nn.Module:
    """The run's text encoder, or the one called ``default``, frozen; ``UserError`` when none is named."""
    name = config.text_encoder or default
    if name is None:
        raise UserError(f"{config.task} reads captions: set text_encoder to a run of {', '.join(TRAINED_ENCODERS)} or "
                        f"{CLIP}, open_clip:NAME/TAG or transformers:NAME")
    encoder = load_text_encoder(name)
    if not config.standardise_text:
        return encoder
    return StandardisedTextEncoder.over(encoder, first_captions(config.data))


def first_captions(data: DataConfig) -> list[str]:
    """A caption of each of the first samples to train on, to take statistics over."""
    source = CaptionSource(ShardIndex.load(data.train, data.bad_shards))
    captions = []
    for position in range(min(source.index.num_samples, CAPTIONS_FOR_STATISTICS)):
        with suppress(BadSample):
            own = source.captions(position)
            captions.append(own[position % len(own)])
    return captions


def filled(config: Config, **values: Any) -> Config:
    """``config`` with what follows from elsewhere filled in; ``UserError`` for a value that contradicts it."""
    given = dict(config)
    for name, value in values.items():
        default = type(config).model_fields[name].default      # what a saved config has in it, though nobody chose it
        if given[name] not in (value, default):
            raise UserError(f"generator.{name} is {given[name]}, but it follows from the data and the text encoder and "
                            f"is {value}: leave it out")
    try:
        return type(config).model_validate({**config.model_dump(exclude_unset=True), **values})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["generator", *map(str, first["loc"])])
        raise UserError(f"{where}: {first['msg'].removeprefix('Value error, ')}") from error


def pyramid(image: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """[B, 3, S, S] resized to each size: lower levels are copies of one crop, not crops of their own."""
    return [image if size == image.shape[-1] else
            F.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False) for size in sizes]


def floated(text: Text) -> Text:
    return Text(at_least_single(text.sentence), at_least_single(text.words), text.mask)


def step_generator(*key: int) -> torch.Generator:
    """A source of random numbers that is a function of ``key`` alone."""
    digest = hashlib.blake2b(",".join(map(str, key)).encode(), digest_size=8, person=b"gan-step").digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def other_samples(classes: Tensor, of_other_class: bool, source: torch.Generator) -> Tensor:
    """int64 [B]: for each sample another one at random; of another class where there is one (-1: a class of its own).

    A batch in which all samples are of one class gives just others; a batch of one sample gives that one.
    """
    count = len(classes)
    order = torch.rand(count, count, generator=source)
    order.fill_diagonal_(-2)                                    # never itself, unless it is alone
    if of_other_class:
        order = order.to(classes.device, non_blocking=True)
        alike = (classes[:, None] == classes[None, :]) & (classes >= 0)[:, None]
        order -= alike.float().fill_diagonal_(0)                # behind all of another class
    return order.argmax(dim=1).to(classes.device, non_blocking=True)
