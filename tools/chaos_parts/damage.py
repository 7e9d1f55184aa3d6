"""Shards of which some samples are damaged, in every way, before and after they were indexed; what they really hold."""

import itertools
import os
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path


@dataclass(frozen=True)
class Truth:
    """What the shards hold, known from making them: the keys of each shard in order, and the damaged ones."""

    shards: tuple[tuple[str, ...], ...]
    bad: frozenset[str]

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.shards))

    def epoch(self) -> Counter[str]:
        """How often each key must be met in an epoch: once, and once more for each damaged one right before it."""
        expected = Counter()
        for keys in self.shards:
            for index in range(len(keys)):
                behind = itertools.islice(itertools.cycle(keys), index, index + len(keys))
                expected[next(key for key in behind if key not in self.bad)] += 1
        return expected


def damage_shards(folder: Path, rng: random.Random) -> Truth:
    """Damage samples of every shard in each way of ``DAMAGE``, and cut the last shard short."""
    shards, bad = [], set()
    paths = sorted(folder.glob("*.tar"))
    for path in paths:
        samples = read_samples(path)
        chosen = rng.sample(sorted(samples), len(DAMAGE))
        for key, spoil in zip(chosen, DAMAGE, strict=True):
            spoil(samples[key])
        write_samples(path, samples)
        keys = list(samples)
        if path == paths[-1]:
            keys = cut_short(path, keys)
        shards.append(tuple(keys))
        bad |= set(chosen) & set(keys)
    return Truth(tuple(shards), frozenset(bad))


def truncated(sample: dict[str, bytes]) -> None:
    sample["png"] = sample["png"][:len(sample["png"]) // 2]


def not_a_picture(sample: dict[str, bytes]) -> None:
    sample["png"] = b"<html><body>404 Not Found</body></html>"


def empty(sample: dict[str, bytes]) -> None:
    sample["png"] = b""


def caption_not_utf8(sample: dict[str, bytes]) -> None:
    sample["txt"] = b"a \x92 red circle"


DAMAGE: tuple[Callable[[dict[str, bytes]], None], ...] = (truncated, not_a_picture, empty, caption_not_utf8)


def read_samples(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def write_samples(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def cut_short(path: Path, keys: list[str]) -> list[str]:
    """Cut the shard inside the first member of its last sample; the keys that are left."""
    with tarfile.open(path) as tar:
        first = next(member for member in tar if member.name.startswith(keys[-1]))
    os.truncate(path, first.offset_data + first.size // 2)
    return keys[:-1]


def overwrite_pictures(folder: Path, truth: Truth, rng: random.Random) -> Truth:
    """Overwrite the picture of one good sample a shard where it lies, after the shards were indexed."""
    bad = set(truth.bad)
    for path, keys in zip(sorted(folder.glob("*.tar")), truth.shards, strict=True):
        key = rng.choice([key for key in keys if key not in bad])
        with tarfile.open(path) as tar:
            picture = next(member for member in tar if member.name == f"{key}.png")
        with open(path, "r+b") as file:
            file.seek(picture.offset_data)
            file.write(rng.randbytes(picture.size))
        bad.add(key)
    return Truth(truth.shards, frozenset(bad))
