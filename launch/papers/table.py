"""The papers' figures beside ours, in columns of their own, and whether both put the systems in the same order."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dalle.evaluation.protocol import MEASURE, Protocol
from dalle.words import cell
from papers.figures import PUBLISHED, Column, Doubt, Figure

MARKDOWN, JSON = "papers.md", "papers.json"
LOWER_IS_BETTER = ("fid", "kid", "ms-ssim")        # of our metrics, by how their names begin
OF_THE_SYSTEM = {"image_size", "sources"}          # what it paints and what it edits: not how it is measured
REMARK = """\
± is the papers': over splits (IS), folds (R-precision) or pictures (VS). `?` stands behind what could not be verified.
Agreement is Kendall's tau (b) over the systems that have both figures, how many in brackets: +1 where both put them in
the same order from best to worst, -1 in the opposite one; of two systems it is one or the other, and says little. Lower
is better for FID, KID and MS-SSIM (more diverse). The papers' systems paint birds, flowers and scenes after days of
training, ours paint shapes after minutes: only orders can be compared."""


Row = tuple[str, Mapping[str, float], Mapping[str, str]]    # a system, its figures by metric, their protocols as JSON


class Measured(NamedTuple):
    """One of our figures for all systems that were measured by one protocol."""

    metric: str
    protocol: str
    values: dict[str, float]        # by system

    @property
    def lower_is_better(self) -> bool:
        return self.metric.startswith(LOWER_IS_BETTER)


class Agreement(NamedTuple):
    """How far two columns put the systems that are in both in the same order; None where that is not defined."""

    systems: list[str]
    tau: float | None
    in_doubt: bool          # a published value is

    def __str__(self) -> str:
        return "-" if self.tau is None else f"{self.tau:+.2f}{'?' * self.in_doubt} ({len(self.systems)})"


def measured_columns(rows: Iterable[Row]) -> list[Measured]:
    """A column for each metric and protocol, those of one metric side by side."""
    columns: dict[str, dict[tuple, Measured]] = {}
    for system, figures, protocols in rows:
        for metric, value in figures.items():
            known = json.loads(protocols.get(metric, "{}"))
            measure = tuple(known.get(name) for name in MEASURE if name not in OF_THE_SYSTEM)
            of_metric = columns.setdefault(metric, {})
            of_metric.setdefault(measure, Measured(metric, described(known), {})).values[system] = value
    return [column for of_metric in columns.values() for column in of_metric.values()]


def described(known: Mapping[str, Any]) -> str:
    """What two figures need in common to be compared."""
    if not known:
        return "not recorded"
    protocol = Protocol(**{name: value for name, value in known.items() if name in Protocol.__dataclass_fields__})
    parts = [f"{protocol.samples:,} captions of {protocol.captions}, a picture each", protocol.own_sentence(),
             f"seed {protocol.seed}", protocol.tool]
    return "; ".join(part for part in parts if part)


def agreement(published: Column, measured: Measured) -> Agreement:
    """Kendall's tau-b of the two orders, from best to worst; none of fewer than two systems, or where all are equal."""
    from scipy.stats import kendalltau

    both = [figure for figure in published.figures if figure.system in measured.values]
    systems, in_doubt = [figure.system for figure in both], any(figure.doubt is Doubt.VALUE for figure in both)
    if len(both) < 2:
        return Agreement(systems, None, in_doubt)
    tau = float(kendalltau([figure.value for figure in both], [measured.values[one] for one in systems]).statistic)
    same_direction = published.lower_is_better == measured.lower_is_better
    return Agreement(systems, None if math.isnan(tau) else tau if same_direction else -tau, in_doubt)


# -- the files

def write_papers(rows: Sequence[Row], family: Sequence[str], out: Path, published: Sequence[Column] = PUBLISHED) -> str:
    """``papers.md`` and ``papers.json`` in ``out``; what the first says. A row of a system that is neither of the
    ``family`` nor in a paper is left out, and named."""
    known = list(dict.fromkeys([*family, *(figure.system for column in published for figure in column.figures)]))
    measured = measured_columns(row for row in rows if row[0] in known)
    strangers = [system for system, _, _ in rows if system not in known]
    text = to_markdown(known, published, measured, strangers)
    (out / MARKDOWN).write_text(text)
    (out / JSON).write_text(json.dumps(to_json(published, measured), indent=2) + "\n")
    return text


def to_json(published: Sequence[Column], measured: Sequence[Measured]) -> dict[str, Any]:
    return {
        "published": [{"metric": column.metric, "data": column.data, "protocol": column.protocol,
                       "figures": [figure._asdict() | {"doubt": figure.doubt.value} for figure in column.figures]}
                      for column in published],
        "measured": [column._asdict() for column in measured],
        "agreement": [{"published": number, "measured": place, **agreement(theirs, ours)._asdict()}
                      for number, theirs in enumerate(published) for place, ours in enumerate(measured)],
    }


def to_markdown(systems: Sequence[str], published: Sequence[Column], measured: Sequence[Measured],
                strangers: Sequence[str]) -> str:
    """A table for each data set, what the numbers of the columns mean, and a table of the agreement."""
    numbers = {id(column): f"{number}" for number, column in enumerate(published, start=1)}
    marks = {id(column): f"m{number}" for number, column in enumerate(measured, start=1)}
    theirs = [f"{column.metric} [{numbers[id(column)]}]" for column in published]
    ours = [f"ours: {column.metric} [{marks[id(column)]}]" for column in measured]
    parts = []
    for data in dict.fromkeys(column.data for column in published):
        here = [(head, column) for head, column in zip(theirs, published, strict=True) if column.data == data]
        parts += [f"## {data}", figures_table(systems, here, list(zip(ours, measured, strict=True))),
                  "\n".join(legend(numbers[id(column)], column) for _, column in here)]
    if measured:
        lines = "\n".join(f"- [{marks[id(column)]}] {column.metric}: {cell(column.protocol)}" for column in measured)
        cells = [[f"{column.data}: {head}", *(str(agreement(column, one)) for one in measured)]
                 for head, column in zip(theirs, published, strict=True) if len(column.figures) > 1]
        parts += ["## Ours, on shapes", lines, "## Agreement", markdown_table(["published", *ours], cells)]
    else:
        parts.append("Nothing of ours is measured yet: run launch/zoo.py.")
    parts.append(REMARK)
    if strangers:
        parts.append(f"Measured, but no system of the family: {', '.join(strangers)}.")
    return "\n\n".join(parts) + "\n"


def figures_table(systems: Sequence[str], published: Sequence[tuple[str, Column]],
                  measured: Sequence[tuple[str, Measured]]) -> str:
    """A line for each system of which something is published here; the others are named below."""
    found = {system: [next((one for one in column.figures if one.system == system), None) for _, column in published]
             for system in systems}
    digits = [column.digits for _, column in published]
    cells = [[system, *map(figure_text, figures, digits),
              *(f"{column.values[system]:.3g}" if system in column.values else "-" for _, column in measured)]
             for system, figures in found.items() if any(figures)]
    others = [system for system, figures in found.items() if not any(figures)]
    table = markdown_table(["system", *(head for head, _ in published), *(head for head, _ in measured)], cells)
    return table + (f"\n\nNothing is known of: {', '.join(others)}." if others else "")


def figure_text(figure: Figure | None, digits: int) -> str:
    """The value with its spread, a question mark behind what is in doubt."""
    if figure is None:
        return "-"
    value = f"{figure.value:.{digits}f}{'?' if figure.doubt is Doubt.VALUE else ''}"
    if figure.spread is None:
        return value
    return f"{value} ± {figure.spread:.{digits}f}{'' if figure.doubt is Doubt.NONE else '?'}"


def legend(number: str, column: Column) -> str:
    """The protocol, and who reports what."""
    reporters: dict[str, list[str]] = {}
    for figure in column.figures:
        reporters.setdefault(figure.by, []).append(figure.system)
    told = "; ".join(f"{', '.join(systems)} by {by}" for by, systems in reporters.items())
    return f"- [{number}] {column.metric}: {column.protocol}. Reported: {told}."


def markdown_table(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(line) + " |" for line in cells)])
