"""What the shards hold: counts, sizes and a fingerprint in one small table, member offsets in one side file a shard.

``FOLDER/index/index.json`` holds the table and ``FOLDER/index/SHARD.npy`` the offsets, so that the reading order needs
only the table, and a sample is one positioned read. A shard is never unpacked: see :mod:`dalle.data.tar`.
"""

import fnmatch
import hashlib
import json
import logging
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, TypeVar

import numpy as np

from dalle.data.tar import Member, TarWalk
from dalle.errors import UserError

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
MISSING_SHARD = "missing_shard"      # the name that training without a shard is counted by
NO_PROBLEMS: dict[str, int] = {}
REBUILD = "run `python tools/index_shards.py {folder}` to index the folder again"


class ShardInfo(NamedTuple):
    """One shard: its file, its number of samples (those with a picture), its bytes and a digest of its headers."""

    name: str
    folder: str
    count: int
    size: int
    digest: str
    problems: dict[str, int]      # reason -> how many; what was left out, and what looks wrong

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


class ShardIndex:
    """The shards of one data set, in order. ``fingerprint`` changes with names, counts, sizes and digests.

    ``missing``: how many shards were left out because they are gone.
    """

    def __init__(self, shards: Sequence[ShardInfo], members: dict[int, np.ndarray] | None = None, missing: int = 0):
        self.shards = list(shards)
        self.missing = missing
        self._in_memory = members or {}

    @cached_property
    def counts(self) -> np.ndarray:
        """int64 [shards]: samples in each."""
        return np.array([shard.count for shard in self.shards], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        return int(self.counts.sum())

    @cached_property
    def fingerprint(self) -> str:
        hasher = hashlib.blake2b(digest_size=16)
        for shard in self.shards:
            row = f"{shard.name}\0{shard.count}\0{shard.size}\0{shard.digest}\n"
            hasher.update(row.encode("utf-8", "surrogateescape"))      # a file's name need not be UTF-8
        return hasher.hexdigest()

    @property
    def problems(self) -> Counter[str]:
        """What the header walk found, over all shards: reason -> how many."""
        return sum((Counter(shard.problems) for shard in self.shards if shard.problems), Counter())

    def members(self, shard_number: int) -> np.ndarray:
        """The rows of one shard, structured as :func:`member_dtype`; read from the side file at each call."""
        if shard_number in self._in_memory:
            return self._in_memory[shard_number]
        shard = self.shards[shard_number]
        path = Path(shard.folder) / INDEX_FOLDER / f"{shard.stem}.npy"
        advice = REBUILD.format(folder=shard.folder)
        try:
            rows = np.array(np.lib.format.open_memmap(path, mode="r"))      # no pickles, no archives
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
    def load(spec: str, on_missing: Literal["refuse", "skip"] = "refuse") -> "ShardIndex":
        """The index of ``spec``: a folder, a glob, a brace range ``{00000..00009}.tar``, several joined by ``::``.

        Shards without an index are walked now (with a log line) and the index is kept if the folder is writable.
        Raises :class:`UserError` for a missing shard, an index that disagrees with the files, a spec that is no path.
        ``on_missing="skip"``: an index without the missing shards, another data set with another fingerprint and
        order, as if they had never been there.
        """
        parts = [_load_part(part.strip(), on_missing == "skip") for part in str(spec).split("::")]
        index = _joined(parts)
        paths = [shard[:2] for shard in index.shards]
        if len(set(paths)) < len(paths):
            (name, folder), _ = Counter(paths).most_common(1)[0]
            raise UserError(f"data {spec!r} names the shard {Path(folder, name)} twice; give every shard once")
        if not index.num_samples:
            found = ", ".join(f"{reason} {count}" for reason, count in index.problems.items())
            raise UserError(f"data {spec!r}: its {len(index.shards)} shards hold no sample with a picture"
                            f"{f' ({found})' if found else ''}; a sample is KEY.jpg|png|webp and KEY.txt in a tar")
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
                _replace(target / f"{self.shards[number].stem}.npy", lambda file, rows=rows: np.save(file, rows))
            rows = [self.shards[number] for number in numbers]
            part = ShardIndex(rows)
            table = {"version": VERSION, "fingerprint": part.fingerprint,
                     "shards": [{"name": shard.name, "count": shard.count, "size": shard.size, "digest": shard.digest,
                                 **({"problems": shard.problems} if shard.problems else {})} for shard in rows]}
            text = json.dumps(table, indent=0 if len(rows) < 1000 else None) + "\n"
            _replace(target / TABLE_FILE, lambda file: file.write(text.encode()))
        except OSError as error:
            raise UserError(f"the index cannot be written into {target}: {error.strerror}; "
                            "check the permissions") from None


def scan_shard(path: Path) -> tuple[ShardInfo, np.ndarray]:
    """One shard's table row and its samples, by a walk over its headers."""
    path = path.absolute()
    if path.suffix != ".tar":
        raise UserError(f"{path} is no .tar; compressed archives cannot be read at offsets, unpack them to plain tars")
    walk = TarWalk(path)
    problems: Counter[str] = Counter()
    try:
        size = path.stat().st_size
        rows = _rows(walk, problems)
    except OSError as error:
        raise UserError(f"the shard {path} cannot be read: {error.strerror}") from None
    problems.update(reason for reason, _ in walk.problems)
    for _, detail in walk.problems:
        log.warning("shard %s: %s", path, detail)
    key_length = max((len(row[-1]) for row in rows), default=1)
    members = np.array(rows, dtype=member_dtype(key_length))
    return ShardInfo(path.name, str(path.parent), len(rows), size, walk.digest, dict(problems)), members


def _rows(walk: Iterable[Member], problems: Counter[str]) -> list[tuple]:
    """The samples among ``walk``'s members, in the order of their keys' first members; what is left out is counted.

    The members of a key are joined wherever they lie. Those that repeat what the key has already are another sample of
    that name: none of them is used, so that no sample is made of two.
    """
    samples: dict[bytes, Parts[Member]] = {}
    for key, parts in member_runs(((member.name, member) for member in walk), problems):
        known = samples.setdefault(key, {})
        if known.keys() & parts.keys():
            problems["duplicate_key"] += 1
        else:
            known |= parts
    rows: list[tuple] = []
    for key, parts in samples.items():
        reason = why_no_sample(key, parts)
        if reason is not None:
            problems[reason] += 1
            continue
        if "text" not in parts:
            problems["no_caption"] += 1        # kept: pictures alone train a codec, and the caption may be in the JSON
        kind, _ = parts["image"]
        numbers = [value for part in PARTS for value in (parts[part][1][1:] if part in parts else (-1, -1))]
        rows.append((*numbers, kind.encode(), key))
    return rows


def why_no_sample(key: bytes, parts: Mapping[str, object]) -> str | None:
    """The reason why the ``parts`` of ``key`` make no sample, or None."""
    if len(key) > LONGEST_KEY:
        return "key_too_long"
    return None if "image" in parts else "no_image"


def member_runs(members: Iterable[tuple[bytes, Part]], problems: Counter[str]) -> Iterator[tuple[bytes, Parts[Part]]]:
    """(key, its parts) of the (name, member) that follow one another; what belongs to no sample may lie between them.

    A run is complete when it is given: where reading it raises, nothing of it was given.
    """
    for key, run in groupby(_useful(members, problems), key=itemgetter(0)):
        parts: Parts[Part] = {}
        for _, part, extension, member in run:
            if part in parts:
                problems["duplicate_member"] += 1
            else:
                parts[part] = (extension, member)
        yield key, parts


def _useful(members: Iterable[tuple[bytes, Part]], problems: Counter[str]) -> Iterator[tuple[bytes, str, str, Part]]:
    """(key, part, extension, member) of all that can belong to a sample; the others are counted."""
    for name, member in members:
        key, extension = split_name(name)
        part = PART_OF.get(extension)
        if key is not None and part is not None:
            yield key, part, extension, member
        else:
            problems[_why_of_no_use(key, extension)] += 1


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


def _joined(parts: list[ShardIndex]) -> ShardIndex:
    members, start = {}, 0
    for part in parts:
        members.update({start + number: rows for number, rows in part._in_memory.items()})
        start += len(part.shards)
    return ShardIndex([shard for part in parts for shard in part.shards], members, sum(part.missing for part in parts))


def _load_part(spec: str, skip_missing: bool) -> ShardIndex:
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
            parts.append(_load_folder(Path(folder or "."), {os.path.basename(path) for path in paths}, spec,
                                      skip_missing))
        else:
            parts += [_load_pattern(path, spec, skip_missing) for path in paths]
    return _joined(parts)


def _place(path: str) -> tuple[str, bool]:
    """The folder of a path, and whether the path names one file there."""
    folder, name = os.path.split(path)
    return folder, name.endswith(".tar") and not glob_magic(name) and not os.path.isdir(path)


def _load_pattern(path: str, spec: str, skip_missing: bool) -> ShardIndex:
    if os.path.isdir(path):
        return _load_folder(Path(path), "*.tar", spec, skip_missing)
    folder, pattern = os.path.split(path)
    if glob_magic(folder):
        raise UserError(f"data {spec!r}: only the file name may hold wildcards; join several folders with '::'")
    if not glob_magic(pattern):
        raise UserError(f"data {spec!r}: there is no folder {path}; give a folder of .tar shards, a glob or a range")
    return _load_folder(Path(folder or "."), pattern, spec, skip_missing)


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


def _load_folder(folder: Path, wanted: str | set[str], spec: str, skip_missing: bool) -> ShardIndex:
    """The shards of ``folder`` that are in the set ``wanted`` or match the pattern, by its saved index or a walk."""
    if not folder.is_dir():
        raise UserError(f"data {spec!r}: there is no folder {folder}; check the path")
    folder = folder.absolute()
    sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".tar")}
    matches = wanted.__contains__ if isinstance(wanted, set) else re.compile(fnmatch.translate(wanted)).match
    present = {name: size for name, size in sizes.items() if matches(name)}
    absent = sorted(wanted - set(present)) if isinstance(wanted, set) else []
    if absent and not skip_missing:
        raise UserError(f"data {spec!r}: the shard {folder / absent[0]} does not exist"
                        f"{f' (and {len(absent) - 1} more)' if len(absent) > 1 else ''}; check the range, "
                        "or set data.on_missing=skip to train without it")
    table = read_table(folder)
    if table is None:
        if not present:
            raise UserError(f"data {spec!r}: no .tar shard there; give a folder of shards, a glob or a brace range")
        index = _index_now(folder, sorted(present), everything=len(present) == len(sizes))
    else:
        index = ShardIndex(_compared(folder, [shard for shard in table if matches(shard.name)], present, skip_missing))
        absent = sorted({*absent, *(shard.name for shard in table if matches(shard.name))} - set(present))
        if not index.shards:
            raise UserError(f"data {spec!r}: no shard matches; {folder} holds {len(table)} shards, {len(absent)} of "
                            "those wanted are missing")
    if absent:
        log.warning("training without %d missing shards of %s: %s%s", len(absent), folder, ", ".join(absent[:10]),
                    ", ..." if len(absent) > 10 else "")
    index.missing = len(absent)
    return index


def _compared(folder: Path, shards: list[ShardInfo], present: dict[str, int], skip_missing: bool) -> list[ShardInfo]:
    """``shards`` without those that may be missing; refuses an index that does not describe the files ``present``,
    since training on less, or on other bytes, must not go unseen."""
    advice = REBUILD.format(folder=folder)
    if skip_missing:
        shards = [shard for shard in shards if shard.name in present]
    for shard in shards:
        size = present.get(shard.name)
        if size is None:
            raise UserError(f"the shard {shard.path} is in the index but missing on disk; bring it back, set "
                            f"data.on_missing=skip to train without it, or {advice}")
        if size != shard.size:
            raise UserError(f"the shard {shard.path} has {size} bytes, its index says {shard.size}; {advice}")
    if len(present) > len(shards):
        extra = sorted(set(present) - {shard.name for shard in shards})
        raise UserError(f"the shard {folder / extra[0]} is not in the index of its folder; {advice}")
    return shards


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
                            dict(row["problems"]) if "problems" in row else NO_PROBLEMS) for row in rows]
        if any(type(name) is not str or type(count) is not int or "/" in name or count < 0
               for name, _, count, *_ in shards):
            raise ValueError("a shard's name or count is impossible")
        if any(type(number) is not int for shard in shards for number in shard.problems.values()):
            raise ValueError("a problem's count is no number")
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


def _replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write ``path`` beside its place and rename, so that several ranks may do it at once."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "wb") as file:
        write(file)
    os.replace(draft, path)


@dataclass
class ShardReader:
    """Positioned reads of members, over a bounded number of open shards; picklable, safe after a fork."""

    index: ShardIndex
    max_open: int = 128
    _open: OrderedDict[int, tuple[int, np.ndarray]] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict:
        return {"index": self.index, "max_open": self.max_open, "_open": OrderedDict()}

    def row(self, shard: int, sample: int) -> np.void:
        """The sample's row of :func:`member_dtype`."""
        return self._opened(shard)[1][sample]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, fewer if the shard was cut since it was indexed."""
        return self._retried(shard, lambda: os.pread(self._opened(shard)[0], size, offset))

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def _opened(self, shard: int) -> tuple[int, np.ndarray]:
        entry = self._open.get(shard)
        if entry is not None:
            self._open.move_to_end(shard)
            return entry
        rows = self.index.members(shard)
        handle = self._retried(shard, lambda: os.open(self.index.shards[shard].path, os.O_RDONLY))
        entry = self._open[shard] = (handle, rows)
        if len(self._open) > self.max_open:
            self._forget(next(iter(self._open)))
        return entry

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
        raise UserError(f"the shard {path} cannot be read: {failure.strerror}; bring it back, "
                        f"or {REBUILD.format(folder=path.parent)}")

    def _forget(self, shard: int) -> None:
        entry = self._open.pop(shard, None)
        if entry is not None:
            os.close(entry[0])
