"""Figures from features, pictures and captions, each as a row with its protocol."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from torch import Tensor

from dalle.evaluation.protocol import Protocol, Row
from dalle.metrics.distributions import (
    IS_SPLITS,
    KID_SUBSET_SIZE,
    KID_SUBSETS,
    Moments,
    frechet_distance,
    inception_score,
    kernel_distance,
)
from dalle.metrics.features import FeatureExtractor, metric_name
from dalle.metrics.images import ms_ssim_scales
from dalle.metrics.judge_report import JudgeReport
from dalle.metrics.retrieval import clip_score, mean_and_error, r_precision_hits
from dalle.metrics.vs import mean_and_deviation

CHOICES = 100            # of R-precision: one true caption and 99 others


def distribution_rows(metrics: Sequence[str], made: dict[str, Tensor], real: Tensor, moments: Moments | None,
                      extractor: FeatureExtractor, protocol: Protocol, allow_few: bool, prefix: str = "") \
        -> Iterator[Row]:
    """FID, KID (without blur only) and IS of ``made`` (``features``, ``logits``) against features of real pictures.

    ``moments`` are those of ``real``; ``protocol`` names the reference and the blur.
    """
    features = made["features"]
    protocol = replace(protocol, extractor=extractor.name, extractor_digest=extractor.digest, resize=extractor.resize,
                       references=len(real))

    def row(family: str, value: float, error: float | None, own: Protocol) -> Row:
        return Row(prefix + family, prefix + metric_name(family, extractor), value, error, own)

    if "fid" in metrics:
        few = min(len(features), len(real)) <= extractor.dim
        value = frechet_distance(moments or Moments.of(real), Moments.of(features), allow_few)
        yield row("fid", value, None, replace(protocol, few_samples=few))
    if "kid" in metrics and not protocol.blur:
        size = min(KID_SUBSET_SIZE, len(features), len(real))
        yield row("kid", *kernel_distance(real, features, KID_SUBSETS, size), replace(
            protocol, detail=f"{KID_SUBSETS} subsets of {size}, ± their standard deviation"))
    if "is" in metrics:
        yield row("is", *inception_score(made["logits"], IS_SPLITS), replace(
            protocol, reference=None, reference_fingerprint=None, references=None,
            detail=f"{IS_SPLITS} splits, ± their standard deviation"))


def score_rows(metrics: Sequence[str], images: Tensor, texts: Tensor, captions: Sequence[str], protocol: Protocol) \
        -> Iterator[Row]:
    """CLIP score and R-precision from a CLIP's features; ``protocol`` names the CLIP as judge."""
    if "clip" in metrics:
        yield Row("clip-score", f"clip-score-{protocol.judge}", *mean_and_error(clip_score(images, texts)), replace(
            protocol, detail="100 x cosine, not below 0, ± standard error"))
    if "rprecision" in metrics:
        choices = min(CHOICES, len(texts))
        hits = r_precision_hits(images, texts, choices, protocol.seed, captions)
        yield Row("r-precision", f"r-precision-{protocol.judge}", *mean_and_error(hits), replace(
            protocol, few_samples=choices < CHOICES,
            detail=f"R = 1, one true caption among {choices}, ± standard error"))


def judge_rows(report: JudgeReport, protocol: Protocol) -> Iterator[Row]:
    """Every share that the shapes judge found."""
    protocol = replace(protocol, judge="shapes judge")
    for name, value in sorted(report.accuracy.items()):
        asked = report.asked.get(name)
        error = math.sqrt(value * (1 - value) / asked) if asked else None
        yield Row(f"judge/{name}", f"judge/{name}", value, error, replace(
            protocol, detail=f"over {asked} captions, ± standard error" if asked else "over what captions name"))


def diversity_rows(made: Tensor, real: Tensor, image_size: int, protocol: Protocol) -> Iterator[Row]:
    """MS-SSIM of pairs of one class, painted and real: of the samples that the captions belong to."""
    detail = f"{ms_ssim_scales(image_size)} scales, lower is more diverse, ± standard error"
    for name, values in (("ms-ssim", made), ("ms-ssim-real", real)):
        if len(values) > 1:
            yield Row(name, name, *mean_and_error(values), replace(
                protocol, detail=f"{len(values)} pairs of one class, {detail}"))


def vs_row(cosines: Tensor, protocol: Protocol) -> Row:
    """The VS similarity; ``protocol`` names the VS model as judge."""
    return Row("vs", f"vs-{protocol.judge}", *mean_and_deviation(cosines), replace(
        protocol, detail="cosine, ± standard deviation over pictures"))
