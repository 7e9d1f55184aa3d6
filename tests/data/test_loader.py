import io
import itertools
import os
import pickle
import resource
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from dalle.data.codes import CodesWriter
from dalle.data.dataset import ShardDataset
from dalle.data.index import ShardIndex
from dalle.data.loader import DataConfig, ValidationPositions, train_batches, validation_batches, view_batches
from dalle.data.order import Order
from dalle.data.reader import most_open
from dalle.data.reasons import Tally, remedy
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.writer import ShardWriter
from dalle.errors import LostProcess, UserError

COUNT, SIZE = 23, 8


def png(number, size=SIZE):
    """A flat picture whose red value is its number, so that a batch can be read back."""
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (number, 2 * number, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "train", 6) as writer:
        for number in range(COUNT):
            writer.write(png(number), "png", [f"picture number {number}", f"second caption of {number}"],
                         {"class_id": number % 3, "name": str(number)} if number != 5 else None)
    index = ShardIndex.load(str(folder / "train"))
    CaptionTokenizer.train_from_shards(index, 300).save(folder / "tokenizer")
    with CodesWriter(folder / "codes", index, codec_digest="d", num_codes=1000, grid=(2, 2), views=3) as writer:
        numbers = np.arange(COUNT)[:, None, None] * 10
        writer.write(numbers + np.arange(3)[None, :, None] + np.zeros((1, 1, 4), int))
    return folder


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


def test_a_batch_holds_what_the_order_says(data):
    loader = train_batches(config(data, codes=str(data / "codes")), seed=4, batch_size=6)
    order = Order(np.array([6, 6, 6, 5]), 4, lanes=3, window=2)
    tokenizer = CaptionTokenizer.load(data / "tokenizer")
    assert loader.samples_per_epoch == COUNT and loader.tokenizer.digest == tokenizer.digest
    for step, batch in enumerate(take(loader, 8)):                       # two epochs
        assert set(batch) == {"image", "text", "codes", "caption", "key", "position", "class_id"}
        assert batch["image"].dtype == torch.uint8 and batch["image"].shape == (6, 3, SIZE, SIZE)
        assert batch["image"].is_contiguous()
        assert batch["text"].dtype == batch["codes"].dtype == batch["class_id"].dtype == torch.int64
        for row in range(6):
            position = int(batch["position"][row])
            assert position == step * 6 + row
            _, shard, index = order(position)
            number = shard * 6 + index
            assert batch["key"][row] == f"{shard:05d}{index:04d}"
            assert batch["image"][row, 0].unique().tolist() == [number]
            assert batch["image"][row, 1].unique().tolist() == [2 * number]
            assert batch["caption"][row] in (f"picture number {number}", f"second caption of {number}")
            kept = tokenizer.decode(batch["text"][row].tolist())
            assert batch["caption"][row].startswith(kept)
            assert batch["class_id"][row] == (number % 3 if number != 5 else -1)
            assert batch["codes"][row].unique().item() // 10 == number
    assert not loader.skipped


@pytest.mark.parametrize(("world", "workers", "start"), [(1, 2, 0), (2, 0, 3), (3, 1, 1), (6, 0, 0)])
def test_ranks_workers_and_restarts_only_divide_the_same_batches(data, world, workers, start):
    settings = {"flip": True, "crop": "random", "image_size": 6, "codes": str(data / "codes"), "caption_dropout": 0.3}
    reference = take(train_batches(config(data, **settings), seed=1, batch_size=6), 6)
    loaders = [train_batches(config(data, workers=workers, **settings), seed=1, batch_size=6, rank=rank,
                             world_size=world, start_step=start) for rank in range(world)]
    for expected, *parts in zip(reference[start:], *loaders, strict=False):
        equal(interleave(parts), expected)
    for loader in loaders:
        loader.close()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Six pictures of 19 pixels a side, whose red value says in which column a pixel lies."""
    folder = tmp_path_factory.mktemp("places")
    with ShardWriter(folder / "train", 6) as writer:
        for _ in range(6):
            buffer = io.BytesIO()
            Image.fromarray(np.indices((19, 19, 3))[1].astype(np.uint8)).save(buffer, "png")
            writer.write(buffer.getvalue(), "png", ["a picture"], None)
    return folder


def test_augmented_pictures_are_a_function_of_seed_and_position(places):
    """Cut from 19 / 16 of the side and mirrored: elsewhere in every epoch, the same for any ranks, after any stop."""
    settings = DataConfig(train=str(places / "train"), validation=str(places / "train"), image_size=16, crop="random",
                          crop_from=19 / 16, flip=True, workers=0)
    batches = take(train_batches(settings, seed=1, batch_size=6), 20)                        # 20 epochs
    edges = {(int(image[0, 0, 0]), int(image[0, 0, -1])) for batch in batches for image in batch["image"]}
    assert edges == {pair for left in range(4) for pair in ((left, left + 15), (left + 15, left))}
    shares = [train_batches(settings, seed=1, batch_size=6, rank=rank, world_size=2, start_step=17) for rank in (0, 1)]
    for expected, *parts in zip(batches[17:], *shares, strict=False):
        equal(interleave(parts), expected)
    (plain,) = validation_batches(settings, seed=1, batch_size=6)
    assert len(plain["image"].flatten(1).unique(dim=0)) == 1                # whole pictures, neither cut nor mirrored
    assert plain["image"][0, 0, 0, 0] <= 1 and plain["image"][0, 0, 0, -1] >= 17


def test_a_chain_of_stops_and_changes_is_the_uninterrupted_run(data):
    settings = {"images": False, "codes": str(data / "codes")}
    step, keys = 0, []
    for world, workers, steps in [(2, 1, 3), (1, 2, 2), (6, 0, 1), (3, 1, 4), (1, 0, 5), (2, 2, 2)]:
        loaders = [train_batches(config(data, workers=workers, **settings), seed=1, batch_size=6, rank=rank,
                                 world_size=world, start_step=step) for rank in range(world)]
        shares = [take(loader, steps) for loader in loaders]
        keys += [interleave(parts)["key"] for parts in zip(*shares, strict=True)]
        step += steps
        for loader in loaders:
            loader.close()
    assert keys == [batch["key"] for batch in take(train_batches(config(data, **settings), seed=1, batch_size=6), step)]
    line = [key for batch in keys for key in batch]
    for epoch in range(len(line) // COUNT):
        assert len(set(line[epoch * COUNT:(epoch + 1) * COUNT])) == COUNT


def test_every_epoch_is_every_sample_once(data):
    batches = take(train_batches(config(data), seed=0, batch_size=1), 3 * COUNT)
    for epoch in range(3):
        keys = [batch["key"][0] for batch in batches[epoch * COUNT:(epoch + 1) * COUNT]]
        assert len(set(keys)) == COUNT


def test_randomness_of_captions_views_and_dropout(data):
    settings = {"codes": str(data / "codes"), "caption_dropout": 0.5, "images": False}
    batches = take(train_batches(config(data, **settings), seed=0, batch_size=COUNT), 20)
    captions = {caption for batch in batches for caption in batch["caption"]}
    assert len(captions) == 2 * COUNT and "image" not in batches[0]
    assert {int(code) % 10 for batch in batches for code in batch["codes"][:, 0]} == {0, 1, 2}
    dropped = sum(int((batch["text"] == 0).all(1).sum()) for batch in batches)
    assert 0.4 < dropped / (20 * COUNT) < 0.6
    first = take(train_batches(config(data, caption="first"), seed=0, batch_size=COUNT), 1)[0]
    assert all(caption.startswith("picture number") for caption in first["caption"])


def test_text_does_not_depend_on_whether_pictures_are_read(data):
    settings = {"codes": str(data / "codes"), "caption_dropout": 0.2, "flip": True}
    with_images = take(train_batches(config(data, **settings), seed=3, batch_size=6), 5)
    without = take(train_batches(config(data, images=False, **settings), seed=3, batch_size=6), 5)
    for first, second in zip(with_images, without, strict=True):
        first.pop("image")
        equal(first, second)


def test_remembered_ids_are_the_encoded_ids(data):
    loader = train_batches(config(data, bpe_dropout=0.0), seed=0, batch_size=COUNT)
    for batch in take(loader, 4):
        expected = np.stack([loader.tokenizer.encode(caption, 12) for caption in batch["caption"]])
        np.testing.assert_array_equal(batch["text"].numpy(), expected)


def test_validation_is_one_plain_pass_in_order(data):
    loader = validation_batches(config(data, flip=True, crop="random", caption_dropout=1.0, images=True,
                                       validation_codes=str(data / "codes")), seed=9, batch_size=5)
    assert len(loader) == 5
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["key"]) for batch in batches] == [5, 5, 5, 5, 3]
        numbers = [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]
        assert numbers == list(range(COUNT))
        captions = [caption for batch in batches for caption in batch["caption"]]
        assert captions == [f"picture number {number}" for number in numbers]
        assert batches[0]["meta"][4] == {"class_id": 1, "name": "4"} and batches[1]["meta"][0] == {}
        assert [int(code) for batch in batches for code in batch["codes"][:, 0]] == [10 * n for n in numbers]
        assert all(row.any() for batch in batches for row in batch["text"])
    limited = validation_batches(config(data, workers=2), seed=9, batch_size=4, limit=6)
    for _ in range(2):
        assert [batch["position"].tolist() for batch in limited] == [[0, 1, 2, 3], [4, 5]]
    limited.close()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("local", [1, 2, 3, 5])
@pytest.mark.parametrize("total", range(4, 40))
def test_validation_gives_every_rank_as_many_batches(total, local, world):
    ranks = [list(ValidationPositions(total, local * world, rank, world)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(0 < len(batch) <= local for batches in ranks for batch in batches)
    seen = sorted(position for batches in ranks for batch in batches for position in batch)
    assert seen == list(range(total - (total % world if local == 1 else 0)))
    for step in range(total // (local * world)):                  # full global batches keep their positions
        for rank in range(world):
            start = step * local * world
            if len(ranks[rank][step]) == local:
                assert ranks[rank][step] == list(range(start + rank, start + local * world, world))


def test_without_captions(tmp_path):
    with ShardWriter(tmp_path / "d", 4) as writer:
        for number in range(6):
            writer.write(png(number), "png", [])
    settings = {"train": str(tmp_path / "d"), "image_size": SIZE, "workers": 0}
    batch = next(iter(train_batches(DataConfig(caption="none", **settings), seed=0, batch_size=6)))
    assert sorted(batch["image"][:, 0, 0, 0].tolist()) == list(range(6))
    assert "caption" not in batch and "text" not in batch
    with pytest.raises(UserError, match="empty_caption.*caption=none"):
        next(iter(train_batches(DataConfig(**settings), seed=0, batch_size=6)))


def damaged_set(folder):
    """Nine samples a shard; of shard 0, numbers 2, 3 and 8 are bad, each in its own way."""
    with ShardWriter(folder, 9) as writer:
        for number in range(18):
            image = {2: png(2)[:-30], 3: b"<html>"}.get(number, png(number))
            writer.write(image, "png", ["" if number == 8 else f"caption {number}"])
    return folder


def test_bad_samples_are_replaced_by_the_next_good_one_and_counted(tmp_path, caplog):
    settings = {"train": str(damaged_set(tmp_path / "d")), "validation": str(tmp_path / "d"), "image_size": SIZE,
                "max_bad_fraction": 1.0}
    for workers in (0, 2):
        loader = validation_batches(DataConfig(workers=workers, **settings), seed=0, batch_size=6)
        batches = list(loader)
        assert all("skipped" not in batch for batch in batches)
        numbers = [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]
        assert numbers == [0, 1, 4, 4, 4, 5, 6, 7, 0, *range(9, 18)]          # 8 goes around the end of its shard
        assert [int(position) for batch in batches for position in batch["position"]] == list(range(18))
        assert batches[0]["caption"][2] == "caption 4" and batches[0]["key"][2] == "000000004"
        assert loader.skipped == {"truncated_image": 1, "not_an_image": 1, "empty_caption": 1}
        loader.close()
    assert "bad sample replaced: not_an_image" in caplog.text and "key 000000003, sample 3 of " in caplog.text


def test_too_many_bad_samples_stop_the_run(tmp_path):
    settings = {"train": str(damaged_set(tmp_path / "d")), "validation": str(tmp_path / "d"), "image_size": SIZE}
    with pytest.raises(UserError, match=r"3 of 18 samples .*max_bad_fraction=0\.1: .*; 1 not_an_image \(000000003 in "
                                        r"00000\.tar\): .*look at one; 1 empty_caption .*data\.caption=none"):
        list(validation_batches(DataConfig(workers=0, **settings), seed=0, batch_size=6))
    seen = 0
    with pytest.raises(UserError, match="cannot be used"):
        for batch in train_batches(DataConfig(workers=0, **settings), seed=0, batch_size=6):
            seen += len(batch["key"])
    assert 190 < seen < 210                                          # a few samples are no fraction yet


def test_keys_are_printable_text(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("a\n\x1b[2Jb.png", "é.png", os.fsdecode(b"caf\xe9.png")):
            info = tarfile.TarInfo(name)
            info.size = len(png(1))
            tar.addfile(info, io.BytesIO(png(1)))
    settings = DataConfig(train=str(tmp_path), image_size=SIZE, workers=0, caption="none")
    keys = take(train_batches(settings, seed=0, batch_size=3), 1)[0]["key"]
    assert sorted(keys) == ["a\\n\\x1b[2Jb", "caf\\xe9", "é"]


def test_a_set_without_a_good_sample_ends(tmp_path):
    with ShardWriter(tmp_path / "d", 4) as writer:
        for _ in range(9):
            writer.write(b"<html>", "png", ["a"])
    with pytest.raises(UserError, match="no usable sample.*not_an_image"):
        take(train_batches(DataConfig(train=str(tmp_path / "d"), workers=0), seed=0, batch_size=2), 1)


def test_view_batches_keep_rows_and_samples_aligned(tmp_path):
    settings = DataConfig(train=str(damaged_set(tmp_path / "d")), image_size=SIZE, workers=0, max_bad_fraction=0.5)
    batches = list(view_batches(settings, seed=0, batch_size=5, views=2))
    assert [batch["image"].shape for batch in batches][0] == (5, 2, 3, SIZE, SIZE)
    assert torch.cat([batch["position"] for batch in batches]).tolist() == list(range(18))
    valid = torch.cat([batch["valid"] for batch in batches])
    assert (~valid).nonzero().flatten().tolist() == [2, 3]           # a missing caption does not matter here
    reds = torch.cat([batch["image"] for batch in batches])[:, :, 0, 0, 0]
    assert reds.tolist() == [[n, n] if n not in (2, 3) else [0, 0] for n in range(18)]


def test_views_are_different_crops(tmp_path):
    ramp = Image.fromarray(np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None], (8, 64, 3)).copy())
    buffer = io.BytesIO()
    ramp.save(buffer, "png")
    with ShardWriter(tmp_path / "d") as writer:
        writer.write(buffer.getvalue(), "png", ["a"])
    settings = DataConfig(train=str(tmp_path / "d"), image_size=8, crop="random", workers=0)
    image = next(iter(view_batches(settings, seed=0, batch_size=1, views=6)))["image"]
    assert len(set(image[0, :, 0, 0, 0].tolist())) > 3


def test_codes_without_a_picture_are_replaced(data, tmp_path):
    index = ShardIndex.load(str(data / "train"))
    with CodesWriter(tmp_path / "codes", index, codec_digest="d", num_codes=1000, grid=(1, 1)) as writer:
        writer.write(np.arange(COUNT)[:, None, None], np.arange(COUNT) != 4)
    loader = validation_batches(config(data, images=False, validation_codes=str(tmp_path / "codes")), seed=0,
                                batch_size=COUNT)
    assert next(iter(loader))["codes"].flatten().tolist() == [0, 1, 2, 3, 5, 5, *range(6, COUNT)]
    assert loader.skipped == {"no_codes": 1}


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


@pytest.mark.parametrize("whole_folder", [True, False])
def test_a_missing_shard_stops_the_run_or_leaves_every_position_what_it_was(tmp_path, caplog, whole_folder):
    folder = numbered_shards(tmp_path / "d")
    train = str(folder) if whole_folder else f"{folder}/{{00000..00003}}.tar"
    settings = DataConfig(train=train, image_size=SIZE, workers=0, bad_shards="skip", validation=train)

    def loaders():
        return [train_batches(settings, seed=0, batch_size=2, rank=rank, world_size=2) for rank in range(2)]

    whole = loaders()
    before = reds(whole, 14)                                        # two epochs
    (folder / "00001.tar").unlink()                                 # numbers 4 to 7
    with pytest.raises(UserError, match=r"00001\.tar .*data\.bad_shards=skip"):
        train_batches(settings.model_copy(update={"bad_shards": "refuse"}), seed=0, batch_size=4)
    skipping = loaders()
    assert [loader.skipped for loader in skipping] == [{"missing_shard": 1}, {}]      # counted once, over the ranks
    assert skipping[0].identity == whole[0].identity                # so that a resume goes on
    stand_in = {4: 8, 5: 9, 6: 10, 7: 11}                           # the same places of the next shard
    assert reds(skipping, 14) == [stand_in.get(number, number) for number in before]
    lost = sum((loader.skipped for loader in skipping), Counter())
    assert lost == {"missing_shard": 1, "in_bad_shard": 2 * len(stand_in)}          # and no word of max_bad_fraction
    assert "00001.tar is in the index but missing on disk: 4 of its 4 samples are gone" in caplog.text
    measured = [int(red) for batch in validation_batches(settings, seed=0, batch_size=5)
                for red in batch["image"][:, 0, 0, 0]]
    assert measured == [0, 1, 2, 3, *range(8, 14)]                  # a measure takes no sample twice
    for path in folder.glob("*.tar"):
        path.unlink()
    with pytest.raises(UserError, match="no shard matches; .* 4 of those wanted are missing"):
        train_batches(settings, seed=0, batch_size=4)


def test_a_missing_shard_that_no_index_knows_leaves_another_data_set(tmp_path, caplog):
    folder = numbered_shards(tmp_path / "d", count=12)
    settings = DataConfig(train=f"{folder}/{{00000..00003}}.tar", image_size=SIZE, workers=0, bad_shards="skip")
    loader = train_batches(settings, seed=0, batch_size=4)
    assert loader.skipped == {"missing_shard": 1} and loader.samples_per_epoch == 12
    assert "training without 1 missing shards" in caplog.text and "00003.tar" in caplog.text
    assert loader.report() == [f"left out: 1 missing_shard (00003.tar): {remedy('missing_shard')}"]
    with pytest.raises(UserError, match=r"00003\.tar does not exist"):
        train_batches(settings.model_copy(update={"bad_shards": "refuse"}), seed=0, batch_size=4)


def test_a_shard_lost_in_a_run_that_skips_costs_its_samples_alone(tmp_path):
    folder = numbered_shards(tmp_path / "d")
    settings = DataConfig(train=str(folder), image_size=SIZE, workers=0, bad_shards="skip")
    expected = reds([train_batches(settings, seed=0, batch_size=2)], 7)
    loader = train_batches(settings, seed=0, batch_size=2)
    (folder / "00002.tar").unlink()
    stand_in = {8: 12, 9: 13, 10: 12, 11: 13}                       # the last shard has two samples
    assert reds([loader], 7) == [stand_in.get(number, number) for number in expected]
    assert loader.skipped == {"in_bad_shard": 4}


def test_many_samples_behind_a_cut_are_replaced_by_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.data.dataset.MOST_REPLACEMENTS_TRIED", 6)
    folder = numbered_shards(tmp_path / "d", count=24, per_shard=12)
    settings = DataConfig(train=str(folder), image_size=SIZE, workers=0, max_bad_fraction=1)
    loader = train_batches(settings, seed=0, batch_size=24)
    os.truncate(folder / "00000.tar", 2 * 4 * 512)                 # two samples of four blocks are left
    assert sorted(reds([loader], 1)) == sorted([0, 1, *range(12, 24), *range(14, 24)])


def test_a_reader_opens_each_shard_of_the_windows_once(tmp_path, monkeypatch):
    shards = 300                                                    # all of them in 64 lanes, a window each
    numbered_shards(tmp_path / "d", count=2 * shards, per_shard=2)
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, caption="none")
    dataset = ShardDataset(settings, ShardIndex.load(settings.train), seed=0, training=True)
    opened, really = Counter(), os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.update([str(path)]) or really(path, *rest))
    for start in range(0, 4 * shards, 100):                         # two epochs
        dataset.fetch(range(start, start + 100))
    assert len(opened) == shards and set(opened.values()) == {1}
    dataset._reader.close()


@pytest.mark.parametrize(("soft", "hard", "raised", "expected"), [
    (4096, 4096, None, 1000), (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 1000),
    (1024, 1 << 20, 3256, 1000), (1024, resource.RLIM_INFINITY, 3256, 1000), (1024, 1156, 1156, 300),
    (1024, 2048, "not allowed", 256), (64, 64, 64, 1),
])
def test_shards_stay_open_as_far_as_the_process_may_open_files(monkeypatch, soft, hard, raised, expected):
    asked = []

    def setrlimit(kind, limits):
        asked.append(limits)
        if raised == "not allowed":
            raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert most_open(1000) == expected and asked in ([], [(raised, hard)], [(2048, 2048)])


def test_a_damaged_json_costs_its_sample_only_where_it_is_read(tmp_path):
    damaged = [b"{", b"[]", b'{"class_id": "dog"}', b"\xff", b"{}", b'{"class_id": 3}']
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, data in enumerate(damaged):
            for extension, content in (("png", png(number)), ("json", data), *([("txt", b"a")] if number else [])):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    settings = DataConfig(train=str(tmp_path), validation=str(tmp_path), image_size=SIZE, workers=0, max_bad_fraction=1)

    def one_pass(**changes):
        options = {"needs_classes": changes.pop("needs_classes", False)}
        loader = validation_batches(settings.model_copy(update=changes), seed=0, batch_size=6, **options)
        (batch,) = loader
        return batch["class_id"].tolist(), loader.skipped, loader.partly_used

    # the first has its caption, or nothing, in the JSON; 1 and what stands in for it
    assert one_pass() == ([-1, -1, -1, -1, -1, 3], {"damaged_json": 1}, {"damaged_json": 4})
    assert one_pass(caption="none") == ([-1, -1, -1, -1, -1, 3], {}, {"damaged_json": 4})
    classes, skipped, partly_used = one_pass(needs_classes=True)
    assert classes == [-1, -1, -1, -1, -1, 3] and skipped == {"damaged_json": 4} and not partly_used


def test_captions_that_are_cut_and_words_that_are_unknown_are_counted_and_said_once(tmp_path, caplog):
    captions = ["a red bird", "a very long red bird", "a green bird", "a very long green bird"]
    with ShardWriter(tmp_path / "d") as writer:
        for number, caption in enumerate(captions):
            writer.write(png(number), "png", [caption])
    CaptionTokenizer.train_words(["a very long red bird"]).save(tmp_path / "t")
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, workers=0, tokenizer=str(tmp_path / "t"),
                          text_length=3, bpe_dropout=0)
    for dropout, expected in ((0.0, {"caption_cut": 4, "unknown_word": 4}), (1.0, {})):
        loader = train_batches(settings.model_copy(update={"caption_dropout": dropout}), seed=0, batch_size=4)
        batches = take(loader, 2)                                   # the second epoch from what is remembered
        assert loader.partly_used == expected and not loader.skipped and "partly_used" not in batches[0]
        said = [message for message in caplog.messages if "used in part" in message]
        assert len(said) == len(expected) and ("data.text_length" in "".join(said)) == bool(expected)
        caplog.clear()


def test_the_older_name_of_bad_shards_is_taken(caplog):
    assert DataConfig(train="x", on_missing="skip").bad_shards == "skip" and "is now data.bad_shards" in caplog.text
    with pytest.raises(ValidationError, match="older name of bad_shards"):
        DataConfig(train="x", on_missing="skip", bad_shards="skip")


def test_a_shard_cut_after_indexing_is_noticed(tmp_path):
    with ShardWriter(tmp_path / "d", 40) as writer:
        for number in range(40):
            writer.write(png(number), "png", ["a"])
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, workers=0)
    loader = train_batches(settings, seed=0, batch_size=8)
    shard = tmp_path / "d" / "00000.tar"
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match="truncated_shard"):
        take(loader, 60)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_vanished_shard_is_one_clear_line_even_from_a_worker(tmp_path, workers):
    with ShardWriter(tmp_path / "d", 4) as writer:
        for number in range(4):
            writer.write(png(number), "png", ["a"])
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, workers=workers)
    loader = train_batches(settings, seed=0, batch_size=2)
    (tmp_path / "d" / "00000.tar").unlink()
    with pytest.raises(UserError) as caught:
        take(loader, 2)
    assert "00000.tar cannot be read" in str(caught.value) and "\n" not in str(caught.value)
    loader.close()


def test_workers_and_what_starts_them_outlive_the_signals_of_the_job(data):
    loader = train_batches(config(data, workers=1), seed=0, batch_size=2)
    batches = iter(loader)
    next(batches)
    worker = loader._loader._iterator._workers[0]
    server = psutil.Process(worker.pid).parent()
    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        os.kill(worker.pid, name)
        server.send_signal(name)
    for _ in range(20):
        next(batches)
    assert worker.is_alive() and server.is_running() and server.status() != psutil.STATUS_ZOMBIE
    loader.close()
    assert not worker.is_alive()


def test_workers_are_forks_of_a_process_with_one_thread_that_is_not_this_one(data):
    loader = train_batches(config(data, workers=2), seed=0, batch_size=2)
    next(iter(loader))
    (server,) = {psutil.Process(worker.pid).parent() for worker in loader._loader._iterator._workers}
    assert server.pid != os.getpid() and server.num_threads() == 1
    loader.close()


def test_workers_go_on_in_the_environment_and_folder_of_the_process(tmp_path, monkeypatch):
    for number in (1, 2):                             # the process that starts them is the same
        with ShardWriter(tmp_path / str(number) / "shards") as writer:
            writer.write(png(number), "png", ["a"])
        monkeypatch.chdir(tmp_path / str(number))
        monkeypatch.setenv("OF_THIS_TEST", f"0000{number - 1}")
        (tmp_path / str(number) / "shards" / "00000.tar").rename(f"shards/0000{number - 1}.tar")
        settings = DataConfig(train="pipe:cat shards/$OF_THIS_TEST.tar", tier="sequential", allow_pipe=True, workers=1,
                              image_size=SIZE)
        loader = train_batches(settings, seed=0, batch_size=1)
        assert take(loader, 1)[0]["image"][0, 0, 0, 0] == number
        loader.close()


TRAINER = """
import sys
from dalle.data.loader import DataConfig, train_batches

if __name__ == "__main__":
    loader = train_batches(DataConfig.model_validate_json(sys.argv[1]), seed=0, batch_size=2)
    for _ in loader:
        print("a batch", flush=True)
"""


@pytest.mark.parametrize("early", [False, True])
def test_all_processes_of_a_killed_trainer_end_without_a_word_on_its_semaphores(data, tmp_path, early):
    (tmp_path / "trainer.py").write_text(TRAINER)
    trainer = subprocess.Popen([sys.executable, str(tmp_path / "trainer.py"),
                                config(data, workers=2).model_dump_json()],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        of_it = psutil.Process(trainer.pid)
        while early and len(of_it.children()) < 2:    # no worker yet
            time.sleep(0.01)
        assert early or trainer.stdout.readline() == "a batch\n"
        processes = of_it.children(recursive=True)
        assert len(processes) == (2 if early else 4), processes      # a fork server, a semaphore tracker, two workers
    finally:
        trainer.kill()
    _, left = psutil.wait_procs(processes, 120)        # the server when it has imported all
    assert not left and "resource_tracker" not in trainer.communicate()[1]


@pytest.mark.parametrize("waiting", [True, False])
def test_a_killed_worker_is_named_when_its_batch_is_asked_for_and_nowhere_else(data, waiting):
    loader = train_batches(config(data, workers=2), seed=0, batch_size=2)
    batches = iter(loader)
    next(batches)
    victim = loader._loader._iterator._workers[1]
    if waiting:
        os.kill(loader._loader._iterator._workers[0].pid, signal.SIGSTOP)      # so that the batches run out
        threading.Timer(0.3, os.kill, (victim.pid, signal.SIGKILL)).start()
    else:
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(0.3)
    began = time.monotonic()
    with pytest.raises(LostProcess, match=rf"worker 1 \(process {victim.pid}\) was killed by signal 9.*data\.workers"):
        take(batches, 50)
    assert time.monotonic() - began < 4
    if waiting:
        os.kill(loader._loader._iterator._workers[0].pid, signal.SIGCONT)
    loader.close()


def test_workers_without_the_process_that_starts_them_are_lost_and_the_next_loader_has_another(data):
    loader = train_batches(config(data, workers=1), seed=0, batch_size=2)
    batches = iter(loader)
    next(batches)
    psutil.Process(loader._loader._iterator._workers[0].pid).parent().kill()
    with pytest.raises(LostProcess, match=r"worker 0 \(process \d+\) was lost with the process that starts"):
        take(batches, 1000)
    loader.close()
    again = train_batches(config(data, workers=1), seed=0, batch_size=2)
    assert len(take(again, 2)) == 2
    again.close()


def test_iterating_leaves_the_global_generator_alone(data):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    take(train_batches(config(data), seed=0, batch_size=2), 2)
    assert torch.equal(torch.rand(1), expected)


def test_dataset_can_be_sent_to_a_spawned_worker(data):
    index = ShardIndex.load(str(data / "train"))
    dataset = ShardDataset(config(data), index, seed=0, training=True,
                           tokenizer=CaptionTokenizer.load(data / "tokenizer"))
    expected = dataset.fetch([3, 1, 4])
    equal(pickle.loads(pickle.dumps(dataset)).fetch([3, 1, 4]), expected)


def test_wrong_requests(data, tmp_path):
    with pytest.raises(UserError, match="12 samples cannot be shared by 5 processes; use one of 1, 2, 3, 4, 6, 12"):
        train_batches(config(data), seed=0, batch_size=12, world_size=5)
    with pytest.raises(UserError, match="must be at least 1"):
        train_batches(config(data), seed=0, batch_size=0)
    with pytest.raises(UserError, match="data.validation is not set"):
        validation_batches(config(data, validation=None), seed=0, batch_size=2)
    with pytest.raises(UserError, match="validation_codes is not"):
        validation_batches(config(data, images=False, codes=str(data / "codes")), seed=0, batch_size=2)
    with pytest.raises(UserError, match="2 samples, fewer than the 4 processes"):
        validation_batches(config(data), seed=0, batch_size=4, world_size=4, limit=2)
    with pytest.raises(UserError, match="no tokenizer"):
        train_batches(config(data, tokenizer=str(tmp_path)), seed=0, batch_size=2)
    with pytest.raises(TypeError, match="endless"):
        len(train_batches(config(data), seed=0, batch_size=2))


@pytest.mark.parametrize("wrong", [{"crop": "top"}, {"bpe_dropout": 2}, {"image_size": 0}, {"workers": -1},
                                   {"caption": "none", "tokenizer": "t"}, {"caption": "none", "images": False},
                                   {"unknown": 1}, {"crop": "random", "crop_from": 0.9},
                                   {"crop": "center", "crop_from": 1.2}, {"crop": "dvae", "crop_from": 1.2},
                                   {"crop": "random", "crop_from": 1.2, "codes": "c"}])
def test_impossible_configs(wrong):
    with pytest.raises(ValidationError):
        DataConfig(train="x", **wrong)
