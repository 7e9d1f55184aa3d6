"""How well pictures fit their captions, from the features of any two encoders that share a space."""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

RETRIEVAL_STREAM = 0x47C   # keeps these draws apart from every other use of (seed, row)
ROWS = 256                 # pictures compared at a time


def cosine(image_features: Tensor, text_features: Tensor) -> Tensor:
    """The cosine of each picture and its caption, fp32 [N], for features [N, E] of any length."""
    check_pairs(image_features, text_features)
    return (F.normalize(image_features.float(), dim=-1) * F.normalize(text_features.float(), dim=-1)).sum(dim=-1)


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """100 times the cosine of each picture and its caption, not below 0 (arXiv 2104.08718 without its factor 2.5)."""
    return (100 * cosine(image_features, text_features)).clamp(min=0)


def r_precision(image_features: Tensor, text_features: Tensor, candidates: int = 100, seed: int = 0,
                captions: Sequence[Hashable] | None = None) -> float:
    """The share of pictures that are nearer to their own caption than to ``candidates - 1`` mismatched ones (R = 1)."""
    hits = r_precision_hits(image_features, text_features, candidates, seed, captions)
    return float(hits.double().mean())


def r_precision_hits(image_features: Tensor, text_features: Tensor, candidates: int = 100, seed: int = 0,
                     captions: Sequence[Hashable] | None = None) -> Tensor:
    """Whether each picture finds its own caption, bool [N] (the protocol of arXiv 1711.10485, section 4).

    The mismatched captions of a row are drawn from all other *different* captions, without repetition, by the seed and
    the row's number alone. Rows have the same caption when ``captions`` says so or, without it, when their features are
    bitwise equal. A tie counts as a miss. Raises ``ValueError`` where there are fewer than ``candidates`` captions.
    """
    check_pairs(image_features, text_features)
    own, first_rows = distinct(text_features, captions)
    choices = mismatched(own, len(first_rows), candidates, seed)
    columns = torch.from_numpy(first_rows[np.concatenate([own[:, None], choices], axis=1)])      # [N, candidates]
    images, texts = F.normalize(image_features.float(), dim=-1), F.normalize(text_features.float(), dim=-1)
    hits = []
    for part, picture in zip(columns.to(texts.device).split(ROWS), images.split(ROWS), strict=True):
        similarity = torch.einsum("ne,nce->nc", picture, texts[part])
        hits.append((similarity[:, :1] > similarity[:, 1:]).all(dim=1))
    return torch.cat(hits)


def mismatched(own: np.ndarray, different: int, candidates: int, seed: int) -> np.ndarray:
    """int64 [N, candidates - 1]: for each row, numbers of captions out of ``different`` ones, none its ``own``."""
    if candidates < 2:
        raise ValueError(f"R-precision needs at least 2 candidates, not {candidates}")
    if different < candidates:
        raise ValueError(f"R-precision among {candidates} candidates needs {candidates} different captions; "
                         f"there are {different}: use more samples or fewer candidates")
    draws = [np.random.default_rng((RETRIEVAL_STREAM, seed, row)).choice(different - 1, candidates - 1, replace=False)
             for row in range(len(own))]
    choices = np.stack(draws)
    return choices + (choices >= own[:, None])     # one number is skipped: the row's own


def distinct(text_features: Tensor, captions: Sequence[Hashable] | None) -> tuple[np.ndarray, np.ndarray]:
    """The number of each row's caption among the different ones, in order of first appearance, and their first rows."""
    keys: Sequence[Hashable]
    if captions is None:
        keys = [row.tobytes() for row in text_features.detach().float().cpu().numpy()]
    elif len(captions) != len(text_features):
        raise ValueError(f"{len(captions)} captions but {len(text_features)} rows of their features")
    else:
        keys = captions
    numbers: dict[Hashable, int] = {}
    own = np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=np.int64)
    _, first_rows = np.unique(own, return_index=True)
    return own, first_rows


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean of [N] values and its standard error (nan for a single one)."""
    values = values.double()
    return float(values.mean()), float(values.var().sqrt() / len(values) ** 0.5) if len(values) > 1 else float("nan")


def check_pairs(image_features: Tensor, text_features: Tensor) -> None:
    if image_features.ndim != 2 or image_features.shape != text_features.shape or len(image_features) == 0:
        raise ValueError(f"pictures and captions need features of one shape [N, E], N > 0, not "
                         f"{list(image_features.shape)} and {list(text_features.shape)}")
