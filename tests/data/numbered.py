"""What the tests of loading share: sets whose pictures are their numbers, and batches taken apart."""

import io
import itertools

import torch
from PIL import Image

from dalle.data.reasons import Tally
from dalle.data.settings import DataConfig
from dalle.data.writer import ShardWriter

COUNT, SIZE = 23, 8


def png(number, size=SIZE):
    """A flat picture whose red value is its number, so that a batch can be read back."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number, 2 * number, 0)).save(buffer, "png")
    return buffer.getvalue()


def config(data, **changes):
    values = {"train": str(data / "train"), "validation": str(data / "train"), "image_size": SIZE, "workers": 0,
              "lanes": 3, "window": 2, "tokenizer": str(data / "tokenizer"), "text_length": 12}
    return DataConfig(**{**values, **changes})


def take(loader, count):
    return list(itertools.islice(loader, count))


def equal(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, Tally):
            assert (value.counts, value.examples) == (second[name].counts, second[name].examples), name
            continue
        assert torch.equal(value, second[name]) if isinstance(value, torch.Tensor) else value == second[name], name


def interleave(parts):
    """The global batch out of the ranks' parts."""
    whole = {}
    for name in parts[0]:
        if isinstance(parts[0][name], torch.Tensor):
            whole[name] = torch.stack([part[name] for part in parts], 1).flatten(0, 1)
        else:
            whole[name] = [value for group in zip(*(part[name] for part in parts), strict=True) for value in group]
    return whole


def damaged_set(folder):
    """Nine samples a shard; of shard 0, numbers 2, 3 and 8 are bad, each in its own way."""
    with ShardWriter(folder, 9) as writer:
        for number in range(18):
            image = {2: png(2)[:-30], 3: b"<html>"}.get(number, png(number))
            writer.write(image, "png", ["" if number == 8 else f"caption {number}"])
    return folder


def numbered_shards(folder, count=14, per_shard=4):
    """``count`` samples whose pictures are their numbers, with an index."""
    with ShardWriter(folder, per_shard) as writer:
        for number in range(count):
            writer.write(png(number), "png", ["a"])
    return folder


def reds(loaders, steps):
    """The pictures' numbers in the batches that the loaders of all ranks give, by position."""
    found = {}
    for loader in loaders:
        for batch in take(loader, steps):
            found |= dict(zip(batch["position"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
    return [found[position] for position in sorted(found)]
