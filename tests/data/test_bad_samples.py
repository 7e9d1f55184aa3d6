"""Samples that cannot be used, or not whole: what stands in for them, how they are counted, when a run ends."""

import io
import os
import tarfile

import numpy as np
import pytest
from numbered import COUNT, SIZE, config, damaged_set, png, take

from dalle.data.codes import CodesWriter
from dalle.data.index import ShardIndex
from dalle.data.loader import train_batches, validation_batches
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.writer import ShardWriter
from dalle.errors import UserError


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


def test_codes_without_a_picture_are_replaced(data, tmp_path):
    index = ShardIndex.load(str(data / "train"))
    with CodesWriter(tmp_path / "codes", index, codec_digest="d", num_codes=1000, grid=(1, 1)) as writer:
        writer.write(np.arange(COUNT)[:, None, None], np.arange(COUNT) != 4)
    loader = validation_batches(config(data, images=False, validation_codes=str(tmp_path / "codes")), seed=0,
                                batch_size=COUNT)
    assert next(iter(loader))["codes"].flatten().tolist() == [0, 1, 2, 3, 5, 5, *range(6, COUNT)]
    assert loader.skipped == {"no_codes": 1}


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
