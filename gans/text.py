"""Captions to vectors: one frozen interface over every text encoder that a GAN may be conditioned on.

The encoders trained here (``TEXT_ENCODERS``), the towers of open_clip and the encoders of ``transformers`` all give a
:class:`Text`, and each can be saved into a folder from which it comes back without a network.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.lookup import LazyTable
from dalle.models.base import CONFIG_FILE, WEIGHTS_FILE
from dalle.models.clip import first_line
from dalle.sampling.caption_warnings import lost_warnings
from dalle.store import model_folder, model_kind
from dalle.tensor_file import write_synced
from gans import SYSTEMS

OPEN_CLIP_PREFIX, TRANSFORMERS_PREFIX = "open_clip:", "transformers:"
TOKENIZER_FOLDER, ENCODER_FOLDER = "tokenizer", "encoder"
STATISTICS = ("sentence_mean", "sentence_deviation", "word_mean", "word_deviation")
CAPTIONS_AT_ONCE = 256

TRAINED_ENCODERS = {name: (system.module, system.text_encoder) for name, system in SYSTEMS.items()
                    if system.text_encoder}
CLIP = "clip"

# The model_type of a saved encoder -> where its class is, a subclass of TextEncoder. What is trained here as a system
# says so in SYSTEMS; any other is one line here.
TEXT_ENCODERS = LazyTable({
    **TRAINED_ENCODERS,
    CLIP: ("gans.clip_text", "ClipTextEncoder"),
    "open_clip_text": ("gans.clip_text", "OpenClipTextEncoder"),
    "transformers_text": ("gans.transformers_text", "TransformersTextEncoder"),
    "standardised_text": ("gans.text", "StandardisedTextEncoder"),
})

# What a name of a pretrained encoder begins with -> what makes it from the rest of that name
PRETRAINED = LazyTable({
    OPEN_CLIP_PREFIX: ("gans.clip_text", "OpenClipTextEncoder.pretrained"),
    TRANSFORMERS_PREFIX: ("gans.transformers_text", "TransformersTextEncoder.pretrained"),
})


class Text(NamedTuple):
    """What a caption says: as a whole and word by word ("words" are tokens, or time steps of a recurrent network).

    Words come as channels first, as convolutions and attention over pictures take them. Every caption has one word at
    least, the empty one too, so that a softmax over its words is defined.
    """

    sentence: Tensor    # float [B, D]
    words: Tensor       # float [B, E, T], T the same for every batch of one encoder; 0 where there is no word
    mask: Tensor        # bool [B, T], True where there is a word

    def to(self, device: torch.device | str) -> "Text":
        return Text(*(part.to(device) for part in self))


class TextEncoder(nn.Module):
    """A frozen encoder, always in evaluation mode. Subclasses set the three sizes and say how to encode, save, load."""

    model_type: ClassVar[str]
    sentence_dim: int
    word_dim: int
    text_length: int        # T

    def freeze(self) -> Self:
        """To be called at the end of a constructor."""
        return self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> Text:
        """Captions -> :class:`Text` on the device of the module, in fp32 and without gradient."""
        with torch.autocast(self.device.type, enabled=False):
            sentence, words, mask = self.encode(list(captions))
        return Text(sentence.float(), words.float() * mask[:, None], mask)

    def encode(self, captions: list[str]) -> Text:
        raise NotImplementedError

    def warnings(self, captions: Sequence[str]) -> list[str]:
        """A line for every caption that is not read whole."""
        return []

    def save(self, folder: str | Path) -> None:
        """Write all that :meth:`load` needs into ``folder``."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The encoder saved in ``folder``, on the CPU; ``UserError`` for one that is incomplete or damaged."""
        raise NotImplementedError


class TokenTextEncoder(TextEncoder):
    """An encoder that reads the ids of a tokenizer trained here. Subclasses set ``tokenizer``, too."""

    tokenizer: CaptionTokenizer

    def ids(self, captions: list[str]) -> Tensor:
        """int64 [B, T] on the device of the module, 0 behind each caption's end."""
        return token_ids(self.tokenizer, captions, self.text_length).to(self.device, non_blocking=True)

    def warnings(self, captions: Sequence[str]) -> list[str]:
        return lost_warnings(captions, self.tokenizer, self.text_length, "prompt")


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder called ``name``, frozen:

    - a run or model folder of an encoder trained here (``ds_sje``, ``vse``, ``damsm``, ``clip``), or the folder of any
      encoder's :meth:`TextEncoder.save`;
    - ``open_clip:NAME/TAG``, ``open_clip:NAME/FILE`` or ``open_clip:FOLDER``, the text tower of a pretrained CLIP;
    - ``transformers:NAME_OR_PATH``, whose sentence is the mean over the tokens; with ``@pooler`` behind it, what the
      network's own pooling gives.

    Raises ``UserError`` in one line; a run that does not exist yet is a ``MissingModel``.
    """
    for prefix in PRETRAINED:
        if name.startswith(prefix):
            return PRETRAINED[prefix](name.removeprefix(prefix)).to(device)
    folder = model_folder(name)
    kind = model_kind(folder)
    if kind not in TEXT_ENCODERS:
        raise UserError(f"{name} holds a {kind!r} model, which is no text encoder; known: "
                        f"{', '.join(sorted(TEXT_ENCODERS))}, {OPEN_CLIP_PREFIX}NAME/TAG, {TRANSFORMERS_PREFIX}NAME")
    return TEXT_ENCODERS[kind].load(folder).to(device)


def two_different(captions: Sequence[str]) -> tuple[str, str]:
    """The first and the next one that differs from it; captions are drawn with repetition."""
    first, *others = captions
    return first, next((caption for caption in others if caption != first), first)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[B] -> bool [B, size]: True in the first ``lengths`` places, one at least."""
    return torch.arange(size, device=lengths.device) < lengths.clamp(min=1)[:, None]


def lengths_of(ids: np.ndarray) -> list[int]:
    """[B, T] -> how many words :func:`length_mask` finds in each row, for what wants them on the host."""
    return np.count_nonzero(ids, axis=1).clip(min=1).tolist()


def token_ids(tokenizer: CaptionTokenizer, captions: Sequence[str], length: int) -> Tensor:
    """int64 [B, length], 0 behind each caption's end."""
    return torch.from_numpy(token_rows(tokenizer, captions, length))


def token_rows(tokenizer: CaptionTokenizer, captions: Sequence[str], length: int) -> np.ndarray:
    ids = [tokenizer.encode(caption, length) for caption in captions]
    return np.stack(ids) if ids else np.zeros((0, length), dtype=np.int64)


# -- any of them, standardised

class StandardisedTextEncoder(TextEncoder):
    """Another encoder, each of whose dimensions has mean 0 and deviation 1 over sample captions.

    Encoders that were trained by cosines give vectors that hardly differ beside noise of deviation 1: a generator is
    blind to them for its first thousands of steps.
    """

    model_type = "standardised_text"

    def __init__(self, encoder: TextEncoder, statistics: dict[str, Tensor], captions: str = ""):
        """``captions``: a digest of those that the statistics were taken over, where that was done here."""
        super().__init__()
        self.encoder, self.captions = encoder, captions
        self.sentence_dim, self.word_dim = encoder.sentence_dim, encoder.word_dim
        self.text_length = encoder.text_length
        for name in STATISTICS:
            self.register_buffer(name, statistics[name].float().clone())
        self.freeze()

    @classmethod
    def over(cls, encoder: TextEncoder, captions: Sequence[str]) -> Self:
        """With the statistics of ``captions``."""
        parts = [encoder(captions[start:start + CAPTIONS_AT_ONCE])
                 for start in range(0, len(captions), CAPTIONS_AT_ONCE)]
        sentences = torch.cat([part.sentence for part in parts])
        words = torch.cat([part.words.transpose(1, 2)[part.mask] for part in parts])        # [words, E]
        return cls(encoder, {"sentence_mean": sentences.mean(dim=0), "sentence_deviation": deviation(sentences),
                             "word_mean": words.mean(dim=0), "word_deviation": deviation(words)},
                   hashlib.blake2b(json.dumps(list(captions)).encode(), digest_size=16).hexdigest())

    def encode(self, captions: list[str]) -> Text:
        text = self.encoder(captions)
        words = (text.words - self.word_mean[:, None]) / self.word_deviation[:, None]
        return Text((text.sentence - self.sentence_mean) / self.sentence_deviation, words, text.mask)

    def warnings(self, captions: Sequence[str]) -> list[str]:
        return self.encoder.warnings(captions)

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_description(folder, {"model_type": self.model_type})
        write_synced(folder / WEIGHTS_FILE, {name: self.get_buffer(name).cpu() for name in STATISTICS})
        self.encoder.save(folder / ENCODER_FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Self:
        encoder = load_text_encoder(str(folder / ENCODER_FOLDER))
        with damaged(folder):
            return cls(encoder, load_file(folder / WEIGHTS_FILE))


def deviation(values: Tensor) -> Tensor:
    """Of each column of [N, D]; 1 where all rows are the same."""
    found = values.std(dim=0, correction=0)
    return torch.where(found > 1e-6, found, torch.ones_like(found))


# -- shared

def with_one_word(words: Tensor) -> Tensor:
    """bool [B, T]: a caption without a word gets its first place."""
    words = words.clone()
    words[:, 0] |= ~words.any(dim=1)
    return words


def write_description(folder: Path, description: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


@contextmanager
def damaged(folder: Path) -> Iterator[None]:
    """Whatever goes wrong in reading a saved encoder, in one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:      # a damaged folder can lead the libraries to anything
        raise UserError(f"cannot load the text encoder in {folder}: {first_line(error)}; save it again") from error
