"""What every maker of shards shares: samples in, a folder with both splits out, and the record of how it was made.

    OUT/train/00000.tar ...  OUT/validation/00000.tar ...  (an index beside each)  OUT/dataset.json
"""

import json
import multiprocessing
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

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
                  report: Callable[[str], None] = print) -> dict[str, Any]:
    """Write what ``samples()`` yields below ``out`` and return the record that is kept in ``dataset.json``.

    ``recipe`` is everything that decides the bytes. When ``out`` was made by the same recipe nothing is done; another
    recipe is a :class:`UserError` unless ``force``. The shards are written to ``out.partial`` and renamed at the end,
    so that ``out`` is whole or absent.
    """
    record = _made_before(out, recipe, force)
    if record is not None:
        report(f"{out}: already made ({_counts(record['counts'])})")
        return record
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        counts, left_out = _write(partial, samples(), total, samples_per_shard, report)
        if not counts["train"]:
            raise UserError(f"{out}: no sample for training came out{_because(left_out)}; nothing was written")
        record = {"recipe": recipe, "counts": counts, "left_out": dict(sorted(left_out.items()))}
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    report(f"{out}: {_counts(counts)}")
    for reason, count in left_out.most_common():
        report(f"  left out {count:>7,}  {reason}")
    return record


def _made_before(out: Path, recipe: dict[str, Any], force: bool) -> dict[str, Any] | None:
    """The record of ``out`` if it was made by ``recipe``; None when it must be made."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give another --out")
    if not out.exists() or not any(out.iterdir()):
        return None
    try:
        record = json.loads((out / RECORD).read_text(encoding="utf-8"))
        before = record["recipe"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{out} holds files but no {RECORD} that says what they are; use another --out") from None
    if before == recipe:
        return record
    if force:
        return None
    changed = ", ".join(f"{key} {before.get(key)!r} -> {recipe.get(key)!r}"
                        for key in sorted(before.keys() | recipe.keys()) if before.get(key) != recipe.get(key))
    raise UserError(f"{out} was made with other parameters ({changed}); give another --out, or --force to replace it")


def _write(folder: Path, samples: Iterable[Sample | LeftOut], total: int | None, samples_per_shard: int,
           report: Callable[[str], None]) -> tuple[dict[str, int], Counter[str]]:
    from dalle.data.writer import ShardWriter  # brings torch, which the worker processes can do without

    counts = dict.fromkeys(SPLITS, 0)
    left_out: Counter[str] = Counter()
    started = last = time.monotonic()
    with ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        for sample in samples:
            if isinstance(sample, LeftOut):
                left_out[sample.reason] += 1
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


def _because(left_out: Counter[str]) -> str:
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.most_common())
    return f" (left out: {reasons})" if reasons else ""


def hash_fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone, to split by."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def in_batches(items: Sequence[Job], size: int) -> Iterator[tuple[Job, ...]]:
    """``items`` in tuples of ``size``, the last one shorter."""
    for start in range(0, len(items), size):
        yield tuple(items[start:start + size])


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
