"""Codes of whole shards: the same for any number of processes and stops, and never a part taken for the whole."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data.caching import CodesFolder, cache_shards, rows_at_once, share
from dalle.data.codes import CachedCodes
from dalle.data.decode import BadSample
from dalle.data.index import ShardIndex
from dalle.data.settings import DataConfig
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

COUNT, PER_SHARD, BAD = 17, 5, (1, 7, 8)       # the last shard has two pictures
DESCRIPTION = {"codec_digest": "d", "num_codes": 256, "grid": [1, 2], "views": 2, "crop": "random", "seed": 3,
               "batch_size": 6, "dtype": "fp32"}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, PER_SHARD) as writer:
        for number in range(COUNT):
            file = io.BytesIO()
            noise = np.random.default_rng(number).integers(0, 200, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(noise).save(file, "png")
            writer.write(b"<html>" if number in BAD else file.getvalue(), "png", ["a caption"])
    return str(folder)


def encode(images):
    """Two codes of a picture; that they change with the number of pictures is what a codec's rounding may do."""
    images = images.long()
    return torch.stack([images.sum((1, 2, 3)) % 200, images[:, 0, 0, 0]], dim=1) + len(images) % 7


def make(out, shards, size=1, encode=encode, workers=0, **changes):
    """The codes by ``size`` processes, one after the other."""
    index = ShardIndex.load(shards)
    out.mkdir(exist_ok=True)
    folder = CodesFolder(out, index, {**DESCRIPTION, **changes})
    if folder.is_complete():
        return None
    pending = folder.begin()
    config = DataConfig(train=shards, image_size=8, crop="random", caption="none", workers=workers, max_bad_fraction=1)
    for rank in range(size):
        cache_shards(folder, share(pending, index.counts, rank, size), config, encode,
                     rows=rows_at_once(index, 6, 2), say=print)
    return folder.finish()


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert make(out, shards).counts == {"not_an_image": len(BAD)}
    return contents(out)


def test_a_shard_is_encoded_in_batches_of_one_shape(shards, whole, tmp_path):
    shapes = set()

    def watched(images):
        shapes.add(tuple(images.shape))
        return encode(images)

    make(tmp_path / "out", shards, encode=watched)
    assert shapes == {(6, 3, 8, 8)} and contents(tmp_path / "out") == whole
    assert set(whole) == {"codes.json", *(f"{number:05d}.npy" for number in range(4))}
    codes = CachedCodes(tmp_path / "out", ShardIndex.load(shards))
    for number in range(COUNT):
        if number in BAD:
            with pytest.raises(BadSample, match="no_codes"):
                codes.row(number // PER_SHARD, number % PER_SHARD, 1)
        else:
            assert codes.row(number // PER_SHARD, number % PER_SHARD, 1).shape == (2,)


@pytest.mark.parametrize(("size", "workers"), [(2, 0), (1, 1), (9, 0)])
def test_the_codes_are_the_same_for_any_number_of_processes_and_workers(shards, whole, tmp_path, size, workers):
    left_out = make(tmp_path / "out", shards, size, workers=workers)
    assert left_out.counts == {"not_an_image": len(BAD)} and left_out.examples == {
        "not_an_image": "000000001 in 00000.tar"} and contents(tmp_path / "out") == whole


@pytest.mark.parametrize("calls", [0, 1, 2, 4, 6])
def test_a_run_that_is_killed_goes_on_behind_the_shards_that_are_there(shards, whole, tmp_path, calls):
    made = []

    def killed(images):
        if len(made) == calls:
            raise KeyboardInterrupt
        made.append(1)
        return encode(images)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(out, shards, encode=killed)
    with pytest.raises(UserError, match="no cached codes"):
        CachedCodes(out, ShardIndex.load(shards))
    (out / ".00003.npy.77.tmp").write_bytes(b"half of it")
    finished = sorted(out.glob("*.npy"))
    before = [path.stat().st_mtime_ns for path in finished]
    assert make(out, shards, size=2).counts == {"not_an_image": len(BAD)}       # those of before among them
    assert contents(out) == whole and [path.stat().st_mtime_ns for path in finished] == before
    assert make(out, shards) is None and not (out / "partial").exists()


@pytest.mark.parametrize(("changes", "message"), [
    ({"codec_digest": "e"}, "another codec"), ({"crop": "center"}, "another --crop"), ({"seed": 4}, "another --seed"),
    ({"dtype": "bf16"}, "another --dtype"), ({"batch_size": 8}, "another --batch-size"),
    ({"codec_digest": "e", "num_codes": 300, "seed": 4}, "another codec and another --seed")])
def test_a_part_of_other_codes_is_not_gone_on_with(shards, tmp_path, changes, message):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(out, shards, encode=stopping_after(3))
    assert len(list(out.glob("*.npy"))) == 1
    with pytest.raises(UserError, match=f"a part of the codes of {message}; give another --out"):
        make(out, shards, **changes)
    (out / "00000.npy").unlink()                       # of nothing there is nothing to keep
    assert make(out, shards, **changes).total() == len(BAD)
    assert json.loads((out / "codes.json").read_text())["seed"] == changes.get("seed", 3)


def test_whole_codes_are_kept_or_refused(shards, tmp_path):
    out = tmp_path / "out"
    make(out, shards)
    assert make(out, shards, batch_size=100) is None and make(out, shards) is None
    with pytest.raises(UserError, match="the codes of another --seed"):
        make(out, shards, seed=4)
    older = json.loads((out / "codes.json").read_text())
    for key in ("crop", "seed", "batch_size", "dtype"):
        del older[key]
    (out / "codes.json").write_text(json.dumps(older))
    assert make(out, shards, seed=4) is None           # it does not say
    with pytest.raises(UserError, match="another number of views"):
        make(out, shards, views=1)


def test_files_of_nobody_knows_which_codes_are_made_again(shards, whole, tmp_path):
    out = tmp_path / "out"
    make(out, shards)
    (out / "codes.json").unlink()
    np.save(out / "00001.npy", np.zeros(3))
    make(out, shards)
    assert contents(out) == whole


def test_shards_are_missing_at_the_end(shards, tmp_path):
    folder = CodesFolder(tmp_path, ShardIndex.load(shards), DESCRIPTION)
    assert folder.begin() == [0, 1, 2, 3]
    with pytest.raises(UserError, match=r"4 of 4 shards have no codes.*00000\.npy.*start again"):
        folder.finish()
    assert not (tmp_path / "codes.json").exists()


def test_shares_are_even_and_leave_nothing_out():
    counts = np.array([9, 1, 1, 1, 5, 4, 0, 3])
    for size in (1, 2, 3, 5, 11):
        shares = [share([0, 2, 3, 4, 5, 7], counts, rank, size) for rank in range(size)]
        assert sorted(shard for part in shares for shard in part) == [0, 2, 3, 4, 5, 7]
        assert all(part == sorted(part) for part in shares)
    loads = [int(counts[share(range(8), counts, rank, 2)].sum()) for rank in range(2)]
    assert loads == [12, 12]


def stopping_after(calls):
    made = []

    def stopping(images):
        made.append(1)
        if len(made) > calls:
            raise KeyboardInterrupt
        return encode(images)

    return stopping
