"""Captions by the text tower of a CLIP: of one that was trained here, and of open_clip's pretrained ones."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.base import WEIGHTS_FILE, read_description
from dalle.models.clip import (
    LOCAL_FOLDER_CONFIG,
    ClipModel,
    first_line,
    known_architecture,
    load_open_clip,
    load_open_clip_folder,
    no_code_from_hubs,
)
from dalle.sampling.rerank import open_clip_warnings
from dalle.store import load_model, load_tokenizer
from dalle.tensor_file import write_synced
from gans.text import (
    OPEN_CLIP_PREFIX,
    TOKENIZER_FOLDER,
    TRANSFORMERS_PREFIX,
    Text,
    TextEncoder,
    TokenTextEncoder,
    damaged,
    length_mask,
    with_one_word,
    write_description,
)

# -- trained here

class ClipTextEncoder(TokenTextEncoder):
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
        ids = self.ids(captions)
        sentence, tokens = self._features(ids)
        # the tower sees a start before the caption and an end behind it
        words = tokens[:, 1 : 1 + self.text_length].transpose(1, 2)
        return Text(sentence, words, length_mask((ids != 0).sum(dim=1), self.text_length))

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
