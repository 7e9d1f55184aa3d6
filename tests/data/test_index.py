import io
import json
import os
import tarfile

import numpy as np
import pytest

from dalle.data.index import ShardIndex
from dalle.data.members import split_name
from dalle.data.reader import ShardReader
from dalle.data.specs import expand_braces
from dalle.errors import UserError

BLOCK = 512


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def pairs(*keys):
    return [(f"{key}.{extension}", f"{key} {extension}".encode()) for key in keys for extension in ("jpg", "txt")]


def keys_of(index, shard=0):
    return [bytes(key).decode() for key in index.members(shard)["key"]]


def test_members_are_found_where_tarfile_finds_them(tmp_path):
    path = write_tar(tmp_path / "00000.tar", [("a.jpg", b"JPG"), ("a.json", b"{}"), ("a.txt", b"x" * 600),
                                              ("b.png", b"P" * 512), ("b.txt", b"")])
    index = ShardIndex.build([path])
    with tarfile.open(path) as tar:
        expected = {member.name: (member.offset_data, member.size) for member in tar}
    first, second = index.members(0)
    assert (first["image_offset"], first["image_size"]) == expected["a.jpg"]
    assert (first["json_offset"], first["json_size"]) == expected["a.json"]
    assert (first["text_offset"], first["text_size"]) == expected["a.txt"]
    assert (second["image_offset"], second["image_size"]) == expected["b.png"]
    assert second["image_kind"] == b"png" and second["text_size"] == 0 and second["json_size"] == -1
    assert index.shards[0].count == 2 and index.shards[0].size == path.stat().st_size and not index.problems
    assert ShardReader(index).read(0, int(first["text_offset"]), 600) == b"x" * 600


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_in_each_tar_format(tmp_path, format):
    folder = "deep/" + "f" * 90                      # needs the ustar prefix, a GNU 'L' record or nothing
    long = "d/" + "k" * 140 if format != tarfile.USTAR_FORMAT else folder + "/key"
    index = ShardIndex.build([write_tar(tmp_path / "0.tar", pairs(long, "short"), format)])
    assert keys_of(index) == [long, "short"] and not index.problems


def test_pax_size_and_non_ascii_name(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("ключ.jpg")
        info.size, info.pax_headers = 3, {"size": "3", "comment": "x"}
        tar.addfile(info, io.BytesIO(b"abc"))
    row = ShardIndex.build([path]).members(0)[0]
    assert bytes(row["key"]).decode() == "ключ" and row["image_size"] == 3


@pytest.mark.parametrize(("cut", "problem", "keys", "without_caption"), [
    (7 * BLOCK + 3, "truncated_member", ["a", "b"], 1),      # inside b.txt's payload
    (6 * BLOCK + 100, "truncated_header", ["a", "b"], 1),    # inside b.txt's header
    (4 * BLOCK, "no_end_marker", ["a"], 0),                  # between two samples
    (6 * BLOCK, "no_end_marker", ["a", "b"], 1),             # between b's picture and its caption
    (5 * BLOCK + 3, "truncated_member", ["a"], 0),           # inside b.jpg's payload
    (0, "no_end_marker", [], 0),
])
def test_every_cut_is_reported(tmp_path, cut, problem, keys, without_caption):
    path = write_tar(tmp_path / "0.tar", pairs("a", "b"))
    os.truncate(path, cut)
    index = ShardIndex.build([path])
    assert index.problems[problem] == 1
    assert keys_of(index) == keys and index.problems["no_caption"] == without_caption


def test_whole_shard_without_its_zero_blocks_is_still_used(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs("a", "b"))
    os.truncate(path, 8 * BLOCK)
    index = ShardIndex.build([path])
    assert keys_of(index) == ["a", "b"] and index.problems == {"no_end_marker": 1}


def test_damaged_header_and_second_archive_are_reported(tmp_path):
    path = write_tar(tmp_path / "0.tar", pairs("a", "b"))
    data = bytearray(path.read_bytes())
    data[4 * BLOCK + 1] ^= 1
    (tmp_path / "1.tar").write_bytes(data)
    (tmp_path / "2.tar").write_bytes(path.read_bytes() + path.read_bytes())
    damaged = ShardIndex.build([tmp_path / "1.tar"])
    assert keys_of(damaged) == ["a"] and damaged.problems == {"damaged_header": 1}
    doubled = ShardIndex.build([tmp_path / "2.tar"])
    assert keys_of(doubled) == ["a", "b"] and doubled.problems == {"data_after_end": 1}


def test_odd_members_are_counted_and_never_used(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    import pickle
    members = [*pairs("a"), ("a.pkl", pickle.dumps(Payload())), *pairs("b", "a"), ("c.txt", b"alone"), ("d.jpg", b"D"),
               ("e.jpg", b"E"), ("e.jpg", b"E"), ("e.png", b"E"), ("img.v1.jpg", b"1"), ("img.v2.jpg", b"2"),
               ("README", b""), ("._a.jpg", b""), ("../../etc/x.jpg", b"X"), ("../../etc/x.txt", b"x")]
    index = ShardIndex.build([write_tar(tmp_path / "0.tar", members)])
    assert keys_of(index) == ["a", "b", "d", "e", "../../etc/x"]      # a key is data, never a path
    assert index.problems == {"other_members": 1, "duplicate_key": 1, "no_image": 1, "no_caption": 2,
                              "duplicate_member": 2, "dot_in_name": 2, "not_a_sample": 2}
    assert not (tmp_path / "executed").exists()


MAC, OTHER = ("._a.jpg", b"mac"), ("a.seg.png", b"mask")


@pytest.mark.parametrize("members", [
    [("a.jpg", b"A"), MAC, ("a.txt", b"a caption"), *pairs("b")],                      # as macOS packs a folder
    [("a.jpg", b"A"), ("Thumbs.db", b"!"), OTHER, ("README", b""), ("a.txt", b"a caption"), *pairs("b")],
    [("a.jpg", b"A"), ("b.jpg", b"B"), ("a.txt", b"a caption"), ("b.txt", b"")],       # all pictures, then all captions
    [("a.txt", b"a caption"), ("b.txt", b""), ("b.jpg", b"B"), ("a.jpg", b"A")],
    [("a.txt", b"a caption"), *pairs("b"), ("a.jpg", b"A")],
])
def test_members_of_a_key_are_joined_whatever_lies_between(tmp_path, members):
    index = ShardIndex.build([write_tar(tmp_path / "0.tar", members)])
    assert keys_of(index) == ["a", "b"]                           # in the order of their first members
    (row, other), reader = index.members(0), ShardReader(index)
    assert reader.read(0, int(row["image_offset"]), int(row["image_size"])) == b"A"
    assert reader.read(0, int(row["text_offset"]), int(row["text_size"])) == b"a caption"
    assert other["text_size"] >= 0 and not {"no_caption", "no_image", "duplicate_key"} & index.problems.keys()


def test_each_reason_has_an_example_also_in_the_saved_index(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [*pairs("a"), ("img.v1.jpg", b"1"), ("img.v2.jpg", b"2"), ("b.txt", b"alone")])
    for index in (ShardIndex.load(str(tmp_path)), ShardIndex.load(str(tmp_path))):
        assert index.findings.summary() == "2 dot_in_name (img.v1.jpg in 0.tar), 1 no_image (b in 0.tar)"


def test_no_sample_is_made_of_two_that_have_one_name(tmp_path):
    members = [("a.jpg", b"first"), *pairs("b"), ("a.jpg", b"second"), ("a.txt", b"of the second"), ("a.json", b"{}")]
    index = ShardIndex.build([write_tar(tmp_path / "0.tar", members)])
    assert index.members(0)[0]["text_size"] == index.members(0)[0]["json_size"] == -1
    assert index.problems == {"duplicate_key": 1, "no_caption": 1} and keys_of(index) == ["a", "b"]


def test_names_that_are_not_utf8_are_keys_like_any_other(tmp_path):
    path = write_tar(tmp_path / os.fsdecode(b"caf\xe9.tar"), [(os.fsdecode(b"d/caf\xe9") + ".jpg", b"A")])
    index = ShardIndex.build([path])
    assert bytes(index.members(0)[0]["key"]) == b"d/caf\xe9"
    index.save()
    assert ShardIndex.load(str(tmp_path)).fingerprint == index.fingerprint


def test_links_and_folders_have_no_payload(tmp_path):
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("dir", tarfile.DIRTYPE), ("link.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        info = tarfile.TarInfo("a.jpg")
        info.size = 1
        tar.addfile(info, io.BytesIO(b"A"))
    assert keys_of(ShardIndex.build([path])) == ["a"]


@pytest.mark.parametrize(("name", "expected"), [
    (b"000.jpg", (b"000", "jpg")), (b"d.x/000.JPG", (b"d.x/000", "jpg")), (b"a.b.c", (b"a", "b.c")),
    (b"none", (None, "")), (b"d/.hidden", (None, "")),
])
def test_names_are_cut_at_the_first_dot_of_the_base_name(name, expected):
    assert split_name(name) == expected


def test_saved_index_gives_the_same_and_fingerprint_follows_the_content(tmp_path):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pairs(f"{number}a", f"{number}b"))
    built = ShardIndex.build(sorted(tmp_path.glob("*.tar")))
    built.save()
    loaded = ShardIndex.load(str(tmp_path))
    assert loaded.shards == built.shards and loaded.fingerprint == built.fingerprint
    assert loaded.counts.tolist() == [2, 2, 2]
    np.testing.assert_array_equal(loaded.members(1), built.members(1))
    assert ShardIndex.load(f"{tmp_path}/[01].tar").fingerprint != built.fingerprint
    write_tar(tmp_path / "1.tar", pairs("1a", "1c"))          # same size and count, another key
    assert ShardIndex.build(sorted(tmp_path.glob("*.tar"))).fingerprint != built.fingerprint


def test_parallel_build_equals_serial(tmp_path):
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", pairs(*map(str, range(number))))
    paths = sorted(tmp_path.glob("*.tar"))
    assert ShardIndex.build(paths, workers=2).shards == ShardIndex.build(paths).shards


def test_specs(tmp_path):
    for folder in ("x", "y"):
        for number in range(12):
            write_tar(tmp_path / folder / f"{number:02d}.tar", pairs(f"{folder}{number}"))
        ShardIndex.build(sorted((tmp_path / folder).glob("*.tar"))).save()

    def names(spec):
        return [f"{shard.path.parent.name}{shard.name[:2]}" for shard in ShardIndex.load(spec).shards]

    assert names(f"{tmp_path}/x") == [f"x{number:02d}" for number in range(12)]
    assert names(f"{tmp_path}/x/{{08..10}}.tar") == ["x08", "x09", "x10"]
    assert names(f"{tmp_path}/x/0[01].tar::{tmp_path}/y/{{03..03}}.tar") == ["x00", "x01", "y03"]
    assert names(f"{tmp_path}/{{x,y}}/{{00..01}}.tar") == ["x00", "x01", "y00", "y01"]
    assert names(f"{tmp_path}/x/05.tar") == ["x05"]
    assert len(names(f"{tmp_path}/{{x,y}}")) == 24
    assert expand_braces("{9..11}") == ["9", "10", "11"]


def test_unindexed_shards_are_indexed_and_kept_only_when_whole(tmp_path, caplog):
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", pairs(str(number)))
    part = ShardIndex.load(f"{tmp_path}/{{0..1}}.tar")
    assert part.counts.tolist() == [1, 1] and not (tmp_path / "index").exists()
    assert "has no index" in caplog.text
    assert keys_of(part, 1) == ["1"]
    ShardIndex.load(str(tmp_path))
    assert (tmp_path / "index" / "index.json").exists()
    assert ShardIndex.load(f"{tmp_path}/{{0..1}}.tar").fingerprint == part.fingerprint


def test_in_memory_and_saved_parts_keep_their_members_apart(tmp_path):
    for folder in ("x", "y"):
        for number in range(2):
            write_tar(tmp_path / folder / f"{number}.tar", pairs(f"{folder}{number}"))
    ShardIndex.build(sorted((tmp_path / "x").glob("*.tar"))).save()
    index = ShardIndex.load(f"{tmp_path}/x::{tmp_path}/y/1.tar")
    assert [keys_of(index, number) for number in range(3)] == [["x0"], ["x1"], ["y1"]]


@pytest.mark.parametrize("spec", ["pipe:touch executed", "https://host/0.tar", "s3://bucket/{0..1}.tar", "PIPE:x"])
def test_remote_specs_are_refused_and_not_run(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="needs local tar files"):
        ShardIndex.load(spec)
    assert not list(tmp_path.iterdir())


def test_disagreement_with_the_disk_is_refused_by_name(tmp_path):
    paths = [write_tar(tmp_path / f"{number}.tar", pairs(str(number))) for number in range(3)]
    ShardIndex.build(paths).save()
    with open(paths[1], "ab") as file:
        file.write(bytes(BLOCK))
    with pytest.raises(UserError, match=r"1\.tar has .* bytes.*index_shards\.py"):
        ShardIndex.load(str(tmp_path))
    paths[1].unlink()
    with pytest.raises(UserError, match=r"1\.tar is in the index but missing on disk.*index_shards\.py"):
        ShardIndex.load(str(tmp_path))
    with pytest.raises(UserError, match=r"1\.tar does not exist"):
        ShardIndex.load(f"{tmp_path}/{{0..2}}.tar")
    ShardIndex.build([paths[0], paths[2]]).save()
    write_tar(tmp_path / "9.tar", pairs("9"))
    with pytest.raises(UserError, match=r"9\.tar is not in the index"):
        ShardIndex.load(str(tmp_path))


@pytest.mark.parametrize(("spec", "message"), [
    ("absent", "no folder"), ("empty", r"no \.tar"), ("absent/*.tar", "no folder"), ("", "empty"),
    ("blank", "no sample with a picture"), ("full::full", "twice"), ("full/{3..1}.tar", "smaller number first"),
])
def test_useless_specs(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "full" / "0.tar", pairs("a"))
    write_tar(tmp_path / "blank" / "0.tar", [("a.txt", b"alone")])
    with pytest.raises(UserError, match=message):
        ShardIndex.load(spec)


@pytest.mark.parametrize("damage", ["{", '{"version": 2, "shards": []}', '{"version": 1}', "tampered"])
def test_damaged_table(tmp_path, damage):
    ShardIndex.build([write_tar(tmp_path / "0.tar", pairs("a"))]).save()
    table = tmp_path / "index" / "index.json"
    if damage == "tampered":
        tree = json.loads(table.read_text())
        tree["shards"][0]["count"] = 7
        damage = json.dumps(tree)
    table.write_text(damage)
    with pytest.raises(UserError, match=r"is damaged.*index_shards\.py"):
        ShardIndex.load(str(tmp_path))


def test_side_file_with_a_pickle_is_refused(tmp_path):
    ShardIndex.build([write_tar(tmp_path / "0.tar", pairs("a"))]).save()
    np.save(tmp_path / "index" / "0.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read"):
        ShardIndex.load(str(tmp_path)).members(0)


def test_reader_keeps_few_shards_open(tmp_path):
    for number in range(6):
        write_tar(tmp_path / f"{number}.tar", pairs(str(number)))
    index = ShardIndex.load(str(tmp_path))
    reader = ShardReader(index, max_open=2)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        for shard in range(6):
            row = reader.row(shard, 0)
            assert reader.read(shard, int(row["text_offset"]), int(row["text_size"])) == f"{shard} txt".encode()
    assert len(os.listdir("/proc/self/fd")) - before == 2
    reader.close()


def test_large_tables_load_quickly(tmp_path):
    from time import perf_counter

    from dalle.data.shard import ShardInfo
    shards = [ShardInfo(f"{number:06d}.tar", str(tmp_path), 10_000, 10**9, "0" * 32, {}) for number in range(20_000)]
    index = ShardIndex(shards)
    started = perf_counter()
    assert index.num_samples == 200_000_000 and len(index.fingerprint) == 32
    assert perf_counter() - started < 2
