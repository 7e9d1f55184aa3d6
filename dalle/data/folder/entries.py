"""What is asked of a folder or a table, and one picture that was found there, before it is opened."""

from dataclasses import dataclass
from pathlib import Path

from dalle.config import Section


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


def is_text(name: str) -> bool:
    """Whether a name can be written anywhere: bytes of a name that are not UTF-8 stand in it as half characters."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
