"""Your own pictures to shards: a folder of pictures with `.txt` files beside them, or a table of paths and captions.

Every picture is decoded once as training would; what fails is left out and counted by reason. A JPEG, PNG or WebP of
acceptable size keeps its own bytes. Which pictures are held out is a hash of their path, so it does not change when
others are added. The paths of a table are relative to the table's folder and must stay inside it; with
``absolute_paths`` they may lead anywhere.
"""

import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from dalle.config import Section
from dalle.data.building import LeftOut, Sample, build_dataset, hash_fraction, in_batches, in_order
from dalle.data.decode import BadSample, decode_captions, decode_image
from dalle.data.index import IMAGE_EXTENSIONS
from dalle.errors import UserError

VERSION = 1
PATH_COLUMNS = ("path", "image", "file", "filename", "file_name", "image_path", "filepath")
CAPTION_COLUMNS = ("caption", "captions", "text")
CHUNK = 32
JPEG_QUALITY = 95
OUTSIDE = "path leads outside the table's folder"


class FolderConfig(Section):
    """Everything that decides the bytes of the set, beside the pictures and captions."""

    path_column: str | None = None
    caption_column: str | None = None
    absolute_paths: bool = False
    resize: int | None = None     # the shorter side of a picture that is above max_size
    max_size: int | None = None   # the largest shorter side that keeps its own bytes; the other of the two by default
    validation_fraction: float = 0.05
    samples_per_shard: int = 1_000

    def largest_side(self) -> int | None:
        return self.max_size or self.resize

    def resized_side(self) -> int | None:
        return self.resize or self.max_size


@dataclass(frozen=True)
class Entry:
    """One picture: its name (the path that the source gives), its file, and its captions or the file of them."""

    name: str
    file: Path
    captions: tuple[str, ...] | Path


def make_folder(config: FolderConfig, source: Path, out: Path, workers: int = 1, force: bool = False,
                report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write the pictures of ``source``, a folder or a table, below ``out`` (:func:`build_dataset`)."""
    _check(config)
    if source.is_dir():
        found = find_pictures(source)
    elif source.is_file():
        found = read_table(source, config)
    else:
        raise UserError(f"there is no folder or table at {source}")
    if not found:
        raise UserError(f"{source} holds no picture; known extensions: {', '.join(IMAGE_EXTENSIONS)}")
    recipe = {"kind": "folder", "version": VERSION, "source": str(source.absolute()), **config.model_dump(),
              "listing": _listing_digest(found)}
    return build_dataset(out, recipe, lambda: _samples(found, config, workers), total=len(found),
                         samples_per_shard=config.samples_per_shard, force=force, report=report)


def _check(config: FolderConfig) -> None:
    if not 0 <= config.validation_fraction < 1:
        raise UserError(f"--validation-fraction {config.validation_fraction}: it is at least 0 and below 1")
    for option, value in (("--resize", config.resize), ("--max-size", config.max_size)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: a side is at least 1 pixel")
    if config.resize and config.max_size and config.resize > config.max_size:
        raise UserError(f"--resize {config.resize} is above --max-size {config.max_size}: pictures are only shrunk")


# -- what there is ----------------------------------------------------------------------------------------------------

def find_pictures(folder: Path) -> list[Entry | LeftOut]:
    """The pictures below ``folder`` by path, each with the `.txt` of the same name; hidden ones are passed over."""
    found: list[Entry | LeftOut] = []
    for parent, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = Path(parent, name)
            if name.startswith(".") or file.suffix.lower().removeprefix(".") not in IMAGE_EXTENSIONS:
                continue
            relative, text = file.relative_to(folder).as_posix(), file.with_suffix(".txt")
            found.append(Entry(relative, file, text) if text.is_file() else LeftOut("no .txt beside it", relative))
    return sorted(found, key=lambda entry: entry.name)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}")


def read_table(table: Path, config: FolderConfig) -> list[Entry | LeftOut]:
    """The pictures that a table names, in its order; the captions of a path that comes again are collected."""
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    reader = readers.get(table.suffix.lower())
    if reader is None:
        raise UserError(f"{table}: the table's extension must be one of {', '.join(readers)}")
    captions: dict[str, list[str]] = {}
    damaged: list[LeftOut] = []
    try:
        for number, (path, said) in enumerate(_picked(reader(table), table, config), start=1):
            texts = said if isinstance(said, list) else [said]
            if not isinstance(path, str) or not path.strip() or not all(isinstance(text, str) for text in texts):
                damaged.append(LeftOut("damaged row", f"row {number}"))
            else:
                captions.setdefault(path.strip(), []).extend(texts)
    except (OSError, UnicodeDecodeError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"the table {table} cannot be read: {' '.join(str(error).split())}") from None
    return [_entry(table.parent, path, texts, config.absolute_paths) for path, texts in captions.items()] + damaged


def _entry(folder: Path, path: str, captions: list[str], anywhere: bool) -> Entry | LeftOut:
    """``path`` as a file; a table from elsewhere must not make this read what is not its own."""
    if "://" in path:
        return LeftOut("a URL, not a file", path)
    normal = os.path.normpath(path)
    if not anywhere and (os.path.isabs(normal) or PurePosixPath(normal).parts[:1] == ("..",)):
        return LeftOut(OUTSIDE, path)
    return Entry(path, folder / normal, tuple(captions))


Rows = Iterable[dict[str, Any]]


def _picked(rows: Rows, table: Path, config: FolderConfig) -> Iterator[tuple[Any, Any]]:
    """The path and the caption of each row."""
    columns: tuple[str, str] | None = None
    for row in rows:
        if columns is None:
            columns = (_column(row, PATH_COLUMNS, config.path_column, "--path-column", table),
                       _column(row, CAPTION_COLUMNS, config.caption_column, "--caption-column", table))
        yield row.get(columns[0]), row.get(columns[1])


def _column(row: dict[str, Any], known: tuple[str, ...], given: str | None, option: str, table: Path) -> str:
    names = {str(name).strip().lower(): name for name in row if name is not None}
    if given is not None:
        if given not in row:
            raise UserError(f"{table} has no column {given!r} ({option}); its columns: {', '.join(map(str, row))}")
        return given
    for name in known:
        if name in names:
            return names[name]
    raise UserError(f"{table}: no column is called {', '.join(known)}; its columns: {', '.join(map(str, row))}; "
                    f"name one with {option}")


def _read_csv(table: Path) -> Iterator[dict[str, Any]]:
    with open(table, encoding="utf-8-sig", newline="") as file:
        yield from csv.DictReader(file, delimiter="\t" if table.suffix.lower() == ".tsv" else ",")


def _read_jsonl(table: Path) -> Iterator[dict[str, Any]]:
    with open(table, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{table}, line {number}: not a JSON object")
            yield row


def _read_parquet(table: Path) -> Iterator[dict[str, Any]]:
    with pyarrow.parquet.ParquetFile(table) as file:
        for batch in file.iter_batches(batch_size=4096):
            yield from batch.to_pylist()


def _listing_digest(found: list[Entry | LeftOut]) -> str:
    """Changes when a picture or a caption is added, removed or changed, without reading the pictures."""
    hasher = hashlib.blake2b(digest_size=8)
    for entry in found:
        if isinstance(entry, LeftOut):
            hasher.update(repr((entry.reason, entry.name)).encode())
            continue
        files = (entry.file, entry.captions) if isinstance(entry.captions, Path) else (entry.file,)
        captions = () if isinstance(entry.captions, Path) else entry.captions
        hasher.update(repr((entry.name, captions, [_stamp(file) for file in files])).encode())
    return hasher.hexdigest()


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        status = file.stat()
    except (OSError, ValueError):  # ValueError: a zero byte in the path
        return None
    return status.st_size, status.st_mtime_ns


# -- what becomes of it -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Chunk:
    entries: tuple[Entry, ...]
    config: FolderConfig


def _samples(found: list[Entry | LeftOut], config: FolderConfig, workers: int) -> Iterator[Sample | LeftOut]:
    yield from (entry for entry in found if isinstance(entry, LeftOut))
    entries = [entry for entry in found if isinstance(entry, Entry)]
    for samples in in_order(_make_chunk, (_Chunk(part, config) for part in in_batches(entries, CHUNK)), workers):
        yield from samples


def _make_chunk(chunk: _Chunk) -> list[Sample | LeftOut]:
    return [make_sample(entry, chunk.config) for entry in chunk.entries]


def make_sample(entry: Entry, config: FolderConfig) -> Sample | LeftOut:
    """The picture of one entry with its captions, or why it is left out."""
    try:
        captions = _captions(entry)
        image, extension = encode(entry.file.read_bytes(), config)
    except BadSample as error:
        return LeftOut(error.reason, entry.name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
        return LeftOut("no such file", entry.name)
    except OSError:
        return LeftOut("unreadable file", entry.name)
    split = "validation" if hash_fraction(entry.name) < config.validation_fraction else "train"
    return Sample(split, image, extension, captions, {"path": entry.name, "split": split})


def _captions(entry: Entry) -> list[str]:
    if isinstance(entry.captions, Path):
        return decode_captions(entry.captions.read_bytes())
    lines = (" ".join(caption.split()) for caption in entry.captions)
    return decode_captions("\n".join(lines).encode("utf-8", "replace"))


def encode(data: bytes, config: FolderConfig) -> tuple[bytes, str]:
    """A picture file as it is stored: bytes and extension. Raises :class:`BadSample` if it cannot be decoded."""
    picture = decode_image(data)
    kind = _kind(data)
    limit = config.largest_side()
    if limit is None or min(picture.size) <= limit:
        return (data, kind) if kind else (_save(picture, "png"), "png")  # GIF, BMP, TIFF: without loss
    scale = config.resized_side() / min(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    extension = "png" if kind == "png" else "jpg"
    return _save(picture.resize(size, Image.Resampling.LANCZOS), extension), extension


def _kind(data: bytes) -> str | None:
    """The extension of the formats that are stored as they are, from the first bytes: names can lie."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else None


def _save(picture: Image.Image, extension: str) -> bytes:
    buffer = BytesIO()
    if extension == "png":
        picture.save(buffer, format="PNG")
    else:
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()
