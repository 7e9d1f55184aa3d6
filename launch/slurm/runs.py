"""The runs of a job: what the config describes, or one for each line of a sweep; all validated."""

import argparse
import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from dalle.config import load_config
from dalle.errors import UserError
from dalle.text_file import read_text_file
from slurm.options import UNPRINTABLE, parse_signal, processes


@dataclass(frozen=True)
class PlannedRun:
    """One training: its folder, its number of steps, and the overrides that make it."""

    name: str
    folder: Path
    steps: int
    workers: int
    overrides: list[str]


def plan_runs(arguments: argparse.Namespace) -> list[PlannedRun]:
    """The run that the config describes, or one for each line of --sweep; all validated."""
    overrides = [*offload_overrides(arguments.engine), *arguments.overrides]
    if arguments.sweep is None:
        return [plan_run(arguments, overrides)]
    runs = []
    for number, line in enumerate(sweep_lines(arguments.sweep), start=1):
        name = plan_run(arguments, overrides + line).name
        runs.append(plan_run(arguments, [*overrides, *line, f"name={json.dumps(f'{name}/{number:03d}')}"]))
    return runs


def plan_run(arguments: argparse.Namespace, overrides: list[str]) -> PlannedRun:
    from dalle.tasks import RUNS
    from dalle.training.settings import split_batch

    config = load_config(arguments.config, overrides, RUNS)
    if UNPRINTABLE.search(str(config.folder)):
        raise UserError(f"the run's folder {str(config.folder)!r} holds a line break or a control character: change "
                        "`name` or `output`")
    split_batch(config.train.batch_size, config.train.micro_batch_size, processes(arguments))
    name, _ = parse_signal(arguments.signal)
    if f"SIG{name}" not in config.train.stop_signals:
        raise UserError(f"--signal {arguments.signal}: the run stops on {', '.join(config.train.stop_signals)} "
                        "(train.stop_signals) and would die of another signal")
    return PlannedRun(config.name, Path.cwd() / config.folder, config.train.steps, config.data.workers, overrides)


def sweep_lines(path: Path) -> list[list[str]]:
    """The overrides on each line; blank lines and comments do not count."""
    try:
        lines = enumerate(read_text_file(path).splitlines(), start=1)
    except UserError as error:
        raise UserError(f"--sweep {error}") from error
    words = [line for line in (sweep_words(path, number, text) for number, text in lines) if line]
    if not words:
        raise UserError(f"--sweep {path} holds no line of overrides")
    for line in words:
        if UNPRINTABLE.search("".join(line)):
            raise UserError(f"--sweep {path}: {line} holds a control character, which a batch script cannot carry")
    return words


def sweep_words(path: Path, number: int, line: str) -> list[str]:
    """The overrides of one line, split as a shell would."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"--sweep {path}, line {number}: {str(error).lower()}") from None


def offload_overrides(engine: str | None) -> list[str]:
    return ["engine.offload_optimizer=true", "engine.offload_parameters=true"] if engine == "zero3_offload" else []


def common_folder(runs: list[PlannedRun], arguments: argparse.Namespace) -> Path:
    return runs[0].folder.parent if arguments.sweep else runs[0].folder
