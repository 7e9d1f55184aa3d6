#!/usr/bin/env python
"""Pictures a second: shards to batches and decoders alone, beside webdataset with Pillow, in turns in one process.

    PYTHONPATH=. OMP_NUM_THREADS=1 python tools/bench/data.py
    PYTHONPATH=. OMP_NUM_THREADS=1 python tools/bench/data.py --cases jpeg-512-256 --workers 0 --pictures 300 --rounds 5

Makes its pictures (smoothed noise under shapes, quality 90) in a temporary folder. The peer is ``webdataset`` with
``decode("pil")``, bicubic resizing and batches made in the worker. A figure is the median of the rounds in pictures a
core-second: processor time of this process and of its workers, which a busy machine disturbs least; a ratio is the
median of the rounds' own. ``wall`` is by the clock, for an idle machine. The case ``codes`` reads no pictures: 1,024
cached codes and a caption a sample, as a transformer does.
"""

import argparse
import functools
import io
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw, ImageFilter
from torch.utils.data import DataLoader

from dalle.data import quick
from dalle.data.codes import CodesWriter
from dalle.data.decode import decode_image, decode_pixels
from dalle.data.index import ShardIndex
from dalle.data.loader import PREFETCHED_BATCHES, train_batches
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.transforms import needed_sides, to_square
from dalle.data.writer import ShardWriter

SHARDS = 4
CAPTIONS = ["a red circle on a grey field", "two blue squares beside a small green triangle, seen from above"]


class Case(NamedTuple):
    kind: str           # as Pillow names it
    side: int           # of the stored pictures
    size: int           # of those in a batch


CODES = "codes"
CASES = {f"{kind}-{side}-{size}": Case(kind, side, size) for kind, side, size in [
    ("jpeg", 256, 64), ("jpeg", 512, 256), ("jpeg", 256, 256), ("webp", 256, 64), ("webp", 512, 256)]}


class Figure(NamedTuple):
    pictures: int
    core_seconds: float
    seconds: float


Contender = Callable[[], Figure]           # one round of it


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, CODES], default=[*CASES, CODES])
    parser.add_argument("--workers", nargs="*", type=int, default=[0, 2])
    parser.add_argument("--pictures", type=int, default=1000, help="of each case (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the contenders")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    shuffle = random.Random(arguments.seed)
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            measure = measure_codes if name == CODES else functools.partial(measure_case, name)
            measure(Path(folder), arguments, shuffle)


def measure_case(name: str, folder: Path, arguments: argparse.Namespace, shuffle: random.Random) -> None:
    case = CASES[name]
    files = make_shards(folder, case.kind, case.side, arguments.pictures)
    print(f"\n## {name}: {len(files)} pictures, {np.mean([len(file) for file in files]) / 1024:.1f} KiB each\n")
    show("decoded, cut and resized", interleave(decoders(case, files[:200]), arguments.rounds, shuffle))
    for workers in arguments.workers:
        loaders = pipelines(case, folder, workers, arguments)
        measure_loaders(loaders, workers, arguments, shuffle)


def measure_codes(folder: Path, arguments: argparse.Namespace, shuffle: random.Random) -> None:
    print(f"\n## {CODES}: {arguments.pictures} samples\n")
    make_shards(folder, "jpeg", 16, arguments.pictures)
    index = ShardIndex.load(str(folder / "train"))
    with CodesWriter(folder / "codes", index, codec_digest="any", num_codes=8192, grid=(32, 32)) as writer:
        writer.write(np.random.default_rng(0).integers(0, 8192, (arguments.pictures, 1, 1024)))
    for workers in arguments.workers:
        loader = tessera(folder, workers, arguments, images=False, codes=str(folder / "codes"),
                         tokenizer=str(folder / "tokenizer"))
        measure_loaders({"Tessera, codes and captions to ids": loader}, workers, arguments, shuffle)


def measure_loaders(loaders: "dict[str, Loading]", workers: int, arguments: argparse.Namespace,
                    shuffle: random.Random) -> None:
    title = f"batches of {arguments.batch_size}, {'no worker' if not workers else f'{workers} workers'}"
    try:
        show(title, interleave({label: loading.round_of for label, loading in loaders.items()}, arguments.rounds,
                               shuffle))
    finally:
        for loading in loaders.values():
            loading.close()


# -- what is measured

def make_shards(folder: Path, kind: str, side: int, count: int) -> list[bytes]:
    files = []
    with ShardWriter(folder / "train", -(-count // SHARDS)) as writer:
        for number in range(count):
            file = io.BytesIO()
            scene(side, number).save(file, kind, quality=90)
            files.append(file.getvalue())
            writer.write(files[-1], "jpg" if kind == "jpeg" else kind, CAPTIONS)
    CaptionTokenizer.train_from_shards(ShardIndex.load(str(folder / "train")), 300).save(folder / "tokenizer")
    return files


def scene(side: int, seed: int) -> Image.Image:
    """Smoothed noise under eight ellipses."""
    rng = np.random.default_rng(seed)
    rough, fine = (Image.fromarray(rng.integers(0, 256, (edge, edge, 3), dtype=np.uint8)) for edge in (side // 8, side))
    image = Image.blend(rough.resize((side, side), Image.Resampling.BICUBIC),
                        fine.filter(ImageFilter.GaussianBlur(1)), 0.25)
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        left, right, top, bottom = (int(value) for pair in rng.integers(0, side, (2, 2)) for value in np.sort(pair))
        draw.ellipse([left, top, right, bottom], fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def decoders(case: Case, files: list[bytes]) -> dict[str, Contender]:
    sides = needed_sides(case.size, "center")

    def ours(data: bytes, draft: tuple[int, int] | None) -> np.ndarray:
        return to_square(decode_pixels(data, draft=draft), case.size, "center", False, None)

    ways: dict[str, Callable[[bytes], np.ndarray]] = {
        "Pillow, bicubic": lambda data: bicubic(case.size, Image.open(io.BytesIO(data)).convert("RGB")),
        "Pillow, area": lambda data: to_square(decode_image(data), case.size, "center", False, None),
    }
    if case.kind == "jpeg":
        ways["Tessera, whole"] = lambda data: ours(data, None)
    if case.kind == "jpeg" and case.side > case.size:
        ways["Tessera, shrunk by Pillow"] = lambda data: without_quick(lambda: ours(data, sides))
        ways["Tessera, shrunk"] = lambda data: ours(data, sides)

    def timed(way: Callable[[bytes], np.ndarray]) -> Figure:
        with Stopwatch([]) as watch:
            for data in files:
                way(data)
        return Figure(len(files), *watch.passed)

    return {label: functools.partial(timed, way) for label, way in ways.items()}


def without_quick(action: Callable[[], np.ndarray]) -> np.ndarray:
    decoder, quick.jpeg_decoder = quick.jpeg_decoder, lambda: None
    try:
        return action()
    finally:
        quick.jpeg_decoder = decoder


def bicubic(size: int, image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)


def text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode()


class Loading(NamedTuple):
    round_of: Contender
    close: Callable[[], None]


def pipelines(case: Case, folder: Path, workers: int, arguments: argparse.Namespace) -> dict[str, Loading]:
    loader = DataLoader(webdataset_of(folder / "train", case.size, arguments.batch_size), batch_size=None,
                        num_workers=workers, prefetch_factor=PREFETCHED_BATCHES if workers else None,
                        persistent_workers=workers > 0)
    peer = endless(loader)
    found = {"webdataset, Pillow, bicubic": Loading(functools.partial(one_round, peer, loader, arguments), peer.close)}
    if case.kind == "jpeg" and case.side > case.size:
        found["Tessera, whole"] = tessera(folder, workers, arguments, image_size=case.size, jpeg_draft=False)
    found["Tessera"] = tessera(folder, workers, arguments, image_size=case.size)
    found["Tessera, captions to ids"] = tessera(folder, workers, arguments, image_size=case.size,
                                                tokenizer=str(folder / "tokenizer"))
    return found


def tessera(folder: Path, workers: int, arguments: argparse.Namespace, **settings: object) -> Loading:
    config = DataConfig(train=str(folder / "train"), workers=workers, **settings)
    loader = train_batches(config, seed=0, batch_size=arguments.batch_size)
    return Loading(functools.partial(one_round, iter(loader), loader._loader, arguments), loader.close)


def webdataset_of(train: Path, side: int, batch_size: int):
    import webdataset

    urls = [str(path) for path in sorted(train.glob("*.tar"))]
    return (webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("pil")
            .to_tuple("jpg;webp", "txt").map_tuple(functools.partial(bicubic, side), text)
            .batched(batch_size, partial=False))


def endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


# -- how it is measured

class Stopwatch:
    """Core-seconds and seconds, of this process and of ``workers``."""

    def __init__(self, workers: list[int]):
        self.processes = [psutil.Process(), *map(psutil.Process, workers)]

    def now(self) -> tuple[float, float]:
        others = sum(sum(process.cpu_times()[:2]) for process in self.processes[1:])
        return time.process_time() + others, time.monotonic()

    def __enter__(self) -> "Stopwatch":
        self.start = self.now()
        return self

    def __exit__(self, *error: object) -> None:
        self.passed = [after - before for after, before in zip(self.now(), self.start, strict=True)]


def one_round(batches: Iterator, loader: DataLoader, arguments: argparse.Namespace) -> Figure:
    """As many batches as hold all pictures once, after those that the workers have made ahead meanwhile."""
    for _ in range(1 + PREFETCHED_BATCHES * loader.num_workers):
        next(batches)
    count = max(1, arguments.pictures // arguments.batch_size)
    with Stopwatch([worker.pid for worker in getattr(loader._iterator, "_workers", [])]) as watch:
        for _ in range(count):
            next(batches)
    return Figure(count * arguments.batch_size, *watch.passed)


def interleave(contenders: dict[str, Contender], rounds: int, shuffle: random.Random) -> dict[str, list[Figure]]:
    figures: dict[str, list[Figure]] = {label: [] for label in contenders}
    for number in range(rounds + 1):
        for label in shuffle.sample(list(contenders), len(contenders)):
            figure = contenders[label]()
            if number:                              # the first warms up
                figures[label].append(figure)
    return figures


def show(title: str, figures: dict[str, list[Figure]]) -> None:
    """A table; the first contender is what the others are measured by."""
    def per_core(found: list[Figure]) -> list[float]:
        return [figure.pictures / max(figure.core_seconds, 1e-9) for figure in found]

    first = per_core(next(iter(figures.values())))
    print(f"| {title} | pictures a core-second | ratio | wall |\n| --- | --- | --- | --- |")
    for label, found in figures.items():
        ratio = statistics.median(rate / base for rate, base in zip(per_core(found), first, strict=True))
        wall = statistics.median(figure.pictures / figure.seconds for figure in found)
        print(f"| {label} | {statistics.median(per_core(found)):,.0f} | {ratio:.2f} | {wall:,.0f} |", flush=True)
    print()


if __name__ == "__main__":
    main()
