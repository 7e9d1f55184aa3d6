"""A table's rows to pictures: which columns count, what their cells may hold, and which paths may be read.

The paths of a table are relative to the table's folder and must stay inside it; with ``absolute_paths`` they may lead
anywhere.
"""

import os
import re
from dataclasses import replace
from math import isnan
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dalle.data.building import LeftOut
from dalle.data.decode import BadSample
from dalle.data.folder.entries import Cell, Entry, FolderConfig, is_text
from dalle.data.folder.tables import Table, open_table
from dalle.data.reasons import printable
from dalle.errors import UserError

PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "image_path", "filepath")
CAPTION_COLUMNS = ("caption", "captions", "text")
CLASS_COLUMN = "class_id"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")      # of a folder as Hugging Face lays it out
METADATA_PATH = "file_name"
OUTSIDE = "path leads outside the table's folder"

Columns = tuple[str, str, str | None]     # of pictures, captions, class ids


def is_set_table(file: Path) -> bool:
    """Whether a file in a folder may say what the folder holds: metadata by its name, parquet files of pictures."""
    return file.name.lower() in METADATA or (file.suffix.lower() == ".parquet"
                                             and bool(open_table(file).picture_columns))


def of_set_table(file: Path, name: str, config: FolderConfig) -> list[Entry | LeftOut]:
    """What the table at the path ``name`` below the source says; its pictures are named from the source."""
    if not is_text(name):
        return [LeftOut("name is not UTF-8", name)]
    table = open_table(file)
    if config.path_column is None and not table.picture_columns:
        config = config.model_copy(update={"path_column": METADATA_PATH})
    if config.path_column is not None and config.path_column not in table.columns:
        return [LeftOut("metadata without file_name", name)]
    if not (config.caption_column or _known(table, CAPTION_COLUMNS)):
        return [LeftOut("a table without a column of captions", name)]
    folder = PurePosixPath(name).parent
    return [replace(entry, name=(folder / entry.name).as_posix()) for entry in read_table(table, config)]


def read_table(table: Table, config: FolderConfig) -> list[Entry | LeftOut]:
    """The pictures that a table names or holds, in its order; the captions of a path that comes again are collected."""
    columns = _columns(table, config)
    file, anywhere = printable(table.path.name), config.absolute_paths
    found: dict[str, Entry | LeftOut] = {}
    wrong: list[LeftOut] = []
    for number, row in enumerate(table.rows([name for name in columns if name is not None])):
        try:
            path, captions, label = _read_row(row.cells, columns, holds_picture=columns[0] in table.picture_columns)
            if columns[0] in table.picture_columns:
                name = f"{file}/{number}"
                found[name] = Entry(name, Cell(table.path, columns[0], number, path), captions, label)
            elif path in found:
                found[path] = _joined(found[path], captions, label)
            else:
                found[path] = entry_at(table.path.parent, path, captions, label, anywhere)
        except BadSample as bad:
            wrong.append(LeftOut(bad.reason, f"{file}, {row.where}"))
    return [*found.values(), *wrong]


def _read_row(cells: dict[str, Any], columns: Columns, holds_picture: bool) -> tuple[str | None, tuple[str, ...],
                                                                                    int | None]:
    """Path (None at most where the row holds its picture), captions and class id. Raises :class:`BadSample`."""
    path, captions, label = (cells.get(column) for column in columns)
    return _path_of(path, required=not holds_picture), _captions_of(captions), _class_of(label)


def _joined(before: Entry | LeftOut, captions: tuple[str, ...], label: int | None) -> Entry | LeftOut:
    """What a path stands for that comes again."""
    if isinstance(before, LeftOut):
        return before
    if before.label is not None and label not in (None, before.label):
        raise BadSample("another class_id than before")
    return replace(before, captions=before.captions + captions, label=label if before.label is None else before.label)


def _columns(table: Table, config: FolderConfig) -> Columns:
    held = [name for name in table.picture_columns if name.lower() not in CAPTION_COLUMNS]
    pictures = _column(table, PATH_COLUMNS, config.path_column or (held or [None])[0], "--path-column")
    return (pictures, _column(table, CAPTION_COLUMNS, config.caption_column, "--caption-column"),
            _known(table, (CLASS_COLUMN,)))


def _column(table: Table, known: tuple[str, ...], given: str | None, option: str) -> str:
    listed = ", ".join(printable(str(name)) for name in table.columns)
    if given is not None:
        if given not in table.columns:
            raise UserError(f"{table.path} has no column {given!r} ({option}); its columns: {listed}")
        return given
    name = _known(table, known)
    if name is None:
        raise UserError(f"{table.path}: no column is called {', '.join(known)}; its columns: {listed}; "
                        f"name one with {option}")
    return name


def _known(table: Table, known: tuple[str, ...]) -> str | None:
    """The first of the ``known`` names that is a column, in any case."""
    names = {str(name).strip().lower(): name for name in table.columns}
    return next((names[name] for name in known if name in names), None)


def _path_of(cell: Any, required: bool) -> str | None:
    if isinstance(cell, dict):                # {bytes, path}
        cell = cell.get("path")
    if cell is not None and not isinstance(cell, str):
        raise BadSample("path that is no text")
    path = (cell or "").strip()
    if required and not path:
        raise BadSample("row without a path")
    return path or None


def _captions_of(cell: Any) -> tuple[str, ...]:
    """A text or a list of texts; nothing for a missing one."""
    if cell is None or (isinstance(cell, float) and isnan(cell)):
        return ()
    texts = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(text, str) for text in texts):
        raise BadSample("caption that is no text")
    return tuple(texts)


def _class_of(cell: Any) -> int | None:
    """A whole number, also as a text or as a float, which a table with empty cells may hold."""
    if cell is None or cell == "" or (isinstance(cell, float) and isnan(cell)):
        return None
    if isinstance(cell, bool) or not re.fullmatch(r"\d{1,9}(\.0)?", str(cell).strip()):
        raise BadSample("class_id that is no whole number")
    return int(float(cell))


def entry_at(folder: Path, path: str, captions: tuple[str, ...], label: int | None, anywhere: bool) -> Entry | LeftOut:
    """``path`` as a file; a table from elsewhere must not make this read what is not its own."""
    if not is_text(path):
        return LeftOut("name is not UTF-8", path)
    if re.match(r"[a-z][a-z0-9+.-]+://", path, re.IGNORECASE):
        return LeftOut("a URL, not a file", path)
    if "\\" in path and not os.path.lexists(folder / path):        # written on Windows
        if PureWindowsPath(path).drive:
            return LeftOut("a path of a Windows drive", path)
        path = path.replace("\\", "/")
    normal = os.path.normpath(path)
    if not anywhere and (os.path.isabs(normal) or PurePosixPath(normal).parts[:1] == ("..",)):
        return LeftOut(OUTSIDE, path)
    return Entry(path, folder / normal, captions, label)
