"""What every maker of shards shares: samples in, a folder with both splits out, and the record of how it was made.

    OUT/train/00000.tar ...  OUT/validation/00000.tar ...  (an index beside each)  OUT/dataset.json
"""

import json
import multiprocessing
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dalle.data.reasons import Tally, printable
from dalle.errors import UserError

RECORD = "dataset.json"
SPLITS = ("train", "validation")
PROGRESS_SECONDS = 2.0

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Sample:
    """One encoded picture with its captions, and the split that it belongs to."""

    split: str
    image: bytes
    extension: str
    captions: list[str]
    meta: dict[str, Any] | None


@dataclass(frozen=True)
class LeftOut:
    """Something that did not become a sample: why, in a few words that are counted, and what it was."""

    reason: str
    name: str


def build_dataset(out: Path, recipe: dict[str, Any], samples: Callable[[], Iterable[Sample | LeftOut]], *,
                  total: int | None = None, samples_per_shard: int = 1000, force: bool = False,
                  report: Callable[[str], None] = print, details: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write what ``samples()`` yields below ``out`` and return the record that is kept in ``dataset.json``.

    ``recipe`` is everything that decides the bytes; ``details`` are kept beside it. When ``out`` was made by the same
    recipe nothing is done; another recipe is a :class:`UserError` unless ``force``, which deletes the files that the
    record names and no others. The shards are written to ``out.partial`` and moved at the end.
    """
    place = out.resolve()
    before = _made_before(out, recipe, force)
    if before is not None and before["recipe"] == recipe:
        report(f"{printable(str(out))}: already made ({_counts(before['counts'])})")
        return before
    if before is not None:
        _refuse_foreign_shards(place, set(before["files"]))
    partial = place.with_name(place.name + ".partial")
    try:
        _remove_partial(partial)
        partial.mkdir(parents=True)
        counts, left_out = _write(partial, samples(), total, samples_per_shard, report)
        if not counts["train"]:
            raise UserError(f"{out}: no sample for training came out{_because(counts, left_out)}; nothing was written")
        record = {"recipe": recipe, **(details or {}), "counts": counts, **_kept(left_out), "files": _files(partial)}
        _put(place, before, partial, record)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        _remove_partial(partial)
    _say(out, counts, left_out, report)
    return record


def _say(out: Path, counts: dict[str, int], left_out: Tally, report: Callable[[str], None]) -> None:
    report(f"{printable(str(out))}: {_counts(counts)}")
    for line in left_out.lines():
        report(f"  left out {line}")
    if not counts["validation"]:
        report("  nothing is held out: train with data.validation=null, or make the set again with a part held out")


def _kept(left_out: Tally) -> dict[str, Any]:
    return {"left_out": dict(sorted(left_out.counts.items())), "examples": dict(sorted(left_out.examples.items()))}


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _write_record(folder: Path, record: Mapping[str, Any]) -> None:
    draft = folder / f".{RECORD}.part"
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(folder / RECORD)


def _remove_partial(partial: Path) -> None:
    """Delete what an interrupted run left. A folder of that name that holds anything else is not ours."""
    if not partial.is_dir() or partial.is_symlink():
        return
    foreign = {path.name for path in partial.iterdir()} - {*SPLITS, RECORD, f".{RECORD}.part"}
    if foreign:
        raise UserError(f"{partial}, where the set is written first, holds {printable(sorted(foreign)[0])}; "
                        "move it away or give another --out")
    shutil.rmtree(partial)


def _put(out: Path, before: Mapping[str, Any] | None, partial: Path, record: Mapping[str, Any]) -> None:
    """Make ``partial`` the set at ``out``: by one rename where nothing is there."""
    if out.exists():
        _replace(out, before["files"] if before else [], partial, record)
    else:
        _write_record(partial, record)
        partial.rename(out)


def _replace(out: Path, old: list[str], partial: Path, record: Mapping[str, Any]) -> None:
    """Put the new set into ``out`` in place of the ``old`` files; all others stay.

    Killed on the way it leaves a record of no recipe, which names the files of both: the next start asks for --force.
    """
    new = record["files"]
    _write_record(out, {"recipe": {}, "counts": dict.fromkeys(SPLITS, 0), "files": sorted({*old, *new})})
    for name in old:
        (out / name).unlink(missing_ok=True)
    for name in new:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(partial / name, out / name)
    for folder in sorted({(out / name).parent for name in old}, reverse=True):        # index/ before its split
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    _write_record(out, record)


def _refuse_foreign_shards(out: Path, ours: set[str]) -> None:
    """A shard that somebody put among those of a set would be trained on with the new one, or be overwritten."""
    for split in SPLITS:
        for path in sorted((out / split).glob("*.tar")):
            if f"{split}/{path.name}" not in ours:
                raise UserError(f"{printable(str(path))} was not made by this command; move it away, "
                                "or give another --out")


def _made_before(out: Path, recipe: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The record of ``out`` if it holds a set that is this one or may be replaced; None when it is empty."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give another --out")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        before = record["recipe"]
        if not isinstance(before, dict) or not all(_is_ours(name) for name in record.get("files", [])):
            raise ValueError("not a record of ours")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{out} holds files but no {RECORD} that says what they are; use another --out") from None
    if before == recipe:
        return record
    changed = ", ".join(f"{key} {before.get(key)!r} -> {recipe.get(key)!r}"
                        for key in sorted(before.keys() | recipe.keys()) if before.get(key) != recipe.get(key))
    if not before and not force:
        raise UserError(f"{out} was being replaced when that was interrupted; give --force to do it again")
    if not force:
        raise UserError(f"{out} was made with other parameters ({changed}); give another --out, or --force to replace "
                        "its shards (other files in it stay)")
    if "files" not in record:
        raise UserError(f"{out} was made by an older version, which did not record its files; delete "
                        f"{out / 'train'}, {out / 'validation'} and {out / RECORD} yourself, or give another --out")
    return record


def _is_ours(name: object) -> bool:
    """Whether a name in a record is one that this writes: a record from elsewhere must not delete anything else."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    return len(parts) in (2, 3) and parts[0] in SPLITS and ".." not in parts


def _write(folder: Path, samples: Iterable[Sample | LeftOut], total: int | None, samples_per_shard: int,
           report: Callable[[str], None]) -> tuple[dict[str, int], Tally]:
    from dalle.data.writer import ShardWriter  # brings torch, which the worker processes can do without

    counts = dict.fromkeys(SPLITS, 0)
    left_out = Tally()
    started = last = time.monotonic()
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for sample in samples:
            if isinstance(sample, LeftOut):
                left_out.add(sample.reason, sample.name)
            else:
                if sample.split not in writers:
                    writers[sample.split] = stack.enter_context(ShardWriter(folder / sample.split, samples_per_shard))
                writers[sample.split].write(sample.image, sample.extension, sample.captions, sample.meta)
                counts[sample.split] += 1
            if time.monotonic() - last >= PROGRESS_SECONDS:
                last = time.monotonic()
                done = sum(counts.values()) + left_out.total()
                of = f" of {total:,}" if total else ""
                report(f"  {done:,}{of} pictures, {done / (last - started):,.0f} a second")
    return counts, left_out


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {split}" for split, count in counts.items())


def _because(counts: dict[str, int], left_out: Tally) -> str:
    held = f" ({counts['validation']} were held out)" if counts["validation"] else ""
    return held + (f" (left out: {left_out.summary()}; {left_out.advice()})" if left_out.counts else "")


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, to split by."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def in_batches(items: Iterable[Job], size: int) -> Iterator[tuple[Job, ...]]:
    """``items`` in tuples of ``size``, the last one shorter; fetched as they are asked for."""
    remaining = iter(items)
    while batch := tuple(islice(remaining, size)):
        yield batch


def in_order(function: Callable[[Job], Result], jobs: Iterable[Job], workers: int) -> Iterator[Result]:
    """``function`` of every job, in the order of the jobs, in ``workers`` processes; a few jobs ahead, not all."""
    if workers <= 1:
        yield from map(function, jobs)
        return
    # Fresh processes instead of forks: a fork of a process with threads (pyarrow, BLAS) can hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque = deque()
        for job in jobs:
            ahead.append(pool.submit(function, job))
            if len(ahead) > 2 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
