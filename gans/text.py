"""Captions to vectors: one frozen interface over every text encoder that a GAN may be conditioned on.

The encoders trained here (``TEXT_ENCODERS``), the towers of open_clip and the encoders of ``transformers`` all give a
:class:`Text`, and each can be saved into a folder from which it comes back without a network.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
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
from dalle.models.base import CONFIG_FILE, WEIGHTS_FILE, read_description
from dalle.models.clip import (
    LOCAL_FOLDER_CONFIG,
    ClipModel,
    first_line,
    known_architecture,
    load_open_clip,
    load_open_clip_folder,
    no_code_from_hubs,
)
from dalle.sampling.caption_warnings import cut_warning, lost_warnings
from dalle.sampling.rerank import open_clip_warnings
from dalle.store import load_model, load_tokenizer, model_folder, model_kind
from dalle.tensor_file import write_synced

OPEN_CLIP_PREFIX, TRANSFORMERS_PREFIX = "open_clip:", "transformers:"
POOLER_SUFFIX = "@pooler"
NETWORK_FOLDER, TOKENIZER_FOLDER = "network", "tokenizer"
ENCODER_FOLDER = "encoder"
STATISTICS = ("sentence_mean", "sentence_deviation", "word_mean", "word_deviation")
CAPTIONS_AT_ONCE = 256
MOST_TOKENS = 64        # of a transformers encoder, which may take 512; captions are short, and every step pays for all

# The model_type of a saved encoder -> where its class is. A new one is one line here: a subclass of TextEncoder.
TEXT_ENCODERS = LazyTable({
    "ds_sje": ("gans.ds_sje", "DSSJETextEncoder"),
    "vse": ("gans.vse", "VSETextEncoder"),
    "damsm": ("gans.damsm", "DAMSMTextEncoder"),
    "clip": ("gans.text", "ClipTextEncoder"),
    "open_clip_text": ("gans.text", "OpenClipTextEncoder"),
    "transformers_text": ("gans.text", "TransformersTextEncoder"),
    "standardised_text": ("gans.text", "StandardisedTextEncoder"),
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


def load_text_encoder(name: str, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder called ``name``, frozen:

    - a run or model folder of an encoder trained here (``ds_sje``, ``vse``, ``damsm``, ``clip``), or the folder of any
      encoder's :meth:`TextEncoder.save`;
    - ``open_clip:NAME/TAG``, ``open_clip:NAME/FILE`` or ``open_clip:FOLDER``, the text tower of a pretrained CLIP;
    - ``transformers:NAME_OR_PATH``, whose sentence is the mean over the tokens; with ``@pooler`` behind it, what the
      network's own pooling gives.

    Raises ``UserError`` in one line; a run that does not exist yet is a ``MissingModel``.
    """
    if name.startswith(OPEN_CLIP_PREFIX):
        return OpenClipTextEncoder.pretrained(name.removeprefix(OPEN_CLIP_PREFIX)).to(device)
    if name.startswith(TRANSFORMERS_PREFIX):
        return TransformersTextEncoder.pretrained(name.removeprefix(TRANSFORMERS_PREFIX)).to(device)
    folder = model_folder(name)
    kind = model_kind(folder)
    if kind not in TEXT_ENCODERS:
        raise UserError(f"{name} holds a {kind!r} model, which is no text encoder; known: "
                        f"{', '.join(sorted(TEXT_ENCODERS))}, {OPEN_CLIP_PREFIX}NAME/TAG, {TRANSFORMERS_PREFIX}NAME")
    return TEXT_ENCODERS[kind].load(folder).to(device)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """[B] -> bool [B, size]: True in the first ``lengths`` places, one at least."""
    return torch.arange(size, device=lengths.device) < lengths.clamp(min=1)[:, None]


def token_ids(tokenizer: CaptionTokenizer, captions: Sequence[str], length: int) -> Tensor:
    """int64 [B, length], 0 behind each caption's end."""
    ids = [tokenizer.encode(caption, length) for caption in captions]
    return torch.from_numpy(np.stack(ids)) if ids else torch.zeros(0, length, dtype=torch.int64)


def lost_of_prompts(tokenizer: CaptionTokenizer, captions: Sequence[str], length: int) -> list[str]:
    """A line for every different caption of more than ``length`` tokens."""
    return lost_warnings(captions, tokenizer, length, "prompt")


# -- CLIP, trained here

class ClipTextEncoder(TextEncoder):
    """A CLIP run: the sentence is its unit-length text embedding, the words are the text tower's last features."""

    model_type = "clip"

    def __init__(self, model: ClipModel, tokenizer: CaptionTokenizer):
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.text_length = model.config.text_length
        pooled, tokens = self._features(torch.ones(1, 1, dtype=torch.int64))
        self.sentence_dim, self.word_dim = pooled.shape[1], tokens.shape[2]
        self.freeze()

    @torch.no_grad()
    def _features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        with last_tokens(self.model.towers) as tokens:
            return self.model.encode_text(ids), tokens[0]

    def encode(self, captions: list[str]) -> Text:
        ids = token_ids(self.tokenizer, captions, self.text_length).to(self.device)
        sentence, tokens = self._features(ids)
        # the tower sees a start before the caption and an end behind it
        words = tokens[:, 1 : 1 + self.text_length].transpose(1, 2)
        return Text(sentence, words, length_mask((ids != 0).sum(dim=1), self.text_length))

    def warnings(self, captions: Sequence[str]) -> list[str]:
        return lost_of_prompts(self.tokenizer, captions, self.text_length)

    def save(self, folder: str | Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save(Path(folder) / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Self:
        return cls(load_model(ClipModel, folder, "cpu"), load_tokenizer(folder / TOKENIZER_FOLDER))


@contextmanager
def last_tokens(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the text tower of an open_clip model makes of each token, [B, T, W], in the calls within."""
    norm = getattr(getattr(model, "text", model), "ln_final", None)
    if norm is None or getattr(getattr(model, "text", None), "cls_emb", None) is not None:
        raise ValueError("its text tower does not show its tokens")
    tokens: list[Tensor] = []
    handle = norm.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    try:
        yield tokens
    finally:
        handle.remove()


# -- open_clip

class OpenClipTextEncoder(TextEncoder):
    """The text tower of a pretrained open_clip model; its image tower is left behind.

    The sentence is the embedding before its normalisation, the words are the tower's last features without those of the
    marks before and behind the caption.
    """

    model_type = "open_clip_text"

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], architecture: dict[str, Any]):
        super().__init__()
        model.visual = None
        self.model, self.tokenizer, self.architecture = model, tokenizer, architecture
        self.text_length = int(model.context_length)
        pooled, tokens = self._features(self.tokenizer(["a"]))
        self.sentence_dim, self.word_dim = pooled.shape[1], tokens.shape[2]
        self.freeze()

    @torch.no_grad()
    def _features(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        with last_tokens(self.model) as tokens:
            return self.model.encode_text(ids.to(self.device)), tokens[0]

    def encode(self, captions: list[str]) -> Text:
        ids = self.tokenizer(captions)
        sentence, tokens = self._features(ids)
        return Text(sentence, tokens.transpose(1, 2), self._mask(ids).to(self.device))

    def warnings(self, captions: Sequence[str]) -> list[str]:
        return open_clip_warnings(self.tokenizer, captions, "prompt")

    def _mask(self, ids: Tensor) -> Tensor:
        """bool [B, T]: True for tokens of the caption itself."""
        if hasattr(self.tokenizer, "eot_token_id"):         # its id 0 is a word, too: what counts is where the end is
            end = (ids == self.tokenizer.eot_token_id).int().argmax(dim=1, keepdim=True)
            places = torch.arange(ids.shape[1])
            words = (places > 0) & (places < end)
        else:
            marks = {*self.tokenizer.tokenizer.all_special_ids, 0 if self.tokenizer.strip_sep_token else -1}
            words = ~torch.isin(ids, torch.tensor(sorted(marks)))
        return with_one_word(words)

    @classmethod
    def pretrained(cls, name: str) -> Self:
        """By ``NAME/TAG``, ``NAME/FILE`` or a local hub folder."""
        config, _, weights = name.partition("/")
        try:
            if Path(name).is_dir():
                scorer = load_open_clip_folder(name)
                architecture = json.loads((Path(name) / LOCAL_FOLDER_CONFIG).read_text(encoding="utf-8"))["model_cfg"]
            else:
                scorer, architecture = load_open_clip(config, weights or None), known_architecture(config)
            check_tokenizer(scorer.tokenizer)
            return cls(scorer.model, scorer.tokenizer, text_architecture(architecture, scorer.model))
        except (ValueError, OSError, RuntimeError) as error:
            raise UserError(f"text_encoder {OPEN_CLIP_PREFIX}{name}: {first_line(error)}; give "
                            f"{OPEN_CLIP_PREFIX}NAME/TAG, {OPEN_CLIP_PREFIX}NAME/FILE or {OPEN_CLIP_PREFIX}FOLDER, or "
                            "the folder of a CLIP run") from error

    def save(self, folder: str | Path) -> None:
        """``config.json``, the text tower's weights and, where it is not open_clip's own, ``tokenizer/``."""
        folder = Path(folder)
        write_description(folder, {"model_type": self.model_type, "architecture": self.architecture})
        write_synced(folder / WEIGHTS_FILE, {key: tensor.detach().cpu().contiguous()
                                             for key, tensor in self.model.state_dict().items()})
        if not hasattr(self.tokenizer, "eot_token_id"):
            self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Self:
        with damaged(folder):
            architecture = read_description(folder)["architecture"]
            model = build_text_tower(architecture)
            model.load_state_dict(load_file(folder / WEIGHTS_FILE))
            return cls(model, build_tokenizer(architecture["text_cfg"], folder / TOKENIZER_FOLDER), architecture)


def text_architecture(architecture: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """What of an open_clip model's config makes its text tower: the image tower becomes the smallest there is."""
    if "multimodal_cfg" in architecture or architecture["text_cfg"].get("hf_model_name"):
        raise ValueError("its text tower cannot stand alone; give one of transformers by "
                         f"{TRANSFORMERS_PREFIX}NAME_OR_PATH")
    activations = {type(part).__name__ for name, part in model.named_modules() if not name.startswith("visual")}
    return {"embed_dim": architecture["embed_dim"], "text_cfg": dict(architecture["text_cfg"]),
            "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32},
            "quick_gelu": "QuickGELU" in activations, "custom_text": hasattr(model, "text"),
            "init_logit_bias": None if model.logit_bias is None else 0.0}


def build_text_tower(architecture: dict[str, Any]) -> nn.Module:
    import open_clip

    options = {key: value for key, value in architecture.items() if key != "custom_text"}
    options["text_cfg"] = {key: value for key, value in options["text_cfg"].items()
                           if key not in ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")}
    model = (open_clip.CustomTextCLIP if architecture["custom_text"] else open_clip.CLIP)(**options)
    model.visual = None
    return model


def check_tokenizer(tokenizer: Any) -> None:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    if not isinstance(tokenizer, (HFTokenizer, SimpleTokenizer)):
        raise ValueError(f"its tokenizer ({type(tokenizer).__name__}) cannot be saved with a model")


def build_tokenizer(text: dict[str, Any], folder: Path) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a text tower's config, from ``folder`` where it is not open_clip's own."""
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = {"context_length": text.get("context_length", 77), **text.get("tokenizer_kwargs", {})}
    if not folder.is_dir():
        return SimpleTokenizer(**options)
    with no_code_from_hubs():
        return HFTokenizer(str(folder), tokenizer_mode=text.get("tokenizer_mode"), **options)


# -- transformers

class TransformersTextEncoder(TextEncoder):
    """An encoder of ``transformers``: the words are its last hidden states, without those of marks such as ``[CLS]``.

    Weights are read from safetensors only, and code that lies beside them is never run.
    """

    model_type = "transformers_text"

    def __init__(self, network: nn.Module, tokenizer: Any, pooler: bool, text_length: int):
        super().__init__()
        self.network, self.tokenizer, self.pooler, self.text_length = network, tokenizer, pooler, text_length
        self.freeze()
        sample = self(["a"])
        self.sentence_dim, self.word_dim = sample.sentence.shape[1], sample.words.shape[1]

    def encode(self, captions: list[str]) -> Text:
        tokens = self.tokenizer(captions, max_length=self.text_length, padding="max_length", truncation=True,
                                return_special_tokens_mask=True, return_tensors="pt").to(self.device)
        seen = tokens["attention_mask"]
        output = self.network(input_ids=tokens["input_ids"], attention_mask=seen)
        hidden = output.last_hidden_state
        sentence = output.pooler_output if self.pooler else mean_of_tokens(hidden, seen)
        words = with_one_word((seen == 1) & (tokens["special_tokens_mask"] == 0))
        return Text(sentence, hidden.transpose(1, 2), words)

    def warnings(self, captions: Sequence[str]) -> list[str]:
        counts = {caption: len(self.tokenizer(caption, verbose=False)["input_ids"]) for caption in captions}
        return [cut_warning("prompt", caption, count, self.text_length) for caption, count in counts.items()
                if count > self.text_length]

    @classmethod
    def pretrained(cls, name: str) -> Self:
        pooler = name.endswith(POOLER_SUFFIX)
        source = name.removesuffix(POOLER_SUFFIX)
        try:
            network, tokenizer = load_transformers(source, source)
            if pooler and getattr(network(**tokenizer("a", return_tensors="pt")), "pooler_output", None) is None:
                raise ValueError(f"{type(network).__name__} has no pooling of its own: leave out {POOLER_SUFFIX}")
            return cls(network, tokenizer, pooler, most_tokens(network, tokenizer))
        except Exception as error:      # transformers and the hub's client fail in many ways
            raise UserError(f"text_encoder {TRANSFORMERS_PREFIX}{name}: {first_line(error)}; give the folder of a "
                            "save_pretrained with safetensors and tokenizer, or a name that the hub knows") from error

    def save(self, folder: str | Path) -> None:
        folder = Path(folder)
        write_description(folder, {"model_type": self.model_type, "pooler": self.pooler,
                                   "text_length": self.text_length})
        self.network.save_pretrained(folder / NETWORK_FOLDER)
        self.tokenizer.save_pretrained(folder / TOKENIZER_FOLDER)

    @classmethod
    def load(cls, folder: Path) -> Self:
        with damaged(folder):
            description = read_description(folder)
            for part in (NETWORK_FOLDER, TOKENIZER_FOLDER):
                if not (folder / part).is_dir():        # a name that is no folder would be looked for on the hub
                    raise FileNotFoundError(f"it has no {part}/")
            network, tokenizer = load_transformers(folder / NETWORK_FOLDER, folder / TOKENIZER_FOLDER)
            return cls(network, tokenizer, bool(description["pooler"]), int(description["text_length"]))


def load_transformers(network: str | Path, tokenizer: str | Path) -> tuple[nn.Module, Any]:
    """Network (the text side of one that sees pictures, too; the encoder of one that also decodes) and tokenizer."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = AutoConfig.from_pretrained(network, trust_remote_code=False)
    config = getattr(config, "text_config", None) or config
    kind = AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel
    if kind is AutoModel and getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{config.model_type} is no encoder of text alone")
    model = kind.from_pretrained(network, config=config, trust_remote_code=False, use_safetensors=True,
                                 dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    if words.pad_token is None:
        words.pad_token = words.eos_token
    words.padding_side = "right"
    return model.eval(), words


def most_tokens(network: nn.Module, tokenizer: Any) -> int:
    """T: what the network and the tokenizer both take, 64 at most."""
    places = getattr(network.config, "max_position_embeddings", None) or MOST_TOKENS
    # RoBERTa's positions start behind the padding's
    offset = 2 if "roberta" in getattr(network.config, "model_type", "") else 0
    return max(1, min(MOST_TOKENS, places - offset, tokenizer.model_max_length))


def mean_of_tokens(hidden: Tensor, seen: Tensor) -> Tensor:
    """[B, T, E], [B, T] -> [B, E]: the mean over what is no padding."""
    weights = seen.to(hidden.dtype)[:, :, None]
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


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
        write_synced(folder / WEIGHTS_FILE, {name: getattr(self, name).cpu() for name in STATISTICS})
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
