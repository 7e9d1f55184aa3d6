"""Your own pictures to shards: a folder of pictures with `.txt` files beside them, or a table of paths and captions.

Every picture is decoded once as training would; what fails is left out and counted by reason. A JPEG, PNG or WebP of
acceptable size keeps its own bytes. Which pictures are held out is a hash of their path, so it does not change when
others are added; a source with splits of its own keeps them. The paths of a table are relative to the table's folder
and must stay inside it; with ``absolute_paths`` they may lead anywhere. A folder as Hugging Face lays it out
(``metadata.csv|jsonl|parquet`` with ``file_name``, or parquet files that hold the pictures) is read as its tables say.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import chain, groupby, islice
from math import inf, isnan, nextafter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from PIL import Image

from dalle.config import Section
from dalle.data.building import SPLITS, LeftOut, Sample, build_dataset, hash_fraction, in_batches, in_order
from dalle.data.decode import BadSample, decode_captions
from dalle.data.formats import HEAD, decode_any, is_unreadable, kind_of, looks_like_picture
from dalle.data.reasons import printable
from dalle.data.tables import ParquetTable, Table, open_table
from dalle.errors import UserError

VERSION = 2
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "image_path", "filepath")
CAPTION_COLUMNS = ("caption", "captions", "text")
CLASS_COLUMN = "class_id"
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")      # of a folder as Hugging Face lays it out
METADATA_PATH = "file_name"
SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test)(-\d.*)?", re.IGNORECASE)
CHUNK = 32
STORED = ("jpg", "png", "webp")             # as they are; names can lie, so by the first bytes
PHOTOGRAPHS = ("avif", "heif", "jp2")       # lossy already: as JPEG; the others (GIF, BMP, TIFF) without loss
JPEG_QUALITY = 95
VALIDATION_FRACTION = 0.05
ENOUGH_TO_HOLD_OUT = 20       # so many by their hash alone: some of them can be decoded
MOST_CLASSES_SAID = 10
OUTSIDE = "path leads outside the table's folder"


class FolderConfig(Section):
    """Everything that decides the bytes of the set, beside the pictures and captions."""

    path_column: str | None = None
    caption_column: str | None = None
    absolute_paths: bool = False
    resize: int | None = None     # the shorter side of a picture that is above max_size
    max_size: int | None = None   # the largest shorter side that keeps its own bytes; the other of the two by default
    validation_fraction: float | None = None     # None: as the source splits, or else VALIDATION_FRACTION
    samples_per_shard: int = 1_000

    def largest_side(self) -> int | None:
        return self.max_size or self.resize

    def resized_side(self) -> int | None:
        return self.resize or self.max_size


@dataclass(frozen=True)
class Cell:
    """A picture in a parquet file: the column, the row (from 0), and the path that may stand for its bytes."""

    table: Path
    column: str
    row: int
    path: str | None


@dataclass(frozen=True)
class Entry:
    """One picture: its name (the path that the source gives), where its bytes are, its captions or the file of them."""

    name: str
    picture: Path | Cell | bytes
    captions: tuple[str, ...] | Path
    label: int | str | None = None     # a table's class id, or the name of a sub-folder
    split: str = "train"


def make_folder(config: FolderConfig, source: Path, out: Path, workers: int = 1, force: bool = False,
                report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the pictures of ``source``, a folder or a table, below ``out`` (:func:`build_dataset`)."""
    _check(config)
    if source.is_dir():
        found = find_pictures(source, config)
    elif source.is_file():
        found = read_table(open_table(source), config)
    else:
        raise UserError(f"there is no folder or table at {source}")
    if not found:
        raise UserError(f"{source} holds no picture; give a folder of pictures with .txt files beside them, or a table "
                        "(csv, tsv, jsonl, parquet) of paths and captions")
    left_out = [entry for entry in found if isinstance(entry, LeftOut)]
    entries, classes = with_class_ids([entry for entry in found if isinstance(entry, Entry)])
    recipe = {"kind": "folder", "version": VERSION, "source": str(source.absolute()), **config.model_dump(),
              "listing": _listing_digest(found)}

    def samples() -> Iterator[Sample | LeftOut]:
        return chain(left_out, _samples(with_splits(entries, config), config, workers))

    record = build_dataset(out, recipe, samples, total=len(found), samples_per_shard=config.samples_per_shard,
                           force=force, report=report, details={"classes": classes} if classes else {})
    if _has_own_splits(entries, config):
        report("  held out: what the source has in a folder validation or test (--validation-fraction draws by hash)")
    if classes:
        report(f"  class_id by sub-folder: {_some_of(classes)}")
    return record


def _check(config: FolderConfig) -> None:
    if config.validation_fraction is not None and not 0 <= config.validation_fraction < 1:
        raise UserError(f"--validation-fraction {config.validation_fraction}: it is at least 0 and below 1")
    for option, value in (("--resize", config.resize), ("--max-size", config.max_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: a side is at least 1 pixel")
    if config.resize and config.max_size and config.resize > config.max_size:
        raise UserError(f"--resize {config.resize} is above --max-size {config.max_size}: pictures are only shrunk")


def _some_of(classes: Sequence[str]) -> str:
    said = ", ".join(f"{number} {printable(name)}" for number, name in enumerate(classes[:MOST_CLASSES_SAID]))
    more = len(classes) - MOST_CLASSES_SAID
    return f"{said}, ... ({more} more, see dataset.json)" if more > 0 else said


# -- a folder ---------------------------------------------------------------------------------------------------------

def find_pictures(folder: Path, config: FolderConfig) -> list[Entry | LeftOut]:
    """The pictures below ``folder``: those of its tables, then those with a `.txt` of the same name, by path.

    Hidden folders and the ``._`` files that macOS adds are passed over.
    """
    files, loops = _walk(folder)
    tables = [entry for name, file in files if _is_set_table(file) for entry in _of_set_table(file, name, config)]
    named = {_named_file(entry) for entry in tables if isinstance(entry, Entry)}
    by_table = any(isinstance(entry, Entry) for entry in tables)
    texts = _texts(file for _, file in files)
    beside = [_beside(name, file, texts, by_table) for name, file in files
              if file not in named and (looks_like_picture(file) or _is_broken(file))]
    return tables + _with_classes(beside) + loops


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
    if not _is_text(name):
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


def _is_text(name: str) -> bool:
    """Whether a name can be written anywhere: bytes of a name that are not UTF-8 stand in it as half characters."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


# -- tables -----------------------------------------------------------------------------------------------------------

Columns = tuple[str, str, str | None]     # of pictures, captions, class ids


def _is_set_table(file: Path) -> bool:
    """Whether a file in a folder may say what the folder holds: metadata by its name, parquet files of pictures."""
    return file.name.lower() in METADATA or (file.suffix.lower() == ".parquet"
                                             and bool(open_table(file).picture_columns))


def _of_set_table(file: Path, name: str, config: FolderConfig) -> list[Entry | LeftOut]:
    """What the table at the path ``name`` below the source says; its pictures are named from the source."""
    if not _is_text(name):
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
                found[path] = _entry(table.path.parent, path, captions, label, anywhere)
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


def _entry(folder: Path, path: str, captions: tuple[str, ...], label: int | None, anywhere: bool) -> Entry | LeftOut:
    """``path`` as a file; a table from elsewhere must not make this read what is not its own."""
    if not _is_text(path):
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


# -- classes and splits -----------------------------------------------------------------------------------------------

def _with_classes(found: list[Entry | LeftOut]) -> list[Entry | LeftOut]:
    """Each picture in a sub-folder labelled by it; the folders of splits, where all are in one, are no classes."""
    names = [entry.name for entry in found if isinstance(entry, Entry)]
    skipped = 1 if all(map(_own_split, names)) else 0
    return [replace(entry, label=_class_folder(entry.name, skipped)) if isinstance(entry, Entry) else entry
            for entry in found]


def _class_folder(name: str, skipped: int) -> str | None:
    folders = PurePosixPath(name).parts[:-1]
    folders = _below_data(folders)[skipped:] if skipped else folders
    return folders[0] if folders else None


def with_class_ids(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Sub-folders become class ids in the order of their names, which are returned; one alone is no class."""
    names = sorted({entry.label for entry in entries if isinstance(entry.label, str)})
    ids = {name: number for number, name in enumerate(names)} if len(names) > 1 else {}
    return [replace(entry, label=ids.get(entry.label)) if isinstance(entry.label, str) else entry
            for entry in entries], list(ids)


def with_splits(entries: list[Entry], config: FolderConfig) -> list[Entry]:
    """The source's own splits where every picture has one; else by a hash of the path, at least one good picture."""
    if _has_own_splits(entries, config):
        return [replace(entry, split=_own_split(entry.name)) for entry in entries]
    fraction = VALIDATION_FRACTION if config.validation_fraction is None else config.validation_fraction
    hashes = [hash_fraction(entry.name) for entry in entries]
    limit = _hash_limit(entries, hashes, fraction, config)
    return [replace(entry, split="validation" if value < limit else "train")
            for entry, value in zip(entries, hashes, strict=True)]


def _has_own_splits(entries: list[Entry], config: FolderConfig) -> bool:
    return config.validation_fraction is None and {_own_split(entry.name) for entry in entries} == set(SPLITS)


def _hash_limit(entries: list[Entry], hashes: list[float], fraction: float, config: FolderConfig) -> float:
    """``fraction``, or so much more that a picture below it can be decoded (while another is left to train on)."""
    if not fraction or sum(value < fraction for value in hashes) >= ENOUGH_TO_HOLD_OUT:
        return fraction
    ranked = sorted(range(len(entries)), key=hashes.__getitem__)
    good = (hashes[number] for number in ranked
            if any(isinstance(make_sample(entry, config), Sample) for entry in _loaded([entries[number]], config)))
    first = list(islice(good, 2))
    return max(fraction, nextafter(first[0], inf)) if len(first) == 2 else 0.0


def _own_split(name: str) -> str | None:
    parts = PurePosixPath(name).parts[:-1]
    match = SPLIT.fullmatch(_below_data(parts)[0]) if _below_data(parts) else None
    return match and ("train" if match.group(1).lower().startswith("train") else "validation")


def _below_data(folders: tuple[str, ...]) -> tuple[str, ...]:
    return folders[1:] if folders[:1] == ("data",) and len(folders) > 1 else folders


def _listing_digest(found: list[Entry | LeftOut]) -> str:
    """Changes when a picture or a caption is added, removed or changed, without reading the pictures."""
    hasher = hashlib.blake2b(digest_size=8)
    for entry in found:
        if isinstance(entry, LeftOut):
            hasher.update(repr((entry.reason, entry.name)).encode())
            continue
        files = [file for file in (_file_of(entry.picture), entry.captions) if isinstance(file, Path)]
        captions = () if isinstance(entry.captions, Path) else entry.captions
        hasher.update(repr((entry.name, captions, entry.label, [_stamp(file) for file in files])).encode())
    return hasher.hexdigest()


def _file_of(picture: Path | Cell | bytes) -> Path | None:
    return picture.table if isinstance(picture, Cell) else picture


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return None
    return status.st_size, status.st_mtime_ns


# -- what becomes of it -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Chunk:
    entries: tuple[Entry | LeftOut, ...]
    config: FolderConfig


def _samples(entries: list[Entry], config: FolderConfig, workers: int) -> Iterator[Sample | LeftOut]:
    chunks = (_Chunk(part, config) for part in in_batches(_loaded(entries, config), CHUNK))
    for samples in in_order(_make_chunk, chunks, workers):
        yield from samples


def _loaded(entries: Iterable[Entry], config: FolderConfig) -> Iterator[Entry | LeftOut]:
    """``entries`` with the bytes of those that lie in a parquet file, each file read once and in order."""
    for (table, column), group in groupby(entries, key=_cells_of):
        if table is None:
            yield from group
            continue
        pictures = enumerate(ParquetTable(table).pictures(column))
        for entry in group:
            data = next((data for row, data in pictures if row == entry.picture.row), None)
            yield _with_bytes(entry, data, config)


def _cells_of(entry: Entry) -> tuple[Path | None, str]:
    return (entry.picture.table, entry.picture.column) if isinstance(entry.picture, Cell) else (None, "")


def _with_bytes(entry: Entry, data: bytes | None, config: FolderConfig) -> Entry | LeftOut:
    """``entry`` with its bytes, or with the file that its cell names in their place."""
    if data is not None:
        return replace(entry, picture=data)
    if entry.picture.path is None:
        return LeftOut("row without a picture", entry.name)
    place = _entry(entry.picture.table.parent, entry.picture.path, (), None, config.absolute_paths)
    return place if isinstance(place, LeftOut) else replace(entry, picture=place.picture)


def _make_chunk(chunk: _Chunk) -> list[Sample | LeftOut]:
    return [make_sample(entry, chunk.config) for entry in chunk.entries]


def make_sample(entry: Entry | LeftOut, config: FolderConfig) -> Sample | LeftOut:
    """The picture of one entry with its captions, or why it is left out (which may be known already)."""
    if isinstance(entry, LeftOut):
        return entry
    try:
        captions = _captions(entry)
        image, extension = encode(_picture_bytes(entry), config)
    except BadSample as error:
        return LeftOut(error.reason, entry.name)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return LeftOut("no such file", entry.name)
    except OSError:
        return LeftOut("unreadable file", entry.name)
    meta = {"path": entry.name, "split": entry.split}
    if entry.label is not None:
        meta["class_id"] = entry.label
    return Sample(entry.split, image, extension, captions, meta)


def _picture_bytes(entry: Entry) -> bytes:
    if isinstance(entry.picture, bytes):
        return entry.picture
    if is_unreadable(entry.picture):
        raise BadSample("a format that is not read")
    if entry.picture.exists() and not entry.picture.is_file():     # a pipe would be waited for
        raise BadSample("not a file")
    return entry.picture.read_bytes()


def _captions(entry: Entry) -> list[str]:
    if isinstance(entry.captions, Path):
        return decode_captions(entry.captions.read_bytes())
    lines = (" ".join(caption.split()) for caption in entry.captions)
    try:
        return decode_captions("\n".join(lines).encode("utf-8"))
    except UnicodeEncodeError as error:             # JSON can spell half of a surrogate pair
        raise BadSample("caption_encoding", f"half a character at {error.start}") from None


def encode(data: bytes, config: FolderConfig) -> tuple[bytes, str]:
    """A picture file as it is stored: bytes and extension. Raises :class:`BadSample` if it cannot be decoded."""
    picture = decode_any(data)
    kind = kind_of(data[:HEAD])
    limit = config.largest_side()
    if limit is not None and min(picture.size) > limit:
        scale = config.resized_side() / min(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        extension = "png" if kind == "png" else "jpg"
        return _save(picture.resize(size, Image.Resampling.LANCZOS), extension), extension
    if kind in STORED:
        return data, kind
    extension = "jpg" if kind in PHOTOGRAPHS else "png"
    return _save(picture, extension), extension


def _save(picture: Image.Image, extension: str) -> bytes:
    buffer = BytesIO()
    if extension == "png":
        picture.save(buffer, format="PNG")
    else:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
