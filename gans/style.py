"""The style encoder of GAN-INT-CLS (Reed et al., arXiv 1605.05396, section 4.4): the noise that would paint a picture.

With it the pose and the background of a picture can be given to another caption.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from scipy.cluster.vq import kmeans2
from scipy.stats import rankdata
from torch import Tensor, nn

from dalle.config import FREE
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.models.precision import at_least_single
from dalle.pictures import grid, to_bytes, to_signed
from dalle.store import load_model, model_folder, model_kind
from dalle.training.gathering import of_everyone
from dalle.training.optimizers import OptimizerConfig
from dalle.training.task import Batch, Companion, Loss, Mean, Networks, Phase, Player
from gans.gan_int_cls import GANINTCLSConfig, GANINTCLSGenerator, trunk, widths
from gans.generator import TEXT_FOLDER, Noise, Painter
from gans.layers import dcgan_init, synchronised
from gans.task import GanBatch, GANTask, PaintingRun, step_generator
from gans.text import Text, load_text_encoder

NOWHERE = [float("nan")] * 2      # the place of an object that the metadata do not have


class StyleConfig(ModelConfig):
    """Sizes of the style encoder, and those of the generator that it inverts."""

    generator: GANINTCLSConfig = Field(default=GANINTCLSConfig(), description="sizes of the generator that is "
                                       "inverted; follows from its run")
    width: int = Field(default=64, ge=2, description="channels of the style encoder after its first halving")

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

    task: Literal["style"] = Field(default="style", description="the kind of run: a style encoder")
    gan: str = Field(description="a run or model folder of gan_int_cls", json_schema_extra=FREE)
    width: int = Field(default=64, ge=2, description="channels of the style encoder after its first halving")
    optimizer: OptimizerConfig = Field(
        default=OptimizerConfig(lr=2e-4, betas=(0.5, 0.999), clip=0.0, schedule="constant"),
        description="how the style encoder's weights move")
    clusters: int = Field(default=100, ge=2, description="styles that K-means finds for the evaluation",
                          json_schema_extra=FREE)


class StyleBatch(GanBatch, total=False):
    """``image`` is what the generator makes of ``z`` and the captions."""

    z: Tensor           # [b, Z]: what is to be found again


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
        self.phases = [Phase("style", player="generator", loss=self.style_loss, capturable=True)]

    def companions(self) -> dict[str, Companion]:
        return {**super().companions(), "gan": Companion(self.network.generator, "gan")}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> StyleBatch:
        """A noise for each caption, and the picture that the generator makes of both."""
        sentence = self.encode(networks, batch).sentence
        exchange, generator = self.exchange(networks), networks.bare("generator").generator
        own = len(sentence)
        whole = torch.randn(exchange.size(own), generator.config.noise_dim,
                            generator=step_generator(self.config.seed, step, 0))
        z = exchange.mine(whole).to(sentence.device, non_blocking=True)
        return {"z": z, "image": generator({"z": z}, sentence)}

    def style_loss(self, networks: Networks, batch: StyleBatch, step: int) -> Loss:
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
