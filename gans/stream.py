"""STREAM, the image captioner of MirrorGAN (arXiv 1903.05854, section 3.3): a CNN looks, an LSTM writes.

The picture's vector is the first input of the LSTM, the caption's words follow; each output names the next word
(arXiv 1411.4555). Trained here by the cross-entropy of the captions, it stands frozen beside a MirrorGAN, whose
pictures must let it write their captions again, and beside a PPGN, whose chains climb the likelihood of a caption.

The paper's network has no word for the end, neither in the targets nor in what MirrorGAN is asked. To describe a
picture one is needed: training has the id 0, which stands for unfilled places elsewhere, as the target behind the last
word (``loss.end``), and the networks keep the published sizes. What MirrorGAN and PPGN ask leaves it out, as published.

The paper's CNN has seen ImageNet before and stays as it is. A small trunk that begins with nothing learns little
through an LSTM; ``trunk_from`` takes that of a damsm run, frozen.

Not as released: the trunk sees what it was trained with (ImageNet's mean and deviation), where MirrorGAN's code feeds
its fakes in [-1, 1] to a network that was trained otherwise.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FIXED, FREE, Section
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.base import ModelConfig, PretrainedModel
from dalle.models.precision import at_least_single, full_precision
from dalle.pictures import to_signed
from dalle.sampling.caption_warnings import lost_warnings
from dalle.store import load_model, load_tokenizer, model_folder, model_kind
from dalle.training.optimizers import Betas
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Companion, Loss, Mean, Networks, Phase, Player, Task
from gans.damsm import Damsm
from gans.descriptions import description_scores, texts_of_everyone
from gans.joint import check_pairs_are_read
from gans.layers import synchronised
from gans.looking import described_picture
from gans.task import Exchange, GANOptimizer, GANTask, filled
from gans.text import TOKENIZER_FOLDER, token_ids
from gans.trunks import build_trunk

PREVIEWED = 8        # pictures in the log, with what is said of them


# -- the network

class StreamConfig(ModelConfig):
    """The sizes of the released captioner for CUB."""

    num_text_tokens: int = Field(default=5450, ge=2, description="tokens in the tokenizer's vocabulary, 0 for none "
                                 "included; follows from it")
    text_length: int = Field(default=18, ge=1, description="most tokens of a caption; follows from data.text_length")
    trunk: str = Field(default="resnet152", description="what looks, as in gans/trunks.py")
    embedding_dim: int = Field(default=256, ge=1, description="numbers in the vector of a word, and of the picture")
    hidden_dim: int = Field(default=512, ge=1, description="numbers in the LSTM's state")


class StreamNetwork(PretrainedModel):
    """A picture and the words so far to the next word."""

    model_type = "stream"
    Config = StreamConfig
    config: StreamConfig

    def __init__(self, config: StreamConfig):
        super().__init__(config)
        self.trunk = build_trunk(config.trunk, load=False)      # weights come from the task, or from the saved model
        self.see = nn.Sequential(nn.Linear(self.trunk.pooled_dim, config.embedding_dim),
                                 nn.BatchNorm1d(config.embedding_dim, momentum=0.01))
        self.embedding = nn.Embedding(config.num_text_tokens, config.embedding_dim)
        self.lstm = nn.LSTM(config.embedding_dim, config.hidden_dim, batch_first=True)
        self.words = nn.Linear(config.hidden_dim, config.num_text_tokens)

    def train(self, mode: bool = True) -> Self:
        """A trunk that is not trained stays in evaluation mode. The LSTM, which has no dropout, is always in training
        mode: cuDNN differentiates it in no other."""
        super().train(mode)
        if not self.trunk.trained:
            self.trunk.eval()
        self.lstm.train()
        return self

    def look(self, images: Tensor) -> Tensor:
        """float [B, 3, H, W] in [-1, 1] -> [B, E]."""
        pooled = self.trunk(images)[1]
        with full_precision(pooled.device):
            return self.see(at_least_single(pooled))

    def forward(self, images: Tensor, ids: Tensor, end: bool = False) -> Tensor:
        """-log p of each word of captions int64 [B, T] (0 behind the end), given its picture [B, 3, H, W] in [-1, 1]
        and the words before it: [B, T], or [B, T + 1] with the target 0 behind a caption's last word where ``end``.

        0 in the places behind. The last word is an input only where its successor, the end, is asked for.
        """
        logits = self.logits(images, ids if end else ids[:, :-1])
        targets = F.pad(ids, (0, 1)) if end else ids
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        return losses * target_mask(ids, end)

    def logits(self, images: Tensor, ids: Tensor) -> Tensor:
        """[B, T + 1, V] of the T + 1 words that follow on a picture and T words [B, T]."""
        seen = self.look(images)
        with full_precision(seen.device):
            inputs = torch.cat([seen[:, None], self.embedding(ids)], dim=1)
            return self.words(self.lstm(inputs)[0])

    @torch.no_grad()
    def describe(self, images: Tensor, length: int | None = None) -> Tensor:
        """int64 [B, T]: the likeliest word after the likeliest words, until the end, 0 behind it."""
        step, state, chosen = self.look(images)[:, None], None, []
        going = torch.ones(len(images), dtype=torch.bool, device=images.device)
        with full_precision(step.device):
            for _ in range(length or self.config.text_length):
                output, state = self.lstm(step, state)
                word = self.words(output[:, 0]).argmax(dim=1) * going
                going = going & (word != 0)
                chosen.append(word)
                step = self.embedding(word)[:, None]
        return torch.stack(chosen, dim=1)


def target_mask(ids: Tensor, end: bool) -> Tensor:
    """bool [B, T], or [B, T + 1] with ``end``: which places have a target.

    A caption that fills all T places was perhaps cut: it has no end.
    """
    words = ids != 0
    if not end:
        return words
    last = F.pad(words, (1, 0), value=True) & ~F.pad(words, (0, 1), value=True)     # the place behind the last word
    return F.pad(words, (0, 1)) | last


def stream_loss(losses: Tensor, count: Tensor) -> Tensor:
    """The mean -log p of a word: ``losses`` [B, T], 0 where there is no word, and how many words there are.

    As released; the paper's equation 9 is the sum over a caption.
    """
    return losses.sum() / count


# -- the trained captioner at work

class Stream(nn.Module):
    """A frozen captioner, with its tokenizer. How likely it finds a caption is differentiable by the picture."""

    def __init__(self, network: StreamNetwork, tokenizer: CaptionTokenizer):
        super().__init__()
        self.network, self.tokenizer = network, tokenizer
        self.text_length = network.config.text_length
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return self.network.embedding.weight.device

    def ids(self, captions: Sequence[str]) -> Tensor:
        """int64 [B, T], 0 behind each caption's end."""
        return token_ids(self.tokenizer, captions, self.text_length).to(self.device, non_blocking=True)

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        """-log p of each word, [B, T], as :meth:`StreamNetwork.forward` gives it."""
        return self.network(images, ids)

    def log_likelihood(self, images: Tensor, ids: Tensor) -> Tensor:
        """log p of each caption, the sum over its words: [B]."""
        return -self(images, ids).sum(dim=1)

    def describe(self, images: Tensor) -> list[str]:
        """What the pictures float [B, 3, H, W] in [-1, 1] show, by the likeliest words."""
        return [self.tokenizer.decode(row) for row in self.network.describe(images).tolist()]

    def warnings(self, captions: Sequence[str]) -> list[str]:
        return lost_warnings(list(captions), self.tokenizer, self.text_length, "caption for the captioner")

    def save(self, folder: str | Path) -> None:
        """``config.json``, ``model.safetensors`` and ``tokenizer/``, as the run exports them."""
        self.network.save_pretrained(folder)
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, name: str | Path, device: torch.device | str = "cpu") -> Self:
        """The captioner of a run or model folder; ``UserError`` for anything else."""
        folder = model_folder(str(name))
        if (kind := model_kind(folder)) != StreamNetwork.model_type:
            raise UserError(f"{name} holds a {kind!r} model, not {StreamNetwork.model_type!r}: give the folder of a "
                            f"{StreamNetwork.model_type} run")
        return cls(load_model(StreamNetwork, folder, device), load_tokenizer(folder / TOKENIZER_FOLDER))


# -- training

class StreamArchitecture(Section, json_schema_extra=FIXED):
    """The sizes that are free; vocabulary and length follow from the tokenizer and the data."""

    trunk: str = Field(default="resnet152", description="small[:WIDTH], or resnet152, inception_v3, googlenet or vgg16 "
                       "with nothing (torchvision's hub), :FILE or :random behind it", json_schema_extra=FREE)
    embedding_dim: int = Field(default=256, ge=1, description="numbers in the vector of a word, and of the picture")
    hidden_dim: int = Field(default=512, ge=1, description="numbers in the LSTM's state")


class StreamOptimizer(GANOptimizer):
    """Adam at 0.001, as the captioner's own tutorial has it."""

    lr: float = Field(default=1e-3, gt=0, description="peak learning rate")
    betas: Betas = Field(default=(0.9, 0.999), description="of Adam: the share that each of its two moving averages, "
                         "of the gradient and of its square, keeps in a step")


class StreamLossConfig(Section, json_schema_extra=FREE):
    """What the captioner is asked."""

    end: bool = Field(default=True, description="whether the end behind the last word is a target; without it a "
                      "description goes on to its last place")


class StreamRun(RunConfig):
    """A captioner's run. ``data.num_captions``: how many captions of a held-out picture its description is held
    against."""

    task: Literal["stream"] = Field(default="stream", description="the kind of run: a captioner")
    model: StreamArchitecture = Field(default=StreamArchitecture(), description="sizes of the network, and the trunk")
    optimizer: StreamOptimizer = Field(default=StreamOptimizer(), description="how the weights move")
    loss: StreamLossConfig = Field(default=StreamLossConfig(), description="what the captioner is asked")
    trunk_from: str | None = Field(default=None, description="run or model folder of a damsm run with the trunk "
                                   "model.trunk: its trunk looks, frozen; null: torchvision's, or one that is trained "
                                   "here", json_schema_extra=FREE)
    sync_batch_norm: bool = Field(default=False, description="batch normalisation by the statistics over the batches "
                                  "of all processes", json_schema_extra=FREE)

    @model_validator(mode="after")
    def _pairs_are_there(self) -> "StreamRun":
        check_pairs_are_read(self.data, "the captioner")
        return self

    @property
    def reads_several_captions(self) -> bool:
        """In validation: training reads one of them."""
        return True


class StreamBatch(Batch, total=False):
    """A prepared batch: pictures, captions and how many words there are."""

    images: Tensor              # float [b, 3, S, S] in [-1, 1]
    ids: Tensor                 # int64 [b, T], 0 behind the end
    count: Tensor               # float, 0-d: the words of the global batch over the number of processes


class WordPerplexity(Mean):
    """exp of the mean -log p of the words."""

    def joined(self, other: Self) -> Self:
        return WordPerplexity(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return math.exp(super().value)


class StreamTask(Task):
    """The cross-entropy of the captions, word by word."""

    splits_batch = False        # the batch normalisation couples the samples
    unpacked = frozenset({"trunk"})         # its weights are in the checkpoint
    check_share = GANTask.check_share

    def __init__(self, config: StreamRun):
        self.config = config
        self.tokenizer = CaptionTokenizer.load(config.data.tokenizer)
        sizes = filled(StreamConfig(**config.model.model_dump()), num_text_tokens=self.tokenizer.vocab_size,
                       text_length=config.data.text_length)
        network = StreamNetwork(sizes)
        if config.trunk_from is not None:
            network.trunk = finished_trunk(config.trunk_from, sizes.trunk)
        elif not network.trunk.trained:
            network.trunk = build_trunk(sizes.trunk)
        network.trunk.requires_grad_(network.trunk.trained)
        if config.sync_batch_norm:
            network.see = synchronised(network.see)
        self.players = {"captioner": Player(network, config.optimizer)}
        self.frozen = {}
        self.phases = [Phase("captioner", player="captioner", loss=self.next_word_loss, capturable=True)]
        self.tokens_per_sample = config.data.text_length
        self._previewed: tuple[Tensor, list[str]] | None = None

    def companions(self) -> dict[str, Companion]:
        """The trunk that comes from another run."""
        trunk = self.players["captioner"].module.trunk
        return {} if self.config.trunk_from is None else {"trunk": Companion(trunk, "trunk_from")}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> StreamBatch:
        return {"images": to_signed(batch["image"]), "ids": batch["text"],
                "count": word_count(Exchange(networks), networks, batch["text"], self.config.loss.end)}

    def next_word_loss(self, networks: Networks, batch: StreamBatch, step: int) -> Loss:
        losses = networks["captioner"](batch["images"], batch["ids"], self.config.loss.end)
        return Loss(stream_loss(losses, batch["count"]))

    @torch.no_grad()
    def validate(self, networks: Networks, batches: Iterable[Batch]) -> dict[str, Mean | float]:
        """Perplexity of the first caption of each picture, its end included; BLEU-4 and CIDEr of the descriptions
        against all captions that are read of it. Every process measures the descriptions of all."""
        captioner, losses, described, captions = networks.bare("captioner"), WordPerplexity(), [], []
        for batch in batches:
            images, ids, end = to_signed(batch["image"]), batch["text"], self.config.loss.end
            count = int(target_mask(ids, end).sum())
            losses.add(captioner(images, ids, end).sum() / max(count, 1), count=count)
            described += [self.tokenizer.decode(row) for row in captioner.describe(images).tolist()]
            captions += batch.get("captions") or [[caption] for caption in batch["caption"]]
            if self._previewed is None:
                self._previewed = images[:PREVIEWED].cpu(), captions[:PREVIEWED]
        described = texts_of_everyone(described, networks.world_size)
        several = texts_of_everyone(["\n".join(own) for own in captions], networks.world_size)
        return {"perplexity": losses, **description_scores(described, [own.split("\n") for own in several])}

    @torch.no_grad()
    def preview(self, networks: Networks, step: int) -> dict[str, Tensor]:
        """``described_N``: held-out pictures under one of their captions, and below it what is said of them."""
        if self._previewed is None:
            return {}
        images, captions = self._previewed
        captioner = networks.bare("captioner")
        rows = captioner.describe(images.to(captioner.embedding.weight.device)).tolist()
        return {f"described_{number}": described_picture(image, own[0], self.tokenizer.decode(row))
                for number, (image, own, row) in enumerate(zip(images, captions, rows, strict=True))}

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """``config.json``, ``model.safetensors`` and ``tokenizer/``."""
        self.players["captioner"].module.save_pretrained(folder, states["captioner"])
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)


def finished_trunk(name: str, spec: str) -> nn.Module:
    """The trunk of a damsm run, to be left as it is; ``UserError`` where it is another one than ``spec``."""
    model = Damsm.load(name)
    if model.config.trunk != spec:
        raise UserError(f"trunk_from: {name} sees through the trunk {model.config.trunk}, model.trunk is {spec}: set "
                        "it to the same")
    model.image.trunk.trained = False
    return model.image.trunk


def word_count(exchange: Exchange, networks: Networks, ids: Tensor, end: bool) -> Tensor:
    """The targets of the global batch over the number of processes, whose gradients are averaged: float, 0-d."""
    return target_mask(exchange.everyone(ids), end).sum().float() / networks.world_size
