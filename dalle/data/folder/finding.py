"""Which pictures a folder holds: those that its tables name, then those with a `.txt` of the same name."""

import os
from collections.abc import Iterable
from pathlib import Path

from dalle.data.building import LeftOut
from dalle.data.folder.entries import Cell, Entry, FolderConfig, is_text
from dalle.data.folder.rows import is_set_table, of_set_table
from dalle.data.folder.splits import with_classes
from dalle.data.formats import is_unreadable, looks_like_picture
from dalle.data.reasons import printable
from dalle.errors import UserError


def find_pictures(folder: Path, config: FolderConfig) -> list[Entry | LeftOut]:
    """The pictures below ``folder``: those of its tables, then those with a `.txt` of the same name, by path.

    Hidden folders and the ``._`` files that macOS adds are passed over.
    """
    files, loops = _walk(folder)
    tables = [entry for name, file in files if is_set_table(file) for entry in of_set_table(file, name, config)]
    named = {_named_file(entry) for entry in tables if isinstance(entry, Entry)}
    by_table = any(isinstance(entry, Entry) for entry in tables)
    texts = _texts(file for _, file in files)
    beside = [_beside(name, file, texts, by_table) for name, file in files
              if file not in named and (looks_like_picture(file) or _is_broken(file))]
    return tables + with_classes(beside) + loops


def _walk(folder: Path) -> tuple[list[tuple[str, Path]], list[LeftOut]]:
    """(path below ``folder``, file) of all files, in order, and the links that are not followed.

    A linked folder is read, each folder once; not so a link to a folder that holds the link, which would never end.
    """
    seen: set[str] = set()
    found: list[tuple[str, Path]] = []
    loops: list[LeftOut] = []
    for parent, folders, files in os.walk(folder, onerror=_cannot_list, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        relative = Path(parent).relative_to(folder)
        back = {name for name in folders if _leads_back(os.path.join(parent, name), place)}
        loops += (LeftOut("a link to a folder that holds it", (relative / name).as_posix()) for name in sorted(back))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in back)
        folders.sort(key=lambda name, parent=parent: os.path.islink(os.path.join(parent, name)))   # the real ones first
        found += (((relative / name).as_posix(), Path(parent, name)) for name in files if not name.startswith("._"))
    return sorted(found), loops


def _leads_back(path: str, place: str) -> bool:
    return os.path.islink(path) and Path(place).is_relative_to(os.path.realpath(path))


def _cannot_list(error: OSError) -> None:
    raise UserError(f"the folder {printable(str(error.filename))} cannot be read: {error.strerror}")


def _texts(files: Iterable[Path]) -> dict[Path, Path]:
    """The caption files by what they stand beside: path without extension -> file."""
    return {file.with_suffix(""): file for file in files if file.suffix.lower() == ".txt" and file.is_file()}


def _beside(name: str, file: Path, texts: dict[Path, Path], by_table: bool) -> Entry | LeftOut:
    text = texts.get(file.with_suffix("")) or texts.get(file)      # x.txt or x.jpg.txt
    if not is_text(name):
        return LeftOut("name is not UTF-8", name)
    if _is_broken(file):
        return LeftOut("a link that leads nowhere", name)
    if is_unreadable(file):
        return LeftOut("a format that is not read", name)
    if file.name.startswith("."):
        return LeftOut("hidden by a dot", name)
    if text is None:
        return LeftOut("not in the tables, no .txt beside it" if by_table else "no .txt beside it", name)
    return Entry(name, file, text)


def _named_file(entry: Entry) -> Path | None:
    picture = entry.picture
    if isinstance(picture, Cell):
        return picture.table.parent / picture.path if picture.path else None
    return picture


def _is_broken(file: Path) -> bool:
    return file.is_symlink() and not file.exists()
