"""How a figure was measured: stored with every figure, so that two of them can be compared or refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from dalle.files import json_digest

# Two figures mean the same only where all of these are equal; the others say what was measured, not how.
MEASURE = ("tool", "extractor", "extractor_digest", "resize", "samples", "reference_fingerprint", "references",
           "captions_fingerprint", "sources", "seed", "image_size", "blur", "judge", "judge_digest", "few_samples",
           "detail")
TITLES = {"tool": "tool and version", "extractor_digest": "hash of the extractor's weights",
          "reference_fingerprint": "reference split", "references": "number of reference pictures",
          "captions_fingerprint": "split of the captions", "sources": "pictures that are edited",
          "samples": "sample count", "resize": "resize filter",
          "blur": "blur radius", "judge": "judging model", "judge_digest": "hash of the judging model's weights",
          "few_samples": "fewer samples than features", "detail": "settings of the metric"}


@dataclass(frozen=True)
class Protocol:
    """One figure's protocol; None where something plays no part in it."""

    tool: str                                  # and version
    samples: int
    seed: int                                  # of captions and pictures
    image_size: int                            # of the pictures that are compared
    captions: str | None = None                # the split that the captions come from
    captions_fingerprint: str | None = None
    sources: str | None = None                 # of a generator that edits pictures: which ones
    reference: str | None = None               # the split of the real pictures
    reference_fingerprint: str | None = None
    references: int | None = None              # how many of them
    extractor: str | None = None
    extractor_digest: str | None = None
    resize: str | None = None                  # to the extractor's size
    judge: str | None = None                   # the model that scores: a CLIP, the VS model
    judge_digest: str | None = None
    blur: float | None = None                  # radius in pixels, of both sets
    few_samples: bool = False                  # fewer than the covariance needs
    detail: str | None = None                  # of the metric: splits, subsets
    candidates: int | None = None              # best of so many
    ranker: str | None = None
    ranker_digest: str | None = None
    settings: str | None = None                # guidance, temperature, top-k, top-p
    step: int | None = None                    # of the checkpoint
    weights: str | None = None                 # EMA or raw
    precision: str | None = None

    def sentence(self) -> str:
        """The whole protocol in one line, for a table's cell or a figure's caption."""
        parts = [f"{self.samples:,} samples of {self.image_size} px"]
        if self.captions is not None:
            parts.append(f"captions of {named(self.captions, self.captions_fingerprint)}")
        parts += filter(None, [self.sources, self.own_sentence()])
        if self.blur is not None:
            parts.append(f"blur radius {self.blur:g} px")
        if self.candidates is not None:
            parts.append(f"best of {self.candidates} by {named(self.ranker, self.ranker_digest)}" if self.ranker
                         else f"{self.candidates} candidate, unranked")
        parts += filter(None, [self.settings])
        parts.append(f"step {'unknown' if self.step is None else self.step}, {self.weights or 'unknown'} weights")
        parts += filter(None, [self.precision, f"seed {self.seed}", self.tool])
        return "; ".join(parts)

    def own_sentence(self) -> str:
        """What the metric looked with and at."""
        parts = []
        if self.reference is not None:
            parts.append(f"against {self.references:,} of {named(self.reference, self.reference_fingerprint)}")
        if self.extractor is not None:
            parts.append(f"features {named(self.extractor, self.extractor_digest)}, resized {self.resize}")
        if self.judge is not None:
            parts.append(f"judged by {named(self.judge, self.judge_digest)}")
        parts += filter(None, [self.detail, "FEWER SAMPLES THAN THE METRIC NEEDS" if self.few_samples else None])
        return "; ".join(parts)


def named(what: str, digest: str | None) -> str:
    return f"{what} ({digest[:12]})" if digest else what


@dataclass(frozen=True)
class Row:
    """One figure. ``family`` is the metric without the model that its name carries: rows are compared within it."""

    family: str                # fid
    metric: str                # fid-inception-pytorch-fid
    value: float
    error: float | None        # standard deviation or error, as ``protocol.detail`` says
    protocol: Protocol

    def flat(self) -> dict[str, Any]:
        """For a results file: the figure and its protocol side by side."""
        return {"family": self.family, "metric": self.metric, "value": self.value, "error": self.error,
                **asdict(self.protocol)}

    @classmethod
    def from_flat(cls, record: Mapping[str, Any]) -> Self:
        """Raises ``TypeError`` or ``KeyError`` for what :meth:`flat` did not write."""
        known = {field.name for field in fields(Protocol)}
        rest = {key: value for key, value in record.items() if key in known}
        return cls(record["family"], record["metric"], record["value"], record["error"], Protocol(**rest))

    @property
    def place(self) -> tuple[str, float, int]:
        """Which line of a table it is in."""
        return self.family, self.protocol.blur or 0, self.protocol.candidates or 0


def differences(left: Protocol, right: Protocol) -> list[str]:
    """Why two figures are not comparable: one phrase for each thing that was measured differently."""
    found = []
    for name in MEASURE:
        here, there = getattr(left, name), getattr(right, name)
        if here != there:
            found.append(f"{TITLES.get(name, name.replace('_', ' '))}: {here} against {there}")
    return found


def digest(description: Mapping[str, Any]) -> str:
    """12 hex digits of what determines some pictures or features."""
    return json_digest(description, digits=12)
