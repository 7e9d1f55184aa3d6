"""Results as files: JSON, a markdown table, plots; and several results files as one table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dalle.errors import UserError
from dalle.evaluation.job import Results
from dalle.evaluation.plots import PLOTS, draw_plots
from dalle.evaluation.protocol import Protocol, Row, differences
from dalle.files import json_text, replacing
from dalle.words import cell

RESULTS, TABLE = "results.json", "results.md"
FORMAT = 1
LISTED = 200      # of the unreadable pictures, so many are named in the results


def check_out(out: Path) -> None:
    """:class:`UserError` for files of the user's where the results would be written."""
    try:
        read_rows(out / RESULTS)
    except UserError:
        other = next((name for name in (RESULTS, TABLE, *PLOTS) if (out / name).exists()), None)
        if other is not None:
            raise UserError(f"{out / other} is not of an evaluation and would be overwritten: give another --out, or "
                            "move it") from None


def write_report(results: Results, out: Path) -> list[Path]:
    """``results.json``, ``results.md`` and the plots; the files that were written."""
    try:
        written = [out / RESULTS, out / TABLE]
        for path, text in zip(written, (json_text(to_json(results)), to_markdown(results)), strict=True):
            with replacing(path) as file:
                file.write(text.encode())
        return written + draw_plots(results.rows, results.judge, out)
    except OSError as error:
        raise UserError(f"the results cannot be written into {out}: {error.strerror or error}") from error


def to_json(results: Results) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "model": results.model,
        "rows": [row.flat() for row in results.rows],
        "left_out": results.left_out,
        "unreadable_pictures": {"count": len(results.unreadable), "first": results.unreadable[:LISTED]},
        "unreadable_captions": results.unreadable_captions,
        "judge": {str(count): report.to_json() for count, report in results.judge.items()},
    }


def to_markdown(results: Results) -> str:
    """The figures at a glance; then one line a figure, its whole protocol in the last cell."""
    lines = [f"# Evaluation of {results.model.get('path', results.model.get('kind'))}", "", glance(results.rows), "",
             "## Protocol", "", "| metric | value | protocol |", "| --- | ---: | --- |"]
    lines += [f"| {cell(row.metric)} | {figure(row)} | {cell(row.protocol.sentence())} |" for row in results.rows]
    return "\n".join([*lines, *remarks(results)]).rstrip() + "\n"


def glance(rows: Sequence[Row]) -> str:
    """A line for each metric and blur radius, a column for each number of candidates."""
    counts = list(dict.fromkeys(row.protocol.candidates for row in rows))
    heads = ["value" if count is None else f"best of {count}" if count > 1 else "1 candidate" for count in counts]
    lines = ["| metric | blur | " + " | ".join(heads) + " |", "| --- | ---: |" + " ---: |" * len(counts)]
    places = dict.fromkeys((row.metric, row.protocol.blur) for row in rows)
    for metric, blur in places:
        found = {row.protocol.candidates: row for row in rows if (row.metric, row.protocol.blur) == (metric, blur)}
        cells = [figure(found[count]) if count in found else "-" for count in counts]
        lines.append(f"| {cell(metric)} | {'-' if blur is None else f'{blur:g}'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def remarks(results: Results) -> list[str]:
    """What was left out and what could not be read."""
    lines = ["", *(f"Left out: {metric} ({reason})." for metric, reason in results.left_out.items())]
    if results.unreadable:
        lines += ["", f"{len(results.unreadable)} real pictures could not be read and were left out:", "",
                  *(f"- {cell(line)}" for line in results.unreadable[:LISTED])]
    if results.unreadable_captions:
        counts = ", ".join(f"{reason} {count}" for reason, count in results.unreadable_captions.items())
        lines += ["", f"Samples without a caption that can be read: {counts}."]
    return lines


def figure(row: Row) -> str:
    """The value with its error, where it has one."""
    value = f"{row.value:.4g}"
    return value if row.error is None else f"{value} ± {row.error:.2g}"


# -- several files ----------------------------------------------------------------------------------------------------

def read_rows(path: Path) -> list[Row]:
    """The rows of a results file."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise UserError(f"{path} is of format {tree['format']}, this program reads {FORMAT}: measure again")
        return [Row.from_flat(record) for record in tree["rows"]]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a results.json of launch/evaluate.py "
                        f"({type(error).__name__}: {error})") from None


def compare(paths: Sequence[Path]) -> str:
    """One markdown table: a line for each figure, a column for each file, and whether they may be compared."""
    if len(paths) < 2:
        raise UserError("--compare takes at least two results files")
    files = [{row.place: row for row in read_rows(path)} for path in paths]
    names = labels(paths)
    head = ["metric", "best of N", "blur", *names, "comparable"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for place in dict.fromkeys(place for rows in files for place in rows):
        found = [rows.get(place) for rows in files]
        present = [(name, row) for name, row in zip(names, found, strict=True) if row is not None]
        first = present[0][1]
        metrics = dict.fromkeys(row.metric for _, row in present)
        cells = [" / ".join(metrics), str(first.protocol.candidates or "-"),
                 "-" if first.protocol.blur is None else f"{first.protocol.blur:g}",
                 *("-" if row is None else figure(row) for row in found), verdict(present)]
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    lines += ["", "What was measured:", ""]
    for name, path, rows in zip(names, paths, files, strict=True):
        lines.append(f"- {name} ({path}): {cell(described(next(iter(rows.values())).protocol) if rows else 'nothing')}")
    return "\n".join(lines) + "\n"


def verdict(present: Sequence[tuple[str, Row]]) -> str:
    """Yes, or every reason why not, against the first file that has the figure."""
    if len(present) < 2:
        return f"only in {present[0][0]}"
    (first, reference), *others = present
    reasons = [f"{first} and {name}: {'; '.join(found)}" for name, row in others
               if (found := differences(reference.protocol, row.protocol))]
    return f"NO: {'. '.join(reasons)}" if reasons else "yes"


def described(protocol: Protocol) -> str:
    """What may differ between comparable figures: the model's side of the protocol."""
    parts = [f"step {protocol.step}", f"{protocol.weights} weights", protocol.settings, protocol.precision]
    return ", ".join(part for part in parts if part)


def labels(paths: Sequence[Path]) -> list[str]:
    """A short name for each file: its folder's, or as much of its path as tells it from the others."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.with_suffix("").parts[-1 - depth:]).removesuffix("/results") for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths, start=1)]
