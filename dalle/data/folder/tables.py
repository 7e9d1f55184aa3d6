"""Tables of pictures and captions, read strictly: CSV and its relatives, JSON Lines, parquet.

A row that does not fit its header, an open quote or a line that is no object is refused with its line: to go on would
pair pictures with halves of captions. What a cell holds is for the caller to judge.
"""

import codecs
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow
import pyarrow.parquet

from dalle.errors import UserError
from dalle.words import one_line

DELIMITERS = ",\t;|"
HEADER_BYTES = 1 << 20       # a header is shorter
BATCH_ROWS = 4096            # of a parquet file, without its pictures
BATCH_PICTURES = 64
QUOTE = 'a cell with the separator, a quote or a line break is written "in quotes", a quote inside as ""'


class Row(NamedTuple):
    """The cells that were asked for, by column (absent: the row lacks it), and where the row is: "line 7"."""

    where: str
    cells: dict[str, Any]


class Table(Protocol):
    path: Path
    columns: Sequence[str]           # in the order of the file
    picture_columns: Sequence[str]   # those that hold the pictures themselves

    def rows(self, columns: Sequence[str]) -> Iterator[Row]: ...


def open_table(path: Path) -> Table:
    """The table at ``path``, by its extension. Raises :class:`UserError` for what is none, here or while it is read."""
    readers = {".csv": CsvTable, ".tsv": CsvTable, ".jsonl": JsonTable, ".ndjson": JsonTable, ".parquet": ParquetTable}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: the table's extension must be one of {', '.join(readers)}")
    try:
        return reader(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"the table {path} cannot be read: {one_line(error)}")


def _check_names(path: Path, columns: Sequence[str]) -> None:
    twice = [name for name, times in Counter(columns).items() if name and times > 1]
    if twice:
        raise UserError(f"{path}: its header names the column {twice[0]!r} twice; name each once")


# -- text -------------------------------------------------------------------------------------------------------------

def text_encoding(path: Path) -> str:
    """UTF-8, or what a byte order mark or the zero bytes of UTF-16 say."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if head.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if head.count(0) > len(head) // 4:        # of few zero bytes the cells tell
        return "utf-16-le" if head[1::2].count(0) > head[::2].count(0) else "utf-16-be"
    return "utf-8-sig"


def _not_text(path: Path, encoding: str) -> UserError:
    """Which line of ``path`` is not in ``encoding``, and what to do."""
    where = str(path)
    if encoding == "utf-8-sig":
        with open(path, "rb") as file:
            where = next((f"{path}, line {number}" for number, line in enumerate(file, start=1) if not _is_utf8(line)),
                         where)
    name = "UTF-8" if encoding == "utf-8-sig" else encoding.upper()
    return UserError(f"{where}: the bytes are not {name}; save the table as UTF-8 (a spreadsheet calls it 'CSV UTF-8')")


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class TextTable:
    """What the tables of lines share: their encoding, and that a wrong one is said with its line."""

    picture_columns: Sequence[str] = ()

    def __init__(self, path: Path):
        self.path = path
        self.encoding = text_encoding(path)

    def lines(self, newline: str | None = None) -> Iterator[str]:
        try:
            with open(self.path, encoding=self.encoding, newline=newline) as file:
                yield from file
        except UnicodeError:
            raise _not_text(self.path, self.encoding) from None
        except OSError as error:
            raise _unreadable(self.path, error) from None


class CsvTable(TextTable):
    """Cells separated by commas, tabs, semicolons or bars, whichever the header has most of."""

    def __init__(self, path: Path):
        super().__init__(path)
        first = next((line for line in self.lines() if line.strip()), "")
        self.delimiter = delimiter_of(first)
        self.columns = next((cells for _, cells in self._records()), [])
        _check_names(path, self.columns)

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        places = [(name, self.columns.index(name)) for name in columns]
        records = self._records()
        next(records, None)
        for line, cells in records:
            if len(cells) != len(self.columns):
                raise UserError(f"{self.path}, line {line}: {len(cells)} cells where the header has "
                                f"{len(self.columns)} (separated by {self.delimiter!r}); {QUOTE}")
            yield Row(f"line {line}", {name: cells[place] for name, place in places})

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """(line that it begins in, cells) of the header and every row, without empty lines."""
        reader = csv.reader(self.lines(newline=""), delimiter=self.delimiter, strict=True, skipinitialspace=True)
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{self.path}, line {line}: a quote in the row that begins here is not closed, or not "
                                f"followed by a separator ({error}); {QUOTE}") from None
            if cells is None:
                return
            if cells:
                yield line, cells


def delimiter_of(header: str) -> str:
    """The separator that ``header`` has most of, outside of quotes."""
    plain = re.sub(r'"[^"]*"', "", header)
    return max(DELIMITERS, key=plain.count)


class JsonTable(TextTable):
    """One JSON object a line."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.columns = list(dict.fromkeys(name for _, row in self._objects() for name in row))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        for line, row in self._objects():
            yield Row(f"line {line}", {name: row[name] for name in columns if name in row})

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, line in enumerate(self.lines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{self.path}, line {number}: not a JSON object; the table has one object a line")
            yield number, row


# -- parquet ----------------------------------------------------------------------------------------------------------

class ParquetTable:
    """A parquet file; pictures in columns of bytes, or of {bytes, path} as Hugging Face writes them, stay unread."""

    def __init__(self, path: Path):
        self.path = path
        with pyarrow.parquet.ParquetFile(path) as file:
            self._schema = file.schema_arrow
        self.columns = self._schema.names
        _check_names(path, self.columns)
        self.picture_columns = [field.name for field in self._schema if _holds_pictures(field.type)]

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """Of a column of pictures {bytes, path} the cell is {path}; of one of bytes there is no cell."""
        leaves = [leaf for name in columns for leaf in self._leaves_without_bytes(name)]
        number = 0
        for batch in self._batches(BATCH_ROWS, leaves):
            for cells in batch.to_pylist():
                number += 1
                yield Row(f"row {number}", cells)

    def pictures(self, column: str) -> Iterator[bytes | None]:
        """The bytes in ``column`` of each row, in order."""
        struct = pyarrow.types.is_struct(self._schema.field(column).type)
        for batch in self._batches(BATCH_PICTURES, [f"{column}.bytes" if struct else column]):
            cells = batch.column(0).to_pylist()
            yield from ((cell or {}).get("bytes") for cell in cells) if struct else cells

    def _leaves_without_bytes(self, name: str) -> list[str]:
        kind = self._schema.field(name).type
        if name not in self.picture_columns:
            return [name]
        return [f"{name}.path"] if pyarrow.types.is_struct(kind) and kind.get_field_index("path") >= 0 else []

    def _batches(self, rows: int, columns: list[str]) -> Iterator[pyarrow.RecordBatch]:
        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                yield from file.iter_batches(batch_size=rows, columns=columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise _unreadable(self.path, error) from None


def _holds_pictures(kind: pyarrow.DataType) -> bool:
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return index >= 0 and _is_binary(kind.field(index).type)
    return _is_binary(kind)


def _is_binary(kind: pyarrow.DataType) -> bool:
    return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
