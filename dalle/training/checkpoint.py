"""Checkpoints that are whole or absent: written beside their place, listed with sizes and hashes, synced, renamed.

    checkpoints/step_00012000/
        manifest.json          every other file with its size and sha256; written last
        state.json             step, samples, config, data identity, layout, versions
        PLAYER/                what the engine saves of each player
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dalle.errors import UserError

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 1
PREFIX = "step_"

# What a resume must leave alone: with another of these the weights or the order of the samples would mean nothing.
# The data's own identity (fingerprints, digests) is compared apart, so that its files may move.
MUST_MATCH = ("task", "seed", "model", "data", "train.batch_size")
MAY_CHANGE = ("data.train", "data.validation", "data.tokenizer", "data.codes", "data.validation_codes",
              "data.workers", "data.max_bad_fraction")


class CheckpointStore:
    """The checkpoints of one run. Knows files, nothing of engines; one process uses it."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def begin(self, step: int) -> Path:
        """An empty folder to write the checkpoint of ``step`` into; a reader does not see it yet."""
        temporary = self.folder / f".{self.path(step).name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        return temporary

    def commit(self, temporary: Path, step: int) -> Path:
        """Publish what was written into ``temporary``, then delete all but the newest ``keep_last``."""
        files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
        entries = {path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": digest(path)}
                   for path in files}
        write_json(temporary / MANIFEST, {"format": FORMAT, "files": entries})
        for path in [*files, temporary / MANIFEST, *(folder for folder in temporary.rglob("*") if folder.is_dir())]:
            sync(path)
        sync(temporary)
        place = self.path(step)
        shutil.rmtree(place, ignore_errors=True)      # the same step again, or one that did not verify
        temporary.rename(place)
        sync(self.folder)
        self._prune()
        return place

    def discard(self, temporary: Path) -> None:
        shutil.rmtree(temporary, ignore_errors=True)

    def _prune(self) -> None:
        for path in self.all()[self.keep_last:]:
            shutil.rmtree(path, ignore_errors=True)   # one that cannot be deleted costs space, not the run

    def clear(self) -> None:
        """Delete every checkpoint of the run."""
        if self.folder.is_dir():
            shutil.rmtree(self.folder)

    def all(self) -> list[Path]:
        """Published checkpoints, newest first."""
        found = self.folder.glob(f"{PREFIX}*") if self.folder.is_dir() else []
        return sorted((path for path in found if path.is_dir() and path.name[len(PREFIX):].isdigit()),
                      key=lambda path: int(path.name[len(PREFIX):]), reverse=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and one line on each newer one that was passed over."""
        passed_over = []
        for path in self.all():
            fault = find_fault(path)
            if fault is None:
                return path, passed_over
            passed_over.append(f"passed over {path}: {fault}")
        return None, passed_over


def find_fault(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None: every file present, of its size, with its hash."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
        for name, entry in files.items():
            if (path / name).stat().st_size != entry["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {entry['size']}"
            if digest(path / name) != entry["sha256"]:
                return f"{name} is damaged (its sha256 differs)"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(path)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint folder; :class:`UserError` where there is none or it does not verify."""
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a checkpoint: give a folder like checkpoints/{PREFIX}00012000")
    fault = find_fault(path)
    if fault is not None:
        raise UserError(f"the checkpoint {path} cannot be used: {fault}")
    state = json.loads((path / STATE).read_text())
    if state.get("format") != FORMAT:
        raise UserError(f"the checkpoint {path} has format {state.get('format')}, this version reads {FORMAT}")
    return state


def check_resumable(path: Path, saved: Mapping[str, Any], config: Mapping[str, Any], identity: Mapping[str, Any],
                    layout: Mapping[str, Any], players: list[str]) -> None:
    """Raise :class:`UserError`, with the difference shown, when a run may not go on from the checkpoint ``saved``."""
    if saved["config"].get("task") != config.get("task"):
        raise UserError(f"{path} is a checkpoint of the task {saved['config'].get('task')!r}, "
                        f"not {config.get('task')!r}")
    differences = [*different_settings(saved["config"], config),
                   *(f"data {key}: {saved['data'].get(key)!r} -> {value!r}" for key, value in identity.items()
                     if saved["data"].get(key) != value)]
    if differences:
        raise UserError(f"{path} cannot be resumed, what must stay has changed: {'; '.join(differences)}. "
                        "Undo the change, or give the run another name")
    if saved["players"] != players:
        raise UserError(f"{path} holds the players {', '.join(saved['players'])}, the task has {', '.join(players)}")
    if saved["layout"] != dict(layout):
        raise UserError(f"{path} was saved as {describe(saved['layout'])}, this run is {describe(layout)}: "
                        "launch it as it was saved")


def different_settings(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """``key: old -> new`` for every setting that a resume may not change and that has changed."""
    old, new = dict(flatten(saved)), dict(flatten(config))
    return [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and is_under(key, MUST_MATCH) and not is_under(key, MAY_CHANGE)]


def is_under(key: str, roots: tuple[str, ...]) -> bool:
    return any(key == root or key.startswith(root + ".") for root in roots)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def describe(layout: Mapping[str, Any]) -> str:
    processes = f" on {layout['world_size']} processes" if "world_size" in layout else ""
    return f"{layout['format']}{processes}"


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(temporary: Path, place: Path) -> None:
    """Put the folder ``temporary`` where ``place`` was; a reader finds the old, the new or, for an instant, none."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    temporary.rename(place)
    shutil.rmtree(old, ignore_errors=True)
