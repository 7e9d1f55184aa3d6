import hashlib
import json
import tarfile

import pytest

from dalle.data.index import ShardIndex
from dalle.data.writer import ShardWriter
from dalle.errors import UserError


def write(folder, count=5, per_shard=2, **options):
    with ShardWriter(folder, per_shard, **options) as writer:
        return [writer.write(b"picture %d" % number, "png", [f"caption {number}", "second\nline"],
                             {"class_id": number, "a": "ü"}) for number in range(count)]


def test_layout_is_that_of_img2dataset(tmp_path):
    keys = write(tmp_path)
    assert keys == ["000000000", "000000001", "000010000", "000010001", "000020000"]
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == ["00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(tmp_path / "00001.tar") as tar:
        assert tar.getnames() == [f"{key}.{part}" for key in keys[2:4] for part in ("json", "png", "txt")]
        assert tar.extractfile("000010000.txt").read() == b"caption 2\nsecond line"
        assert json.load(tar.extractfile("000010001.json")) == {"class_id": 3, "a": "ü"}
        assert {member.mtime for member in tar} == {0}


def test_same_samples_give_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    first, second = ([hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((tmp_path / name).glob("*.tar"))]
                     for name in "ab")
    assert first == second
    assert ShardIndex.load(f"{tmp_path}/a").fingerprint == ShardIndex.load(f"{tmp_path}/b").fingerprint


def test_close_returns_and_writes_the_index(tmp_path):
    writer = ShardWriter(tmp_path, 2)
    for number in range(3):
        writer.write(b"x", ".JPG", [str(number)], None)
    index = writer.close()
    assert index.counts.tolist() == [2, 1] and not index.problems
    assert ShardIndex.load(str(tmp_path)).shards == index.shards
    assert index.members(0)["json_size"].tolist() == [-1, -1]


def test_keys_grow_with_the_shard_size(tmp_path):
    with ShardWriter(tmp_path, 100_000) as writer:
        assert writer.write(b"x", "png", []) == "0000000000"


def test_an_interrupted_write_leaves_no_half_shard(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, 2) as writer:
        for _ in range(3):
            writer.write(b"x", "png", ["a"])
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]


def test_refusals(tmp_path):
    write(tmp_path / "full")
    with pytest.raises(UserError, match=r"already holds \.tar shards"):
        ShardWriter(tmp_path / "full")
    with pytest.raises(UserError, match="at least 1"):
        ShardWriter(tmp_path / "new", 0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        ShardWriter(tmp_path / "file" / "below")
    with pytest.raises(ValueError, match="known: jpg"):
        ShardWriter(tmp_path / "other").write(b"x", "exe", [])
