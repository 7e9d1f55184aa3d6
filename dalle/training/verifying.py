"""Which checkpoint a run goes on from, verified by all ranks: 12B parameters are 190 GB, minutes for one thread."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from dalle.training.checkpoint import Damage, Entries, check_hash, listed
from dalle.training.engines.base import Engine

THREADS = 4                      # of each rank; hashing and reading leave the interpreter to others
SECONDS_BETWEEN_LOOKS = 0.5


def newest_that_verifies(engine: Engine, checkpoints: Sequence[Path], feed: Callable[[], None]) \
        -> tuple[Path | None, dict[Path, str]]:
    """The first of ``checkpoints`` that verifies, and what is wrong with each before it; every rank must ask, with the
    same ones, as for :func:`find_fault_together`."""
    faults: dict[Path, str] = {}
    for path in checkpoints:
        fault = find_fault_together(engine, path, feed)
        if fault is None:
            return path, faults
        faults[path] = fault
    return None, faults


def find_fault_together(engine: Engine, path: Path, feed: Callable[[], None]) -> str | None:
    """:func:`dalle.training.checkpoint.find_fault` by all ranks, each of which hashes its share of the files.

    Every rank must ask, and all get the same answer. ``feed()`` is called whenever a rank has come forward.
    """
    entries = engine.together(lambda: _listed(path), only_rank0=True)
    if isinstance(entries, str):
        return entries
    mine = sorted(entries, key=lambda name: entries[name]["size"], reverse=True)[engine.rank::engine.world_size]
    hashed: list[None] = []      # one for every piece since the last look
    with ThreadPoolExecutor(THREADS) as pool:
        work = [pool.submit(check_hash, path, name, entries[name], lambda: hashed.append(None)) for name in mine]
        busy = 1
        while busy:
            wait(work, SECONDS_BETWEEN_LOOKS)
            busy, came = engine.all_reduce_max(int(not all(one.done() for one in work)), int(bool(hashed)))
            if came:
                hashed.clear()
                feed()
    errors = [error for one in work if (error := one.exception()) is not None]
    faults = engine.gather([str(error) for error in errors])
    for error in errors:
        if not isinstance(error, Damage):
            raise error
    return next((fault for share in faults for fault in share), None)


def _listed(path: Path) -> Entries | str:
    try:
        return listed(path)
    except Damage as damage:
        return str(damage)
