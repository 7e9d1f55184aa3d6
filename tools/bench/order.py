"""What the index and the reading order of a very large data set cost one process: time and memory.

    PYTHONPATH=. python tools/bench/order.py [--shards 100000] [--samples 10000] [--folder FOLDER]

Makes a folder of that many shards (empty files of the size that the table names) with its index, loads it as training
does, each file's size compared with the table, and asks the order for positions far away. 100,000 shards take about
5 s to make and no disk space but their names. Times are the process's own (user and system), so that a busy neighbour
does not count, and by the clock; memory is what the process holds more after each row, garbage collected.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil

from dalle.data.index import INDEX_FOLDER, TABLE_FILE, VERSION, ShardIndex, read_table
from dalle.data.order import Order
from dalle.data.shard import ShardInfo

SHARD_BYTES = 1 << 20
FAR = 987_654_321
BATCH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--samples", type=int, default=10_000, help="in each shard")
    parser.add_argument("--lanes", type=int, default=64)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--folder", type=Path, help="where the shards are made and left (default: a temporary folder)")
    options = parser.parse_args()
    if options.folder:
        measure(make_shards(options.folder.absolute(), options.shards, options.samples), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(make_shards(Path(folder), options.shards, options.samples), options)


def make_shards(folder: Path, shards: int, samples: int) -> Path:
    """The placeholder shards and their table, unless they are there."""
    table = folder / INDEX_FOLDER / TABLE_FILE
    if table.exists():
        return folder
    table.parent.mkdir(parents=True, exist_ok=True)
    infos = [ShardInfo(f"{number:05d}.tar", str(folder), samples, SHARD_BYTES, f"{number:032x}", {})
             for number in range(shards)]
    rows = []
    for info in infos:
        with open(info.path, "wb") as file:
            file.truncate(SHARD_BYTES)
        rows.append({"name": info.name, "count": info.count, "size": info.size, "digest": info.digest,
                     "mtime_ns": info.path.stat().st_mtime_ns})
    table.write_text(json.dumps({"version": VERSION, "fingerprint": ShardIndex(infos).fingerprint, "shards": rows}))
    return folder


def measure(folder: Path, options: argparse.Namespace) -> None:
    print(f"{options.shards:,} shards x {options.samples:,} samples = {options.shards * options.samples:,}; "
          f"C = {options.lanes}, K = {options.window}; table {size_of_table(folder):.1f} MB")
    print(f"{'':56}{'first':>10}{'by clock':>10}{'again':>10}{'memory':>10}")
    row("read the table and check its fingerprint", lambda: read_table(folder))
    index = row("load: the same, and every shard's name and size on disk", lambda: ShardIndex.load(str(folder)))
    order = row("set up the order", lambda: Order(index.counts, 0, options.lanes, options.window))
    far = min(FAR, options.shards * options.samples - BATCH)
    row(f"seek to position {far:,}", lambda: order(far))
    epoch = order._epoch(0)
    first = int(np.searchsorted(epoch.ends, 0, side="right"))
    row("permute one window", lambda: (order._windows.clear(), order._window(0, 0, 0, first, epoch.ends))[1])
    row(f"locate a batch of {BATCH} positions there", lambda: order.locate(np.arange(far, far + BATCH)))


def row(what: str, action: Callable[[], object]) -> object:
    """Do it twice and print the times and the memory held after the first."""
    process = psutil.Process()
    gc.collect()
    held = process.memory_info().rss
    started, clock = time.process_time(), time.perf_counter()
    result = action()
    first, by_clock = time.process_time() - started, time.perf_counter() - clock
    gc.collect()
    grown = process.memory_info().rss - held
    started = time.process_time()
    action()
    again = time.process_time() - started
    print(f"{what:56}{1e3 * first:7.1f} ms{1e3 * by_clock:7.1f} ms{1e3 * again:7.1f} ms{max(grown, 0) / 1e6:7.1f} MB",
          flush=True)
    return result


def size_of_table(folder: Path) -> float:
    return (folder / INDEX_FOLDER / TABLE_FILE).stat().st_size / 1e6


if __name__ == "__main__":
    main()
