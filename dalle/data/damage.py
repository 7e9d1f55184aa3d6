"""Whether a shard still is what was indexed, and whole: what is wrong with it, what is gone of it, what to do."""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from dalle.data.members import PARTS, split_name
from dalle.data.shard import ShardInfo
from dalle.data.tar import Member, TarWalk

log = logging.getLogger(__name__)

BadShards = Literal["refuse", "skip"]      # what becomes of shards that are missing or damaged, see `ShardIndex.load`
MISSING_SHARD, DAMAGED_SHARD = "missing_shard", "damaged_shard"      # reasons that shards are counted by, not samples
# of a tar. One without its end marker is readable, but a cut between two members looks just the same
DAMAGE = ("truncated_member", "truncated_header", "damaged_header", "no_end_marker", "data_after_end")
SKIP = "set data.bad_shards=skip to train without what is lost"
READERS = 8                                # threads that read headers again: a network file system makes them wait
REBUILD = "run `python tools/index_shards.py {folder}` to index the folder again"


class Fault(NamedTuple):
    """What is wrong with a shard as a whole: the reason to count it by, what to say of it, and what to do."""

    reason: str
    words: str
    remedy: str


def fault_of(shard: ShardInfo, file: os.stat_result | None) -> Fault | None:
    """What is wrong with a shard, if anything: ``file`` is what lies under its name."""
    rebuild = REBUILD.format(folder=shard.folder)
    if file is None:
        return Fault(MISSING_SHARD, "is in the index but missing on disk", f"bring it back, {SKIP}, or {rebuild}")
    if file.st_size != shard.size:
        return Fault(DAMAGED_SHARD, f"has {file.st_size} bytes, its index says {shard.size}",
                     f"bring it back as it was, {SKIP}, or {rebuild}")
    if not is_as_indexed(shard, file):
        return Fault(DAMAGED_SHARD, "is not the file that was indexed, though as large",
                     f"bring it back as it was, {SKIP}, or {rebuild}")
    damage = [reason for reason in DAMAGE if reason in shard.problems]
    if damage:
        return Fault(DAMAGED_SHARD, f"is damaged ({', '.join(damage)})",
                     f"fetch it again and {rebuild}, or set data.bad_shards=skip to train on what can be read of it")
    return None


def is_as_indexed(shard: ShardInfo, file: os.stat_result | None) -> bool:
    return file is not None and file.st_size == shard.size and file.st_mtime_ns == shard.mtime_ns


def not_there(shard: ShardInfo, rows: np.ndarray) -> np.ndarray:
    """bool [count]: the samples of ``rows`` of which a member is not where it was in the file as it is now."""
    members = _members_found(TarWalk(shard.path)) or ()
    found = {(split_name(member.name)[0], member.offset, member.size) for member in members}
    there = np.ones(len(rows), dtype=bool)
    for part in PARTS:
        places = zip(rows["key"].tolist(), rows[f"{part}_offset"].tolist(), rows[f"{part}_size"].tolist(), strict=True)
        there &= np.fromiter((place[2] < 0 or place in found for place in places), dtype=bool, count=len(rows))
    return ~there


def same_headers(shards: list[ShardInfo], folder: Path) -> list[str]:
    """The names of those whose files have the headers that were indexed."""
    log.warning("%d shards of %s were written or copied since they were indexed: reading their headers again",
                len(shards), folder)
    with ThreadPoolExecutor(READERS) as pool:
        return [shard.name for shard, digest in zip(shards, pool.map(_digest, shards), strict=True)
                if digest == shard.digest]


def _digest(shard: ShardInfo) -> str | None:
    """The digest of the headers of the file under the shard's name; None where it cannot be read."""
    walk = TarWalk(shard.path)
    return walk.digest if _members_found(walk) is not None else None


def _members_found(walk: TarWalk) -> list[Member] | None:
    try:
        return list(walk)
    except OSError:
        return None
