"""Captions by an encoder of ``transformers``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.models.base import read_description
from dalle.models.clip import first_line
from dalle.sampling.caption_warnings import cut_warning
from gans.text import (
    TOKENIZER_FOLDER,
    TRANSFORMERS_PREFIX,
    Text,
    TextEncoder,
    damaged,
    with_one_word,
    write_description,
)

POOLER_SUFFIX = "@pooler"
NETWORK_FOLDER = "network"
MOST_TOKENS = 64        # an encoder may take 512; captions are short, and every step pays for all


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
