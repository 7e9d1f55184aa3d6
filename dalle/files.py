"""Files and folders that are there whole or not at all, and the digests by which files are known again."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 1 << 20        # bytes hashed at once
FILE_DIGITS = 16       # of a weights file's digest where a result names what made it


# -- writing

def json_text(value: Any) -> str:
    """``value`` as people read it in a file."""
    return json.dumps(value, indent=2) + "\n"


def write_json(path: Path, value: Any) -> None:
    path.write_text(json_text(value), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; None where there is none that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


@contextmanager
def replacing(path: Path, synced: bool = False) -> Iterator[BinaryIO]:
    """A new file that becomes ``path`` where all goes well: a reader finds the old one or the whole new one.

    Several processes may do it at once; what a killed one leaves is called ``.NAME.PID.tmp``. ``synced``: it is on the
    disk before it takes its place.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("wb") as file:
            yield file
            if synced:
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_folder(temporary: Path, place: Path) -> None:
    """Put the folder ``temporary`` where ``place`` was; a reader finds the old, the new or, for an instant, none."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    temporary.rename(place)
    sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


# -- digests: each is kept in files of runs and results, so none may change

def sha256_of(path: Path, came: Callable[[], None] = lambda: None) -> str:
    """The sha256 of a file; ``came()`` after every piece of it."""
    sha256, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(piece):
            sha256.update(piece[:count])        # other threads run meanwhile
            came()
    return sha256.hexdigest()


def file_digest(path: Path, digits: int = FILE_DIGITS) -> str:
    """The first ``digits`` of a file's sha256, enough to tell one file of weights from another."""
    return sha256_of(path)[:digits]


def hub_digest(folder: Path) -> str:
    """The digest of the weights in a hub's folder: of its first file, safetensors before others, as it is looked for.
    """
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin")), *sorted(folder.glob("*.pth"))]
    return file_digest(files[0])


def json_digest(value: Any, digits: int) -> str:
    """The first ``digits`` of the sha256 of ``value`` as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]
