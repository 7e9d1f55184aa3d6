import json
import pickle

import numpy as np
import pytest

from dalle.data.codes import CachedCodes, CodesWriter, codes_dtype
from dalle.data.decode import BadSample
from dalle.data.index import ShardIndex
from dalle.data.writer import ShardWriter
from dalle.errors import UserError


def shards(folder, count=7):
    with ShardWriter(folder, 3) as writer:
        for number in range(count):
            writer.write(b"%d" % number, "png", [str(number)])
    return ShardIndex.load(str(folder))


def write(folder, index, num_codes=100, batch=2, views=2, valid=None, **changes):
    codes = np.random.default_rng(0).integers(0, num_codes, (index.num_samples, views, 4))
    settings = {"codec_digest": "digest", "num_codes": num_codes, "grid": (2, 2), "views": views, **changes}
    with CodesWriter(folder, index, **settings) as writer:
        for start in range(0, len(codes), batch):
            writer.write(codes[start:start + batch], None if valid is None else valid[start:start + batch])
    return codes


@pytest.mark.parametrize("num_codes", [100, 65_535, 65_536, 300_000])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_every_row_comes_back(tmp_path, num_codes, batch):
    index = shards(tmp_path / "data")
    codes = write(tmp_path / "codes", index, num_codes, batch)
    cached = CachedCodes(tmp_path / "codes", index)
    assert (cached.num_codes, cached.grid, cached.views, cached.length) == (num_codes, (2, 2), 2, 4)
    assert cached.codec_digest == "digest"
    places = [(shard, sample) for shard, count in enumerate(index.counts) for sample in range(count)]
    for reader in (cached, pickle.loads(pickle.dumps(cached))):
        for (shard, sample), expected in zip(places, codes, strict=True):
            for view in range(2):
                np.testing.assert_array_equal(reader.row(shard, sample, view), expected[view])
    assert np.load(tmp_path / "codes" / "00000.npy").dtype == codes_dtype(num_codes)


def test_invalid_rows_are_bad_samples(tmp_path):
    index = shards(tmp_path / "data")
    write(tmp_path / "codes", index, valid=np.array([True] * 4 + [False] + [True] * 2))
    cached = CachedCodes(tmp_path / "codes", index)
    with pytest.raises(BadSample, match="no_codes"):
        cached.row(1, 1)
    assert np.load(tmp_path / "codes" / "00001.npy")[1].tolist() == [[65535] * 4] * 2


def test_other_shards_are_refused(tmp_path):
    index, other = shards(tmp_path / "data"), shards(tmp_path / "other", 8)
    write(tmp_path / "codes", index)
    with pytest.raises(UserError, match=r"belong to other shards.*cache_codes\.py"):
        CachedCodes(tmp_path / "codes", other)


def test_an_unfinished_folder_is_refused(tmp_path):
    index = shards(tmp_path / "data")
    write(tmp_path / "codes", index)
    writer = CodesWriter(tmp_path / "codes", index, codec_digest="d", num_codes=9, grid=(2, 2))
    writer.write(np.zeros((5, 1, 4), int))
    with pytest.raises(ValueError, match="3 shards expected, 1 are complete and 2 rows"):
        writer.close()
    with pytest.raises(UserError, match="no cached codes"):
        CachedCodes(tmp_path / "codes", index)


def test_damage_is_named(tmp_path):
    index = shards(tmp_path / "data")
    write(tmp_path / "codes", index)
    description = tmp_path / "codes" / "codes.json"
    table = json.loads(description.read_text())
    description.write_text(json.dumps({**table, "num_codes": 10}))
    with pytest.raises(UserError, match="but there are only 10"):
        CachedCodes(tmp_path / "codes", index).row(0, 0)
    description.write_text(json.dumps({**table, "grid": [3, 3]}))
    with pytest.raises(UserError, match=r"where uint16 \[3, 2, 9\] is needed"):
        CachedCodes(tmp_path / "codes", index).row(0, 0)
    description.write_text(json.dumps(table))
    (tmp_path / "codes" / "00001.npy").unlink()
    with pytest.raises(UserError, match=r"00001\.npy cannot be read"):
        CachedCodes(tmp_path / "codes", index).row(1, 0)
    description.write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        CachedCodes(tmp_path / "codes", index)


def test_writer_refuses_wrong_codes(tmp_path):
    index = shards(tmp_path / "data")
    writer = CodesWriter(tmp_path / "codes", index, codec_digest="d", num_codes=9, grid=(2, 2))
    with pytest.raises(ValueError, match="is needed"):
        writer.write(np.zeros((1, 1, 5), int))
    with pytest.raises(ValueError, match="outside 0..8"):
        writer.write(np.full((1, 1, 4), 9))


def test_two_folders_with_equal_shard_names(tmp_path):
    shards(tmp_path / "a")
    shards(tmp_path / "b", 4)
    index = ShardIndex.load(f"{tmp_path}/a::{tmp_path}/b")
    codes = write(tmp_path / "codes", index)
    cached = CachedCodes(tmp_path / "codes", index)
    np.testing.assert_array_equal(cached.row(3, 0, 1), codes[7, 1])
