"""MirrorGAN (arXiv 1903.05854): what is painted must let a captioner write its caption again.

STEM, the text encoder, is a DAMSM's (``gans/damsm.py``). GLAM, the generator, is AttnGAN's with a second attention in
each refinement: beside the words, the sentence as the conditioning augmentation gives it. STREAM (``gans/stream.py``),
trained before and frozen, writes down what the last picture shows; its cross-entropy against the caption takes the
place of AttnGAN's matching loss.

Where paper and released code differ: the sentence attention is the code's (a 1x1 convolution before the softmax, which
runs over the channels; the paper names no axis, ``sentence_attention: spatial`` is the other), and so are the
convolution that fuses the three maps and the mean over words in the loss; its weight is the paper's 20 (the code's CUB
config has 10). The mask of the words is the aligned one (``gans/attention.py: global_attention``).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from dalle.config import FREE
from dalle.models.base import CONFIG_FILE
from dalle.training.task import Batch, Networks
from gans.attention import global_attention
from gans.generator import Noise
from gans.layers import conv1, residual_glu, up_glu
from gans.looking import described_picture
from gans.refining import (
    RefiningConfig,
    RefiningGenerator,
    RefiningLossConfig,
    RefiningRun,
    RefiningTask,
)
from gans.stream import Stream, stream_loss, word_count
from gans.task import GanBatch, load_encoder
from gans.text import Text

STREAM_FOLDER = "stream"       # of an exported generator
DESCRIBED = "described"        # what the captioner says, among what painting gives


# -- GLAM

class MirrorGANConfig(RefiningConfig):
    """Sizes of the generator; the defaults are the paper's for CUB (COCO, as AttnGAN has it: width 48, residuals 3)."""

    sentence_attention: Literal["channels", "spatial", "none"] = Field(
        default="channels", description="the axis of the softmax in the attention to the sentence: the code's, the "
        "other one, or no such attention (the paper's ablation)")


class MirrorGANGenerator(RefiningGenerator):
    """z, a sentence and its words to pictures of growing side (section 3.2, equations 2-5)."""

    model_type = "mirrorgan"
    Config = MirrorGANConfig
    config: MirrorGANConfig
    captioners: Sequence[Stream] = ()       # one, where it stands beside the generator: a part that is not its own

    def refinement(self, level: int) -> nn.Module:
        config = self.config
        return Refinement(config.width, config.word_dim, config.condition_dim, config.residuals,
                          config.sentence_attention)

    @torch.no_grad()
    def paint(self, noise: Noise, text: Text) -> tuple[Tensor, dict[str, Tensor]]:
        """Also ``described`` int64 [B, T]: the words that the captioner sees in the last pictures."""
        image, shown = super().paint(noise, text)
        for captioner in self.captioners:
            shown[DESCRIBED] = captioner.network.describe(image)
        return image, shown

    def pictures(self, values: Mapping[str, Tensor], caption: str) -> dict[str, Tensor]:
        """Also ``described``: the caption, the picture, and what the captioner says of it."""
        values = dict(values)
        ids = values.pop(DESCRIBED, None)
        shown = super().pictures(values, caption)
        if ids is not None:
            said = self.captioners[0].tokenizer.decode(ids.tolist())
            shown[DESCRIBED] = described_picture(values[f"image_{self.config.image_size}"], caption, said)
        return shown

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """With the captioner in the folder beside its weights, if there is one."""
        network = super().from_pretrained(folder, device)
        place = Path(folder) / STREAM_FOLDER
        if (place / CONFIG_FILE).is_file():
            network.captioners = (Stream.load(place, device),)
        return network


class GlobalLocalAttention(nn.Module):
    """Every place's mixture of the words, and the sentence weighted for it.

    ``axis``: of the softmax that weights the sentence, 1 for channels; "places" for the whole map.
    """

    def __init__(self, width: int, word_dim: int, condition_dim: int, axis: Literal["channels", "spatial"]):
        super().__init__()
        self.axis = axis
        self.to_values = conv1(word_dim, width)                     # U
        self.to_sentence = nn.Linear(condition_dim, width)          # V
        self.score = conv1(width, width)

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, width, S, S], words, [B, condition_dim] -> contexts of words and sentence [B, width, S, S], and the
        attention to the words [B, T, S, S]."""
        words, attention = global_attention(h, self.to_values(text.words[..., None])[..., 0], text.mask)
        sentence = self.to_sentence(condition)[:, :, None, None]
        return words, sentence * self.sentence_weights(h, sentence), attention

    def sentence_weights(self, h: Tensor, sentence: Tensor) -> Tensor:
        """[B, width, S, S]: sums to 1 over the channels of each place, or over the places of each channel."""
        scores = self.score(h * sentence)
        if self.axis == "channels":
            return scores.softmax(dim=1)
        return scores.flatten(2).softmax(dim=2).view_as(scores)


class Refinement(nn.Module):
    """GLAM's attention and F: [B, width, S, S] to [B, width, 2S, 2S] and the attention to the words [B, T, S, S]."""

    def __init__(self, width: int, word_dim: int, condition_dim: int, residuals: int,
                 sentence_attention: Literal["channels", "spatial", "none"]):
        super().__init__()
        self.with_sentence = sentence_attention != "none"
        if self.with_sentence:
            self.attend = GlobalLocalAttention(width, word_dim, condition_dim, sentence_attention)
            self.fuse = conv1(3 * width, 2 * width)
        else:
            self.to_values = conv1(word_dim, width)
        self.residual = nn.Sequential(*(residual_glu(2 * width) for _ in range(residuals)))
        self.grow = up_glu(2 * width, width)

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor]:
        if self.with_sentence:
            words, sentence, attention = self.attend(h, text, condition)
            joined = self.fuse(torch.cat([h, words, sentence], dim=1))
        else:
            words, attention = global_attention(h, self.to_values(text.words[..., None])[..., 0], text.mask)
            joined = torch.cat([h, words], dim=1)
        return self.grow(self.residual(joined)), attention


# -- training

class MirrorGANLossConfig(RefiningLossConfig):
    """Weights of the generator's terms beside the adversarial one."""

    stream: float = Field(default=20.0, ge=0, description="weight of the captioner's cross-entropy, lambda of equation "
                          "10 (the code's for CUB: 10)")


class MirrorGANRun(RefiningRun):
    """A MirrorGAN run. ``text_encoder``: a damsm run, as in the paper."""

    task: Literal["mirrorgan"] = Field(default="mirrorgan", description="the kind of run: a MirrorGAN")
    stream: str = Field(description="run or model folder of the captioner; frozen", json_schema_extra=FREE)
    generator: MirrorGANConfig = Field(default=MirrorGANConfig(), description="sizes of the generator")
    loss: MirrorGANLossConfig = Field(default=MirrorGANLossConfig(), description="the generator's terms beside the "
                                      "adversarial one")


class MirrorGANBatch(GanBatch, total=False):
    """With the captions for the captioner."""

    stream_ids: Tensor          # int64 [b, T], by its own tokenizer
    stream_count: Tensor        # float, 0-d: as in gans/stream.py


class MirrorGANTask(RefiningTask):
    """Equation 10: L_G + lambda L_stream, with the KL term of the released code."""

    Generator = MirrorGANGenerator
    companion_settings = {"text": "text_encoder", "stream": "stream"}
    config: MirrorGANRun

    def __init__(self, config: MirrorGANRun):
        super().__init__(config)
        self.network.captioners = (self.frozen["stream"],)

    def readers(self, config: MirrorGANRun) -> tuple[nn.Module, dict[str, nn.Module]]:
        return load_encoder(config), {"stream": Stream.load(config.stream)}

    def prepare(self, batch: Batch, networks: Networks, step: int) -> MirrorGANBatch:
        prepared = super().prepare(batch, networks, step)
        ids = networks.bare("stream").ids(batch["caption"])
        return {**prepared, "stream_ids": ids,
                "stream_count": word_count(self.exchange(networks), networks, ids, end=False)}

    def terms(self, networks: Networks, batch: MirrorGANBatch) -> dict[str, Tensor]:
        losses = networks["stream"](batch["painted"].image, batch["stream_ids"])
        return {"stream": stream_loss(losses, batch["stream_count"]), **super().terms(networks, batch)}

    def export(self, folder: str, states: Mapping[str, dict[str, Any]]) -> None:
        """Also the captioner, in ``stream/``: what is painted is described by it."""
        super().export(folder, states)
        self.frozen["stream"].save(Path(folder) / STREAM_FOLDER)
