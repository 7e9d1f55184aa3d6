"""Checkpoints that are whole or absent: written beside their place, listed with sizes and hashes, synced, renamed.

    checkpoints/step_00012000/
        manifest.json          every other file with its size and sha256; written last
        state.json             step, samples, config, data identity, versions
        PLAYER/                weights-RRRRR.safetensors, optimizer-..., average-...: whole tensors by parameter name

A reader does not care which rank wrote a tensor, so any engine resumes any checkpoint with any number of processes.
Nothing in a checkpoint is code: safetensors and JSON only.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dalle.config import FIXED, RESUME, SAID, declaration, resume_rule
from dalle.errors import UserError
from dalle.files import sha256_of, sync, write_json
from dalle.tensor_file import write_synced

MANIFEST, STATE = "manifest.json", "state.json"
FORMAT = 2
PREFIX = "step_"
WEIGHTS, OPTIMIZER, AVERAGE = "weights", "optimizer", "average"
STATE_TYPES = {"step": int, "players": list, "config": dict, "data": dict, "excluded_batches": list, "rollbacks": int,
               "usual_losses": dict}
OTHER_SHARDS = ("Other shards, or an index made anew after some were lost, are other data: with the index that knows "
                "them data.bad_shards=skip goes on without what is lost. ")
Entries = dict[str, dict[str, Any]]           # file below the checkpoint -> its size and sha256


class CheckpointStore:
    """The checkpoints of one run. Knows files, nothing of engines; one process uses it."""

    def __init__(self, folder: Path, keep_last: int):
        self.folder, self.keep_last = folder, keep_last

    def path(self, step: int) -> Path:
        return self.folder / f"{PREFIX}{step:08d}"

    def begin(self, step: int, needed: int = 0) -> Path:
        """An empty folder to write the checkpoint of ``step`` into; a reader does not see it yet.

        Raises ``OSError`` (ENOSPC) when the disk has less than ``needed`` bytes left.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sweep()
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"no room: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")
        temporary = self.temporary(step)
        temporary.mkdir()
        return temporary

    def sweep(self) -> None:
        """Delete what a save or a deletion that did not end has left."""
        for left in self.folder.glob(f".{PREFIX}*"):
            shutil.rmtree(left, ignore_errors=True)

    def temporary(self, step: int) -> Path:
        return self.folder / f".{self.path(step).name}.tmp"

    def commit(self, temporary: Path, step: int, written: Entries | None = None) -> Path:
        """Publish what was written into ``temporary`` as the newest of the ``keep_last`` that stay.

        ``written`` are the entries of files that are hashed and synced already.
        """
        entries = dict(written or {})
        files = {path.relative_to(temporary).as_posix(): path for path in sorted(temporary.rglob("*"))
                 if path.is_file()}
        for name in files.keys() - entries.keys():
            entries[name] = entry(files[name])
            sync(files[name])
        absent = sorted(entries.keys() - files.keys())
        if absent:
            raise OSError(errno.ENOENT, f"{absent[0]} was written by another process and is not there: "
                                        "the run folder must be on storage that all nodes share")
        write_json(temporary / MANIFEST, {"format": FORMAT, "files": dict(sorted(entries.items()))})
        sync(temporary / MANIFEST)
        for folder in [*(path for path in temporary.rglob("*") if path.is_dir()), temporary]:
            sync(folder)
        place = self.path(step)
        for path in self.all():
            if step_of(path) >= step:                        # damaged, or of a branch that --resume PATH has left
                self._delete(path)
        temporary.rename(place)
        sync(self.folder)
        for path in self.all()[self.keep_last:]:
            self._delete(path)
        return place

    def discard(self, step: int) -> None:
        """Remove what an unfinished save of ``step`` left."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def _delete(self, path: Path) -> None:
        """Out of sight first, so that no reader meets half of it; what cannot be deleted costs space, not the run."""
        if path.exists():
            doomed = path.with_name(f".{path.name}.deleted")
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def clear(self) -> None:
        """Delete every checkpoint of the run, the newest last: one that is cut short begins anew again."""
        self.sweep()
        for path in reversed(self.all()):
            self._delete(path)
        with suppress(OSError):                              # what is no checkpoint stays
            self.folder.rmdir()

    def all(self) -> list[Path]:
        """Published checkpoints, newest first."""
        found = self.folder.glob(f"{PREFIX}*") if self.folder.is_dir() else []
        return sorted((path for path in found if path.is_dir() and path.name[len(PREFIX):].isdigit()),
                      key=step_of, reverse=True)

    def newest(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that verifies, and one line on each newer one that was passed over."""
        passed_over = []
        for path in self.all():
            fault = find_fault(path)
            if fault is None:
                return path, passed_over
            passed_over.append(f"passed over {path}: {fault}")
        return None, passed_over


def step_of(path: Path) -> int:
    """The step of the checkpoint folder ``path``."""
    return int(path.name[len(PREFIX):])


class Damage(Exception):
    """What is wrong with a checkpoint, in words that may follow its path."""


def find_fault(path: Path) -> str | None:
    """What is wrong with the checkpoint at ``path``, or None: every file present, of its size, with its hash.

    Reads all of it, in this thread; :mod:`dalle.training.verifying` does it with all ranks.
    """
    try:
        for name, expected in listed(path).items():
            check_hash(path, name, expected)
    except Damage as damage:
        return str(damage)
    return None


def listed(path: Path) -> Entries:
    """What the manifest of the checkpoint at ``path`` lists: all of its files, each there and of its size.

    Raises :class:`Damage`; reads no file but the manifest.
    """
    try:
        files: Entries = json.loads((path / MANIFEST).read_text())["files"]
        for name, expected in files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise Damage(f"{MANIFEST} names a file outside the checkpoint: {name!r}")
            if (path / name).stat().st_size != expected["size"]:
                raise Damage(f"{name} has {(path / name).stat().st_size} bytes instead of {expected['size']}")
            if not isinstance(expected["sha256"], str):
                raise TypeError("sha256")
        unlisted = {file.relative_to(path).as_posix() for file in path.glob("*/*.safetensors")} - files.keys()
    except FileNotFoundError as error:
        raise Damage(f"{Path(error.filename).relative_to(path)} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damage(f"{MANIFEST} cannot be read ({type(error).__name__})") from None
    if unlisted:
        raise Damage(f"{min(unlisted)} is not in {MANIFEST}")
    if STATE not in files:
        raise Damage(f"{MANIFEST} does not list {STATE}")
    return files


def check_hash(path: Path, name: str, expected: Mapping[str, Any], came: Callable[[], None] = lambda: None) -> None:
    """Raise :class:`Damage` when the file ``name`` has not the sha256 of its entry; ``came()`` after every piece."""
    try:
        if sha256_of(path / name, came) != expected["sha256"]:
            raise Damage(f"{name} is damaged (its sha256 differs)")
    except FileNotFoundError:
        raise Damage(f"{name} is missing") from None
    except OSError as error:
        raise Damage(f"{name} cannot be read ({error.strerror or type(error).__name__})") from None


class SavedPlayer:
    """One player in a checkpoint: tensors by section and key, read when they are asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._places: dict[str, dict[str, Any]] = {WEIGHTS: {}, OPTIMIZER: {}, AVERAGE: {}}
        for path in sorted(folder.glob("*.safetensors")):
            section = path.name.partition("-")[0]
            if section in self._places:
                try:
                    file = safe_open(path, framework="pt", device="cpu")
                except SafetensorError as error:
                    raise ValueError(f"{path.name} is not a safetensors file: {error}") from None
                self._places[section].update(dict.fromkeys(file.keys(), file))
        if not self._places[WEIGHTS]:
            raise ValueError(f"no weights in {folder}")

    def keys(self, section: str) -> list[str]:
        return list(self._places[section])

    def tensor(self, section: str, key: str) -> Tensor:
        """Raises ``KeyError`` for what was not saved."""
        return self._places[section][key].get_tensor(key)

    def section(self, section: str) -> dict[str, Tensor]:
        return {key: file.get_tensor(key) for key, file in self._places[section].items()}

    def model_state(self, averaged: bool = True) -> dict[str, Tensor]:
        """What the model's ``load_state_dict`` takes: the weights, with their averages in place where there are any."""
        return self.section(WEIGHTS) | (self.section(AVERAGE) if averaged else {})


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write ``tensors`` (on the CPU, none sharing memory) and sync them; their manifest entry. Raises ``OSError``."""
    size, sha256 = write_synced(path, tensors)
    return {"size": size, "sha256": sha256}


def entry(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}


def check_is_checkpoint(path: Path) -> None:
    if not (path / MANIFEST).is_file():
        raise UserError(f"{path} is not a checkpoint: give a folder like checkpoints/{PREFIX}00012000")


def unusable(path: Path, fault: object) -> UserError:
    return UserError(f"the checkpoint {path} cannot be used: {fault}")


def read_state(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a checkpoint folder; :class:`UserError` where there is none or it does not verify.

    Only this file is verified: a whole checkpoint takes minutes, and :func:`find_fault`.
    """
    check_is_checkpoint(path)
    try:
        check_hash(path, STATE, listed(path)[STATE])
    except Damage as damage:
        raise unusable(path, damage) from None
    try:
        state = dict(json.loads((path / STATE).read_text()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise unusable(path, f"{STATE} cannot be read ({error})") from None
    if state.get("format") != FORMAT:
        raise UserError(f"the checkpoint {path} has format {state.get('format')}, this version reads {FORMAT}; "
                        "--resume none starts over")
    return state


def read_run_state(path: Path) -> dict[str, Any]:
    """:func:`read_state` of a run's checkpoint, with all that a resume takes from it."""
    state = read_state(path)
    wrong = [key for key, kind in STATE_TYPES.items() if not isinstance(state.get(key), kind)]
    if wrong or state["step"] < 0:
        raise unusable(path, f"{STATE} has no usable {[*wrong, 'step'][0]!r}")
    return state


def check_resumable(path: Path, saved: Mapping[str, Any], config: BaseModel, identity: Mapping[str, Any],
                    players: list[str]) -> None:
    """Raise :class:`UserError`, with the difference shown, when a run may not go on from the checkpoint ``saved``.

    The data's own ``identity`` (fingerprints, digests) is compared apart from its paths, so that its files may move.
    """
    if saved["config"].get("task") != config.task:
        raise UserError(f"{path} is a checkpoint of the task {saved['config'].get('task')!r}, not {config.task!r}")
    differences = [*different_settings(saved["config"], config),
                   *(f"data {key}: {saved['data'].get(key)!r} -> {value!r}" for key, value in identity.items()
                     if saved["data"].get(key) != value)]
    if differences:
        raise UserError(f"{path} cannot be resumed, what must stay has changed: {'; '.join(differences)}. "
                        f"{OTHER_SHARDS if saved['data'].get('fingerprint') != identity.get('fingerprint') else ''}"
                        "Undo the change, give the run another name, or start over with --resume none")
    if saved["players"] != players:
        raise UserError(f"{path} holds the players {', '.join(saved['players'])}, the task has {', '.join(players)}")


def different_settings(saved: Mapping[str, Any], config: BaseModel) -> list[str]:
    """``key: old -> new`` for every setting that a resume may not change, by its own declaration, and that has."""
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in sorted(changes(saved, config.model_dump(mode="json")))
            if resume_rule(type(config), key) == FIXED[RESUME]]


def noted_settings(saved: Mapping[str, Any], config: BaseModel) -> list[str]:
    """``key: old -> new`` for every setting that a resume may change, but not without a word."""
    return [f"{key}: {old!r} -> {new!r}" for key, old, new in sorted(changes(saved, config.model_dump(mode="json")))
            if declaration(type(config), key, SAID)]


def changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, old, new) of the settings that differ; one that ``old`` does not know is newer and was not in force."""
    for name, value in old.items():
        other, key = new.get(name), f"{prefix}{name}"
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            yield from changes(value, other, f"{key}.")
        elif value != other:
            yield key, value, other
