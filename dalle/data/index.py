"""What the shards hold: counts, sizes and a fingerprint in one small table, member offsets in one side file a shard.

``FOLDER/index/index.json`` holds the table and ``FOLDER/index/SHARD.npy`` the offsets, so that the reading order needs
only the table, and a sample is one positioned read. A shard is never unpacked: see :mod:`dalle.data.tar`.
"""

import contextlib
import fnmatch
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dalle.data.damage import (
    MISSING_SHARD,
    REBUILD,
    SKIP,
    BadShards,
    fault_of,
    is_as_indexed,
    not_there,
    same_headers,
)
from dalle.data.members import PARTS
from dalle.data.reasons import Tally, printable
from dalle.data.shard import GONE, NO_EXAMPLES, NO_PROBLEMS, ShardInfo, member_dtype, scan_shard
from dalle.data.specs import expand_braces, glob_magic
from dalle.errors import UserError
from dalle.files import replacing

log = logging.getLogger(__name__)

VERSION = 1
INDEX_FOLDER = "index"
TABLE_FILE = "index.json"
MOST_LISTED = 10                           # names in one line


class ShardIndex:
    """The shards of one data set, in order. ``fingerprint`` changes with names, counts, sizes and digests.

    ``bad_shards``: whether samples that are gone with their shard are refused or skipped. ``bad``: how many shards are
    not what they were, by reason. ``gone``: bool [count] by shard number, True for samples that are not where they were
    indexed; they keep their places in the order.
    """

    def __init__(self, shards: Sequence[ShardInfo], members: dict[int, np.ndarray] | None = None,
                 bad_shards: BadShards = "refuse"):
        self.shards = list(shards)
        self.bad_shards: BadShards = bad_shards
        self.bad = Tally()
        self.gone: dict[int, np.ndarray] = {}
        self._in_memory = members or {}

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards]: samples in each."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @property
    def counts_there(self) -> np.ndarray:
        """int64 [shards]: :attr:`counts`, but 0 for shards of which every sample is gone."""
        counts = self.counts.copy()
        counts[[number for number, gone in self.gone.items() if gone.all()]] = 0
        return counts

    def lose(self, shard_number: int) -> None:
        """Count the whole shard as gone from now on."""
        self.gone[shard_number] = np.ones(self.shards[shard_number].count, dtype=bool)

    @cached_property
    def fingerprint(self) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            row = f"{shard.name}\0{shard.count}\0{shard.size}\0{shard.digest}\n"
            hasher.update(row.encode("utf-8", "surrogateescape"))      # a file's name need not be UTF-8
        return hasher.hexdigest()

    @property
    def findings(self) -> Tally:
        """What the header walk found, over all shards."""
        found = Tally()
        for shard in self.shards:
            if shard.problems:
                found.update(Tally(shard.problems, {reason: f"{name} in {printable(shard.name)}"
                                                    for reason, name in shard.examples.items()}))
        return found

    @property
    def problems(self) -> Counter[str]:
        """How often each reason came among the :attr:`findings`."""
        return self.findings.counts

    def members(self, shard_number: int) -> np.ndarray:
        """The rows of one shard, structured as :func:`member_dtype`, to read; the offsets of what is gone are GONE."""
        rows = self._in_memory.get(shard_number)
        if rows is None:
            rows = self._side_file(self.shards[shard_number])
        gone = self.gone.get(shard_number)
        if gone is not None and gone.any():
            rows = rows.copy()
            for part in PARTS:
                rows[f"{part}_offset"][gone & (rows[f"{part}_size"] >= 0)] = GONE
        return rows

    def _side_file(self, shard: ShardInfo) -> np.ndarray:
        path = Path(shard.folder) / INDEX_FOLDER / f"{shard.stem}.npy"
        advice = REBUILD.format(folder=shard.folder)
        try:
            # mapped, so that all workers of a machine share its pages; no pickles, no archives
            rows = np.lib.format.open_memmap(path, mode="r").view(np.ndarray)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the index of {shard.path} cannot be read ({error}); {advice}") from None
        if rows.dtype.names != member_dtype(1).names or rows.shape != (shard.count,):
            raise UserError(f"{path} does not fit {shard.path} ({shard.count} samples); {advice}")
        return rows

    @staticmethod
    def build(shards: Iterable[Path], workers: int = 1) -> "ShardIndex":
        """Walk each tar; nothing is written. Unreadable files raise :class:`UserError`."""
        paths = [Path(path) for path in shards]
        if workers > 1 and len(paths) > 1:
            with ProcessPoolExecutor(min(workers, len(paths))) as pool:
                scanned = list(pool.map(scan_shard, paths, chunksize=4))
        else:
            scanned = [scan_shard(path) for path in paths]
        return ShardIndex([info for info, _ in scanned], {number: rows for number, (_, rows) in enumerate(scanned)})

    @staticmethod
    def load(spec: str, bad_shards: BadShards = "refuse") -> "ShardIndex":
        """The index of ``spec``: a folder, a glob, a brace range ``{00000..00009}.tar``, several joined by ``::``.

        Shards without an index are walked now (with a log line) and the index is kept if the folder is writable.
        Raises :class:`UserError` for an index that disagrees with the files, a spec that is no path, a shard that is
        missing, cut, damaged or replaced since it was indexed. ``bad_shards="skip"``: what is lost of such shards is
        ``gone``, while counts, fingerprint and so the order stay as they were; a missing shard that no index knows is
        left out, which makes another data set.
        """
        index = _joined(_load_parts(_Wish(str(spec), bad_shards)), bad_shards)
        paths = [shard[:2] for shard in index.shards]
        if len(set(paths)) < len(paths):
            (name, folder), _ = Counter(paths).most_common(1)[0]
            raise UserError(f"data {spec!r} names the shard {Path(folder, name)} twice; give every shard once")
        if not index.num_samples:
            found = index.findings.summary()
            raise UserError(f"data {spec!r}: its {len(index.shards)} shards hold no sample with a picture"
                            f"{f' ({found})' if found else ''}; a sample is KEY.jpg|png|webp and KEY.txt in a tar")
        if not index.counts_there.any():
            raise UserError(f"data {spec!r}: every sample of its {len(index.shards)} shards is gone; bring them back")
        return index

    def save(self, folder: str | Path | None = None) -> None:
        """Write the index beside the shards (``FOLDER/index``), the table last and each file by rename.

        ``folder`` restricts it to the shards there. All of a folder's shards must be in this index.
        """
        for place, numbers in _by_folder(self.shards).items():
            if folder is None or Path(place) == Path(folder).absolute():
                self._save_folder(Path(place) / INDEX_FOLDER, numbers)

    def _save_folder(self, target: Path, numbers: list[int]) -> None:
        try:
            target.mkdir(exist_ok=True)
            for number in numbers:
                rows = self.members(number)
                with replacing(target / f"{self.shards[number].stem}.npy") as file:
                    np.save(file, rows)
            _write_table(target, [self.shards[number] for number in numbers])
        except OSError as error:
            raise UserError(f"the index cannot be written into {target}: {error.strerror}; "
                            "check the permissions") from None


def _write_table(target: Path, shards: Sequence[ShardInfo]) -> None:
    table = {"version": VERSION, "fingerprint": ShardIndex(shards).fingerprint,
             "shards": [_table_row(shard) for shard in shards]}
    text = json.dumps(table, indent=0 if len(shards) < 1000 else None) + "\n"
    with replacing(target / TABLE_FILE) as file:
        file.write(text.encode())


def _table_row(shard: ShardInfo) -> dict[str, object]:
    row = {"name": shard.name, "count": shard.count, "size": shard.size, "digest": shard.digest,
           "mtime_ns": shard.mtime_ns}
    return {**row, "problems": shard.problems, "examples": shard.examples} if shard.problems else row


def _joined(parts: list[ShardIndex], bad_shards: BadShards) -> ShardIndex:
    whole = ShardIndex([shard for part in parts for shard in part.shards], bad_shards=bad_shards)
    start = 0
    for part in parts:
        whole._in_memory.update({start + number: rows for number, rows in part._in_memory.items()})
        whole.gone.update({start + number: gone for number, gone in part.gone.items()})
        whole.bad.update(part.bad)
        start += len(part.shards)
    return whole


def check_shards(spec: str, bad_shards: BadShards = "refuse") -> None:
    """Raise what :meth:`ShardIndex.load` would, as far as it shows without reading a shard; nothing is written."""
    _load_parts(_Wish(spec, bad_shards, read=False))


class _Wish(NamedTuple):
    """What is to be loaded, and whether shards may be read for it."""

    spec: str
    bad_shards: BadShards
    read: bool = True


def _load_parts(wish: _Wish) -> list[ShardIndex]:
    return [_load_part(part.strip(), wish) for part in wish.spec.split("::")]


def _load_part(spec: str, wish: _Wish) -> ShardIndex:
    """The index of one folder, glob or brace range."""
    if re.match(r"pipe:|[a-z0-9+]+://|https?:", spec, re.IGNORECASE):
        raise UserError(f"data {spec!r}: the exact reading order needs local tar files, and nothing is run or fetched "
                        "for it; copy the shards to a local or shared folder and give that, or train with "
                        "data.tier=resampled")
    if not spec:
        raise UserError("the data spec is empty; give a folder of .tar shards, a glob or a brace range")
    parts = []
    for (folder, is_file), paths in groupby(expand_braces(spec), key=_place):
        if is_file:
            parts.append(_load_folder(Path(folder or "."), {os.path.basename(path) for path in paths}, spec, wish))
        else:
            parts += [_load_pattern(path, spec, wish) for path in paths]
    return _joined(parts, wish.bad_shards)


def _place(path: str) -> tuple[str, bool]:
    """The folder of a path, and whether the path names one file there."""
    folder, name = os.path.split(path)
    return folder, name.endswith(".tar") and not glob_magic(name) and not os.path.isdir(path)


def _load_pattern(path: str, spec: str, wish: _Wish) -> ShardIndex:
    if os.path.isdir(path):
        return _load_folder(Path(path), "*.tar", spec, wish)
    folder, pattern = os.path.split(path)
    if glob_magic(folder):
        raise UserError(f"data {spec!r}: only the file name may hold wildcards; join several folders with '::'")
    if not glob_magic(pattern):
        raise UserError(f"data {spec!r}: there is no folder {path}; give a folder of .tar shards, a glob or a range")
    return _load_folder(Path(folder or "."), pattern, spec, wish)


def _load_folder(folder: Path, wanted: str | set[str], spec: str, wish: _Wish) -> ShardIndex:
    """The shards of ``folder`` that are in the set ``wanted`` or match the pattern, by its saved index or a walk."""
    if not folder.is_dir():
        raise UserError(f"data {spec!r}: there is no folder {folder}; check the path")
    folder = folder.absolute()
    files = shard_files(folder)
    matches = wanted.__contains__ if isinstance(wanted, set) else re.compile(fnmatch.translate(wanted)).match
    present = {name: file for name, file in files.items() if matches(name)}
    absent = wanted - present.keys() if isinstance(wanted, set) else set()
    if absent and wish.bad_shards == "refuse":
        raise UserError(f"data {spec!r}: the shard {folder / min(absent)} does not exist{_and_more(absent)}; "
                        f"check the range, or {SKIP}")
    table = read_table(folder)
    if table is None:
        if not present:
            raise UserError(f"data {spec!r}: no .tar shard there; give a folder of shards, a glob or a brace range")
        if not wish.read:
            return ShardIndex([])
        index = _index_now(folder, sorted(present), everything=len(present) == len(files))
    else:
        shards = _known(folder, table, matches, present, spec)
        index = ShardIndex(_with_times(folder, table, shards, present) if wish.read else
                           _renewed(shards, {name: file.st_mtime_ns for name, file in present.items()}))
        absent -= {shard.name for shard in shards}
    index.bad_shards = wish.bad_shards
    if wish.read or wish.bad_shards == "refuse":
        _mark_or_refuse(index, present)
    if absent and wish.read:
        index.bad.add(MISSING_SHARD, min(absent), len(absent))
        log.warning("training without %d missing shards of %s, which no index knows: %s", len(absent), folder,
                    _listed(sorted(absent)))
    return index


def shard_files(folder: Path) -> dict[str, os.stat_result]:
    """The tars in ``folder`` by name; a link to nothing is none."""
    found = {}
    for entry in os.scandir(folder):
        if entry.name.endswith(".tar"):
            with contextlib.suppress(FileNotFoundError):
                found[entry.name] = entry.stat()
    return found


def _known(folder: Path, table: list[ShardInfo], matches: Callable[[str], object],
           present: Mapping[str, os.stat_result], spec: str) -> list[ShardInfo]:
    """The shards of a saved index that are wanted; refuses files that it does not know: they must not go unseen."""
    shards = [shard for shard in table if matches(shard.name)]
    names = {shard.name for shard in shards}
    extra = present.keys() - names
    if extra:
        raise UserError(f"the shard {folder / min(extra)} is not in the index of its folder; "
                        f"{REBUILD.format(folder=folder)}")
    if not present:
        raise UserError(f"data {spec!r}: no shard matches; {folder} holds {len(table)} shards, {len(names)} of those "
                        "wanted are missing")
    return shards


def _mark_or_refuse(index: ShardIndex, present: Mapping[str, os.stat_result]) -> None:
    """Refuse shards that are not what the index says, or whole; where they are skipped, find out what is gone."""
    faults = {number: fault for number, shard in enumerate(index.shards)
              if (shard.problems or not is_as_indexed(shard, present.get(shard.name)))
              and (fault := fault_of(shard, present.get(shard.name))) is not None}
    if faults and index.bad_shards == "refuse":
        number, fault = next(iter(faults.items()))
        raise UserError(f"the shard {index.shards[number].path} {fault.words}{_and_more(faults)}; {fault.remedy}")
    for number, fault in faults.items():
        shard = index.shards[number]
        index.bad.add(fault.reason, shard.name)
        if fault.reason == MISSING_SHARD:
            index.lose(number)
        elif not is_as_indexed(shard, present[shard.name]):
            index.gone[number] = not_there(shard, index.members(number))
        gone = int(index.gone[number].sum()) if number in index.gone else 0
        log.warning("the shard %s %s: %s", shard.path, fault.words,
                    f"{gone} of its {shard.count} samples are gone, others stand in for them" if gone
                    else f"the {shard.count} samples that can be read of it are used")


def _with_times(folder: Path, table: list[ShardInfo], shards: list[ShardInfo],
                present: Mapping[str, os.stat_result]) -> list[ShardInfo]:
    """``shards`` with the times of their files, where these are the files that were indexed; the others keep theirs.

    A copy has another time and is the same: where only the time differs, the headers are read again and compared, and
    the new time is kept in the table, so that this is done once.
    """
    written = (folder / INDEX_FOLDER / TABLE_FILE).stat().st_mtime_ns
    differ = [shard for shard in shards if (file := present.get(shard.name)) is not None
              and file.st_mtime_ns != shard.mtime_ns and file.st_size == shard.size]
    # a table without times is of an older version: what is older than it was indexed
    doubtful = {shard.name for shard in differ if shard.mtime_ns or present[shard.name].st_mtime_ns > written}
    renewed = {shard.name: present[shard.name].st_mtime_ns for shard in differ if shard.name not in doubtful}
    if doubtful:
        same = same_headers([shard for shard in differ if shard.name in doubtful], folder)
        renewed |= {name: present[name].st_mtime_ns for name in same}
        with contextlib.suppress(OSError):                    # a folder that cannot be written is compared every time
            _write_table(folder / INDEX_FOLDER, _renewed(table, renewed))
    return _renewed(shards, renewed)


def _renewed(shards: list[ShardInfo], times: Mapping[str, int]) -> list[ShardInfo]:
    if not times:
        return shards
    return [ShardInfo(*shard[:-1], times.get(shard.name, shard.mtime_ns)) for shard in shards]


def _and_more(some: Collection[object]) -> str:
    return f" (and {len(some) - 1} more)" if len(some) > 1 else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_LISTED]) + (", ..." if len(names) > MOST_LISTED else "")


def _index_now(folder: Path, names: list[str], everything: bool) -> ShardIndex:
    log.warning("%s has no index: reading the headers of %d shards now", folder, len(names))
    index = ShardIndex.build(folder / name for name in names)
    if everything:                # a part of a folder is not saved: it would pass for the whole the next time
        try:
            index.save()
        except UserError as error:
            log.warning("%s; the index stays in memory", error)
    return index


def read_table(folder: Path) -> list[ShardInfo] | None:
    """The saved table of ``folder``, or None when it has none. Raises :class:`UserError` for a damaged one."""
    path = folder / INDEX_FOLDER / TABLE_FILE
    try:
        table = json.loads(path.read_bytes())
        if table["version"] != VERSION:
            raise ValueError(f"its version is {table['version']}, this program reads {VERSION}")
        rows, place = table["shards"], str(folder)
        shards = [ShardInfo(row["name"], place, row["count"], row["size"], row["digest"],
                            dict(row["problems"]) if "problems" in row else NO_PROBLEMS,
                            dict(row["examples"]) if "examples" in row else NO_EXAMPLES, row.get("mtime_ns", 0))
                  for row in rows]
        if any(type(name) is not str or type(count) is not int or "/" in name or count < 0
               or type(mtime_ns) is not int for name, _, count, *_, mtime_ns in shards):
            raise ValueError("a shard's name, count or time is impossible")
        if any(type(number) is not int for shard in shards for number in shard.problems.values()):
            raise ValueError("a problem's count is no number")
        if any(type(name) is not str for shard in shards for name in shard.examples.values()):
            raise ValueError("an example is no name")
        if ShardIndex(shards).fingerprint != table["fingerprint"]:
            raise ValueError("its fingerprint does not fit its shards")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); {REBUILD.format(folder=folder)}") from None
    return shards


def _by_folder(shards: Sequence[ShardInfo]) -> dict[str, list[int]]:
    folders: dict[str, list[int]] = {}
    for number, shard in enumerate(shards):
        folders.setdefault(shard.folder, []).append(number)
    return folders
