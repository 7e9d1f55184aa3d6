"""What a run writes into its folder, and how it is taken away again: nothing else there is the run's to delete."""

import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from dalle.store import SOURCE_FILE
from dalle.training.checkpoint import CheckpointStore

STOP_FILE, FINISHED_FILE = "stop", "finished"     # someone asks to stop; all steps are done
LOG_FILE, MODEL_FOLDER = "log.jsonl", "model"


def finished_steps(folder: Path) -> int:
    """The steps of a run that reached its end; 0 for one that did not."""
    try:
        return int(json.loads((folder / FINISHED_FILE).read_text())["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return 0


def exported_step(folder: Path) -> int | None:
    """The step of the export in the run's ``model/``; None where there is none of a run."""
    try:
        return int(json.loads((folder / MODEL_FOLDER / SOURCE_FILE).read_text())["step"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def begin_anew(folder: Path, store: CheckpointStore, keep_model: bool) -> None:
    """Make ``folder`` one in which no run was, but for its old log, which becomes ``log.1.jsonl``, ``log.2.jsonl``, ...

    What is no run's own stays, and so does ``wandb/``: a run there can still be sent. Raises ``OSError``.
    """
    (folder / FINISHED_FILE).unlink(missing_ok=True)
    store.clear()
    if not keep_model and exported_step(folder) is not None:
        shutil.rmtree(folder / MODEL_FOLDER)
    (folder / "wandb_id").unlink(missing_ok=True)
    delete(folder / "samples", (folder / "samples").glob("step_*_*.png"))
    delete(folder / "sample_log", (folder / "sample_log").glob("rank*.jsonl"))
    delete(folder / "tensorboard", (folder / "tensorboard").glob("events.out.tfevents.*"))
    put_log_aside(folder)


def delete(folder: Path, files: Iterable[Path]) -> None:
    """``files``, and ``folder`` where nothing is left in it."""
    for file in list(files):
        file.unlink()
    with suppress(OSError):
        folder.rmdir()


def put_log_aside(folder: Path) -> None:
    log = folder / LOG_FILE
    if not log.is_file():            # nor where it leads to a device or a pipe
        return
    number = 1
    while (folder / f"log.{number}.jsonl").exists():
        number += 1
    log.rename(folder / f"log.{number}.jsonl")
