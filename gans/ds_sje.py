"""DS-SJE: a char-CNN-RNN that reads a caption into the space of a picture's features (arXiv 1605.05395).

The text encoder of GAN-INT-CLS (arXiv 1605.05396), StackGAN and HDGAN. It follows the authors' code where the paper
differs: a hinge on raw dot products, over N^2 and not N (N - 1) pairs. Known differences: the code deals a batch of
distinct classes, while here a batch is what the loader deals, and pairs of one class, apart from a sample's own, are
left out of the loss (``loss.same_class``); a picture gives one view, not one of ten stored ones. Its RMSprop
(alpha 0.99) is AdamW with betas (0, 0.99) and no decay: the same update, but for the correction of the first steps.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from dalle.config import FREE, Section
from dalle.models.precision import full_precision
from dalle.sampling.caption_warnings import cut_warning, unknown_warning
from dalle.store import load_model
from dalle.training.gathering import in_global_order, of_everyone
from dalle.training.optimizers import Betas
from dalle.training.task import Batch, Loss, Mean, Networks, Phase
from gans.joint import JointBatch, JointConfig, JointModel, JointRun, JointTask
from gans.layers import one_hot
from gans.task import GANOptimizer
from gans.text import Text, TextEncoder, length_mask, two_different

# 70 symbols with the indices 1 to 70; "-" is there twice, and the later one counts
ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789-,;.!?:'\"/\\|_@#$%^&*~`+-=<>()[]{} "
INDEX = {symbol: index for index, symbol in enumerate(ALPHABET, start=1)}
KERNEL, POOL = 4, 3
RELU_THRESHOLD = 1e-6
RETRIEVED = 50


# -- the caption's side

def character_ids(captions: Sequence[str], length: int) -> Tensor:
    """int64 [B, length]: the alphabet's indices of each caption in lower case; 0 for others and behind the end."""
    ids = torch.zeros(len(captions), length, dtype=torch.int64)
    for row, caption in enumerate(captions):
        known = [INDEX.get(symbol, 0) for symbol in caption.lower()[:length]]
        ids[row, : len(known)] = torch.tensor(known, dtype=torch.int64)
    return ids


class DSSJEConfig(JointConfig):
    """The defaults are those of CUB and flowers in arXiv 1605.05395; arXiv 1605.05396 has ``recurrent_dim`` 512 for
    flowers and, with ``recurrent`` gru, for CUB and COCO."""

    recurrent: Literal["rnn", "gru"] = Field(default="rnn", description="what reads the convolved characters: a ReLU "
                                             "network or the authors' GRU")
    char_length: int = Field(default=201, ge=1, description="most characters of a caption that are read")
    conv_channels: tuple[PositiveInt, PositiveInt] = Field(default=(384, 512),
                                                           description="output channels of the first and the second "
                                                           "convolution")
    recurrent_dim: int = Field(default=256, ge=1, description="numbers in the recurrent state, and channels of the "
                               "last convolution")
    embed_dim: int = Field(default=1024, ge=1, description="numbers in the embedding of a caption and of a picture")
    over_time: Literal["mean", "last"] = Field(default="mean", description="which states make the embedding: their "
                                               "mean or the last one")
    init_range: float | None = Field(default=0.08, gt=0, description="first weights are uniform in minus this to this; "
                                     "null: PyTorch's own")
    image_map: bool = Field(default=False, description="put a learnt linear map over the trunk's vector (the authors' "
                            "image_noop 0)")

    @model_validator(mode="after")
    def _long_enough(self) -> Self:
        if time_steps(self.char_length, self.recurrent == "rnn") < 1:
            raise ValueError(f"char_length {self.char_length} leaves nothing after the convolutions: set it to 70 or "
                             "more")
        return self


def time_steps(length: int, last_pool: bool) -> int:
    """Steps that are left of ``length`` characters: 201 > 198 > 66 > 63 > 21 > 18 (> 8)."""
    for _ in range(2):
        length = (length - KERNEL + 1) // POOL
    length = length - KERNEL + 1
    return (length - POOL) // 2 + 1 if last_pool else length


class CharCNNRNN(nn.Module):
    """Character ids [B, L] -> the caption's embedding [B, embed_dim] and the hidden states [B, T, recurrent_dim]."""

    def __init__(self, config: DSSJEConfig):
        super().__init__()
        first, second = config.conv_channels
        width = config.recurrent_dim
        relu = nn.Threshold(RELU_THRESHOLD, 0)
        layers = [nn.Conv1d(len(ALPHABET), first, KERNEL), relu, nn.MaxPool1d(POOL),
                  nn.Conv1d(first, second, KERNEL), relu, nn.MaxPool1d(POOL),
                  nn.Conv1d(second, width, KERNEL), relu]
        if config.recurrent == "rnn":
            layers.append(nn.MaxPool1d(POOL, 2))
        self.convolutions = nn.Sequential(*layers)
        self.recurrent = ReluRNN(width) if config.recurrent == "rnn" else GatedRNN(width)
        self.output = nn.Linear(width, config.embed_dim)
        self.over_time = config.over_time

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        symbols = one_hot(ids, len(ALPHABET) + 1, self.output.weight.dtype)[..., 1:].transpose(1, 2)        # [B, 70, L]
        hidden = self.recurrent(self.convolutions(symbols).transpose(1, 2))
        return self.output(hidden.mean(dim=1) if self.over_time == "mean" else hidden[:, -1]), hidden


class ReluRNN(nn.Module):
    """h_1 = relu(W_x x_1 + b_x), h_t = relu(W_x x_t + b_x + W_h h_(t-1) + b_h): [B, T, W] -> all states [B, T, W]."""

    def __init__(self, width: int):
        super().__init__()
        self.inputs, self.states = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, steps: Tensor) -> Tensor:
        first, *later = self.inputs(steps).unbind(dim=1)
        hidden = [F.threshold(first, RELU_THRESHOLD, 0)]
        for step in later:
            hidden.append(F.threshold(step + self.states(hidden[-1]), RELU_THRESHOLD, 0))
        return torch.stack(hidden, dim=1)


class GatedRNN(nn.Module):
    """The authors' GRU: no gates at the first step, and the reset comes before the candidate's recurrent map.

    h_1 = tanh(W x_1 + b); then u, r = sigmoid(...), c = tanh(W x + b + W_h (r * h) + b_h), h = u c + (1 - u) h.
    """

    def __init__(self, width: int):
        super().__init__()
        self.inputs = nn.Linear(width, 3 * width)              # update, reset, candidate
        self.gates, self.candidate = nn.Linear(width, 2 * width), nn.Linear(width, width)

    def forward(self, steps: Tensor) -> Tensor:
        update_reset, candidate = self.inputs(steps).split([2 * steps.shape[2], steps.shape[2]], dim=2)
        hidden = [torch.tanh(candidate[:, 0])]
        for step in range(1, steps.shape[1]):
            before = hidden[-1]
            update, reset = torch.sigmoid(update_reset[:, step] + self.gates(before)).chunk(2, dim=1)
            new = torch.tanh(candidate[:, step] + self.candidate(reset * before))
            hidden.append(update * new + (1 - update) * before)
        return torch.stack(hidden, dim=1)


# -- both sides

class DSSJE(JointModel):
    """The char-CNN-RNN beside a picture's vector, which is taken as it is or through one linear map."""

    model_type = "ds_sje"
    Config = DSSJEConfig
    config: DSSJEConfig

    def __init__(self, config: DSSJEConfig):
        super().__init__(config)
        self.text = CharCNNRNN(config)
        if config.image_map and config.image_dim is not None:
            self.image = nn.Linear(config.image_dim, config.embed_dim)
        elif config.image_dim not in (None, config.embed_dim):
            raise ValueError(f"the trunk's vector has {config.image_dim} numbers, embed_dim is {config.embed_dim}: set "
                             "image_map to true, or embed_dim to the same")
        else:
            self.image = nn.Identity()
        if config.init_range is not None:
            for part in (self.text, self.image):
                for parameter in part.parameters():
                    nn.init.uniform_(parameter, -config.init_range, config.init_range)

    def embed_text(self, text: Tensor) -> Tensor:
        return self.text(text)[0]

    def map_features(self, features: Tensor) -> Tensor:
        return self.image(features)


class DSSJETextEncoder(TextEncoder):
    """A DS-SJE run: the sentence is the embedding, as long as it comes, and the words are the states over time."""

    model_type = "ds_sje"

    def __init__(self, model: DSSJE):
        super().__init__()
        self.model = model
        config = model.config
        self.char_length, pooled = config.char_length, config.recurrent == "rnn"
        self.sentence_dim, self.word_dim = config.embed_dim, config.recurrent_dim
        self.text_length = time_steps(config.char_length, pooled)
        self.stride = POOL * POOL * (2 if pooled else 1)
        self.freeze()

    def encode(self, captions: list[str]) -> Text:
        sentence, hidden = self.model.text(character_ids(captions, self.char_length).to(self.device, non_blocking=True))
        # step t sees the characters from t * stride on
        inside = [-(-min(len(caption), self.char_length) // self.stride) for caption in captions]
        mask = length_mask(torch.tensor(inside).to(self.device, non_blocking=True), self.text_length)
        return Text(sentence, hidden.transpose(1, 2), mask)

    def warnings(self, captions: Sequence[str]) -> list[str]:
        lines = []
        for caption in dict.fromkeys(captions):
            if len(caption) > self.char_length:
                lines.append(cut_warning("prompt", caption, len(caption), self.char_length, "characters"))
            unknown = dict.fromkeys(symbol for symbol in caption if symbol.lower() not in INDEX)
            if unknown:
                lines.append(unknown_warning("prompt", caption, list(unknown), "characters"))
        return lines

    def save(self, folder: str | Path) -> None:
        self.model.save_text(folder)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(load_model(DSSJE, folder, "cpu"))


# -- the loss

def structured_hinge(scores: Tensor, classes: Tensor | None = None, symmetric: bool = True,
                     margin: float = 1.0) -> Tensor:
    """Eqs. 2 to 4 with a hinge in the place of the 0-1 loss, on ``scores`` [N, N] of pictures (rows) by captions.

    1/N^2 sum_(i != j) max(0, margin + s_ij - s_ii), and with ``symmetric`` (DS-SJE; without: DA-SJE) the same for s_ji.
    With ``classes`` [N] pairs within a class count as neither right nor wrong; -1 stands for no class.
    """
    own = scores.diagonal()
    wrong = ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    if classes is not None:
        wrong &= (classes[:, None] != classes[None, :]) | (classes[:, None] < 0)
    hinges = (margin + scores - own[:, None]).clamp(min=0)              # a picture and the captions of others
    if symmetric:
        hinges = hinges + (margin + scores - own[None, :]).clamp(min=0)      # a caption and the pictures of others
    return (hinges * wrong).sum() / scores.numel()


# -- zero-shot classification and retrieval

def class_vectors(texts: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Captions [N, D] of ``classes`` [N] -> the classes there are [C], and the mean caption of each [C, D]."""
    present, place, counts = classes.unique(return_inverse=True, return_counts=True)
    sums = texts.new_zeros(len(present), texts.shape[1]).index_add_(0, place, texts)
    return present, sums / counts[:, None]


def classified(pictures: Tensor, present: Tensor, vectors: Tensor) -> Tensor:
    """[N, D] -> the class [N] whose vector has the largest dot product with each picture."""
    return present[(pictures @ vectors.T).argmax(dim=1)]


def precision_at(pictures: Tensor, classes: Tensor, present: Tensor, vectors: Tensor, depth: int = RETRIEVED) -> Tensor:
    """AP@depth of each class [C]: the share of its pictures among the ``depth`` that its vector ranks first."""
    first = (vectors @ pictures.T).topk(min(depth, len(pictures)), dim=1).indices
    return (classes[first] == present[:, None]).double().mean(dim=1)


# -- training

class DSSJEOptimizer(GANOptimizer):
    """RMSprop's update at the rate of the authors' scripts; they also multiply it by 0.98 every epoch."""

    lr: float = Field(default=7e-4, gt=0, description="peak learning rate")
    betas: Betas = Field(default=(0.0, 0.99), description="RMSprop's alpha is the second: the share that the moving "
                         "average of the squared gradient keeps in a step")


class DSSJELoss(Section, json_schema_extra=FREE):
    """``pairs``: a picture and a caption, or (the authors' COCO encoder) two captions of one picture, one direction."""

    pairs: Literal["pictures", "captions"] = Field(default="pictures", description="what is compared: a picture and "
                                                   "its caption, or two captions of a picture")
    symmetric: bool = Field(default=True, description="take the hinge in both directions; of pairs of captions only "
                            "one is taken")
    same_class: Literal["left_out", "wrong"] = Field(default="left_out",
                                                     description="what other samples of one's own class are to a pair; "
                                                     "a sample without class has none")
    margin: float = Field(default=1.0, gt=0, description="by how much a pair's own score shall exceed the others, in "
                          "units of the score")


class DSSJERun(JointRun):
    """A DS-SJE run. It needs no tokenizer: captions are read by characters."""

    task: Literal["ds_sje"] = Field(default="ds_sje", description="the kind of run: a DS-SJE")
    model: DSSJEConfig = Field(default=DSSJEConfig(trunk="googlenet"), description="sizes of the text encoder, and the "
                               "trunk")
    optimizer: DSSJEOptimizer = Field(default=DSSJEOptimizer(), description="how the weights move")
    loss: DSSJELoss = Field(default=DSSJELoss(), description="what is compared, and how")

    @model_validator(mode="after")
    def _pieces_fit(self) -> "DSSJERun":
        if self.data.caption == "none":
            raise ValueError("DS-SJE reads captions: set data.caption to random or first")
        if self.loss.pairs == "captions":
            if self.data.num_captions < 2:
                raise ValueError("loss.pairs captions compares two captions of a picture: set data.num_captions to 2 "
                                 "or more; they are drawn with repetition")
            if self.model.trunk is not None:
                raise ValueError("loss.pairs captions looks at no pictures: set model.trunk to null")
        elif self.model.trunk is None:
            raise ValueError("model.trunk is missing: name a trunk for the pictures, such as googlenet or small")
        elif not self.data.images:
            raise ValueError("DS-SJE looks at pictures: set data.images to true")
        return self

    @property
    def reads_several_captions(self) -> bool:
        return self.loss.pairs == "captions"


class DSSJETask(JointTask):
    """The structured hinge over the global batch."""

    name = "ds_sje"

    def __init__(self, config: DSSJERun):
        self.config = config
        self.assemble(DSSJE, config.model)
        self.phases = [Phase("embed", player=self.name, loss=self.compare, capturable=True)]

    @property
    def with_pictures(self) -> bool:
        return self.config.loss.pairs == "pictures"

    def read(self, batch: Batch) -> Tensor:
        """int64 [b, L] or, for pairs of captions, [2b, L]: the first ones, then the second ones."""
        captions = batch["caption"]
        if not self.with_pictures:
            captions = [caption for side in zip(*map(two_different, batch["captions"]), strict=True)
                        for caption in side]
        return character_ids(captions, self.config.model.char_length).to(
            batch["class_id"].device, non_blocking=True)

    def prepare(self, batch: Batch, networks: Networks, step: int) -> JointBatch:
        if self.with_pictures:
            return super().prepare(batch, networks, step)
        return {"text": self.read(batch), "pictures": None, "class_id": batch["class_id"]}

    def sides(self, network: Callable[..., Any], batch: JointBatch) -> tuple[Tensor, Tensor]:
        """Pictures and captions or, for pairs of captions, the second ones in the pictures' place."""
        if self.with_pictures:
            return super().sides(network, batch)
        first, second = network(batch["text"])[0].chunk(2)
        return second, first

    def compare(self, networks: Networks, batch: JointBatch, step: int) -> Loss:
        """The hinge, and how far a pair's score lies above the mean of the others'."""
        settings = self.config.loss
        pictures, captions = self.embed(networks, batch)
        classes = in_global_order(batch["class_id"], networks.world_size)
        with full_precision(captions.device):
            scores = pictures @ captions.T
            total = structured_hinge(scores, classes if settings.same_class == "left_out" else None,
                                     settings.symmetric and self.with_pictures, settings.margin)
        lead = (scores.diagonal().mean() - scores.mean()).detach() * len(scores) / (len(scores) - 1)
        return Loss(total, {"lead": lead})

    def figures(self, networks: Networks, pairs: list[tuple[Tensor, Tensor]], classes: Tensor) -> dict[str, Mean]:
        """Zero-shot accuracy by the mean captions of the classes, and AP@50 of retrieval by them."""
        known = classes >= 0
        pictures, texts = (of_everyone(torch.cat(side).float()[known], networks.world_size)
                           for side in zip(*pairs, strict=True))
        everyones = of_everyone(classes[known], networks.world_size)
        if not len(everyones):
            return {}
        present, vectors = class_vectors(texts, everyones)
        right = (classified(pictures, present, vectors) == everyones).double()
        # every process has all of it: the mean over the processes of the same figure is that figure
        accuracy, precision = Mean(), Mean()
        accuracy.add(right.mean(), count=len(right))
        precision.add(precision_at(pictures, everyones, present, vectors).mean(), count=len(present))
        return {"zero_shot_accuracy": accuracy, f"ap@{RETRIEVED}": precision}

    def export(self, folder: str, states: Mapping[str, dict[str, Tensor]]) -> None:
        """``config.json`` and ``model.safetensors``, both sides, with the trunk."""
        self.whole_model(states[self.name]).save_pretrained(folder)
