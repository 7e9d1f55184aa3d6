"""Plots for a paper: FID and IS against the blur radius, everything against the number of candidates."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from dalle.evaluation.protocol import Protocol, Row, named
from dalle.metrics.judge_report import JudgeReport

PLOTS = ("blur.png", "best_of_n.png")
AXES = {"fid": "FID (lower is better)", "rfid": "rFID (lower is better)", "kid": "KID (lower is better)",
        "is": "Inception Score (higher is better)", "clip-score": "CLIP score, 100 x cosine (higher is better)",
        "r-precision": "R-precision (share of 1)", "vs": "VS similarity (cosine)",
        "ms-ssim": "MS-SSIM of pairs of one class (lower is more diverse)",
        "judge/colour_shape": "shapes judge: share of right pictures"}
OF_BLUR = ("fid", "rfid", "is")
OF_CANDIDATES = ("fid", "is", "kid", "clip-score", "r-precision", "vs", "judge/colour_shape")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")      # Okabe and Ito's
MARKS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH, HEIGHT = 4.6, 3.6       # of a panel, inches
LETTERS = 16                   # of the caption, for each inch of width
OF_METRIC = ("extractor", "extractor_digest", "resize", "judge", "judge_digest", "detail", "reference",
             "reference_fingerprint", "references")


def draw_plots(rows: Sequence[Row], judge: Mapping[int, JudgeReport], out: Path) -> list[Path]:
    """The plots that the rows allow, as PNG files in ``out``; a curve needs two points."""
    written = []
    for name, draw in zip(PLOTS, (blur_figure, candidates_figure), strict=True):
        figure = draw(rows)
        (out / name).unlink(missing_ok=True)
        if figure is not None:
            figure.savefig(out / name, dpi=200)
            written.append(out / name)
    for count, report in judge.items():
        path = out / f"judge_best_of_{count}.png"
        protocol = next(row.protocol for row in rows if row.family.startswith("judge/")
                        and row.protocol.candidates == count)
        report.figure(path, textwrap.fill(replace(protocol, detail=None).sentence(), 130))
        written.append(path)
    return written


def blur_figure(rows: Sequence[Row]) -> Figure | None:
    """FID and IS against the radius of the blur of both sets, a line for each N (arXiv 2102.12092, figure 9)."""
    families = [family for family in OF_BLUR
                if len({row.protocol.blur for row in rows if row.family == family}) > 1]
    if not families:
        return None
    figure, axes = panels(len(families))
    used = [row for row in rows if row.family in families]
    for family, axis in zip(families, axes, strict=True):
        own = [row for row in rows if row.family == family]
        for number, count in enumerate(sorted({row.protocol.candidates or 1 for row in own})):
            line = sorted((row for row in own if (row.protocol.candidates or 1) == count),
                          key=lambda row: row.protocol.blur)
            label = label_of(line[0].protocol)
            plot(axis, [row.protocol.blur for row in line], line, number, label)
        axis.set_xlabel("Gaussian blur of both sets, radius (pixels)")
        axis.set_xticks(sorted({row.protocol.blur for row in own}))
        axis.set_ylabel(AXES[family])
        axis.set_title(own[0].metric, fontsize=10)
        axis.legend(frameon=False)
    return captioned(figure, used, ("blur", "candidates"))


def candidates_figure(rows: Sequence[Row]) -> Figure | None:
    """Each metric against the number of candidates, without blur: the gain of the best of N."""
    shown = [row for row in rows if not row.protocol.blur and row.protocol.candidates is not None]
    families = [family for family in OF_CANDIDATES
                if len({row.protocol.candidates for row in shown if row.family == family}) > 1]
    if not families:
        return None
    figure, axes = panels(len(families))
    used = [row for row in shown if row.family in families]
    for number, (family, axis) in enumerate(zip(families, axes, strict=True)):
        line = sorted((row for row in shown if row.family == family), key=lambda row: row.protocol.candidates)
        counts = [row.protocol.candidates for row in line]
        plot(axis, counts, line, number, line[0].metric)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(counts))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.set_xlabel("candidates N, the best by the ranker")
        axis.set_ylabel(AXES[family])
        axis.legend(frameon=False)
    return captioned(figure, used, ("blur", "candidates"))


def label_of(protocol: Protocol) -> str:
    if protocol.candidates is None:
        return "reconstructions"
    return f"best of {protocol.candidates}" if protocol.candidates > 1 else "1 candidate"


def panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH * columns, HEIGHT * rows + 1), layout="constrained")
    axes = [figure.add_subplot(rows, columns, number + 1) for number in range(count)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot(axis: Axes, places: Sequence[float], line: Sequence[Row], number: int, label: str) -> None:
    errors = [row.error or 0 for row in line] if any(row.error for row in line) else None
    axis.errorbar(places, [row.value for row in line], yerr=errors, label=label, capsize=3, linewidth=1.6, markersize=5,
                  color=COLOURS[number % len(COLOURS)], marker=MARKS[number % len(MARKS)])


def captioned(figure: Figure, rows: Sequence[Row], varied: Sequence[str]) -> Figure:
    """With the protocol below: what all rows share, then each metric's own part."""
    fullest = max((row.protocol for row in rows), key=lambda protocol: protocol.candidates or 0)
    shared = replace(fullest, **dict.fromkeys((*OF_METRIC, *varied)), few_samples=False)
    parts = [shared.sentence()]
    if fullest.ranker is not None:
        parts.append(f"Ranked by {named(fullest.ranker, fullest.ranker_digest)}.")
    for metric in dict.fromkeys(row.metric for row in rows):
        first = next(row.protocol for row in rows if row.metric == metric)
        parts.append(f"{metric}: {first.own_sentence()}.")
    letters = round(LETTERS * figure.get_figwidth())
    lines = [line for part in parts for line in textwrap.wrap(part, letters, subsequent_indent="    ")]
    figure.set_figheight(figure.get_figheight() + 0.14 * len(lines))
    figure.supxlabel("\n".join(lines), fontsize=7.5, x=0.01, ha="left")
    return figure
