"""Training the VS similarity of HDGAN (arXiv 1802.09178, section 4.1): two linear maps over frozen features.

The paper's features are Inception-ResNet-v2's of the picture and a char-CNN-RNN's of the caption; those of a CLIP that
was trained here serve both where neither is at hand.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.metrics.vs import IMAGE_FOLDER, TEXT_FOLDER
from dalle.models.clip import ClipModel, first_line
from dalle.models.precision import full_precision
from dalle.models.vs import MARGIN, InceptionResNetFeatures, VSConfig, VSModel, vs_ranking_loss
from dalle.store import TOKENIZER_FOLDER, load_model, load_tokenizer, model_folder, model_kind
from dalle.tasks.clip import pooled_recalls
from dalle.training.gathering import in_global_order
from dalle.training.optimizers import Betas, OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Companion, Loss, Mean, Networks, Phase, Player, Task

INCEPTION = InceptionResNetFeatures.model_type


class VSArchitecture(Section, json_schema_extra=FIXED):
    """The length of the common space; those of the features follow from their networks."""

    embed_dim: int = Field(default=512, ge=1, description="dimensions of the common space")


class VSOptimizer(OptimizerConfig):
    """The paper's: Adam at a constant rate, without clipping."""

    lr: float = Field(default=2e-4, gt=0, description="peak learning rate of Adam")
    betas: Betas = Field(default=(0.5, 0.999), description="decay of Adam's means of the gradient and of its square")
    clip: float = Field(default=0.0, ge=0, description="largest norm of the gradient; 0 turns clipping off")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="how the learning rate falls after the warm-up")


class VSLossConfig(Section, json_schema_extra=FREE):
    """By how much a pair must be nearer than every mismatched one."""

    margin: float = Field(default=MARGIN, gt=0, description="in cosine similarity")


class VSRun(RunConfig):
    """A VS run: where the features come from and how the maps over them move.

    The paper trained on the test pictures, too: ``data.train`` takes both splits, as ``TRAIN::TEST``.
    """

    task: Literal["vs"] = Field(default="vs", description="what is trained: a VS similarity")
    image_features: str = Field(description=f"a CLIP's run or model folder, {INCEPTION} (of timm's hub) or "
                                            f"{INCEPTION}:FILE", json_schema_extra=FREE)
    text_features: str = Field(description="a CLIP's run or model folder", json_schema_extra=FREE)
    model: VSArchitecture = Field(default=VSArchitecture(), description="the two maps")
    optimizer: VSOptimizer = Field(default=VSOptimizer(), description="how their weights move")
    loss: VSLossConfig = Field(default=VSLossConfig(), description="what they are asked")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "VSRun":
        if self.data.tokenizer is None:
            raise ValueError("the VS model reads captions: set data.tokenizer to the tokenizer of text_features")
        if not self.data.images:
            raise ValueError("the VS model looks at pictures: set data.images to true")
        if self.train.batch_size < 2:
            raise ValueError("the ranking loss compares the pairs of a batch: set train.batch_size to 2 or more")
        return self


class FeaturesBatch(Batch, total=False):
    """The frozen features of the whole global batch, in the same order on every process; no other key is left."""

    image_features: Tensor          # [B, image_dim]
    text_features: Tensor           # [B, text_dim]


class VSTask(Task):
    """The bidirectional ranking loss over the pairs of the global batch."""

    companion_settings = {"text": "text_features", "image": "image_features"}
    splits_batch = False    # every pair of the batch is a negative of every other

    def __init__(self, config: VSRun):
        self.config = config
        self.tokenizer = load_tokenizer(Path(config.data.tokenizer))
        text = load_text_network(config, self.tokenizer)
        same = config.image_features == config.text_features
        image = text if same else load_image_network(config.image_features)
        text_dim = text.encode_text(torch.ones(1, 1, dtype=torch.int64)).shape[1]
        image_dim = text_dim if same else image_width(image)
        model = VSModel(VSConfig(image_dim=image_dim, text_dim=text_dim, embed_dim=config.model.embed_dim))
        self.players = {"vs": Player(model, config.optimizer)}
        self.frozen = {"text": text} if same else {"text": text, "image": image}
        self.phases = [Phase("rank", player="vs", loss=self.rank, capturable=True)]

    def companions(self) -> dict[str, Companion]:
        """Also ``image`` where one network gives both features."""
        found = super().companions()
        return {**found, "image": found.get("image", Companion(self.frozen["text"], "image_features"))}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> FeaturesBatch:
        """The frozen features of the whole global batch, in the same order on every process.

        Each process then computes the one loss, whose gradient is that of the global batch and so the mean over them.
        """
        image, text = (in_global_order(features, networks.world_size) for features in self.features(networks, batch))
        return {"image_features": image, "text_features": text}

    def features(self, networks: Networks, batch: Batch) -> tuple[Tensor, Tensor]:
        text = networks.bare("text")
        image = networks.bare("image") if "image" in self.frozen else text
        with full_precision(batch["image"].device):
            return image.encode_image(batch["image"]), text.encode_text(batch["text"])

    def rank(self, networks: Networks, batch: FeaturesBatch, step: int) -> Loss:
        """The summed ranking loss; also the mean cosine of the pairs."""
        with full_precision(batch["image_features"].device):
            image, text = networks["vs"](batch["image_features"], batch["text_features"])
            similarity = image @ text.T
            total = vs_ranking_loss(similarity, self.config.loss.margin)
        return Loss(total, {"similarity": similarity.diagonal().mean().detach()})

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """The mean cosine of the pairs, and recall@1 and @5 in whole pools, as for a CLIP."""
        model, pairs = networks.bare("vs"), []
        for batch in batches:
            image, text = self.features(networks, batch)
            with full_precision(image.device):
                pairs.append(model(image, text))
        similarity = Mean()
        for image, text in pairs:
            similarity.add((image * text).sum(dim=1).mean(), count=len(image))
        return {"similarity": similarity, **pooled_recalls(pairs, networks.world_size)}

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """The maps and, in ``text/`` and ``image/``, the networks before them: all that the metric needs."""
        self.players["vs"].module.save_pretrained(folder, states["vs"])
        self.frozen["text"].save_pretrained(Path(folder) / TEXT_FOLDER)
        self.tokenizer.save(Path(folder) / TEXT_FOLDER / TOKENIZER_FOLDER)
        if "image" in self.frozen:
            self.frozen["image"].save_pretrained(Path(folder) / IMAGE_FOLDER)


def load_text_network(config: VSRun, tokenizer: CaptionTokenizer) -> ClipModel:
    """The network of ``text_features``, for captions of this tokenizer and length."""
    text = load_clip("text_features", config.text_features)
    folder = model_folder(config.text_features)
    if load_tokenizer(folder / TOKENIZER_FOLDER).digest != tokenizer.digest:
        raise UserError(f"data.tokenizer {config.data.tokenizer} is not the tokenizer of text_features: "
                        f"set it to {folder / TOKENIZER_FOLDER}")
    if text.config.text_length != config.data.text_length:
        raise UserError(f"text_features {config.text_features} reads captions of {text.config.text_length} tokens, "
                        f"data.text_length is {config.data.text_length}: set it to {text.config.text_length}")
    return text


def load_image_network(name: str) -> nn.Module:
    """The network of ``image_features``, frozen."""
    kind, _, weights = name.partition(":")
    if kind != INCEPTION:
        return load_clip("image_features", name)
    try:
        return InceptionResNetFeatures.load(weights or None).requires_grad_(False)
    except Exception as error:      # the hub's client and a file of other weights fail in many ways
        raise UserError(f"image_features: the weights of {name} could not be had ({first_line(error)}); without a "
                        f"network give {INCEPTION}:FILE, published at https://huggingface.co/timm/"
                        "inception_resnet_v2.tf_in1k, or the folder of a CLIP run") from error


def load_clip(key: str, name: str) -> ClipModel:
    try:
        folder = model_folder(name)
        if model_kind(folder) != ClipModel.model_type:
            raise UserError(f"{name} holds a {model_kind(folder)!r} model, not a {ClipModel.model_type!r}")
        return load_model(ClipModel, folder, "cpu").requires_grad_(False)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error


def image_width(network: nn.Module) -> int:
    """How many numbers the network makes of a picture."""
    if isinstance(network, InceptionResNetFeatures):
        return network.dim
    return network.encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
