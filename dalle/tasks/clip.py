"""Training CLIP or SigLIP on captioned pictures: one player, one phase, a loss that couples the whole global batch.

Half of the pictures may be replaced by a codec's reconstruction, so that the model learns to judge what a transformer
will paint: pictures out of the codec's decoder, not photographs.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from dalle.config import FIXED, FREE, Section
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.clip import ClipArchitecture, ClipConfig, ClipModel, ClipOutput, contrastive_loss
from dalle.models.precision import full_precision
from dalle.pictures import to_bytes, to_unit
from dalle.store import TOKENIZER_FOLDER, load_codec, model_folder
from dalle.training.gathering import of_everyone
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Loss, Mean, Networks, Phase, Player, Task

POOLS = (64, 1000)
RANKS = (1, 5)
RECONSTRUCTION_STREAM = 0xC11B   # keeps this choice apart from every other use of (seed, position)


class ClipLossConfig(Section, json_schema_extra=FREE):
    """Which contrastive loss, and how much of the batch is seen through the codec."""

    kind: Literal["clip", "siglip"] = Field(        # the models differ by a bias
        "clip", description="clip: each pair against all others of the batch by a softmax; siglip: each by itself, by "
        "a sigmoid", json_schema_extra=FIXED)
    reconstructions: float = Field(0.0, ge=0, le=1, description="share of pictures replaced by their reconstruction")
    codec: str | None = Field(None, description="run or model folder of the codec that reconstructs")

    @model_validator(mode="after")
    def _codec_is_given(self) -> "ClipLossConfig":
        if self.reconstructions > 0 and self.codec is None:
            raise ValueError("reconstructions need a codec: set loss.codec to the run folder of one")
        return self


class ClipRun(RunConfig):
    """A CLIP run: the towers, how they move and what they are asked."""

    task: Literal["clip"] = Field("clip", description="what is trained: a CLIP or SigLIP")
    model: ClipArchitecture = Field(description="the two towers")
    optimizer: OptimizerConfig = Field(OptimizerConfig(), description="how their weights move")
    loss: ClipLossConfig = Field(ClipLossConfig(), description="what they are asked")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "ClipRun":
        if self.data.tokenizer is None:
            raise ValueError("CLIP reads captions: set data.tokenizer to a tokenizer folder")
        if not self.data.images:
            raise ValueError("CLIP looks at pictures: set data.images to true")
        if self.train.batch_size < 2:
            raise ValueError("the loss compares the pairs of a batch: set train.batch_size to 2 or more")
        return self


class ClipBatch(Batch, total=False):
    """With the choice of what is seen through the codec."""

    chosen: Tensor                  # int64 [c]: the samples of the batch whose picture is replaced; prepared, gone


class ClipTask(Task):
    """The contrastive objective of CLIP (arXiv 2103.00020, figure 3) or SigLIP (arXiv 2303.15343, eq. 1)."""

    companion_settings = {"codec": "loss.codec"}
    unpacked = frozenset({"codec"})
    splits_batch = False    # every pair of the batch is a negative of every other

    def __init__(self, config: ClipRun):
        self.tokenizer = CaptionTokenizer.load(config.data.tokenizer)
        model_config = ClipConfig(
            **config.model.model_dump(),
            text_length=config.data.text_length,
            num_text_tokens=self.tokenizer.vocab_size,
            siglip=config.loss.kind == "siglip",
        )
        model = ClipModel(model_config)
        self.frozen = {}
        if config.loss.reconstructions > 0:
            try:
                self.frozen["codec"] = load_codec(model_folder(config.loss.codec), "cpu")
            except UserError as error:
                raise UserError(f"loss.codec: {error}") from error
        self.assemble(config, model)

    def assemble(self, config: ClipRun, model: ClipModel) -> None:
        """The player and its phase; the rest of what a task says of itself."""
        self.config = config
        self.players = {"clip": Player(model, config.optimizer)}
        self.phases = [Phase("contrast", player="clip", loss=self.contrast, capturable=True)]
        self.tokens_per_sample = model.config.text_length + 2
        self.flops_per_sample = model.training_flops()

    def on_host(self, batch: Batch, step: int) -> ClipBatch:
        """Choose the pictures that reconstructions replace, by the samples' positions."""
        share = self.config.loss.reconstructions
        if share == 0:
            return batch
        chosen = chosen_positions(batch["position"], self.config.seed, share)
        return {**batch, "chosen": chosen.nonzero().flatten()}

    def prepare(self, batch: ClipBatch, networks: Networks, step: int) -> ClipBatch:
        """Put reconstructions in the place of the pictures that were chosen."""
        if self.config.loss.reconstructions == 0:
            return batch
        chosen, batch = batch["chosen"], {name: value for name, value in batch.items() if name != "chosen"}
        if len(chosen) == 0:
            return batch
        images = batch["image"].clone()
        codec = networks.bare("codec")
        codes = batch["codes"][chosen] if "codes" in batch else codec.encode(to_unit(images[chosen]))
        images[chosen] = to_bytes(codec.decode(codes))
        return {**batch, "image": images}

    def contrast(self, networks: Networks, batch: Batch, step: int) -> Loss:
        """The symmetric cross-entropy over the global batch, or SigLIP's sigmoids."""
        output = ClipOutput(*networks["clip"](batch["image"], batch["text"]))
        loss = contrastive_loss(self.config.loss.kind, networks.rank, networks.world_size)
        with full_precision(output.image_features.device):      # bf16 would round logits of up to 100 to steps of 0.5
            total = loss(*output)
        parts = {"contrast": total.detach(), "logit_scale": output.logit_scale.detach()}
        if output.logit_bias is not None:
            parts["logit_bias"] = output.logit_bias.detach().clone()      # it is the weight itself, which moves
        return Loss(total, parts)

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """Recall@1 and @5 in pools of 64 and of 1,000 consecutive samples, the mean of both directions.

        An incomplete last pool is left out, so that the figure is always "in N". Where not even 64 are there, N is the
        largest power of two that is.
        """
        model = networks.bare("clip")
        with full_precision(model.image_mean.device):           # in bf16, cosines tie
            pairs = [(model.encode_image(batch["image"]), model.encode_text(batch["text"])) for batch in batches]
            return pooled_recalls(pairs, networks.world_size)

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """``config.json``, ``model.safetensors`` and ``tokenizer/``: all that a reranker needs."""
        self.players["clip"].module.save_pretrained(folder, states["clip"])
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)


def pooled_recalls(pairs: Sequence[tuple[Tensor, Tensor]], world_size: int = 1) -> dict[str, Mean]:
    """``recall@k_in_N`` over whole pools of N rows of the (image, text) features of all processes, in their order
    (:func:`pools_of`).

    Every process must call it, and gets the same: pools of its own share would be others, and fewer.
    """
    figures: dict[str, Mean] = {}
    if not pairs:
        return figures
    images, texts = (of_everyone(torch.cat(side).float(), world_size) for side in zip(*pairs, strict=True))
    for pool in pools_of(len(images)):
        for start in range(0, len(images) - pool + 1, pool):
            similarity = images[start : start + pool] @ texts[start : start + pool].T
            for k in RANKS:
                figures.setdefault(f"recall@{k}_in_{pool}", Mean()).add(recall(similarity, k), count=pool)
    return figures


def pools_of(count: int) -> tuple[int, ...]:
    """The sizes of ``POOLS`` that ``count`` pairs fill; where they fill none, the largest power of two that they do."""
    filled = tuple(pool for pool in POOLS if pool <= count)
    return filled or ((1 << count.bit_length() - 1,) if count > 1 else ())


def recall(similarity: Tensor, k: int) -> float:
    """Mean over both directions of the share of rows (columns) whose partner is among the ``k`` most similar.

    ``similarity`` [N, N] has the pairs on its diagonal; a tie counts against the partner.
    """
    partner = similarity.diagonal()
    off_diagonal = ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
    better_captions = ((similarity >= partner[:, None]) & off_diagonal).sum(dim=1)
    better_images = ((similarity >= partner[None, :]) & off_diagonal).sum(dim=0)
    hits = (better_captions < k).double().mean() + (better_images < k).double().mean()
    return float(hits / 2)


def chosen_positions(positions: Tensor, seed: int, share: float) -> Tensor:
    """bool [b]: which samples are replaced; a pure function of the run's seed and each sample's position."""
    draws = [np.random.default_rng((RECONSTRUCTION_STREAM, seed, position)).random() for position in positions.tolist()]
    return torch.tensor([draw < share for draw in draws], dtype=torch.bool)
