"""One shard as its index knows it: a row of the table, and a row for each sample, both found by a walk over headers."""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle.data.members import PARTS, Parts, key_text, member_runs, why_no_sample
from dalle.data.reasons import Tally
from dalle.data.tar import Member, TarWalk
from dalle.errors import UserError

log = logging.getLogger(__name__)

GONE = -2                                  # the offset of a member that is not where it was indexed
NO_PROBLEMS: dict[str, int] = {}
NO_EXAMPLES: dict[str, str] = {}


class ShardInfo(NamedTuple):
    """One shard: its file, its number of samples (those with a picture), its bytes and a digest of its headers."""

    name: str
    folder: str
    count: int
    size: int
    digest: str
    problems: dict[str, int]      # reason -> how many; what was left out, and what looks wrong
    examples: dict[str, str] = NO_EXAMPLES      # reason -> a member's name
    mtime_ns: int = 0             # when the file was last written; 0 in an index of an older version

    @property
    def content(self) -> tuple[str, int, int, str]:
        """What must agree for two to be the same: a copy has another time."""
        return self.name, self.count, self.size, self.digest

    @property
    def path(self) -> Path:
        return Path(self.folder) / self.name

    @property
    def stem(self) -> str:
        return self.name.removesuffix(".tar")


def member_dtype(key_length: int) -> np.dtype:
    """A sample's row: offset and size in bytes of each part (size -1: absent), the picture's extension, the key."""
    numbers = [(f"{part}_{what}", "<i8") for part in PARTS for what in ("offset", "size")]
    return np.dtype([*numbers, ("image_kind", "S4"), ("key", f"S{max(1, key_length)}")])


def scan_shard(path: Path) -> tuple[ShardInfo, np.ndarray]:
    """One shard's table row and its samples, by a walk over its headers."""
    path = path.absolute()
    if path.suffix != ".tar":
        raise UserError(f"{path} is no .tar; compressed archives cannot be read at offsets, unpack them to plain tars")
    walk = TarWalk(path)
    problems = Tally()
    try:
        file = path.stat()
        rows = _rows(walk, problems)
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read: {error.strerror}") from None
    for reason, detail in walk.problems:
        problems.add(reason, detail)
        log.warning("shard %s: %s", path, detail)
    key_length = max((len(row[-1]) for row in rows), default=1)
    members = np.array(rows, dtype=member_dtype(key_length))
    return ShardInfo(path.name, str(path.parent), len(rows), file.st_size, walk.digest, dict(problems.counts),
                     problems.examples, file.st_mtime_ns), members


def _rows(walk: Iterable[Member], problems: Tally) -> list[tuple]:
    """The samples among ``walk``'s members, in the order of their keys' first members; what is left out is counted.

    The members of a key are joined wherever they lie. Those that repeat what the key has already are another sample of
    that name: none of them is used, so that no sample is made of two.
    """
    samples: dict[bytes, Parts[Member]] = {}
    for key, parts in member_runs(((member.name, member) for member in walk), problems):
        known = samples.setdefault(key, {})
        if known.keys() & parts.keys():
            problems.add("duplicate_key", key_text(key))
        else:
            known |= parts
    rows: list[tuple] = []
    for key, parts in samples.items():
        reason = why_no_sample(key, parts)
        if reason is not None:
            problems.add(reason, key_text(key))
            continue
        if "text" not in parts:
            # kept: pictures alone train a codec, and the caption may be in the JSON
            problems.add("no_caption", key_text(key))
        kind, _ = parts["image"]
        numbers = [value for part in PARTS for value in (parts[part][1][1:] if part in parts else (-1, -1))]
        rows.append((*numbers, kind.encode(), key))
    return rows
