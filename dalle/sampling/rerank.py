"""Ordering candidates by how well each fits its caption: our CLIP runs, or any pretrained open_clip model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.files import file_digest, hub_digest
from dalle.models.clip import (
    LOCAL_FOLDER_CONFIG,
    ClipModel,
    OpenClipScorer,
    count_tokens,
    first_line,
    load_open_clip,
    load_open_clip_folder,
)
from dalle.sampling.caption_warnings import cut_warning, lost_warnings
from dalle.store import (
    RERANKERS,
    TOKENIZER_FOLDER,
    identify,
    load_model,
    load_tokenizer,
    model_folder,
    model_kind,
)

OPEN_CLIP_PREFIX = "open_clip:"
SCORE_BATCH = 256


class Reranker(Protocol):
    """Scores how well pictures fit captions; only the order of one caption's scores means anything."""

    identity: dict[str, Any]

    def score(self, images: Tensor, captions: list[str]) -> Tensor:
        """uint8 [N, 3, H, W] and N captions -> fp32 [N] on the CPU, the cosine of picture and caption."""
        ...

    def caption_warnings(self, captions: list[str]) -> list[str]:
        """A line for every caption that the model cannot read whole."""
        ...


class FeatureReranker:
    """The cosine of two encoders, always in fp32: a narrower type would let the batch split decide close ranks."""

    def __init__(
        self,
        encode_image: Callable[[Tensor], Tensor],
        encode_captions: Callable[[list[str]], Tensor],
        identity: dict[str, Any],
        warnings: Callable[[list[str]], list[str]] = lambda captions: [],
    ):
        self.encode_image = encode_image
        self.encode_captions = encode_captions
        self.identity = identity
        self.caption_warnings = warnings

    @torch.no_grad()
    def score(self, images: Tensor, captions: list[str], batch_size: int = SCORE_BATCH) -> Tensor:
        if len(images) != len(captions):
            raise ValueError(f"{len(images)} pictures but {len(captions)} captions")
        if not captions:
            return torch.empty(0)
        places = {caption: place for place, caption in enumerate(dict.fromkeys(captions))}
        texts = [self.encode_captions(part).float().cpu() for part in chunks(list(places), batch_size)]
        pictures = [self.encode_image(part).float().cpu() for part in images.split(batch_size)]
        text = torch.cat(texts)[[places[caption] for caption in captions]]
        return (torch.cat(pictures) * text).sum(dim=1)


def clip_reranker(model: ClipModel, tokenizer: CaptionTokenizer, identity: dict[str, Any]) -> FeatureReranker:
    """A CLIP that was trained here, with its own tokenizer."""
    model = model.float().eval()
    length = model.config.text_length

    def device() -> torch.device:
        return next(model.parameters()).device

    def encode_captions(captions: list[str]) -> Tensor:
        ids = np.stack([tokenizer.encode(caption, length) for caption in captions])
        return model.encode_text(torch.from_numpy(ids).to(device()))

    def warnings(captions: list[str]) -> list[str]:
        return lost_warnings(captions, tokenizer, length, "caption for the reranker")

    return FeatureReranker(lambda images: model.encode_image(images.to(device())), encode_captions, identity, warnings)


def load_clip_reranker(folder: Path, device: torch.device | str) -> FeatureReranker:
    """A CLIP's model folder, with its tokenizer."""
    model = load_model(ClipModel, folder, device)
    return clip_reranker(model, load_tokenizer(folder / TOKENIZER_FOLDER), identify(folder))


def load_reranker(spec: str, device: torch.device | str = "cpu") -> Reranker:
    """What ``--rerank`` names.

    - a run folder or model folder of ours, of a kind in ``RERANKERS``;
    - a local hub folder with ``open_clip_config.json``;
    - ``open_clip:NAME/TAG``, a pretrained model such as ``open_clip:ViT-B-32/laion2b_s34b_b79k``;
    - ``open_clip:NAME/PATH``, that model's weights in a file (``.safetensors``, ``.pt``), or ``open_clip:FOLDER``.

    Raises ``UserError`` in one line for everything that cannot be loaded.
    """
    if spec.startswith(OPEN_CLIP_PREFIX):
        return open_clip_reranker(spec.removeprefix(OPEN_CLIP_PREFIX), spec, device)
    if (Path(spec) / LOCAL_FOLDER_CONFIG).is_file():
        return open_clip_reranker(spec, spec, device)
    folder = model_folder(spec)
    kind = model_kind(folder)
    if kind not in RERANKERS:
        raise UserError(f"{spec} holds a {kind!r} model; --rerank needs a {' or '.join(map(repr, RERANKERS))} run, "
                        f"or open_clip:NAME/TAG{RERANKERS.remedy}")
    return RERANKERS[kind](folder, device)


def open_clip_reranker(name: str, spec: str, device: torch.device | str) -> FeatureReranker:
    """A pretrained open_clip model by ``NAME/TAG``, ``NAME/FILE`` or folder; ``spec`` is what the user wrote."""
    identity = {"kind": "open_clip", "path": spec}
    try:
        if Path(name).is_dir():
            scorer = load_open_clip_folder(name, device)
            identity["digest"] = hub_digest(Path(name))
        else:
            architecture, _, weights = name.partition("/")
            scorer = load_open_clip(architecture, weights or None, device)
            if Path(weights).is_file():
                identity["digest"] = file_digest(Path(weights))
    except (ValueError, FileNotFoundError) as error:
        raise UserError(f"--rerank {spec}: {first_line(error)}") from error
    except (OSError, RuntimeError) as error:
        raise UserError(f"--rerank {spec}: the weights could not be read or fetched ({first_line(error)}); "
                        "without a network, give a file: open_clip:NAME/PATH") from error
    return scorer_reranker(scorer, identity)


def scorer_reranker(scorer: OpenClipScorer, identity: dict[str, Any]) -> FeatureReranker:
    def warnings(captions: list[str]) -> list[str]:
        return open_clip_warnings(scorer.tokenizer, captions, "caption for the reranker")

    return FeatureReranker(scorer.encode_image, scorer.encode_captions, identity, warnings)


def open_clip_warnings(tokenizer: Any, captions: Sequence[str], what: str) -> list[str]:
    """A line for each different caption that an open_clip tokenizer cuts; the marks around a caption count."""
    length, counts = tokenizer.context_length, {caption: count_tokens(tokenizer, caption) for caption in captions}
    return [cut_warning(what, caption, count, length) for caption, count in counts.items() if count > length]


def rank(scores: Sequence[float], seeds: Sequence[int]) -> list[int]:
    """Indices from the best score to the worst; equal scores go by seed, so that the order never depends on a batch."""
    if not all(np.isfinite(score) for score in scores):
        raise UserError("the reranker's scores are not finite: its weights are damaged, or not for this model")
    return sorted(range(len(scores)), key=lambda index: (-scores[index], seeds[index]))


def chunks(items: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
