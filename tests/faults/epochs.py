"""What the faults of the data are told by: an epoch over the tiny shards, and how a command refuses."""

import itertools
from collections import Counter
from pathlib import Path

from PIL import Image
from tiny_shards import SAMPLES, SHARDS, encoded, sample_key

from dalle.data.loader import train_batches, validation_batches
from dalle.data.settings import DataConfig

EPOCH = SHARDS * SAMPLES // 12      # steps of 12 samples
GOOD = {sample_key(shard, sample) for shard in range(SHARDS) for sample in range(SAMPLES)}


def data_config(folder: Path | str, **changes) -> DataConfig:
    settings = {"image_size": 32, "workers": 0, "lanes": 4, "window": 2, "max_bad_fraction": 1.0, **changes}
    return DataConfig(train=str(folder), validation=str(folder), **settings)


def one_epoch(folder: Path | str, **changes) -> tuple[list[str], Counter]:
    """The keys that an epoch over the tiny shards trains on, and its counters."""
    loader = train_batches(data_config(folder, **changes), seed=0, batch_size=12)
    samples = loader.samples_per_epoch or len(GOOD)
    return keys_of(loader, -(-samples // 12))[:samples], loader.skipped


def keys_of(batches, count: int) -> list[str]:
    return [key for batch in itertools.islice(batches, count) for key in batch["key"]]


def one_line(ended, *words: str) -> None:
    """The command refused: status 2, and one line on stderr that holds ``words``."""
    assert ended.status == 2 and ended.error.startswith("error: ") and ended.error.count("\n") == 1, ended
    for word in words:
        assert word in ended.error, ended.error


def sample_of(key: str, shade: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", encoded(Image.new("RGB", (32, 32), (shade, 0, 0)), "png")), (f"{key}.txt", b"a caption")]


def delivered(folder: Path) -> list[tuple[str, int]]:
    """(key, red of the picture) of every sample of the shards, in order."""
    batches = validation_batches(data_config(folder), seed=0, batch_size=4)
    return [(key, int(image[0, 0, 0])) for batch in batches
            for key, image in zip(batch["key"], batch["image"], strict=True)]


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}
