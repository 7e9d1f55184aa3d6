"""What is asked of a folder or a table, and one picture that was found there, before it is opened."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from dalle.config import Section


class FolderConfig(Section):
    """Everything that decides the bytes of the set, beside the pictures and captions."""

    path_column: str | None = Field(None, description="the table's column of paths; null: known by its name")
    caption_column: str | None = Field(None, description="the table's column of captions; null: known by its name")
    absolute_paths: bool = Field(False, description="whether a table may name pictures outside its own folder")
    resize: int | None = Field(None, description="the shorter side, in pixels, that a picture above max_size is shrunk "
                                                 "to; null: max_size")
    max_size: int | None = Field(None, description="the largest shorter side, in pixels, that keeps its own bytes; "
                                                   "null: resize")
    validation_fraction: float | None = Field(None, description="share in [0, 1) held out by a hash of the path; null: "
                                                                "as the source splits, or else 0.05")
    samples_per_shard: int = Field(1_000, description="samples in each shard but the last of a split")

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
