"""A picture that was found to a sample: its bytes, its captions, and how it is stored.

Every picture is decoded once as training would; what fails is left out, with a reason. A JPEG, PNG or WebP of
acceptable size keeps its own bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import groupby
from pathlib import Path

from PIL import Image

from dalle.data.building import LeftOut, Sample, in_batches, in_order
from dalle.data.decode import BadSample, decode_captions
from dalle.data.folder.entries import Cell, Entry, FolderConfig
from dalle.data.folder.rows import entry_at
from dalle.data.folder.tables import ParquetTable
from dalle.data.formats import HEAD, decode_any, is_unreadable, kind_of
from dalle.words import one_line

CHUNK = 32
STORED = ("jpg", "png", "webp")             # as they are; names can lie, so by the first bytes
PHOTOGRAPHS = ("avif", "heif", "jp2")       # lossy already: as JPEG; the others (GIF, BMP, TIFF) without loss
JPEG_QUALITY = 95


@dataclass(frozen=True)
class _Chunk:
    entries: tuple[Entry | LeftOut, ...]
    config: FolderConfig


def samples_of(entries: list[Entry], config: FolderConfig, workers: int) -> Iterator[Sample | LeftOut]:
    """A sample of every entry, or why there is none, in their order."""
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
    place = entry_at(entry.picture.table.parent, entry.picture.path, (), None, config.absolute_paths)
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


def can_be_decoded(entry: Entry, config: FolderConfig) -> bool:
    """Whether the picture makes a sample."""
    return any(isinstance(make_sample(found, config), Sample) for found in _loaded([entry], config))


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
    try:
        return decode_captions("\n".join(map(one_line, entry.captions)).encode("utf-8"))
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
