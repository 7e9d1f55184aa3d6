"""What a run writes into its folder, and how it is taken away again: nothing else there is the run's to delete."""

import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from dalle.config import to_yaml
from dalle.errors import UserError
from dalle.files import read_json
from dalle.store import EXPORT_FOLDER, SOURCE_FILE
from dalle.training.checkpoint import CheckpointStore
from dalle.training.lock import FolderLock
from dalle.training.run import RunConfig

STOP_FILE, FINISHED_FILE = "stop", "finished"     # someone asks to stop; all steps are done
LOG_FILE = "log.jsonl"
STOP_FILE_SECONDS = 1.0                           # between two looks


class RunFolder:
    """One run's folder, on rank 0: no other process writes it meanwhile."""

    def __init__(self, config: RunConfig, store: CheckpointStore):
        self.path = Path(config.folder)
        self._config, self._store, self._lock = config, store, FolderLock(self.path)
        self._looked_at = time.monotonic()

    def open(self) -> None:
        """Take the folder; :class:`UserError` where it is another process's or cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            stop = self.path / STOP_FILE
            if stop.exists() and stop.stat().st_mtime < psutil.Process().create_time():
                stop.unlink()                                         # meant for an earlier start
            self._store.sweep()
        except OSError as error:
            raise self._not_writable(error) from error

    def begin(self, anew: bool, keep_model: bool = True) -> None:
        """Make it the folder of a run that goes on, or ``anew`` that of a new one, which may ``keep_model`` of before;
        and write what the run is from now on."""
        try:
            if anew:
                begin_anew(self.path, self._store, keep_model=keep_model or self._is_read_by_its_run())
            (self.path / FINISHED_FILE).unlink(missing_ok=True)
            (self.path / "config.yaml").write_text(to_yaml(self._config), encoding="utf-8")
        except OSError as error:
            raise self._not_writable(error) from error

    def stop_asked(self) -> bool:
        """Whether someone has put the file ``stop`` there, which is taken away; looks once a second."""
        now = time.monotonic()
        if now - self._looked_at < STOP_FILE_SECONDS:
            return False
        self._looked_at = now
        try:
            (self.path / STOP_FILE).unlink()
        except OSError:
            return False
        return True

    def release(self) -> None:
        self._lock.release()

    def _is_read_by_its_run(self) -> bool:
        """Whether a companion's copy in ``model/`` is what the run reads."""
        inside = (self.path / EXPORT_FOLDER).absolute()
        return any(isinstance(value, str) and inside in (Path(value).absolute(), *Path(value).absolute().parents)
                   for value in leaves(self._config.model_dump(mode="json")))

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"the run folder {self.path} cannot be written: {error.strerror}; "
                         "set `output` to a folder that can")


def leaves(tree: Any) -> Iterator[Any]:
    """Every value in nested mappings and lists."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    if inner is None:
        yield tree
        return
    for value in inner:
        yield from leaves(value)


def finished_steps(folder: Path) -> int:
    """The steps of a run that reached its end; 0 for one that did not."""
    return noted_step(folder / FINISHED_FILE) or 0


def exported_step(folder: Path) -> int | None:
    """The step of the export in the run's ``model/``; None where there is none of a run."""
    return noted_step(folder / EXPORT_FOLDER / SOURCE_FILE)


def noted_step(path: Path) -> int | None:
    """The ``step`` that a JSON file notes; None where it notes none."""
    try:
        return int((read_json(path) or {})["step"])
    except (ValueError, TypeError, KeyError):
        return None


def begin_anew(folder: Path, store: CheckpointStore, keep_model: bool) -> None:
    """Make ``folder`` one in which no run was, but for its old log, which becomes ``log.1.jsonl``, ``log.2.jsonl``, ...

    What is no run's own stays, and so does ``wandb/``: a run there can still be sent. Raises ``OSError``.
    """
    (folder / FINISHED_FILE).unlink(missing_ok=True)
    store.clear()
    if not keep_model and exported_step(folder) is not None:
        shutil.rmtree(folder / EXPORT_FOLDER)
    (folder / "wandb_id").unlink(missing_ok=True)
    delete(folder / "samples", (folder / "samples").glob("step_*_*.png"))
    delete(folder / "sample_log", (folder / "sample_log").glob("rank*.jsonl"))
    delete(folder / "profile", (folder / "profile").glob("step_*_rank*.json"))
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
