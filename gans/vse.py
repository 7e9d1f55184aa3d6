"""VSE and VSE++: a GRU over words and a linear map over a picture's vector, into one space (arXiv 1707.05612).

The text encoder of SISGAN (arXiv 1707.06873, section 3.2), whose sizes are the defaults: the sum of hinges over all
mismatched pairs (Kiros et al., arXiv 1411.2539). VSE++ takes the hardest of them alone. Known difference: the vector of
a frozen VGG-16 is taken without its dropout.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from dalle.config import FREE, Section
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.precision import at_least_single, full_precision
from dalle.store import load_model, load_tokenizer
from dalle.training.optimizers import Betas
from dalle.training.task import Batch, Loss, Networks, Phase
from dalle.words import one_line
from gans.joint import JointBatch, JointConfig, JointModel, JointRun, JointTask, check_pairs_are_read
from gans.task import GANOptimizer, filled
from gans.text import TOKENIZER_FOLDER, Text, TokenTextEncoder, length_mask

MARGIN = 0.2


# -- the caption's side

class VSEConfig(JointConfig):
    """The defaults are SISGAN's; VSE++ has ``hidden_dim`` 1024. ``num_text_tokens`` follows from the tokenizer."""

    num_text_tokens: int | None = Field(default=None, ge=2, description="tokens in the tokenizer's vocabulary; follows "
                                        "from it")
    text_length: int | None = Field(default=None, ge=1, description="most tokens of a caption that are read; follows "
                                    "from data.text_length")
    word_dim: int = Field(default=300, ge=1, description="numbers in the vector of a token")
    hidden_dim: int = Field(default=300, ge=1, description="numbers in the GRU's state, and in the embedding of a "
                            "caption and of a picture")
    frozen_words: bool = Field(default=False, description="the tokens' vectors are given and stay as they are")


class WordGRU(nn.Module):
    """Word ids [B, T], 0 behind the end -> the last word's state [B, H] and the state after each word [B, T, H]."""

    def __init__(self, num_words: int, word_dim: int, hidden_dim: int, frozen_words: bool = False):
        super().__init__()
        self.words = nn.Embedding(num_words, word_dim, padding_idx=0)
        self.words.weight.requires_grad_(not frozen_words)
        self.gru = nn.GRU(word_dim, hidden_dim, batch_first=True)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        # a GRU never looks ahead: the state after the last word is what packing the captions would give
        states, _ = self.gru(self.words(ids))
        last = word_counts(ids) - 1
        return states[torch.arange(len(ids), device=ids.device), last], states


def word_counts(ids: Tensor) -> Tensor:
    """[B, T] -> [B]; a caption without a word counts as one, of which nothing is known."""
    return (ids != 0).sum(dim=1).clamp(min=1)


# -- both sides

class VSE(JointModel):
    """GRU and linear map; scores are cosines, so both sides are compared at unit length."""

    model_type = "vse"
    Config = VSEConfig
    config: VSEConfig

    def __init__(self, config: VSEConfig):
        super().__init__(config)
        if config.num_text_tokens is None or config.text_length is None:
            raise ValueError("num_text_tokens and text_length are missing: they follow from the tokenizer")
        self.text = WordGRU(config.num_text_tokens, config.word_dim, config.hidden_dim, config.frozen_words)
        if config.image_dim is not None:
            self.image = nn.Linear(config.image_dim, config.hidden_dim, bias=False)

    def embed_text(self, text: Tensor) -> Tensor:
        return F.normalize(at_least_single(self.text(text)[0]), dim=1)

    def map_features(self, features: Tensor) -> Tensor:
        return F.normalize(at_least_single(self.image(features)), dim=1)


class VSETextEncoder(TokenTextEncoder):
    """A VSE run: the sentence is the GRU's last state, not normalised, and the words are its states."""

    model_type = "vse"

    def __init__(self, model: VSE, tokenizer: CaptionTokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.sentence_dim = self.word_dim = model.config.hidden_dim
        self.text_length = model.config.text_length
        self.freeze()

    def encode(self, captions: list[str]) -> Text:
        ids = self.ids(captions)
        sentence, states = self.model.text(ids)
        return Text(sentence, states.transpose(1, 2), length_mask(word_counts(ids), self.text_length))

    def save(self, folder: str | Path) -> None:
        self.model.save_text(folder)
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(load_model(VSE, folder, "cpu"), load_tokenizer(folder / TOKENIZER_FOLDER))


# -- the losses, on cosines [B, B] of pictures (rows) by captions

def hinges(scores: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """max(0, m - s_ii + s_ij) and max(0, m - s_ii + s_ji) [B, B], row i for pair i; 0 on the diagonal."""
    own = scores.diagonal()[:, None]
    matched = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    captions, pictures = ((margin - own + others).clamp(min=0) for others in (scores, scores.T))
    return captions.masked_fill(matched, 0), pictures.masked_fill(matched, 0)


def sum_of_hinges(scores: Tensor, margin: float = MARGIN) -> Tensor:
    """1/B sum_(i != j) max(0, m - s_ii + s_ij) + max(0, m - s_ii + s_ji): VSE, as SISGAN trains it."""
    captions, pictures = hinges(scores, margin)
    return (captions + pictures).sum() / len(scores)


def max_of_hinges(scores: Tensor, margin: float = MARGIN) -> Tensor:
    """sum_i max_j max(0, m - s_ii + s_ij) + max_j max(0, m - s_ii + s_ji): VSE++, eq. 6, not divided by B."""
    captions, pictures = hinges(scores, margin)
    return captions.amax(dim=1).sum() + pictures.amax(dim=1).sum()


LOSSES = {"sum": sum_of_hinges, "max": max_of_hinges}


# -- training

class VSEOptimizer(GANOptimizer):
    """SISGAN's: Adam at a constant rate. VSE++ multiplies it by 0.1 after 15 of 30 epochs and clips at 2."""

    betas: Betas = Field(default=(0.9, 0.999), description="of Adam: the share that each of its two moving averages, "
                         "of the gradient and of its square, keeps in a step")


class VSELoss(Section, json_schema_extra=FREE):
    """``hinges``: ``sum`` over all mismatched pairs (VSE) or ``max``, the hardest of each row and column (VSE++)."""

    hinges: Literal["sum", "max"] = Field(default="sum", description="which mismatched pairs count: all, or the "
                                          "hardest of each row and column (VSE++)")
    margin: float = Field(default=MARGIN, gt=0, description="by how much the cosine of a pair shall exceed those of "
                          "the others")


class VSERun(JointRun):
    """A VSE run. ``word_vectors``: a text file of fastText's layout, ``word number number ...`` a line."""

    task: Literal["vse"] = Field(default="vse", description="the kind of run: a VSE")
    model: VSEConfig = Field(default=VSEConfig(trunk="vgg16"), description="sizes of the text encoder, and the trunk")
    word_vectors: str | None = Field(default=None, description="a .vec file; its words' vectors are not trained",
                                     json_schema_extra=FREE)
    optimizer: VSEOptimizer = Field(default=VSEOptimizer(), description="how the weights move")
    loss: VSELoss = Field(default=VSELoss(), description="which pairs the loss compares, and how")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "VSERun":
        check_pairs_are_read(self.data, "VSE")
        if self.model.trunk is None:
            raise ValueError("model.trunk is missing: name a trunk for the pictures, such as vgg16 or small")
        return self


class VSETask(JointTask):
    """The ranking loss over the global batch."""

    name = "vse"

    def __init__(self, config: VSERun):
        self.config = config
        self.tokenizer = CaptionTokenizer.load(config.data.tokenizer)
        given = {"frozen_words": True} if config.word_vectors is not None else {}
        settings = filled(config.model.model_copy(update=given), num_text_tokens=self.tokenizer.vocab_size,
                          text_length=config.data.text_length)
        self.assemble(VSE, settings)
        if config.word_vectors is not None:
            self.model.text.words.weight.data.copy_(
                read_word_vectors(config.word_vectors, self.tokenizer, settings.word_dim))
        self.phases = [Phase("rank", player=self.name, loss=self.rank, capturable=True)]

    def read(self, batch: Batch) -> Tensor:
        return batch["text"]

    def rank(self, networks: Networks, batch: JointBatch, step: int) -> Loss:
        """The hinges, and the mean cosine of the pairs."""
        pictures, captions = self.embed(networks, batch)
        with full_precision(captions.device):
            scores = pictures @ captions.T
            total = LOSSES[self.config.loss.hinges](scores, self.config.loss.margin)
        return Loss(total, {"similarity": scores.diagonal().mean().detach()})

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """``config.json``, ``model.safetensors`` (both sides, with the trunk) and ``tokenizer/``."""
        self.whole_model(states[self.name]).save_pretrained(folder)
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)


# -- given word vectors

def read_word_vectors(file: str | Path, tokenizer: CaptionTokenizer, dim: int) -> Tensor:
    """[V, dim]: the file's vector of each word of the tokenizer, 0 for words that it lacks.

    Raises ``UserError`` for a file that cannot be read, has another length, or none of the words.
    """
    wanted: dict[str, list[int]] = {}        # a piece may be there twice, at a word's start and within it
    for index in range(1, tokenizer.vocab_size):
        wanted.setdefault(tokenizer.decode([index]), []).append(index)
    vectors, found = torch.zeros(tokenizer.vocab_size, dim), 0
    try:
        for word, numbers in vector_lines(file):
            if word in wanted:
                vectors[wanted[word]] = torch.from_numpy(np.array(numbers.split(), dtype=np.float32))
                found += 1
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"word_vectors {file} cannot be read as vectors of {dim} numbers (model.word_dim): "
                        f"{one_line(error)}") from error
    if not found:
        raise UserError(f"word_vectors {file} has none of the {len(wanted)} words of the tokenizer: use one of whole "
                        "words, by tools/train_tokenizer.py --kind words")
    return vectors


def vector_lines(file: str | Path) -> Iterator[tuple[str, str]]:
    """Word and numbers of each line; the first line of fastText's files holds the count and the length instead."""
    with open(file, encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines):
            word, _, numbers = line.rstrip("\n ").partition(" ")
            if number > 0 or len(numbers.split()) > 1:
                yield word, numbers
