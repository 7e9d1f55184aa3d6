"""What a person sees of it: a line for each round, and in the end the table and the verdicts."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from chaos_parts.blows import Round

LINES_SHOWN = 30                    # of what a start printed, where it went wrong


def show_round(one: Round, printed: Path, console: Console) -> None:
    ranks = f", ranks {one.rank_statuses}" if one.rank_statuses else ""
    console.print(f"  {one.number:3d}  {one.kind:17s} {one.processes} process(es) from step {one.from_step}, hit after "
                  f"{one.at_step}: status {one.status}{ranks}, {one.seconds_to_end:.1f} s to end, "
                  f"{one.seconds:.0f} s in all", soft_wrap=True)
    for fault in one.faults:
        console.print(f"       WRONG: {fault}", soft_wrap=True)
    if one.faults:
        console.print(f"       the end of {printed}:", soft_wrap=True)
        for line in printed.read_text(errors="replace").splitlines()[-LINES_SHOWN:]:
            console.print(f"       | {line}", soft_wrap=True, markup=False)


def show(rounds: Sequence[Round], checks: Mapping[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="what was done", title_justify="left")
    for column in ("", "blow", "processes", "then", "from step", "hit after", "torn save", "status", "ranks",
                   "s to end"):
        table.add_column(column)
    for one, following in itertools.zip_longest(rounds, rounds[1:]):
        table.add_row(str(one.number), one.kind, str(one.processes), str(following.processes) if following else "",
                      str(one.from_step), "" if one.at_step is None else str(one.at_step),
                      "yes" if one.torn_save else "", str(one.status), " ".join(map(str, one.rank_statuses)),
                      "" if one.kind == "none" else f"{one.seconds_to_end:.1f}")
    console.print(table)
    for name, result in checks.items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in result["figures"].items())
        console.print(f"{'ok   ' if not result['faults'] else 'WRONG'} {name}: {figures}", soft_wrap=True)
        for fault in result["faults"][:10]:
            console.print(f"      {fault}", soft_wrap=True)
        if len(result["faults"]) > 10:
            console.print(f"      ... and {len(result['faults']) - 10} more")
