"""GAN-CLS, GAN-INT and GAN-INT-CLS (Reed et al., arXiv 1605.05396), and their style encoder.

A DCGAN conditioned on a sentence vector. GAN-CLS shows the discriminator real pictures with captions of others and
calls them fake (section 4.2); GAN-INT trains the generator on points between captions, too (section 4.3); GAN-INT-CLS
does both. ``loss.mismatched`` and ``loss.interpolated`` choose. The style encoder (section 4.4) finds the noise of a
picture, so that its pose and background can be given to another caption.

Architecture and weights follow the authors' code. It pairs the *wrong picture* with the right caption where the paper
writes the wrong caption; it averages four captions of a picture (``num_captions``) where the paper takes one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.cluster.vq import kmeans2
from scipy.stats import rankdata
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single
from dalle.pictures import grid, to_bytes, to_signed
from dalle.store import load_model, model_folder, model_kind
from dalle.training.gathering import of_everyone
from dalle.training.optimizers import OptimizerConfig
from dalle.training.task import Batch, Companion, Loss, Mean, Networks, Phase, Player
from gans.generator import TEXT_FOLDER, Noise, Painter
from gans.layers import bottleneck, conv1, dcgan_init, down, join, leaky, relu, synchronised
from gans.losses import bce
from gans.task import GANRun, GANTask, PaintingRun, filled, load_encoder, step_generator
from gans.text import Text, load_text_encoder

NOWHERE = [float("nan")] * 2      # the place of an object that the metadata do not have

# -- networks


class GANINTCLSConfig(ModelConfig):
    """Sizes of the generator; the paper's for birds and flowers (COCO: ``width`` 196)."""

    image_size: int = Field(default=64, ge=16)
    sentence_dim: int = Field(default=1024, ge=1)
    text_dim: int = Field(default=128, ge=1)
    noise_dim: int = Field(default=100, ge=1)
    width: int = Field(default=128, ge=2, description="ngf: channels at half of the picture's side")
    large: bool = Field(default=False, description="two bottlenecks in place of each")

    @model_validator(mode="after")
    def _power_of_two(self) -> "GANINTCLSConfig":
        if self.image_size & (self.image_size - 1):
            raise ValueError(f"image_size is {self.image_size}; it must be a power of two")
        return self


def widths(base: int, image_size: int) -> list[int]:
    """Channels at 4x4, 8x8, ... up to half of the side: 8, 4, 2, 1 times ``base`` at 64 pixels."""
    levels = image_size.bit_length() - 3
    return [base * max(8 >> level, 1) for level in range(levels)]


def bottlenecks(channels: int, middle: int, large: bool) -> nn.Sequential:
    return nn.Sequential(*(bottleneck(channels, middle, relu, nn.ReLU()) for _ in range(2 if large else 1)))


def deconv(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    """Doubles height and width."""
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)


class GANINTCLSGenerator(Painter):
    """[z; projected sentence] to a picture, by transposed convolutions with bottlenecks at 4x4 and 8x8."""

    model_type = "gan_int_cls"
    Config = GANINTCLSConfig
    config: GANINTCLSConfig

    def __init__(self, config: GANINTCLSConfig):
        super().__init__(config)
        channels = widths(config.width, config.image_size)
        self.text = nn.Sequential(nn.Linear(config.sentence_dim, config.text_dim), leaky())
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(config.noise_dim + config.text_dim, channels[0], 4, bias=False),
            nn.BatchNorm2d(channels[0]), bottlenecks(channels[0], channels[0] // 4, config.large),
            deconv(channels[0], channels[1]), nn.BatchNorm2d(channels[1]),
            bottlenecks(channels[1], channels[1] // 4, config.large)]
        for inputs, outputs in zip(channels[1:], channels[2:], strict=False):
            layers += [deconv(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, deconv(channels[-1], 3), nn.Tanh())
        dcgan_init(self)

    @property
    def noise_dims(self) -> dict[str, int]:
        return {"z": self.config.noise_dim}

    def forward(self, noise: Noise, sentence: Tensor) -> Tensor:
        """z [B, Z] and sentence [B, D] -> [B, 3, S, S] in [-1, 1]."""
        return self.layers(torch.cat([noise["z"], self.text(sentence)], dim=1)[:, :, None, None])

    def paint(self, noise: Noise, text: Text, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self(noise, text.sentence), {}


class DiscriminatorConfig(Section, json_schema_extra=FIXED):
    """Sizes of the discriminator; the paper's for birds and flowers (COCO: ``width`` 196, ``variant`` cls)."""

    width: int = Field(default=64, ge=2)
    text_dim: int = Field(default=128, ge=1)
    variant: Literal["cls_int", "cls"] = Field(default="cls_int", description="the code's for birds and flowers, with "
                                               "BatchNorm on the text and no activation at 8x8, or that for COCO")


def trunk(width: int, image_size: int, activation_at_8: bool) -> nn.Sequential:
    """A picture to [8 width, 4, 4]."""
    channels = widths(width, image_size)[::-1]
    layers = [down(3, channels[0], norm=False)]
    for index, (inputs, outputs) in enumerate(zip(channels, channels[1:], strict=False), start=1):
        side = image_size >> (index + 1)
        bare = side == 4 or (side == 8 and not activation_at_8)
        layers.append(down(inputs, outputs, activation=None if bare else leaky))
    return nn.Sequential(*layers, bottleneck(channels[-1], channels[-1] // 4, leaky, leaky()))


class Discriminator(nn.Module):
    """Whether a picture is real *and* fits its caption: the sentence joins the features at 4x4."""

    def __init__(self, config: DiscriminatorConfig, image_size: int, sentence_dim: int):
        super().__init__()
        features = widths(config.width, image_size)[0]
        self.trunk = trunk(config.width, image_size, activation_at_8=config.variant == "cls")
        norm = [nn.BatchNorm1d(config.text_dim)] if config.variant == "cls_int" else []
        self.text = nn.Sequential(nn.Linear(sentence_dim, config.text_dim), *norm, leaky())
        self.head = nn.Sequential(conv1(features + config.text_dim, features), nn.BatchNorm2d(features), leaky(),
                                  nn.Conv2d(features, 1, 4, bias=False))
        dcgan_init(self)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[B, 3, S, S] and [B, D] -> logits [B]."""
        return self.head(join(self.trunk(image), self.text(sentence))).flatten()


# -- losses

def discriminator_loss(real: Tensor, wrong: Tensor | None, fake: Tensor, weight: float) -> Tensor:
    """BCE(real, 1) + w BCE(wrong, 0) + (1 - w) BCE(fake, 0): Algorithm 1's loss with w = 1/2. w = 0: a plain GAN."""
    loss = bce(real, 1) + (1 - weight) * bce(fake, 0)
    return loss if wrong is None else loss + weight * bce(wrong, 0)


def generator_loss(plain: Tensor, interpolated: Tensor, weight: float) -> Tensor:
    """The non-saturating loss over captions and points between them, eq. 5: a sum over both, by their number."""
    count = len(plain) + len(interpolated)
    loss = bce(plain, 1) * len(plain)
    return (loss if not len(interpolated) else loss + weight * bce(interpolated, 1) * len(interpolated)) / count


# -- config and task

class GANINTCLSLoss(Section, json_schema_extra=FREE):
    """Which of the three systems it is: both 0 is a plain conditional GAN."""

    mismatched: float = Field(default=0.5, ge=0, le=1, description="CLS: weight of the wrong picture among the fakes")
    interpolated: float = Field(default=1.0, ge=0, description="INT: weight of the points between captions")
    beta: float = Field(default=0.5, ge=0, le=1, description="where between two captions; the paper's is 1/2")
    wrong: Literal["other_class", "other"] = Field(default="other_class", description="which picture is a wrong one; "
                                                   "COCO, without classes: any other")


class GANINTCLSRun(GANRun):
    """A GAN-INT-CLS run."""

    task: Literal["gan_int_cls"] = "gan_int_cls"
    generator: GANINTCLSConfig = GANINTCLSConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    loss: GANINTCLSLoss = GANINTCLSLoss()

    @model_validator(mode="after")
    def _captions_are_paired(self) -> "GANINTCLSRun":
        if self.loss.interpolated and self.train.batch_size % 2:
            raise ValueError(f"GAN-INT pairs the captions of a batch: train.batch_size {self.train.batch_size} must be "
                             "even (loss.interpolated: 0 pairs none)")
        return self

    @property
    def makes_pairs(self) -> bool:
        return bool(self.loss.mismatched or self.loss.interpolated)


class GANINTCLSTask(GANTask):
    """One step of the discriminator, then one of the generator with noise of its own."""

    fresh_noise = True
    config: GANINTCLSRun

    def __init__(self, config: GANINTCLSRun):
        encoder = load_encoder(config)
        generator = GANINTCLSGenerator(filled(config.generator, image_size=config.data.image_size,
                                              sentence_dim=encoder.sentence_dim))
        discriminator = Discriminator(config.discriminator, config.data.image_size, encoder.sentence_dim)
        self.wrong_images = config.loss.wrong if config.loss.mismatched else None
        self.assemble(config, generator, discriminator, encoder)

    def check_share(self, samples: int, world_size: int) -> None:
        super().check_share(samples, world_size)
        if self.config.loss.interpolated and samples % 2:
            raise UserError(f"GAN-INT pairs the captions of a batch: over {world_size} processes train.batch_size "
                            f"{samples * world_size} must be a multiple of {2 * world_size}")

    def prepare(self, batch: Batch, networks: Networks, step: int) -> Batch:
        """Also ``between`` [b/2, D], points between captions of the global batch's halves, and their noise."""
        prepared = super().prepare(batch, networks, step)
        if not self.config.loss.interpolated:
            return prepared
        exchange = self.exchange(networks)
        whole = exchange.everyone(prepared["text"].sentence)
        first, second = whole.chunk(2)
        beta = self.config.loss.beta
        prepared["between"] = exchange.mine(beta * first + (1 - beta) * second)
        noise = self.draw(exchange, len(prepared["between"]), step, 2, whole.device)
        prepared["noise_g"] = {name: torch.cat([values, noise[name]]) for name, values in prepared["noise_g"].items()}
        return prepared

    def d_loss(self, networks: Networks, batch: Batch, step: int) -> Loss:
        discriminator, sentence = networks["discriminator"], batch["text"].sentence
        with torch.no_grad():
            painted = networks["generator"](batch["noise"], sentence)
        real, fake = discriminator(batch["image"], sentence), discriminator(painted, sentence)
        wrong = discriminator(batch["wrong_image"], sentence) if "wrong_image" in batch else None
        loss = discriminator_loss(real, wrong, fake, self.config.loss.mismatched)
        parts = {"real": real.mean(), "fake": fake.mean()} | ({} if wrong is None else {"wrong": wrong.mean()})
        return Loss(loss, {name: value.detach() for name, value in parts.items()})

    def g_loss(self, networks: Networks, batch: Batch, step: int) -> Loss:
        sentence = batch["text"].sentence
        conditions = torch.cat([sentence, batch["between"]]) if "between" in batch else sentence
        painted = networks["generator"](batch["noise_g"], conditions)
        logits = networks["discriminator"](painted, conditions)
        plain, interpolated = logits[:len(sentence)], logits[len(sentence):]
        return Loss(generator_loss(plain, interpolated, self.config.loss.interpolated))

    def real_scores(self, discriminator: Callable[..., Any], batch: Batch, image: Tensor) -> list[Tensor]:
        return [discriminator(image, batch["text"].sentence)]


# -- the style encoder

class StyleConfig(ModelConfig):
    """Sizes of the style encoder, and those of the generator that it inverts."""

    generator: GANINTCLSConfig = GANINTCLSConfig()
    width: int = Field(default=64, ge=2)

    @property
    def image_size(self) -> int:
        return self.generator.image_size


class StyleTransfer(Painter):
    """The frozen generator and S, which finds a picture's noise: G(S(x), phi(t)) is x's style on t's content.

    The layers of S are not published: the discriminator's trunk, then one convolution to the noise.
    """

    model_type = "style"
    Config = StyleConfig
    config: StyleConfig
    edits = True

    def __init__(self, config: StyleConfig):
        super().__init__(config)
        self.generator = GANINTCLSGenerator(config.generator).requires_grad_(False)
        features = widths(config.width, config.image_size)[0]
        self.style = nn.Sequential(trunk(config.width, config.image_size, activation_at_8=True),
                                   nn.Conv2d(features, config.generator.noise_dim, 4))
        dcgan_init(self.style)

    def train(self, mode: bool = True) -> "StyleTransfer":
        """The generator stays in evaluation mode."""
        super().train(mode)
        self.generator.eval()
        return self

    @property
    def noise_dims(self) -> dict[str, int]:
        return {}

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] in [-1, 1] -> the noise [B, Z] that would paint it."""
        return self.style(image).flatten(1)

    def paint(self, noise: Noise, text: Text, **conditions: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.generator({"z": self(conditions["source"])}, text.sentence), {}


class StyleRun(PaintingRun):
    """A run of the style encoder over a finished ``gan`` run, whose text encoder it takes."""

    task: Literal["style"] = "style"
    gan: str = Field(description="a run or model folder of gan_int_cls", json_schema_extra=FREE)
    width: int = Field(default=64, ge=2, description="of the style encoder")
    optimizer: OptimizerConfig = OptimizerConfig(lr=2e-4, betas=(0.5, 0.999), clip=0.0, schedule="constant")
    clusters: int = Field(default=100, ge=2, description="styles that K-means finds for the evaluation",
                          json_schema_extra=FREE)


class StyleTask(GANTask):
    """Minimises E ||z - S(G(z, phi(t)))||^2, eq. 6, with G frozen."""

    companion_settings = {"text": "gan", "gan": "gan"}
    unpacked = frozenset({"gan"})          # its weights are in the checkpoint
    config: StyleRun

    def __init__(self, config: StyleRun):
        folder = model_folder(config.gan)
        if model_kind(folder) != GANINTCLSGenerator.model_type:
            raise UserError(f"gan: {config.gan} holds a {model_kind(folder)!r} model; the style encoder inverts a "
                            f"{GANINTCLSGenerator.model_type!r} run")
        trained = load_model(GANINTCLSGenerator, folder, "cpu")
        if trained.config.image_size != config.data.image_size:
            raise UserError(f"gan: {config.gan} paints {trained.config.image_size} px, data.image_size is "
                            f"{config.data.image_size}; set it to {trained.config.image_size}")
        self.config = config
        model = StyleTransfer(StyleConfig(generator=trained.config, width=config.width))
        model.generator.load_state_dict(trained.state_dict())
        if config.sync_batch_norm:
            model.style = synchronised(model.style)
        encoder = load_text_encoder(str(folder / TEXT_FOLDER))
        self.players = {"generator": Player(model, config.optimizer)}
        self.frozen = {"text": encoder}
        self.phases = [Phase("style", player="generator", loss=self.style_loss)]

    def companions(self) -> dict[str, Companion]:
        return {**super().companions(), "gan": Companion(self.network.generator, "gan")}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> Batch:
        """A noise for each caption, and the picture that the generator makes of both."""
        sentence = self.encode(networks, batch).sentence
        exchange, generator = self.exchange(networks), networks.bare("generator").generator
        own = len(sentence)
        whole = torch.randn(exchange.size(own), generator.config.noise_dim,
                            generator=step_generator(self.config.seed, step, 0))
        z = exchange.mine(whole).to(sentence.device)
        return {"z": z, "image": generator({"z": z}, sentence)}

    def style_loss(self, networks: Networks, batch: Batch, step: int) -> Loss:
        return Loss((batch["z"] - at_least_single(networks["generator"](batch["image"]))).square().sum(dim=1).mean())

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """Section 5.3 on real pictures: how well S tells same styles from different ones, as ROC AUC.

        Styles are clusters of the background's colour and, where the samples say where their objects are, of those
        places. ``caption_auc/...`` is what the caption's vector gives: near 1/2, for it knows nothing of style.
        """
        model, rows = networks.bare("generator"), []
        for batch in batches:
            image = to_signed(batch["image"])
            places = [first_place(meta) or NOWHERE for meta in batch.get("meta", [None] * len(image))]
            rows.append((model(image).float(), self.encode(networks, batch).sentence, border_colour(image),
                         torch.tensor(places, device=image.device)))
        if not rows:
            return {}
        # clusters of a share would be others: every process clusters the rows of all
        styles, sentences, colours, places = (of_everyone(torch.cat(part), networks.world_size).cpu()
                                              for part in zip(*rows, strict=True))
        labels = {"background": clustered(colours.numpy(), self.config.clusters)}
        if places.isfinite().all():
            labels["pose"] = clustered(places.double().numpy(), self.config.clusters)
        figures = {}
        for name, clusters in labels.items():
            for what, vectors in (("style_auc", styles), ("caption_auc", sentences)):
                figures[f"{what}/{name}"] = Mean(same_cluster_auc(vectors, clusters) * len(clusters), len(clusters))
        return figures

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """Columns: pictures of the generator, and below each its style on the preview's captions."""
        settings, model = self.config.preview, networks.bare("generator")
        captions = list(settings.captions)
        text = networks.bare("text")(captions)
        z = torch.randn(settings.columns, model.generator.config.noise_dim,
                        generator=step_generator(self.config.seed, 0, 1)).to(text.sentence.device)
        sources = model.generator({"z": z}, text.sentence[:1].expand(settings.columns, -1))
        rows = [sources] + [model.generator({"z": model(sources)}, sentence.expand(settings.columns, -1))
                            for sentence in text.sentence]
        return {"styles": grid(to_bytes((torch.cat(rows) + 1) / 2).cpu(), settings.columns)}


def same_cluster_auc(vectors: Tensor, clusters: np.ndarray) -> float:
    """The ROC AUC of the cosine of two rows of ``vectors`` [N, Z] as a sign that their clusters are the same."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    rows, columns = np.triu_indices(len(unit), k=1)
    scores = (unit @ unit.T).numpy()[rows, columns]
    positive = clusters[rows] == clusters[columns]
    count = int(positive.sum())
    if count in (0, len(positive)):
        return float("nan")
    ranks = rankdata(scores)
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def clustered(points: np.ndarray, clusters: int) -> np.ndarray:
    """K-means labels [N] of points [N, d], with at most a tenth as many clusters as points."""
    count = max(2, min(clusters, len(points) // 10))
    return kmeans2(points.astype(np.float64), count, minit="++", seed=0)[1]


def border_colour(image: Tensor) -> Tensor:
    """[B, 3, S, S] -> [B, 3]: the mean of the outermost pixels, which are background where there is no mask."""
    edges = [image[:, :, 0], image[:, :, -1], image[:, :, :, 0], image[:, :, :, -1]]
    return torch.cat(edges, dim=2).mean(dim=2)


def first_place(meta: Mapping[str, Any] | None) -> list[float] | None:
    """Where a sample's first object is, by the ``objects`` in its metadata, which name their ``center``."""
    objects = (meta or {}).get("objects")
    return list(map(float, objects[0]["center"])) if objects else None


