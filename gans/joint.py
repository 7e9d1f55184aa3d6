"""What the joint embeddings share: a caption's side and a picture's, in one player, compared over the global batch.

DS-SJE and VSE differ in how a caption is read, in the loss and in what is measured besides recall.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.data.settings import DataConfig
from dalle.models.base import FREE, ModelConfig, PretrainedModel
from dalle.models.precision import at_least_single, full_precision
from dalle.pictures import to_signed
from dalle.tasks.clip import pooled_recalls
from dalle.training.gathering import in_global_order_with_gradient
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Mean, Networks, Player, Task
from gans.task import filled
from gans.trunks import SmallTrunk, build_trunk


def check_pairs_are_read(data: DataConfig, model: str) -> None:
    """``ValueError`` unless a batch has the tokens and the pictures that ``model`` compares."""
    if data.tokenizer is None:
        raise ValueError(f"{model} reads captions: set data.tokenizer to a tokenizer folder")
    if not data.images:
        raise ValueError(f"{model} looks at pictures: set data.images to true")


class JointConfig(ModelConfig):
    """The picture's side: a trunk's vector or, without ``trunk``, one that comes from outside."""

    trunk: str | None = Field(default=None, description="a trunk of gans/trunks.py", json_schema_extra=FREE)
    image_dim: int | None = Field(default=None, ge=1, description="numbers in a picture's vector; follows from the "
                                  "trunk; neither: captions alone")


class JointModel(PretrainedModel):
    """Captions and pictures into one space. Subclasses set ``text``, and map both sides in two methods."""

    config: JointConfig
    text: nn.Module

    def __init__(self, config: JointConfig):
        super().__init__(config)
        self.trunk = None if config.trunk is None else build_trunk(config.trunk, load=False)
        if isinstance(self.trunk, SmallTrunk):
            # its regions are not used here: this would never get the gradient that DDP waits for
            self.trunk.local_norm.requires_grad_(False)

    def embed_text(self, text: Tensor) -> Tensor:
        """What the subclass reads -> [B, D]."""
        raise NotImplementedError

    def map_features(self, features: Tensor) -> Tensor:
        """[B, image_dim] -> [B, D]."""
        raise NotImplementedError

    def embed_images(self, pictures: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] or, without a trunk, its vectors [B, image_dim] -> [B, D]."""
        return self.map_features(pictures if self.trunk is None else self.trunk(pictures)[1])

    def forward(self, text: Tensor, pictures: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return self.embed_text(text), None if pictures is None else self.embed_images(pictures)

    def save_text(self, folder: Any) -> None:
        """Only the caption's side, as a model of the same kind."""
        alone = type(self)(self.config.model_copy(update={"trunk": None, "image_dim": None}))
        state = self.state_dict()
        alone.load_state_dict({name: state[name] for name in alone.state_dict()})
        alone.save_pretrained(folder)


class JointRun(RunConfig):
    """What the runs of both have in common."""

    @model_validator(mode="after")
    def _batch_is_compared(self) -> "JointRun":
        if self.train.batch_size < 2:
            raise ValueError("the loss compares the pairs of a batch: set train.batch_size to 2 or more")
        return self


class JointBatch(Batch, total=False):
    """A prepared batch: both sides as the model takes them."""

    text: Tensor                    # what ``embed_text`` reads: ids [b, ...]
    pictures: Tensor | None         # what ``embed_images`` reads; None where captions are compared with captions


class JointTask(Task):
    """One player, whose loss is over the global batch; a trunk that is not trained stands beside it, frozen."""

    companion_settings = {"trunk": "model.trunk"}
    splits_batch = False      # every pair of the batch is a negative of every other
    name: ClassVar[str]       # of the player
    whole: JointConfig        # what the export holds, a frozen trunk included

    def assemble(self, kind: type[JointModel], config: JointConfig) -> None:
        """Build the networks: the trunk belongs to the player if it is trained."""
        self.frozen = {}
        if config.trunk is not None:
            trunk = build_trunk(config.trunk)
            config = filled(config, image_dim=trunk.pooled_dim)
            if not trunk.trained:
                self.frozen["trunk"] = trunk
        self.kind, self.whole = kind, config
        own = config.model_copy(update={"trunk": None}) if self.frozen else config
        self.players = {self.name: Player(kind(own), self.config.optimizer)}

    @property
    def model(self) -> JointModel:
        return self.players[self.name].module

    def read(self, batch: Batch) -> Tensor:
        """The captions of a loaded batch as ``embed_text`` takes them, on the batch's device."""
        raise NotImplementedError

    def look(self, batch: Batch, networks: Networks) -> Tensor:
        """The pictures of a loaded batch as ``embed_images`` takes them."""
        pictures = to_signed(batch["image"])
        if "trunk" not in self.frozen:
            return pictures
        with full_precision(pictures.device):
            return networks.bare("trunk")(pictures)[1]

    def prepare(self, batch: Batch, networks: Networks, step: int) -> JointBatch:
        return {"text": self.read(batch), "pictures": self.look(batch, networks), "class_id": batch["class_id"]}

    def sides(self, network: Callable[..., Any], batch: JointBatch) -> tuple[Tensor, Tensor]:
        """Embeddings [b, D] of a prepared batch's pictures and captions, in one forward of the player."""
        text, pictures = network(batch["text"], batch["pictures"])
        return pictures, text

    def embed(self, networks: Networks, batch: JointBatch) -> tuple[Tensor, Tensor]:
        """Those [B, D] of the global batch, with gradient: every process computes its one loss."""
        pictures, text = self.sides(networks[self.name], batch)
        return (in_global_order_with_gradient(at_least_single(pictures), networks.world_size),
                in_global_order_with_gradient(at_least_single(text), networks.world_size))

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """Recall@1 and @5 in whole pools, as for a CLIP, by the scores that the loss compares; and ``figures``."""
        model, pairs, classes = networks.bare(self.name), [], []
        for batch in batches:
            prepared = self.prepare(batch, networks, 0)
            with full_precision(batch["image"].device):
                pairs.append(self.scored(*self.sides(model, prepared)))
            classes.append(prepared["class_id"])
        return {**pooled_recalls(pairs, networks.world_size), **self.figures(networks, pairs, torch.cat(classes))}

    def scored(self, pictures: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The two embeddings such that their dot product is the score."""
        return pictures, text

    def figures(self, networks: Networks, pairs: list[tuple[Tensor, Tensor]], classes: Tensor) -> dict[str, Mean]:
        """What a subclass measures besides, on this rank's share; every process calls it."""
        return {}

    def whole_model(self, state: Mapping[str, Tensor]) -> JointModel:
        """The player with these weights, and with the frozen trunk."""
        model = self.kind(self.whole)
        trunk = self.frozen["trunk"].state_dict() if self.frozen else {}
        model.load_state_dict({**state, **{f"trunk.{name}": tensor for name, tensor in trunk.items()}})
        return model
