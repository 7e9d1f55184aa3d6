"""How far apart two sets of pictures are as distributions of features: FID, KID, and the Inception Score.

Features are extracted once (:func:`extract`) and serve every metric. Sums are float64, and results do not depend on how
many processes shared the pictures: their moments merge exactly and their rows are put back in the order of ``places``.
"""

import json
import logging
import math
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dalle.errors import UserError
from dalle.files import json_digest, replacing

if TYPE_CHECKING:      # every extractor's network comes with that module
    from dalle.metrics.features import FeatureExtractor

log = logging.getLogger(__name__)

SEED = 2020               # torch-fidelity's, so that equal pictures give equal subsets and splits
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10


@dataclass(frozen=True)
class Moments:
    """Count, mean and scatter (the sum of squared deviations) of features, float64: all that FID needs of a set."""

    count: int
    mean: Tensor        # [D]
    scatter: Tensor     # [D, D]

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of the rows of ``features`` [N, D]."""
        features = features.double()
        mean = features.mean(dim=0) if len(features) else features.new_zeros(features.shape[1])
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    @property
    def dim(self) -> int:
        return len(self.mean)

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [D, D]."""
        return self.scatter / (self.count - 1)

    @cached_property
    def root(self) -> Tensor:
        """R [D, rank] with R R^T = covariance; kept, as one reference serves many sets."""
        values, vectors = torch.linalg.eigh(self.covariance)
        spread = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
        return vectors[:, spread] * values[spread].sqrt()

    def __add__(self, other: "Moments") -> "Moments":
        """Of both sets together (Chan's update: no difference of large sums)."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    def over_ranks(self) -> "Moments":
        """Of the pictures of all processes; the same on each of them."""
        if not has_ranks():
            return self
        flat = torch.cat([torch.tensor([float(self.count)], dtype=torch.float64), self.mean, self.scatter.flatten()])
        parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat)
        total, *rest = (Moments(int(part[0]), part[1 : 1 + self.dim], part[1 + self.dim :].view(self.dim, self.dim))
                        for part in parts)
        return sum(rest, start=total)

    def save(self, path: str | Path) -> None:
        save_arrays(Path(path), moments_arrays(self))

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        arrays = load_arrays(Path(path))
        try:
            return moments_from(arrays)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} holds no moments of features ({error}): remove it and measure again") from error


def frechet_distance(reference: Moments, generated: Moments, allow_few: bool = False) -> float:
    """FID (arXiv 1706.08500): the squared Wasserstein distance of the Gaussians with these moments.

    Fewer samples than the covariance has directions are refused, or measured all the same with ``allow_few``.
    """
    if reference.dim != generated.dim:
        raise ValueError(f"features of {reference.dim} and {generated.dim} values cannot be compared")
    enough = 2 if allow_few else reference.dim + 1
    for name, moments in (("reference", reference), ("generated", generated)):
        if moments.count < enough:
            way_out = "" if allow_few else ", or pass --allow-few and the row will say so"
            raise UserError(f"FID over {reference.dim} features needs at least {enough} pictures for a covariance; the "
                            f"{name} set has {moments.count}: measure more{way_out}")
    distance = (reference.mean - generated.mean).square().sum()
    traces = reference.covariance.trace() + generated.covariance.trace()
    # tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2). The eigenvalues of A B, which torchmetrics
    # and others take the roots of, lose half of their digits where they are near zero.
    cross = torch.linalg.svdvals(reference.root.T @ generated.root).sum()
    return float(distance + traces - 2 * cross)


def kernel_distance(reference: Tensor, generated: Tensor, subsets: int = KID_SUBSETS, size: int = KID_SUBSET_SIZE,
                    seed: int = SEED) -> tuple[float, float]:
    """KID (arXiv 1801.01401), mean and standard deviation over ``subsets`` of ``size`` rows of features [N, D]."""
    from torchmetrics.image.kid import poly_mmd

    if min(len(reference), len(generated)) < size or size < 2:
        raise UserError(f"KID over subsets of {size} needs at least {max(size, 2)} pictures in each set, not "
                        f"{len(reference)} and {len(generated)}: measure more or take smaller subsets")
    draw = np.random.RandomState(seed)      # torch-fidelity's sequence, for input1=generated and input2=reference
    distances = []
    for _ in range(subsets):
        ours = torch.from_numpy(draw.choice(len(generated), size, replace=False))
        theirs = torch.from_numpy(draw.choice(len(reference), size, replace=False))
        distances.append(float(poly_mmd(reference[theirs].double(), generated[ours].double())))
    return float(np.mean(distances)), float(np.std(distances))


def inception_score(logits: Tensor, splits: int = IS_SPLITS, seed: int = SEED) -> tuple[float, float]:
    """IS (arXiv 1606.03498), mean and standard deviation over ``splits`` parts of class scores [N, K], shuffled.

    torchmetrics shuffles with the global generator and may leave parts out (11 rows in 10 splits make 6), so its
    number depends on what ran before; this is its formula over torch-fidelity's parts.
    """
    count = len(logits)
    if count < splits:
        raise UserError(f"the Inception Score over {splits} splits needs at least {splits} pictures, not {count}")
    order = torch.from_numpy(np.random.RandomState(seed).permutation(count))
    log_probabilities = logits[order].double().log_softmax(dim=1)
    scores = []
    for index in range(splits):
        part = log_probabilities[index * count // splits : (index + 1) * count // splits]
        marginal = part.logsumexp(dim=0) - math.log(len(part))
        scores.append(float((part.exp() * (part - marginal)).sum(dim=1).mean().exp()))
    return float(np.mean(scores)), float(np.std(scores))


@dataclass(frozen=True)
class Extracted:
    """Features and class scores of pictures, each with its place in the whole set."""

    places: Tensor             # int64 [N]
    features: Tensor           # float32 [N, D]
    logits: Tensor | None      # float32 [N, K]

    def over_ranks(self) -> "Extracted":
        """Of all processes, sorted by place; a place that two of them measured counts once."""
        places, order = torch.unique(gather_rows(self.places), return_inverse=True)
        first = torch.full((len(places),), len(order)).scatter_reduce(0, order, torch.arange(len(order)), "amin")
        logits = None if self.logits is None else gather_rows(self.logits)[first]
        return Extracted(places, gather_rows(self.features)[first], logits)

    @property
    def moments(self) -> Moments:
        return Moments.of(self.features)


def extract(extractor: "FeatureExtractor", batches: Iterable[tuple[Tensor, Tensor]]) -> Extracted:
    """Features of this process's share: ``batches`` yields places (int64 [B]) and uint8 pictures [B, 3, H, W]."""
    places, features = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, extractor.dim)]
    logits = [torch.empty(0, extractor.classes)]
    for positions, images in batches:
        rows, scores = extractor(images)
        places.append(positions.long())
        features.append(rows)
        if scores is not None:
            logits.append(scores)
    return Extracted(torch.cat(places), torch.cat(features), torch.cat(logits) if extractor.classes else None)


def has_ranks() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def gather_rows(rows: Tensor) -> Tensor:
    """The rows [N, ...] of all processes, one process after the other; N may differ between them."""
    if not has_ranks():
        return rows
    counts = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor(len(rows)))
    longest = int(max(counts))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(count)] for part, count in zip(parts, counts, strict=True)])


@dataclass(frozen=True)
class Reference:
    """What generated pictures are held against: moments for FID and, where KID is asked for, features."""

    moments: Moments
    features: Tensor | None


def reference_statistics(extractor: "FeatureExtractor", batches: Iterable[tuple[Tensor, Tensor]],
                         key: Mapping[str, Any], folder: str | Path, with_features: bool = True) -> Reference:
    """Of the pictures of ``batches`` (as in :func:`extract`; this process's share), from ``folder`` if they are known.

    ``key`` says which pictures these are: fingerprint of the data, split, image size, limit, blur. What the extractor
    adds to it is added here. ``batches`` is not touched when all processes find the file.
    """
    described = {**key, "extractor": extractor.name, "digest": extractor.digest, "resize": extractor.resize}
    whole_key = json.dumps(described, sort_keys=True)
    path = Path(folder) / f"{json_digest(described, digits=24)}.npz"
    found = read_reference(path, whole_key, with_features)
    if all_ranks(found is not None):
        return found
    everything = extract(extractor, batches).over_ranks()
    reference = Reference(everything.moments, everything.features if with_features else None)
    if not has_ranks() or dist.get_rank() == 0:
        save_reference(path, reference, whole_key)
    all_ranks(True)      # none looks for the file before it is there
    return reference


def all_ranks(answer: bool) -> bool:
    if not has_ranks():
        return answer
    answers = torch.tensor(int(answer))
    dist.all_reduce(answers, op=dist.ReduceOp.MIN)
    return bool(answers)


def read_reference(path: Path, key: str, with_features: bool) -> Reference | None:
    if not path.is_file():
        return None
    try:
        arrays = load_arrays(path)
        if str(arrays["key"]) != key or (with_features and "features" not in arrays):
            return None
        features = torch.from_numpy(arrays["features"]) if with_features else None
        return Reference(moments_from(arrays), features)
    except (UserError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is not what was saved there (%s): the reference is measured again", path, error)
        return None


def save_reference(path: Path, reference: Reference, key: str) -> None:
    arrays = {"key": np.array(key), **moments_arrays(reference.moments)}
    if reference.features is not None:
        arrays["features"] = reference.features.numpy()
    save_arrays(path, arrays)


def moments_arrays(moments: Moments) -> dict[str, np.ndarray]:
    return {"count": np.array(moments.count), "mean": moments.mean.numpy(), "scatter": moments.scatter.numpy()}


def moments_from(arrays: Mapping[str, np.ndarray]) -> Moments:
    count, mean, scatter = int(arrays["count"]), arrays["mean"], arrays["scatter"]
    if mean.ndim != 1 or scatter.shape != (len(mean), len(mean)) or {mean.dtype, scatter.dtype} != {np.dtype("f8")}:
        raise ValueError(f"mean {mean.dtype} {mean.shape} and scatter {scatter.dtype} {scatter.shape} are no moments")
    return Moments(count, torch.from_numpy(mean), torch.from_numpy(scatter))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """An npz that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        np.savez(file, **arrays)


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz; nothing in it is run."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError as error:
        raise UserError(f"no file {path}") from error
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a readable npz file ({type(error).__name__}): remove it and measure again"
                        ) from error
