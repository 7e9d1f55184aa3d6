#!/usr/bin/env python
"""Index shards: count their samples, note where each member lies, report what is wrong with them.

    python tools/index_shards.py data/coco/train
    python tools/index_shards.py 'data/coco/{00000..00040}.tar' --check

Every folder that holds one of the shards gets ``index/``, for all of its shards. ``--check`` writes nothing, compares
with the index that is there, and ends with status 1 when a shard is damaged or does not fit it.
"""

import argparse
import contextlib
import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from dalle.data.damage import DAMAGE
from dalle.data.index import ShardIndex, read_table
from dalle.data.reasons import printable
from dalle.data.shard import ShardInfo
from dalle.data.specs import expand_braces, glob_magic
from dalle.errors import LostProcess, UserError, run_command

ROWS_SHOWN = 10


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", help="a folder, a glob or a brace range; several joined by '::'")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read headers")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if anything is wrong")
    return parser.parse_args(arguments)


def folders_of(spec: str) -> list[Path]:
    """The folders that hold the shards of ``spec``, each once."""
    folders: dict[Path, None] = {}
    for part in spec.split("::"):
        for path in expand_braces(part.strip()):
            folder = Path(path) if Path(path).is_dir() else Path(path).parent
            if not folder.is_dir() or (folder != Path(path) and not glob_magic(path) and not Path(path).is_file()):
                raise UserError(f"there is no {path}; give a folder of .tar shards, a glob or a brace range")
            folders[folder.absolute()] = None
    return list(folders)


def index_folder(folder: Path, workers: int, check: bool) -> tuple[ShardIndex, bool]:
    """Walk the folder's shards; write the index, or compare with it. Returns (index, does the saved index fit)."""
    try:
        index = ShardIndex.build(sorted(folder.glob("*.tar")), workers)
    except BrokenProcessPool:
        raise LostProcess(f"a process that read the headers of {folder} was killed; if the memory ran out, "
                          "start again with fewer --workers") from None
    if not index.shards:
        raise UserError(f"{folder} holds no .tar shard")
    if not check:
        say_what_is_lost(folder, index)
        index.save()
        return index, True
    saved = read_table(folder)
    if saved is None:
        print(f"{folder} has no index")
        return index, False
    known = {shard.name: shard.content for shard in saved}
    names = {shard.name for shard in index.shards}
    if list(known.values()) == [shard.content for shard in index.shards]:
        return index, offsets_fit(folder, saved, index)
    differing = [shard.name for shard in index.shards if known.get(shard.name) != shard.content]
    differing += [f"{name} (missing)" for name in sorted(set(known) - names)]
    print(f"the index of {folder} does not fit: {printable(', '.join(differing[:ROWS_SHOWN]))}")
    return index, False


def say_what_is_lost(folder: Path, index: ShardIndex) -> None:
    """A line where the new index makes another data set of the folder than the one that is there."""
    with contextlib.suppress(UserError):                     # one that is damaged tells nothing
        saved = ShardIndex(read_table(folder) or [])
        if saved.shards and saved.fingerprint != index.fingerprint:
            print(f"{printable(str(folder))} had {len(saved.shards)} shards, {saved.num_samples} samples, fingerprint "
                  f"{saved.fingerprint}: the new index makes another data set of it, on which no run goes on that was "
                  "trained on the old one (with that, data.bad_shards=skip trains without what is lost)")


def offsets_fit(folder: Path, saved: list[ShardInfo], index: ShardIndex) -> bool:
    """Whether the saved offsets are those of the shards; prints which are not."""
    stored, sound = ShardIndex(saved), True
    for number, shard in enumerate(saved):
        try:
            if np.array_equal(stored.members(number), index.members(number)):
                continue
            print(f"the index of {folder} does not fit: the offsets of {printable(shard.name)} are others")
        except UserError as error:
            print(printable(str(error)))
        sound = False
    return sound


def report(folder: Path, index: ShardIndex) -> bool:
    """Print counts and problems; returns whether a shard is damaged."""
    size = sum(shard.size for shard in index.shards)
    print(f"{folder}: {len(index.shards)} shards, {index.num_samples} samples, {size / 1e6:.1f} MB, "
          f"fingerprint {index.fingerprint}")
    wrong = [shard for shard in index.shards if shard.problems]
    if wrong:
        print(f"{'shard':<24}{'samples':>9}{'bytes':>14}  problems")
        for shard in wrong[:ROWS_SHOWN]:
            listed = ", ".join(f"{reason} {count}" for reason, count in sorted(shard.problems.items()))
            print(f"{printable(shard.name):<24}{shard.count:>9}{shard.size:>14}  {listed}")
        if len(wrong) > ROWS_SHOWN:
            print(f"... and {len(wrong) - ROWS_SHOWN} more")
        print("in all:", *index.findings.lines(), sep="\n")
    return any(reason in shard.problems for shard in wrong for reason in DAMAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    sound = True
    for folder in folders_of(options.shards):
        index, fits = index_folder(folder, options.workers, options.check)
        damaged = report(folder, index)
        sound &= fits and not damaged
    return int(options.check and not sound)


if __name__ == "__main__":
    run_command(main)
