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
import resource
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from dalle.data.reasons import Tally, printable
from dalle.data.tar import Member, TarWalk
from dalle.errors import UserError
from dalle.files import replacing

log = logging.getLogger(__name__)

VERSION = 1
INDEX_FOLDER = "index"
TABLE_FILE = "index.json"
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
PARTS = ("image", "text", "json")
PART_OF = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), "txt": "text", "json": "json"}      # by the name's extension
LONGEST_KEY = 255
READ_ATTEMPTS = 3
Read = TypeVar("Read")
Part = TypeVar("Part")
Parts = dict[str, tuple[str, Part]]      # of one key: part -> (extension, member)
BadShards = Literal["refuse", "skip"]      # what becomes of shards that are missing or damaged, see `ShardIndex.load`
MISSING_SHARD, DAMAGED_SHARD = "missing_shard", "damaged_shard"      # reasons that shards are counted by, not samples
# of a tar. One without its end marker is readable, but a cut between two members looks just the same
DAMAGE = ("truncated_member", "truncated_header", "damaged_header", "no_end_marker", "data_after_end")
GONE = -2                                  # the offset of a member that is not where it was indexed
GONE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError)
NO_PROBLEMS: dict[str, int] = {}
NO_EXAMPLES: dict[str, str] = {}
SKIP = "set data.bad_shards=skip to train without what is lost"
MOST_LISTED = 10                           # names in one line
FILES_A_SHARD = 3                          # itself, its rows and its codes: a mapped file keeps its descriptor
FILES_LEFT = 256                           # for all else that a process opens
READERS = 8                                # threads that read headers again: a network file system makes them wait
REBUILD = "run `python tools/index_shards.py {folder}` to index the folder again"


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


class Fault(NamedTuple):
    """What is wrong with a shard as a whole: the reason to count it by, what to say of it, and what to do."""

    reason: str
    words: str
    remedy: str


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


def why_no_sample(key: bytes, parts: Mapping[str, object]) -> str | None:
    """The reason why the ``parts`` of ``key`` make no sample, or None."""
    if len(key) > LONGEST_KEY:
        return "key_too_long"
    return None if "image" in parts else "no_image"


def member_runs(members: Iterable[tuple[bytes, Part]], problems: Tally) -> Iterator[tuple[bytes, Parts[Part]]]:
    """(key, its parts) of the (name, member) that follow one another; what belongs to no sample may lie between them.

    A run is complete when it is given: where reading it raises, nothing of it was given.
    """
    for key, run in groupby(_useful(members, problems), key=itemgetter(0)):
        parts: Parts[Part] = {}
        for _, part, extension, member in run:
            if part in parts:
                problems.add("duplicate_member", f"{key_text(key)}.{extension}")
            else:
                parts[part] = (extension, member)
        yield key, parts


def _useful(members: Iterable[tuple[bytes, Part]], problems: Tally) -> Iterator[tuple[bytes, str, str, Part]]:
    """(key, part, extension, member) of all that can belong to a sample; the others are counted."""
    for name, member in members:
        key, extension = split_name(name)
        part = PART_OF.get(extension)
        if key is not None and part is not None:
            yield key, part, extension, member
        else:
            problems.add(_why_of_no_use(key, extension), key_text(name))


def _why_of_no_use(key: bytes | None, extension: str) -> str:
    if key is None:
        return "not_a_sample"
    # webdataset cuts a name at its first dot, so img.v1.jpg and img.v2.jpg would both belong to a sample "img"
    _, dot, last = extension.rpartition(".")
    return "dot_in_name" if dot and PART_OF.get(last) in ("image", "text") else "other_members"


def split_name(name: bytes) -> tuple[bytes | None, str]:
    """A member's (key, lower-case extension), cut at the first dot of its base name; (None, "") if it has no such dot.

    Names that begin with a dot (the ``._`` files that macOS adds) have no key.
    """
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot:
        return None, ""
    return folder + slash + stem, extension.decode("ascii", "replace").lower()


def key_text(key: bytes) -> str:
    """A key as printable text for logs and batches; it is data from the shard, never part of a path."""
    text = key.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


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


def glob_magic(text: str) -> bool:
    return any(character in text for character in "*?[")


def expand_braces(text: str) -> list[str]:
    """``a{08..10}.tar`` -> a08.tar, a09.tar, a10.tar and ``{x,y}.tar`` -> x.tar, y.tar; several braces multiply."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", text)
    if not match:
        return [text]
    first, last, words = match.groups()
    if words is not None:
        choices = words.split(",")
    else:
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
        if not choices:
            raise UserError(f"the range {match.group(0)} in {text!r} is empty; write the smaller number first")
    tails = expand_braces(text[match.end():])
    return [text[:match.start()] + choice + tail for choice in choices for tail in tails]


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
              if (shard.problems or not _is_as_indexed(shard, present.get(shard.name)))
              and (fault := _fault(shard, present.get(shard.name))) is not None}
    if faults and index.bad_shards == "refuse":
        number, fault = next(iter(faults.items()))
        raise UserError(f"the shard {index.shards[number].path} {fault.words}{_and_more(faults)}; {fault.remedy}")
    for number, fault in faults.items():
        shard = index.shards[number]
        index.bad.add(fault.reason, shard.name)
        if fault.reason == MISSING_SHARD:
            index.lose(number)
        elif not _is_as_indexed(shard, present[shard.name]):
            index.gone[number] = _not_there(shard, index.members(number))
        gone = int(index.gone[number].sum()) if number in index.gone else 0
        log.warning("the shard %s %s: %s", shard.path, fault.words,
                    f"{gone} of its {shard.count} samples are gone, others stand in for them" if gone
                    else f"the {shard.count} samples that can be read of it are used")


def _fault(shard: ShardInfo, file: os.stat_result | None) -> Fault | None:
    """What is wrong with a shard, if anything: ``file`` is what lies under its name."""
    rebuild = REBUILD.format(folder=shard.folder)
    if file is None:
        return Fault(MISSING_SHARD, "is in the index but missing on disk", f"bring it back, {SKIP}, or {rebuild}")
    if file.st_size != shard.size:
        return Fault(DAMAGED_SHARD, f"has {file.st_size} bytes, its index says {shard.size}",
                     f"bring it back as it was, {SKIP}, or {rebuild}")
    if not _is_as_indexed(shard, file):
        return Fault(DAMAGED_SHARD, "is not the file that was indexed, though as large",
                     f"bring it back as it was, {SKIP}, or {rebuild}")
    damage = [reason for reason in DAMAGE if reason in shard.problems]
    if damage:
        return Fault(DAMAGED_SHARD, f"is damaged ({', '.join(damage)})",
                     f"fetch it again and {rebuild}, or set data.bad_shards=skip to train on what can be read of it")
    return None


def _is_as_indexed(shard: ShardInfo, file: os.stat_result | None) -> bool:
    return file is not None and file.st_size == shard.size and file.st_mtime_ns == shard.mtime_ns


def _not_there(shard: ShardInfo, rows: np.ndarray) -> np.ndarray:
    """bool [count]: the samples of ``rows`` of which a member is not where it was in the file as it is now."""
    members = _members_found(TarWalk(shard.path)) or ()
    found = {(split_name(member.name)[0], member.offset, member.size) for member in members}
    there = np.ones(len(rows), dtype=bool)
    for part in PARTS:
        places = zip(rows["key"].tolist(), rows[f"{part}_offset"].tolist(), rows[f"{part}_size"].tolist(), strict=True)
        there &= np.fromiter((place[2] < 0 or place in found for place in places), dtype=bool, count=len(rows))
    return ~there


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
        same = _same_headers([shard for shard in differ if shard.name in doubtful], folder)
        renewed |= {name: present[name].st_mtime_ns for name in same}
        with contextlib.suppress(OSError):                    # a folder that cannot be written is compared every time
            _write_table(folder / INDEX_FOLDER, _renewed(table, renewed))
    return _renewed(shards, renewed)


def _renewed(shards: list[ShardInfo], times: Mapping[str, int]) -> list[ShardInfo]:
    if not times:
        return shards
    return [ShardInfo(*shard[:-1], times.get(shard.name, shard.mtime_ns)) for shard in shards]


def _same_headers(shards: list[ShardInfo], folder: Path) -> list[str]:
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


@dataclass
class _OpenShard:
    """A shard's rows, and the file once a member was asked for."""

    rows: np.ndarray
    handle: int | None = None


@dataclass
class ShardReader:
    """Positioned reads of members; picklable, safe after a fork.

    At most ``max_open`` shards stay open, fewer where the process may not open so many files; a reader that goes to and
    fro between more of them opens one at almost every read.
    """

    index: ShardIndex
    max_open: int = 128
    _open: OrderedDict[int, _OpenShard] = field(default_factory=OrderedDict, repr=False)
    _most: int = 0                # of `max_open`, what this process may; asked for with the first shard

    def __getstate__(self) -> dict:
        return {"index": self.index, "max_open": self.max_open, "_open": OrderedDict(), "_most": 0}

    def row(self, shard: int, sample: int) -> np.void:
        """The sample's row of :func:`member_dtype`."""
        return self._opened(shard).rows[sample]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, fewer if the shard was cut since it was indexed.

        Raises :class:`UserError` for one that cannot be read, and of these :class:`VanishedShard` for one that is gone.
        """
        return self._retried(shard, lambda: os.pread(self._handle(shard), size, offset))

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def _opened(self, shard: int) -> _OpenShard:
        entry = self._open.get(shard)
        if entry is not None:
            self._open.move_to_end(shard)
            return entry
        if not self._most:
            self._most = most_open(self.max_open)
        entry = self._open[shard] = _OpenShard(self.index.members(shard))
        if len(self._open) > self._most:
            self._forget(next(iter(self._open)))
        return entry

    def _handle(self, shard: int) -> int:
        entry = self._opened(shard)
        if entry.handle is None:
            entry.handle = os.open(self.index.shards[shard].path, os.O_RDONLY)
        return entry.handle

    def _retried(self, shard: int, action: Callable[[], Read]) -> Read:
        """``action``, again after a failure: network file systems drop handles (ESTALE) and come back."""
        for attempt in range(READ_ATTEMPTS):
            try:
                return action()
            except OSError as error:
                self._forget(shard)
                failure = error
            if attempt < READ_ATTEMPTS - 1:
                time.sleep(0.1 * 4**attempt)
        path = self.index.shards[shard].path
        kind = VanishedShard if isinstance(failure, GONE_ERRORS) else UserError
        raise kind(f"the shard {path} cannot be read: {failure.strerror}; bring it back, {SKIP}, "
                   f"or {REBUILD.format(folder=path.parent)}")

    def _forget(self, shard: int) -> None:
        entry = self._open.pop(shard, None)
        if entry is not None and entry.handle is not None:
            os.close(entry.handle)


class VanishedShard(UserError):
    """A shard that was there at the start and is no more; a disk or a server that fails is another matter."""


def most_open(wanted: int) -> int:
    """How many of ``wanted`` shards this process may keep open, beside ``FILES_LEFT`` other files; its soft limit is
    raised as far as needed and as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_A_SHARD * wanted + FILES_LEFT
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):      # systems have limits of their own beside it
        allowed = soft
    return max(1, (allowed - FILES_LEFT) // FILES_A_SHARD)
