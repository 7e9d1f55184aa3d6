"""What an evaluation is asked for, and what it finds."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from dalle.evaluation.protocol import Row
from dalle.metrics.distributions import IS_SPLITS
from dalle.metrics.judge_report import JudgeReport

DISTRIBUTION = ("fid", "kid", "is")
OF_CAPTIONS = ("clip", "rprecision", "vs", "judge", "msssim")
OF_CODECS = ("psnr", "ssim")
METRICS = (*DISTRIBUTION, *OF_CAPTIONS, *OF_CODECS)


@dataclass(frozen=True)
class Job:
    """What is to be measured."""

    model: str
    data: str
    out: Path
    cache: Path
    metrics: tuple[str, ...]
    samples: int
    candidates: tuple[int, ...] = (1,)
    rerank: str | None = None
    judge_clip: str | None = None
    extractor: str | None = None
    vs_model: str | None = None
    reference: str | None = None
    reference_samples: int | None = None
    blur: tuple[float, ...] = (0.0,)
    options: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    allow_few: bool = False
    device: str = "cpu"
    precision: str = "fp32"


@dataclass
class Results:
    """The rows, and what a reader of them has to know."""

    model: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)       # metric -> why it was not measured
    unreadable: list[str] = field(default_factory=list)          # KEY: reason, of the real pictures
    unreadable_captions: dict[str, int] = field(default_factory=dict)
    judge: dict[int, JudgeReport] = field(default_factory=dict)  # by number of candidates

    def leave_out(self, metric: str, reason: str, say: Callable[[str], None]) -> None:
        """Not measured: say so, and keep the reason."""
        self.left_out[metric] = reason
        say(f"left out: {metric} ({reason})")


def check(job: Job) -> None:
    """What can be wrong before anything is loaded."""
    unknown = [metric for metric in job.metrics if metric not in METRICS]
    if unknown or not job.metrics:
        raise UserError(f"--metrics: {', '.join(map(repr, unknown)) or 'nothing'} cannot be measured; known: "
                        f"{', '.join(METRICS)}")
    if job.samples < 2:
        raise UserError(f"--samples {job.samples}: at least 2 are needed")
    if job.reference_samples is not None and job.reference_samples < 2:
        raise UserError(f"--reference-samples {job.reference_samples}: at least 2 are needed")
    if min(job.candidates) < 1 or len(set(job.candidates)) < len(job.candidates):
        raise UserError(f"--candidates {', '.join(map(str, job.candidates))}: give different numbers from 1")
    if max(job.candidates) > 1 and job.rerank is None:
        raise UserError(f"--candidates {max(job.candidates)} needs --rerank CLIP, which chooses the best of so many")
    if min(job.blur) < 0 or len(set(job.blur)) < len(job.blur):
        raise UserError("--blur: give different radii, none below 0")
    if "is" in job.metrics and job.samples < IS_SPLITS:
        raise UserError(f"is takes {IS_SPLITS} splits and so at least {IS_SPLITS} samples, not {job.samples}")
