"""``data.num_captions``: several captions of a sample in a batch, in every tier, without moving anything else."""

import io
import itertools
from collections import Counter

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from dalle.data.index import ShardIndex
from dalle.data.loader import train_batches, validation_batches
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.writer import ShardWriter
from dalle.training.loop import split

COUNT, SIZE = 12, 8


def captions_of(number: int) -> list[str]:
    """One to three captions, which say whose they are."""
    return [f"caption {place} of {number}" for place in range(1 + number % 3)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    with ShardWriter(folder / "train", 4) as writer:
        for number in range(COUNT):
            picture = io.BytesIO()
            Image.effect_noise((3 * SIZE, 2 * SIZE), 60 + number).convert("RGB").save(picture, "png")
            writer.write(picture.getvalue(), "png", captions_of(number))
    CaptionTokenizer.train_from_shards(ShardIndex.load(str(folder / "train")), 300).save(folder / "tokenizer")
    return folder


def batches(data, count, batch_size=6, share=None, **changes):
    settings = DataConfig(**{"train": str(data / "train"), "validation": str(data / "train"), "image_size": SIZE,
                             "crop": "random", "flip": True, "tokenizer": str(data / "tokenizer"), "text_length": 6,
                             "workers": 0, "caption_dropout": 0.2, "shuffle_buffer": 3, **changes})
    loader = train_batches(settings, seed=4, batch_size=batch_size, **(share or {}))
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize("tier", ["exact", "resampled", "sequential"])
def test_every_sample_brings_captions_of_its_own_drawn_with_replacement(data, tier):
    drawn = Counter()
    for batch in batches(data, 60, tier=tier, num_captions=5):
        for caption, captions in zip(batch["caption"], batch["captions"], strict=True):
            own = captions_of(int(caption.rpartition(" ")[2]))
            assert len(captions) == 5 and set(captions) <= set(own)
            drawn.update(captions if len(own) == 3 else [])
    shares = Counter()
    for caption, count in drawn.items():
        shares[caption[: len("caption 0")]] += count / drawn.total()
    assert all(abs(share - 1 / 3) < 0.07 for share in shares.values()) and len(shares) == 3


@pytest.mark.parametrize("tier", ["exact", "resampled", "sequential"])
def test_nothing_else_of_a_batch_changes(data, tier):
    for plain, several in zip(batches(data, 6, tier=tier), batches(data, 6, tier=tier, num_captions=3), strict=True):
        assert several.keys() - plain.keys() == {"captions"} and len(several["captions"]) == 6
        for name, value in plain.items():
            same = torch.equal(value, several[name]) if isinstance(value, torch.Tensor) else value == several[name]
            assert same, name


def test_processes_divide_the_same_captions(data):
    whole = batches(data, 4, num_captions=3)
    shares = [batches(data, 4, num_captions=3, share={"rank": rank, "world_size": 2}) for rank in range(2)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [part["captions"][place] for place in range(3) for part in parts] == batch["captions"]


def test_validation_gives_the_first_ones_again_and_again(data):
    settings = DataConfig(train=str(data / "train"), validation=str(data / "train"), image_size=SIZE, workers=0,
                          num_captions=2)
    found = [captions for batch in validation_batches(settings, seed=0, batch_size=5) for captions in batch["captions"]]
    assert found == [(captions_of(number) * 2)[:2] for number in range(COUNT)]


def test_a_micro_batch_has_the_captions_of_its_samples(data):
    (batch,) = batches(data, 1, num_captions=2)
    first, second = split(batch, 2)
    assert first["captions"] == batch["captions"][:3] and second["captions"] == batch["captions"][3:]
    assert first["caption"] == batch["caption"][:3]


@pytest.mark.parametrize("changes", [{"num_captions": 0}, {"num_captions": 2, "caption": "first"},
                                     {"num_captions": 2, "caption": "none"}])
def test_impossible_numbers(changes):
    with pytest.raises(ValidationError, match="num_captions"):
        DataConfig(train="x", **changes)
