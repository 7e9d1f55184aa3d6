"""Training the transformer on captions and the codes of their pictures (arXiv 2102.12092, section 2.2).

The codec is frozen. Its codes are computed in the step, or read from a cache made by ``tools/cache_codes.py``. What the
run's ``model`` section leaves out and the codec or the tokenizer knows is filled in from them.
"""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Required

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from dalle.config import FREE, Section
from dalle.data.codes import codes_digest
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.evaluation.small_config import SmallEvaluationConfig
from dalle.models.codec import Codec
from dalle.models.losses import IGNORED_TARGET
from dalle.models.transformer import (
    PRESETS,
    TextToImageTransformer,
    TransformerArchitecture,
    TransformerConfig,
)
from dalle.pictures import grid, to_unit
from dalle.sampling.decode import SamplingConfig
from dalle.sampling.generator import TransformerGenerator
from dalle.store import (
    CODEC_FOLDER,
    TOKENIZER_FOLDER,
    codec_digests,
    load_codec,
    load_tokenizer,
    model_folder,
)
from dalle.tasks.transformer_memory import transformer_activations
from dalle.training.deferred import build_player
from dalle.training.memory import Activations
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Loss, Mean, Networks, Phase, Player, Task

PREVIEW_CAPTIONS = ("a red circle", "a blue square above a green star", "a small bird on a branch", "a yellow flower")


class TransformerModelConfig(TransformerArchitecture):
    """The ``model`` section: an architecture (or a preset and what differs from it); sizes may be left to the codec."""

    preset: str | None = Field(default=None, description="start from this preset's architecture",
                               json_schema_extra=FREE)          # what it stands for is compared
    # whether these are left out or written down makes no difference: they are those of the companions
    text_length: int | None = Field(default=None, ge=1, description="from data.text_length", json_schema_extra=FREE)
    num_text_tokens: int | None = Field(default=None, ge=2, description="from the tokenizer", json_schema_extra=FREE)
    grid: tuple[PositiveInt, PositiveInt] | None = Field(default=None, description="from the codec",
                                                         json_schema_extra=FREE)
    num_codes: int | None = Field(default=None, ge=1, description="from the codec", json_schema_extra=FREE)

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or given.get("preset") is None:
            return given
        if given["preset"] not in PRESETS:
            raise ValueError(f"unknown preset {given['preset']!r}; known: {', '.join(PRESETS)}")
        preset = PRESETS[given["preset"]].model_dump(include=set(TransformerArchitecture.model_fields))
        return {**preset, **given}

    def architecture(self) -> dict[str, Any]:
        return self.model_dump(include=set(TransformerArchitecture.model_fields))


class TransformerLossConfig(Section, json_schema_extra=FREE):
    """The weights of the two cross-entropies; the paper's are 1/8 and 7/8."""

    text_weight: float = Field(default=1 / 8, ge=0, description="factor on the mean cross-entropy of text tokens")
    image_weight: float = Field(default=7 / 8, ge=0, description="factor on the mean cross-entropy of image tokens")
    text_pads: bool = Field(default=True, description="whether the pads of empty text slots are targets too")


class PreviewConfig(Section, json_schema_extra=FREE):
    """The pictures in the log: each caption with ``columns`` seeds, counted from 0."""

    captions: tuple[str, ...] = Field(default=PREVIEW_CAPTIONS, description="one a row; none turns previews off")
    columns: int = Field(default=4, ge=1, description="pictures of each caption")
    sampling: SamplingConfig = Field(default=SamplingConfig(), description="how their codes are chosen")


class TransformerRun(RunConfig):
    """A transformer run: its codec, the model, how it moves and what it is asked."""

    task: Literal["transformer"] = Field(default="transformer", description="what is trained: a transformer over "
                                         "captions and the codes of their pictures")
    codec: str = Field(description="run or model folder of the codec", json_schema_extra=FREE)    # by its digest
    model: TransformerModelConfig = Field(default=TransformerModelConfig(), description="the network")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="how its weights move")
    loss: TransformerLossConfig = Field(default=TransformerLossConfig(), description="what it is asked")
    preview: PreviewConfig = Field(default=PreviewConfig(), description="pictures for the log")
    evaluation: SmallEvaluationConfig = Field(default=SmallEvaluationConfig(), description="a small evaluation on the "
                                              "validation set")

    @model_validator(mode="after")
    def _data_has_what_is_needed(self) -> "TransformerRun":
        if self.data.tokenizer is None:
            raise ValueError("the transformer reads captions: set data.tokenizer to a tokenizer folder")
        if not self.data.images and self.data.codes is None:
            raise ValueError("the transformer needs codes: set data.codes to a cache, or data.images to true")
        if not self.data.images and self.data.validation is not None and self.data.validation_codes is None:
            raise ValueError("validation needs codes: set data.validation_codes to a cache, or data.images to true")
        return self


class StreamBatch(Batch, total=False):
    """Captions and the codes of their pictures, which are always there once a batch is prepared."""

    text: Required[Tensor]          # int64 [b, T] token ids; 0: unfilled
    codes: Required[Tensor]         # int64 [b, N], of a cache or of the codec


class TransformerTask(Task):
    """Next-token prediction over caption and picture, each kind of token in its own vocabulary."""

    companion_settings = {"codec": "codec"}
    paints = True

    def __init__(self, config: TransformerRun):
        self.tokenizer = load_tokenizer(Path(config.data.tokenizer))
        codec_folder = model_folder(config.codec)
        codec = load_codec(codec_folder, "cpu")
        check_cached_codes(config, codec, codec_folder)
        resolved = resolve_model(config, codec, self.tokenizer)
        model = build_player(lambda: TextToImageTransformer(resolved))
        self.frozen = {"codec": codec.requires_grad_(False)}
        self.assemble(config, model)
        # Kept apart from the frozen module, which an engine may cast: what is exported is what was loaded.
        self.codec_state = {name: tensor.clone() for name, tensor in codec.state_dict().items()}

    def assemble(self, config: TransformerRun, model: TextToImageTransformer) -> None:
        """The player and its phase; the rest of what a task says of itself."""
        self.config = config
        self.players = {"transformer": Player(model, config.optimizer)}
        self.phases = [Phase("transformer", player="transformer", loss=self.next_token_loss, capturable=True)]
        self.tokens_per_sample = model.config.length
        self.flops_per_sample = model.flops_per_sample()
        self.scored_text_slots = model.config.text_length - (model.config.layout == "boi")

    def prepare(self, batch: Batch, networks: Networks, step: int) -> StreamBatch:
        """Add ``codes`` [b, N] unless a cache delivered them."""
        if "codes" in batch:
            return batch
        codec = networks.bare("codec")
        return {**batch, "codes": codec.encode(to_unit(batch["image"]))}

    def next_token_loss(self, networks: Networks, batch: StreamBatch, step: int) -> Loss:
        """text_weight * CE_text + image_weight * CE_image, each a mean over its kind of slots.

        With ``text_pads`` off the pads count as slots with no loss, so that the mean of micro-batches is the mean of
        the batch whatever their captions' lengths.
        """
        text_sum, _, image_sum, image_count = self._cross_entropies(networks, batch)
        text = text_sum / (len(batch["text"]) * self.scored_text_slots)
        image = image_sum / image_count
        weights = self.config.loss
        return Loss(weights.text_weight * text + weights.image_weight * image,
                    {"text_ce": text.detach(), "image_ce": image.detach()})

    def _cross_entropies(self, networks: Networks, batch: StreamBatch) -> tuple[Tensor, Tensor, Tensor, int]:
        """Sum and count of the scored text slots, then of the image slots."""
        text, codes = batch["text"], batch["codes"]
        targets = self._model.text_targets(text)
        if not self.config.loss.text_pads:
            targets = targets.masked_fill(targets >= self._model.config.num_text_tokens, IGNORED_TARGET)
        text_sum, image_sum = networks["transformer"](text, codes, targets)
        return text_sum, (targets != IGNORED_TARGET).sum(), image_sum, codes.numel()

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """Cross-entropy (nats) a text token and an image token, and the latter in bits."""
        figures = {name: Mean() for name in ("text_ce", "image_ce", "bits_per_image_token")}
        for batch in batches:
            prepared = self.prepare(batch, networks, step=0)
            text_sum, text_count, image_sum, image_count = self._cross_entropies(networks, prepared)
            if text_count:
                figures["text_ce"].add(text_sum / text_count, int(text_count))
            figures["image_ce"].add(image_sum / image_count, image_count)
            figures["bits_per_image_token"].add(image_sum / image_count / math.log(2), image_count)
        return figures

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """One picture ``samples``: a row for each caption, a column for each seed."""
        settings = self.config.preview
        if not settings.captions:
            return {}
        model = networks.bare("transformer")
        was_training = model.training
        captions = [caption for caption in settings.captions for _ in range(settings.columns)]
        seeds = list(range(settings.columns)) * len(settings.captions)
        images = self.generator(networks).generate(captions, seeds, **settings.sampling.model_dump())
        model.train(was_training)
        return {"samples": grid(images, settings.columns)}

    def generator(self, networks: Networks) -> TransformerGenerator:
        """What paints with the networks as they are now; sets them to evaluation mode."""
        return TransformerGenerator(networks.bare("transformer"), self.tokenizer, networks.bare("codec"))

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """The transformer, ``tokenizer/`` and ``codec/``: all that sampling needs."""
        self._model.save_pretrained(folder, states["transformer"])
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)
        self.frozen["codec"].save_pretrained(Path(folder) / CODEC_FOLDER, self.codec_state)

    def activations(self, samples: int, bf16: bool) -> Activations:
        """What a micro-batch keeps for the backward pass."""
        return transformer_activations(self._model.config, samples, bf16)

    @property
    def _model(self) -> TextToImageTransformer:
        return self.players["transformer"].module


def check_cached_codes(config: TransformerRun, codec: Codec, codec_folder: Path) -> None:
    """``UserError`` when a cache of codes was made with other weights than the codec's: their codes mean nothing."""
    folders = [folder for folder in (config.data.codes, config.data.validation_codes) if folder]
    digests = codec_digests(codec, codec_folder) if folders else ()
    for folder in folders:
        if codes_digest(folder) not in digests:
            raise UserError(f"the codes in {folder} were made with another codec than {config.codec} holds now; "
                            "delete them and run tools/cache_codes.py again")


def resolve_model(config: TransformerRun, codec: Codec, tokenizer: CaptionTokenizer) -> TransformerConfig:
    """The model section with what it leaves out filled in; ``UserError`` where it contradicts its companions."""
    given, data = config.model, config.data
    grid = (codec.grid[0], codec.grid[1])
    if given.grid not in (None, grid):
        raise UserError(f"a codec whose grid does not fit the transformer: {config.codec} paints {grid[0]} x {grid[1]} "
                        f"codes, model.grid is {given.grid[0]} x {given.grid[1]}; leave model.grid out")
    if given.num_codes not in (None, codec.num_codes):
        raise UserError(f"the codec {config.codec} has {codec.num_codes} codes, model.num_codes is {given.num_codes}; "
                        "leave model.num_codes out")
    if given.num_text_tokens is not None and given.num_text_tokens < tokenizer.vocab_size:
        raise UserError(f"a tokenizer larger than the model's vocabulary: {data.tokenizer} has {tokenizer.vocab_size} "
                        f"entries, model.num_text_tokens is {given.num_text_tokens}; leave model.num_text_tokens out")
    if given.text_length not in (None, data.text_length):
        raise UserError(f"data.text_length is {data.text_length}, model.text_length is {given.text_length}; "
                        "leave model.text_length out")
    if data.images and data.image_size != codec.config.image_size:
        raise UserError(f"the codec {config.codec} takes pictures of {codec.config.image_size} px, data.image_size is "
                        f"{data.image_size}; set it to {codec.config.image_size}")
    return TransformerConfig(**given.architecture(), text_length=data.text_length, grid=grid,
                             num_text_tokens=given.num_text_tokens or tokenizer.vocab_size, num_codes=codec.num_codes)
