"""DAMSM, the matching model of AttnGAN (arXiv 1711.10485, section 3.2): regions of a picture against words.

A bi-LSTM reads the caption, a trunk and two projections see the picture; a pair fits when its words find regions that
look like them, and when the two whole vectors point the same way. It serves three times: as a text encoder, as a
generator's loss through the frozen picture side, and as the ranker of R-precision.

Where paper and released code differ, the code is followed: gamma 4, 5, 10 for the paper's 5, 5, 10; means for sums; a
score without 1 / gamma_2, hence sharper by that factor; a frozen trunk whose batch norms see the batch while training
(``trunk_batch_statistics``), so that their running statistics drift to the data.
Not as in the code: Adam's moments go on over the epochs instead of starting anew with each of them.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from dalle.config import FIXED, FREE, Section
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.metrics.retrieval import r_precision_hits
from dalle.models.base import ModelConfig, PretrainedModel
from dalle.models.precision import at_least_single, full_precision
from dalle.pictures import to_signed
from dalle.sampling.caption_warnings import lost_warnings
from dalle.sampling.rerank import FeatureReranker
from dalle.store import identify, load_model, load_tokenizer, model_folder, model_kind
from dalle.tasks.clip import POOLS, RANKS, pooled_recalls, pools_of, recall
from dalle.training.gathering import of_everyone
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Loss, Mean, Networks, Phase, Player, Task
from gans.joint import check_pairs_are_read
from gans.layers import synchronised
from gans.matching import GAMMAS, Gammas, MatchingLosses, damsm_losses, word_scores
from gans.task import GANOptimizer, step_generator
from gans.text import TOKENIZER_FOLDER, Text, TokenTextEncoder, length_mask, lengths_of, token_ids, token_rows
from gans.trunks import build_trunk

WORD_DROPOUT_STREAM, WORD_CHOICE_STREAM = 200, 201
R_PRECISION_CANDIDATES = 100


# -- the model

class DamsmConfig(ModelConfig):
    """The paper's sizes, with CUB's vocabulary."""

    num_text_tokens: int = Field(default=5450, ge=2, description="tokens in the tokenizer's vocabulary, 0 for none "
                                 "included; follows from it")
    text_length: int = Field(default=18, ge=1, description="most tokens of a caption that are read; follows from "
                             "data.text_length")
    dim: int = Field(default=256, ge=2, multiple_of=2, description="numbers in the vectors of the common space; half "
                     "of them from each reading direction")
    embedding_dim: int = Field(default=300, ge=1, description="numbers in the vector of a token before it is read in "
                               "context")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of those numbers set to 0 in training")
    trunk: str | None = Field(default="inception_v3", description="as in gans/trunks.py; null: a text encoder alone")
    gammas: Gammas = Field(default=GAMMAS, description="how sharp attention, sum over words and softmax over pairs are")


class WordEncoder(nn.Module):
    """Word ids -> one vector a word and one for the whole caption, by an LSTM in both directions."""

    def __init__(self, num_text_tokens: int, dim: int = 256, embedding_dim: int = 300, dropout: float = 0.5):
        super().__init__()
        self.dropout = dropout
        self.embedding = nn.Embedding(num_text_tokens, embedding_dim)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.lstm = nn.LSTM(embedding_dim, dim // 2, batch_first=True, bidirectional=True)

    def forward(self, ids: Tensor, kept: Tensor | None = None, lengths: list[int] | None = None) -> Text:
        """int64 [B, T] (0 behind the end) -> sentence [B, D], words [B, D, T] (0 behind the end) and mask [B, T].

        ``kept`` bool [B, T, embedding_dim]: what the dropout leaves, for the same whatever the number of processes.
        ``lengths``: of the captions (``lengths_of``); without them they are read from the device, which waits for it.
        """
        with full_precision(ids.device):
            mask = length_mask((ids != 0).sum(dim=1), ids.shape[1])
            embedded = self.embedding(ids)
            if kept is not None:
                embedded = embedded * kept / (1 - self.dropout)
            else:
                embedded = F.dropout(embedded, self.dropout, self.training)
            if lengths is None:
                lengths = mask.sum(dim=1).tolist()
            packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
            outputs, (last, _) = self.lstm(packed)
            words, _ = pad_packed_sequence(outputs, batch_first=True, total_length=ids.shape[1])
            return Text(torch.cat([last[0], last[1]], dim=1), words.transpose(1, 2), mask)


class RegionEncoder(nn.Module):
    """Pictures -> one vector a region and one for the whole, by two projections over a trunk."""

    def __init__(self, trunk: nn.Module, dim: int = 256, trunk_batch_statistics: bool = False):
        super().__init__()
        self.trunk, self.trunk_batch_statistics = trunk, trunk_batch_statistics
        self.local = nn.Conv2d(trunk.local_dim, dim, 1, bias=False)
        self.pooled = nn.Linear(trunk.pooled_dim, dim)
        nn.init.uniform_(self.local.weight, -0.1, 0.1)
        nn.init.uniform_(self.pooled.weight, -0.1, 0.1)

    def forward(self, images: Tensor | None = None,
                features: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Pictures float [B, 3, H, W] in [-1, 1], or the trunk's features -> regions [B, D, h, w], whole [B, D]."""
        local, pooled = self.trunk(images) if features is None else features
        with full_precision(local.device):
            return self.local(at_least_single(local)), self.pooled(at_least_single(pooled))

    def train(self, mode: bool = True) -> Self:
        """A frozen trunk stays in evaluation mode, unless its batch norms shall see the batch."""
        super().train(mode)
        if not self.trunk.trained and not self.trunk_batch_statistics:
            self.trunk.eval()
        return self


class Damsm(PretrainedModel):
    """Both encoders; ``image`` is None in what was saved for its text side alone."""

    model_type = "damsm"
    Config = DamsmConfig
    config: DamsmConfig

    def __init__(self, config: DamsmConfig):
        super().__init__(config)
        self.text = WordEncoder(config.num_text_tokens, config.dim, config.embedding_dim, config.dropout)
        self.image = None
        if config.trunk is not None:        # weights come from the task that makes it, or from the saved model
            self.image = RegionEncoder(build_trunk(config.trunk, load=False), config.dim)

    @classmethod
    def load(cls, name: str | Path, device: torch.device | str = "cpu") -> Self:
        """The model of a run or model folder, frozen; what it says of a picture is differentiable by the picture.

        Raises ``UserError`` for anything else, and for a text encoder alone.
        """
        folder = model_folder(str(name))
        if (kind := model_kind(folder)) != cls.model_type:
            raise UserError(f"{name} holds a {kind!r} model, not {cls.model_type!r}: give the folder of a "
                            f"{cls.model_type} run")
        return with_pictures(load_model(cls, folder, device), folder).requires_grad_(False)

    def losses(self, images: Tensor, text: Text, class_ids: Tensor | None = None,
               world_size: int = 1) -> MatchingLosses:
        """How badly pictures float [B, 3, H, W] in [-1, 1] fit their texts, among those of the global batch."""
        return damsm_losses(*self.image(images), text, class_ids, self.config.gammas, world_size)


def with_pictures(model: Damsm, folder: Path) -> Damsm:
    if model.image is None:
        raise UserError(f"{folder} holds the text side of a damsm model only: give the folder of the damsm run itself")
    return model


# -- training

class DamsmArchitecture(Section, json_schema_extra=FIXED):
    """The sizes that are free; vocabulary and length follow from the tokenizer and the data."""

    dim: int = Field(default=256, ge=2, multiple_of=2, description="numbers in the vectors of the common space; half "
                     "of them from each reading direction")
    embedding_dim: int = Field(default=300, ge=1, description="numbers in the vector of a token before it is read in "
                               "context")
    dropout: float = Field(default=0.5, ge=0, lt=1, description="share of those numbers set to 0 in "
                           "training", json_schema_extra=FREE)
    trunk: str = Field(default="inception_v3", description="small[:WIDTH], or inception_v3, googlenet or vgg16 with "
                       "nothing (torchvision's hub), :FILE or :random behind it", json_schema_extra=FREE)


class DamsmOptimizer(GANOptimizer):
    """Adam at 0.002; in the schedule ``step`` the rate falls until it has reached ``lowest_lr``."""

    lr: float = Field(default=2e-3, gt=0, description="peak learning rate")
    lowest_lr: float = Field(default=2e-4, gt=0, description="learning rate below which the schedule step falls no "
                             "more")

    def factor(self, step: int, steps: int) -> float:
        if self.schedule != "step" or self.step_factor == 1:
            return super().factor(step, steps)
        falls = max(0, math.ceil(math.log(self.lowest_lr / self.lr) / math.log(self.step_factor)))
        return super().factor(min(step, self.warmup + falls * self.step_every), steps)


class DamsmTextOptimizer(DamsmOptimizer):
    """The same, with the text encoder's gradient clipped."""

    clip: float = Field(default=0.25, ge=0, description="largest norm of the text encoder's gradient; 0: not clipped")


class DamsmLossConfig(Section, json_schema_extra=FREE):
    """How sharp the losses are, and which pairs they compare."""

    gamma1: float = Field(default=4.0, gt=0, description="sharpness of the attention over regions; the paper has 5")
    gamma2: float = Field(default=5.0, gt=0, description="sharpness of the sum over words")
    gamma3: float = Field(default=10.0, gt=0, description="sharpness of the softmax over pairs")
    same_class: Literal["left_out", "mismatched"] = Field(
        default="left_out", description="what another sample of one's own class is; a sample without class has none")

    @property
    def gammas(self) -> Gammas:
        return Gammas(self.gamma1, self.gamma2, self.gamma3)


class DamsmRun(RunConfig):
    """A DAMSM run: sizes, trunk, losses and how the two encoders move."""

    task: Literal["damsm"] = Field(default="damsm", description="the kind of run: a DAMSM")
    model: DamsmArchitecture = Field(default=DamsmArchitecture(), description="sizes of the two encoders, and the "
                                     "trunk")
    text_optimizer: DamsmTextOptimizer = Field(default=DamsmTextOptimizer(),
                                               description="how the text encoder's weights move")
    image_optimizer: DamsmOptimizer = Field(default=DamsmOptimizer(), description="how the picture side's weights move")
    loss: DamsmLossConfig = Field(default=DamsmLossConfig(), description="how sharp the losses are, and which pairs "
                                  "they compare")
    trunk_batch_statistics: bool = Field(default=True, description="the batch norms of a frozen trunk see the "
                                         "batch, as in the released code; false: the statistics that it came with",
                                         json_schema_extra=FREE)
    long_captions: Literal["random_words", "head"] = Field(
        default="random_words", description="what training keeps of captions over data.text_length: a random choice of "
                                            "their words, in order, or the first ones", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _pieces_fit(self) -> "DamsmRun":
        check_pairs_are_read(self.data, "DAMSM")
        if self.train.batch_size < 2:
            raise ValueError("the losses compare the pairs of a batch: set train.batch_size to 2 or more")
        return self


class DamsmBatch(Batch, total=False):
    """A prepared batch, and what the phases make ahead."""

    ids: Tensor                         # int64 [b, T], long captions shortened
    lengths: list[int] | None           # words of each, as they were counted on the host
    kept: Tensor | None                 # bool [b, T, embedding_dim]: what the dropout leaves; None without
    class_ids: Tensor | None            # int64 [b]; None: samples of one class are mismatches, too
    seen: dict[str, Any]                # what the picture side takes: ``images``, or ``features`` of a frozen trunk
    codes: tuple[Tensor, Tensor]        # regions [b, D, h, w] and wholes [b, D]
    text: Text                          # in the place of the ids


class DamsmTask(Task):
    """The matching losses over the pairs of the global batch.

    Two players, because the text encoder's gradient is clipped by itself. Both move along the gradient of one and the
    same loss: each phase takes the other side's codes as they were before either moved.
    """

    splits_batch = False    # every pair of the batch is a mismatch of every other

    def __init__(self, config: DamsmRun):
        self.config = config
        self.tokenizer = CaptionTokenizer.load(config.data.tokenizer)
        self.model = Damsm(DamsmConfig(**config.model.model_dump(), num_text_tokens=self.tokenizer.vocab_size,
                                       text_length=config.data.text_length, gammas=config.loss.gammas))
        image = self.model.image
        if not image.trunk.trained:
            image.trunk = build_trunk(config.model.trunk)
            if config.trunk_batch_statistics:       # those of the global batch, on any number of processes
                image.trunk, image.trunk_batch_statistics = synchronised(image.trunk), True
        image.trunk.requires_grad_(image.trunk.trained)
        self.players = {"image": Player(image, config.image_optimizer),
                        "text": Player(self.model.text, config.text_optimizer)}
        self.frozen = {}
        self.phases = [Phase("image", player="image", loss=self.matching, ahead={"codes": self.look}),
                       Phase("text", player="text", loss=self.matching, ahead={"text": self.read})]
        self.tokens_per_sample = config.data.text_length

    def on_host(self, batch: Batch, step: int) -> DamsmBatch:
        """Shorten captions, and count their words."""
        ids = self.shortened(batch) if self.config.long_captions == "random_words" else batch["text"]
        return {**batch, "text": ids, "lengths": lengths_of(ids.numpy())}

    def prepare(self, batch: DamsmBatch, networks: Networks, step: int) -> DamsmBatch:
        images, ids = to_signed(batch["image"]), batch["text"]
        kept = self.draw_kept(networks, ids, step)
        prepared: DamsmBatch = {"ids": ids, "kept": kept, "lengths": batch.get("lengths"), "class_ids": None}
        if self.config.loss.same_class == "left_out":
            prepared["class_ids"] = batch["class_id"]
        image = networks.bare("image")
        if image.trunk.trained:
            return prepared | {"seen": {"images": images}}
        return prepared | {"seen": {"features": tuple(map(at_least_single, image.trunk(images)))}}

    def draw_kept(self, networks: Networks, ids: Tensor, step: int) -> Tensor | None:
        """bool [b, T, embedding_dim]: this rank's rows of what the step's dropout leaves."""
        settings = self.config.model
        if settings.dropout == 0:
            return None
        source = step_generator(self.config.seed, step, WORD_DROPOUT_STREAM)
        shape = (len(ids) * networks.world_size, ids.shape[1], settings.embedding_dim)
        kept = torch.rand(shape, generator=source) >= settings.dropout
        return kept[networks.rank::networks.world_size].to(ids.device, non_blocking=True)

    def shortened(self, batch: Batch) -> Tensor:
        """The ids [b, T], on the CPU, where a caption that is too long keeps T of its words, drawn by its position, in
        order."""
        ids, length = batch["text"], self.config.data.text_length
        full = (ids[:, -1] != 0).nonzero().flatten().tolist()
        if not full:
            return ids
        ids = ids.clone()
        for row in full:
            words = torch.tensor(self.tokenizer.token_ids(batch["caption"][row]))
            if len(words) > length:
                source = step_generator(self.config.seed, int(batch["position"][row]), WORD_CHOICE_STREAM)
                chosen = torch.randperm(len(words), generator=source)[:length].sort().values
                ids[row] = words[chosen]
        return ids

    def look(self, networks: Networks, batch: DamsmBatch, step: int) -> tuple[Tensor, Tensor]:
        """Regions and wholes of the pictures."""
        return networks["image"](**batch["seen"])

    def read(self, networks: Networks, batch: DamsmBatch, step: int) -> Text:
        return Text(*networks["text"](batch["ids"], batch["kept"], batch["lengths"]))

    def matching(self, networks: Networks, batch: DamsmBatch, step: int) -> Loss:
        """L_DAMSM (equation 13): the phase's own side with its graph, the other as a constant."""
        losses = damsm_losses(*batch["codes"], batch["text"], batch["class_ids"], self.config.loss.gammas,
                              networks.world_size)
        return Loss(sum(losses), {name: loss.detach() for name, loss in losses._asdict().items()})

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean]:
        """Recall in whole pools by the sentence, as for a CLIP, and by the words; R-precision by the sentence.

        R-precision is that of the real pictures, each among 99 other captions; where there are not so many different
        ones, the figure is absent. Every process measures the pairs of all: a share has other pools and candidates.
        """
        image, text = networks.bare("image"), networks.bare("text")
        figures: dict[str, Mean] = {}
        pairs, captions, waiting = [], [], []
        with full_precision(image.local.weight.device):
            for batch in batches:
                local, pooled = image(to_signed(batch["image"]))
                said = text(batch["text"])
                matched = (of_everyone(part, networks.world_size) for part in (local, said.words, said.mask))
                waiting = word_recalls(figures, [*waiting, *zip(*matched, strict=True)], self.config.loss.gammas)
                pairs.append((F.normalize(pooled, dim=1), F.normalize(said.sentence, dim=1)))
                captions.append(caption_numbers(batch["caption"]).to(pooled.device))
            if not pairs:
                return {}
            if not figures:      # a small set: its one pool
                for pool in pools_of(len(waiting)):
                    word_recalls(figures, waiting, self.config.loss.gammas, pool)
            figures = pooled_recalls(pairs, networks.world_size) | figures
            wholes, sentences, numbers = (of_everyone(torch.cat(rows), networks.world_size) for rows in
                                          (*zip(*pairs, strict=True), captions))
            if len(numbers.unique()) >= R_PRECISION_CANDIDATES:
                hits = r_precision_hits(wholes, sentences, R_PRECISION_CANDIDATES, captions=numbers.tolist())
                figures["rprecision"] = Mean(float(hits.sum()), len(hits))
        return figures

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """``config.json``, ``model.safetensors`` and ``tokenizer/``: all that the three uses need."""
        state = {f"{player}.{name}": tensor for player, tensors in states.items() for name, tensor in tensors.items()}
        self.model.save_pretrained(folder, state)
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)


def caption_numbers(captions: Sequence[str]) -> Tensor:
    """int64 [N]: a number of each caption's own text, by which processes can tell captions apart."""
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])


def word_recalls(figures: dict[str, Mean], pairs: list[tuple[Tensor, Tensor, Tensor]],
                 gammas: Gammas, pool: int = POOLS[0]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Add ``words_recall@k_in_64``, by the word-level score, of the whole pools among ``pairs``; the rest is returned.

    A pair is regions [D, h, w], words [D, T] and mask [T]: too large to keep them all.
    """
    while len(pairs) >= pool:
        regions, words, mask = (torch.stack(parts) for parts in zip(*pairs[:pool], strict=True))
        scores = word_scores(regions, words, mask, *gammas)
        for k in RANKS:
            figures.setdefault(f"words_recall@{k}_in_{pool}", Mean()).add(recall(scores, k), count=pool)
        pairs = pairs[pool:]
    return pairs


# -- the trained model at work

class DAMSMTextEncoder(TokenTextEncoder):
    """The text side of a DAMSM run."""

    model_type = Damsm.model_type

    def __init__(self, network: WordEncoder, config: DamsmConfig, tokenizer: CaptionTokenizer):
        super().__init__()
        self.network, self.config, self.tokenizer = network, config, tokenizer
        self.sentence_dim = self.word_dim = config.dim
        self.text_length = config.text_length
        self.freeze()

    def encode(self, captions: list[str]) -> Text:
        rows = token_rows(self.tokenizer, captions, self.text_length)
        return self.network(torch.from_numpy(rows).to(self.device, non_blocking=True), lengths=lengths_of(rows))

    def warnings(self, captions: Iterable[str]) -> list[str]:
        return lost_warnings(list(captions), self.tokenizer, self.text_length, "caption for the text encoder")

    def save(self, folder: str | Path) -> None:
        """A DAMSM without a picture side."""
        model = Damsm(self.config.model_copy(update={"trunk": None}))
        model.text = self.network
        model.save_pretrained(folder)
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Self:
        model = load_model(Damsm, folder, "cpu")
        return cls(model.text, model.config, load_tokenizer(folder / TOKENIZER_FOLDER))


def load_reranker(folder: Path, device: torch.device | str = "cpu") -> FeatureReranker:
    """The model of ``folder`` as a ranker: the cosine of whole picture and sentence, as R-precision takes it."""
    model = with_pictures(load_model(Damsm, folder, device), folder)
    tokenizer, length = load_tokenizer(folder / TOKENIZER_FOLDER), model.config.text_length

    def encode_image(images: Tensor) -> Tensor:
        _, pooled = model.image(to_signed(images.to(device)))
        return F.normalize(pooled, dim=1)

    def encode_captions(captions: list[str]) -> Tensor:
        return F.normalize(model.text(token_ids(tokenizer, captions, length).to(device)).sentence, dim=1)

    def warnings(captions: list[str]) -> list[str]:
        return lost_warnings(captions, tokenizer, length, "caption for the reranker")

    return FeatureReranker(encode_image, encode_captions, identify(folder), warnings)
