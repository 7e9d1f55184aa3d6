#!/usr/bin/env python
"""Make one portable folder from a run: safetensors, config, tokenizer and a card.

    python tools/export.py runs/quickstart/transformer --out release/
    python tools/export.py runs/big/transformer --checkpoint 120000 --raw --out release/

Any checkpoint will do, whatever engine and number of processes wrote it; no GPU and no cluster is needed. Averaged
weights (EMA) are taken where the run keeps them, ``--raw`` takes the others. ``key.sub=value`` changes the saved
config, where a codec or tokenizer has moved.
"""

import argparse
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gans
from dalle.config import apply_override, validate
from dalle.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes of the saved config")
    parser.add_argument("--checkpoint", metavar="STEP|PATH", help="default: the newest that verifies")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, not their average")
    parser.add_argument("--out", type=Path, help="default: RUN/export")
    return parser.parse_intermixed_args()


def choose_checkpoint(run: Path, wanted: str | None) -> Path:
    """The checkpoint of a run that is ``wanted``, or the newest, verified."""
    from dalle.training.checkpoint import CheckpointStore, check_is_checkpoint, find_fault, unusable

    store = CheckpointStore(run / "checkpoints", keep_last=1)
    if wanted is not None:
        path = store.path(int(wanted)) if wanted.isdecimal() else Path(wanted)
        check_is_checkpoint(path)
        if (fault := find_fault(path)) is not None:
            raise unusable(path, fault)
        return path
    newest, passed_over = store.newest()
    for line in passed_over:
        print(line)
    if newest is None:
        raise UserError(f"there is no checkpoint that can be used in {store.folder}; give a run's folder")
    return newest


@contextmanager
def written_beside(out: Path) -> Iterator[Path]:
    """An empty folder that becomes ``out`` where all goes well, and is removed where it does not."""
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")      # two at once do not meet
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}; give another --out") from error
    try:
        yield temporary
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> int:
    arguments = parse_arguments()
    out = arguments.out or arguments.run / "export"
    if out.exists():
        raise UserError(f"{out} exists; remove it, or give another --out")
    gans.register()
    import torch

    from dalle.store import EXPORT_FOLDER
    from dalle.tasks import RUNS, TASKS
    from dalle.training.checkpoint import AVERAGE, SavedPlayer, read_run_state
    from dalle.training.companions import check_packed
    from dalle.training.export import export_checkpoint, newest_validation, write_card
    from dalle.training.task import parameter_count

    checkpoint = choose_checkpoint(arguments.run, arguments.checkpoint)
    state = read_run_state(checkpoint)
    tree = dict(state["config"])
    for override in arguments.overrides:
        apply_override(tree, override)
    config = validate(tree, RUNS, source=str(checkpoint))
    torch.manual_seed(config.seed)             # as when it was trained: a companion may be drawn, not loaded
    task = TASKS[config.task](config)
    check_packed(str(checkpoint), state, config, task, copies=arguments.run / EXPORT_FOLDER)
    averaged = not arguments.raw and any(SavedPlayer(checkpoint / name).keys(AVERAGE) for name in task.players)
    with written_beside(out) as temporary:
        export_checkpoint(task, checkpoint, temporary, averaged=not arguments.raw)
        parameters = {name: parameter_count(player.module) for name, player in task.players.items()}
        write_card(temporary, {**state, "config": tree}, newest_validation(arguments.run, state["step"]), averaged,
                   parameters)
    print(f"{out}: step {state['step']}, {'averaged' if averaged else 'raw'} weights, from {checkpoint}")
    return 0


if __name__ == "__main__":
    run_command(main)
