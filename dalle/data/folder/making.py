"""Your own pictures to shards: a folder of pictures with `.txt` files beside them, or a table of paths and captions.

Every picture is decoded once as training would; what fails is left out and counted by reason. A JPEG, PNG or WebP of
acceptable size keeps its own bytes. Which pictures are held out is a hash of their path, so it does not change when
others are added; a source with splits of its own keeps them. The paths of a table are relative to the table's folder
and must stay inside it; with ``absolute_paths`` they may lead anywhere. A folder as Hugging Face lays it out
(``metadata.csv|jsonl|parquet`` with ``file_name``, or parquet files that hold the pictures) is read as its tables say.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from dalle.data.building import LeftOut, Sample, build_dataset
from dalle.data.folder.entries import Cell, Entry, FolderConfig
from dalle.data.folder.finding import find_pictures
from dalle.data.folder.pictures import samples_of
from dalle.data.folder.rows import read_table
from dalle.data.folder.splits import has_own_splits, with_class_ids, with_splits
from dalle.data.folder.tables import open_table
from dalle.data.reasons import printable
from dalle.errors import UserError

VERSION = 2
MOST_CLASSES_SAID = 10


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
        return chain(left_out, samples_of(with_splits(entries, config), config, workers))

    record = build_dataset(out, recipe, samples, total=len(found), samples_per_shard=config.samples_per_shard,
                           force=force, report=report, details={"classes": classes} if classes else {})
    if has_own_splits(entries, config):
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
