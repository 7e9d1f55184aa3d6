#!/usr/bin/env python
"""Train every system on the same pictures, measure all in the same way, and write the leaderboard.

    python launch/zoo.py
    python launch/zoo.py --only attngan,stackgan_v2 --again
    python launch/zoo.py --table                # from the rows that are there
    python launch/zoo.py --table papers         # beside what the papers report
    python launch/zoo.py --set emoji

Each system is trained from configs/gans/SYSTEM_SET.yaml for that config's steps, or --minutes if they are over
before; its text encoder and other prerequisites before that and apart from it. Then it is measured by
launch/evaluate.py with --samples captions, and timed. A row is kept in OUT/rows and made once; `--only` makes some of
them, `--again` makes them anew, `--measure` measures runs that are there without training them. The transformer of the
quickstart stands beside them where its run exists. Writes leaderboard.md, leaderboard.json and, where a judge looked at
the pictures while they trained, curves.png into --out.

`--table papers` puts the figures that the papers report of the family beside ours, each with its protocol, and says how
far they agree on the order of the systems: papers.md, papers.json.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import gans
from dalle.errors import EXIT_STOPPED_BY_SIGNAL, UserError, run_command
from dalle.training.run_log import read_log as read_run_log
from dalle.training.signals import run_in_turn
from papers.table import write_papers

ROOT = Path(__file__).resolve().parent.parent
COLOUR = "judge/object_colour"
REAL = "ms-ssim-real"
CURVE = f"evaluation/{COLOUR}"
METRICS = "fid,kid,clip,rprecision,msssim,judge"
TRANSFORMER = "transformer"
LEADERBOARD, PAPERS = "leaderboard", "papers"
TIMED_PICTURES, TIMED_ROUNDS = 64, 3
GUESS = {COLOUR: "1 in 8", "r-precision": "1 in 100"}


class PictureSet(NamedTuple):
    """What the systems of one set are measured with."""

    data: str             # captions and real pictures
    clip: str             # trained apart from all systems
    transformer: str      # stands beside them


SETS = {"shapes": PictureSet("data/shapes/validation", "runs/quickstart/clip", "runs/quickstart/transformer"),
        # captions that were trained on: there are too few others, and unseen emoji cannot be guessed
        "emoji": PictureSet("data/emoji/train", "runs/emoji/clip", "runs/emoji/transformer")}


@dataclass
class Row:
    """What is known of one system: figures by name, and how its colour accuracy went while it trained."""

    system: str
    paper: str
    seconds: float = 0.0                  # of training, without prerequisites
    processor_seconds: float = 0.0        # the same of its processes, which other load does not lengthen much
    steps: int = 0
    parameters: dict[str, int] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    protocol: dict[str, str] = field(default_factory=dict)
    trained_a_second: float = 0.0         # pictures
    painted_a_second: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=15.0, help="of training each, at most (default: %(default)s)")
    parser.add_argument("--only", metavar="A,B", help="these systems alone (default: all that paint)")
    parser.add_argument("--again", action="store_true", help="train and measure anew where a row exists")
    parser.add_argument("--measure", action="store_true", help="measure the runs that are there, without training")
    parser.add_argument("--table", nargs="?", const=LEADERBOARD, choices=(LEADERBOARD, PAPERS), help="write a table of "
                        "the rows that are there: the leaderboard (default), or the papers' figures beside ours")
    parser.add_argument("--set", default="shapes", choices=SETS, help="of configs and pictures (default: %(default)s)")
    parser.add_argument("--data", help="captions and real pictures (default: the set's)")
    parser.add_argument("--samples", type=int, default=1000, help="captions, a picture each (default: %(default)s)")
    parser.add_argument("--clip", metavar="RUN", help="for FID, CLIP score and R-precision: trained apart from all of "
                        "them (default: the quickstart's of the set)")
    parser.add_argument("--transformer", metavar="RUN", help="default: the quickstart's of the set")
    parser.add_argument("--out", type=Path, help="default: runs/zoo/SET")
    return parser


def parse(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments, what was left out by the set."""
    arguments = build_parser().parse_args(given)
    for name, value in SETS[arguments.set]._asdict().items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.out = arguments.out or Path("runs/zoo") / arguments.set
    if arguments.table == PAPERS and arguments.set != "shapes":
        raise UserError(f"--table {PAPERS} is of shapes alone: leave out --set {arguments.set}")
    return arguments


def main() -> int:
    arguments = parse()
    systems = chosen(arguments)
    rows = arguments.out / "rows"
    rows.mkdir(parents=True, exist_ok=True)
    failed = []
    if not arguments.table:
        for system in systems:
            path = rows / f"{system}.json"
            if path.exists() and not (arguments.again or arguments.measure):
                print(f"{system}: has its row, {path}")
                continue
            try:
                row = make_row(system, arguments, path)
            except UserError as error:
                print(f"error: {system}: {error}", file=sys.stderr, flush=True)
                failed.append(system)
                continue
            path.write_text(json.dumps(asdict(row), indent=2) + "\n")
            print(summary(row), flush=True)
    found = [Row(**json.loads(path.read_text())) for path in sorted(rows.glob("*.json"))]
    if arguments.table == PAPERS:
        print(beside_papers(found, arguments.out))
        return 0
    if not found:
        raise UserError(f"{rows} holds no row yet: run without --table")
    write_leaderboard(found, arguments.out)
    print((arguments.out / "leaderboard.md").read_text())
    if failed:
        raise UserError(f"no row for {', '.join(failed)}: see above")
    return 0


def chosen(arguments: argparse.Namespace) -> list[str]:
    """The systems to train: all that the set has a config for; the transformer last, if its run is there."""
    known = [name for name, system in gans.SYSTEMS.items() if system.paints] + [TRANSFORMER]
    if arguments.only is None:
        transformer = Path(arguments.transformer)
        return [name for name in known
                if (transformer if name == TRANSFORMER else small_config(name, arguments.set)).exists()]
    wanted = [name.strip() for name in arguments.only.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise UserError(f"--only: {unknown[0]!r} is no system that paints; known: {', '.join(known)}")
    return wanted


# -- one row

def make_row(system: str, arguments: argparse.Namespace, known: Path) -> Row:
    """Train, measure and time one system; ``--measure`` takes the training's processor time from the ``known`` row."""
    if system == TRANSFORMER:
        row, run = Row(system, "2102.12092"), Path(arguments.transformer)
    else:
        row = Row(system, gans.SYSTEMS[system].paper)
        config = small_config(system, arguments.set)
        if not config.is_file():
            raise UserError(f"{config} does not exist: the zoo trains a system from its small config")
        run = train(config, arguments, row)
        row.parameters = planned_parameters(config)
    if arguments.measure and known.exists():
        row.processor_seconds = json.loads(known.read_text())["processor_seconds"]
    read_log(run / "log.jsonl", row)
    measure(run, arguments, row)
    row.painted_a_second = painting_speed(run, arguments.data)
    return row


def small_config(system: str, pictures: str) -> Path:
    return ROOT / "configs" / "gans" / f"{system}_{pictures}.yaml"


def train(config: Path, arguments: argparse.Namespace, row: Row) -> Path:
    """Run the training command, behind that of its prerequisites; the run's folder."""
    from dalle.config import load_config
    from dalle.tasks import RUNS
    from dalle.training.prerequisites import prerequisites, train_prerequisites

    gans.register()
    loaded = load_config(config, [], RUNS)
    if arguments.measure:
        return loaded.folder
    status = train_prerequisites(prerequisites(str(config), loaded, RUNS),
                                 [sys.executable, str(ROOT / "launch/train.py")], is_rank0=True, say=print)
    if status:
        raise UserError(f"a prerequisite of {config} ended with status {status}")
    before = children_seconds()
    command("launch/train.py", config, f"train.minutes={arguments.minutes}", "--resume", "none",
            accepted=(0, EXIT_STOPPED_BY_SIGNAL))
    row.processor_seconds = children_seconds() - before
    return loaded.folder


def children_seconds() -> float:
    """Processor time of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def planned_parameters(config: Path) -> dict[str, int]:
    """Player -> parameters, as the training command's plan says."""
    line = [sys.executable, str(ROOT / "launch/train.py"), str(config), "--dry-run"]
    printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
    return json.loads(printed[printed.index("{"):])["players"]


def measure(run: Path, arguments: argparse.Namespace, row: Row) -> None:
    """The figures of launch/evaluate.py, which leaves out what the set has no classes or no grammar for."""
    out = arguments.out / "evaluation" / row.system
    command("launch/evaluate.py", "--model", run, "--data", arguments.data, "--metrics", METRICS, "--samples",
            arguments.samples, "--extractor", f"clip:{arguments.clip}", "--judge-clip", arguments.clip, "--out", out)
    for line in json.loads((out / "results.json").read_text())["rows"]:
        row.figures[line["metric"]] = line["value"]
        row.protocol[line["metric"]] = json.dumps({key: value for key, value in line.items()
                                                   if key not in ("metric", "value", "error")}, default=str)


def command(script: str, *arguments: object, accepted: Sequence[int] = (0,)) -> int:
    """Run one of the commands that a person types."""
    line = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print(f"$ {' '.join(['python', script, *line[2:]])}", flush=True)
    status = run_in_turn(line)
    if status not in accepted:
        raise UserError(f"{script} ended with status {status}")
    return status


def read_log(path: Path, row: Row) -> None:
    """Steps, time, speed and the curve, from the run's log."""
    lines = read_run_log(path)
    logged = [line for line in lines if "samples_per_second" in line]
    if not logged:
        raise UserError(f"{path} holds no line of a training")
    row.steps = logged[-1]["step"]
    row.trained_a_second = statistics.median(line["samples_per_second"] for line in logged)
    previous = 0
    for line in logged:
        row.seconds += line["seconds_per_step"] * (line["step"] - previous)
        previous = line["step"]
    row.curve = [(line["step"], line[CURVE]) for line in lines if CURVE in line]


def painting_speed(run: Path, data: str) -> float:
    """Pictures a second of the exported generator, the median of a few rounds."""
    import torch

    from dalle.data.index import ShardIndex
    from dalle.evaluation.captions import draw_captions
    from dalle.store import load_generator

    gans.register()
    generator = load_generator(run)
    captions = [one.caption for one in draw_captions(ShardIndex.load(data), TIMED_PICTURES, 0)[0]]
    size = generator.image_size
    options = {"sources": torch.zeros(len(captions), 3, size, size, dtype=torch.uint8)} if generator.edits else {}
    speeds = []
    for _ in range(TIMED_ROUNDS):
        began = time.perf_counter()
        generator.generate(captions, list(range(len(captions))), **options)
        speeds.append(len(captions) / (time.perf_counter() - began))
    return statistics.median(speeds)


# -- the leaderboard

def write_leaderboard(rows: Sequence[Row], out: Path) -> None:
    """All rows, the best colours first, or where no judge reads the captions the best R-precision."""
    ranked = sorted(rows, key=lambda row: -merit(row))
    (out / "leaderboard.json").write_text(json.dumps([asdict(row) for row in ranked], indent=2) + "\n")
    (out / "leaderboard.md").write_text(to_markdown(ranked))
    if any(row.curve for row in ranked):
        draw_curves(ranked, out / "curves.png")


def beside_papers(rows: Sequence[Row], out: Path) -> str:
    """Write what the papers report beside the rows' figures; the table."""
    shown = [(row.system, {name: value for name, value in row.figures.items() if wanted(name)}, row.protocol)
             for row in rows]
    return write_papers(shown, [name for name, system in gans.SYSTEMS.items() if system.paints], out)


def merit(row: Row) -> float:
    """What rows are ranked by."""
    found = [value for name, value in row.figures.items() if name == COLOUR]
    found += [value for name, value in row.figures.items() if name.startswith("r-precision")]
    return found[0] if found else float("-inf")


def to_markdown(rows: Sequence[Row]) -> str:
    """One table: columns are figures, named as the evaluation names them."""
    columns = list(dict.fromkeys(name for row in rows for name in row.figures if wanted(name)))
    heads = ["system", "steps", "core minutes", *columns, "parameters", "pictures/s trained", "pictures/s painted"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for row in rows:
        cells = [f"{row.system} ({row.paper})", f"{row.steps:,}", minutes(row.processor_seconds),
                 *(f"{row.figures[name]:.3g}" if name in row.figures else "-" for name in columns),
                 human(row), f"{row.trained_a_second:.0f}", f"{row.painted_a_second:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    guesses = [f"{name}: {chance}" for name, chance in GUESS.items()
               if any(column.startswith(name) for column in columns)]
    real = sorted({(json.loads(row.protocol[REAL])["image_size"], row.figures[REAL])
                   for row in rows if REAL in row.figures})
    remarks = [f"By chance: {'; '.join(guesses)}."] if guesses else []
    if real:
        remarks.append(f"Real pictures: ms-ssim: {', '.join(f'{value:.3g} at {size} px' for size, value in real)}.")
    return "\n".join([*lines, *(["", " ".join(remarks)] if remarks else [])]) + "\n"


def wanted(name: str) -> bool:
    """Of the judge's figures the objects' alone; what real pictures have stands below the table."""
    if name.startswith("judge/"):
        return name in (COLOUR, "judge/object_shape", "judge/colour_shape")
    return name != REAL


def minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}" if seconds else "-"


def human(row: Row) -> str:
    return f"{sum(row.parameters.values()):,}" if row.parameters else "-"


def summary(row: Row) -> str:
    what = "colour" if COLOUR in row.figures else "R-precision"
    return f"{row.system}: {what} {merit(row):.3f} after {row.steps} steps, {row.seconds / 60:.1f} minutes"


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """The judge's colour accuracy against the step, a line for each system."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        if row.curve:
            axes.plot(*zip(*row.curve, strict=True), marker=".", label=row.system)
    axes.axhline(1 / 8, color="grey", linestyle=":", label="chance")
    axes.set(xlabel="step", ylabel="objects of the colour that was said", ylim=(0, 1))
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    run_command(main)
