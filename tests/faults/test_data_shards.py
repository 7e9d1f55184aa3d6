"""Faults of shards: cut, missing, replaced, copied, wrongly indexed, with keys that come twice.

The functions are named after the fault and what is promised; each goes through the loader or a command.
"""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from epochs import EPOCH, GOOD, data_config, delivered, keys_of, one_epoch, one_line, sample_of
from tiny_shards import BLOCK, SAMPLES, sample_key, write_job, write_shards, write_tar

from dalle.data.index import ShardIndex
from dalle.data.loader import train_batches
from dalle.errors import EXIT_LOST_PROCESS, UserError

LOST = 6                             # the samples behind each cut
SAMPLE = 4 * BLOCK                   # header and picture, header and caption: a block each
CUTS = {"payload": BLOCK + 10, "header": 100, "between members": 0, "between picture and caption": 2 * BLOCK}


def cut(shards: Path, where: str) -> Path:
    """Cut the second shard ``where`` of its seventh sample."""
    path = shards / "00001.tar"
    os.truncate(path, (SAMPLES - LOST) * SAMPLE + CUTS[where])
    return path


@pytest.mark.parametrize("where", CUTS)
def test_truncated_tar_is_reported_by_the_check_and_refused_at_the_start(tmp_path, run_here, capsys, where):
    shards = write_shards(tmp_path / "shards")
    path = cut(shards, where)
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 1
    assert "does not fit: 00001.tar" in capsys.readouterr().out
    job = write_job(tmp_path, shards)
    one_line(run_here("train", job.config), str(path), "bytes", "tools/index_shards.py", "data.bad_shards=skip")
    assert run_here("index_shards", shards, "--workers", 1).status == 0        # indexed as it is now
    capsys.readouterr()
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 1
    assert "00001.tar" in capsys.readouterr().out                              # but still not called sound
    one_line(run_here("train", job.config), str(path), "is damaged", "tools/index_shards.py", "data.bad_shards=skip")
    assert not job.steps()


@pytest.mark.parametrize("where", CUTS)
def test_truncated_tar_is_trained_without_what_is_lost_where_that_was_chosen(tmp_path, where):
    shards = write_shards(tmp_path / "shards")
    whole, _ = one_epoch(shards)
    path = cut(shards, where)
    keys, skipped = one_epoch(shards, bad_shards="skip", max_bad_fraction=0)
    lost = {sample_key(1, sample): sample_key(2, sample) for sample in range(SAMPLES - LOST, SAMPLES)}
    assert keys == [lost.get(key, key) for key in whole]             # a position means the same; others stand in
    assert skipped == {"damaged_shard": 1, "in_bad_shard": LOST}
    ShardIndex.build(sorted(shards.glob("*.tar"))).save()            # as it is now, which is another data set
    keys, skipped = one_epoch(shards, bad_shards="skip", caption="none")
    half = where == "between picture and caption"
    assert skipped == {"damaged_shard": 1} and len(keys) == len(GOOD) - LOST + half
    assert set(keys) == GOOD - set(lost) | ({sample_key(1, SAMPLES - LOST)} if half else set())
    with pytest.raises(UserError, match="is damaged"):
        one_epoch(shards)
    path.unlink()


def test_damaged_offsets_in_the_index_are_reported_by_the_check(tmp_path, run_here, capsys):
    shards = write_shards(tmp_path / "shards")
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 0
    offsets = shards / "index" / "00002.npy"
    rows = np.load(offsets)
    rows["image_offset"][3] += 1
    np.save(offsets, rows)
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 1
    assert "the offsets of 00002.tar are others" in capsys.readouterr().out
    offsets.unlink()
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 1
    assert "00002.tar cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize("where", CUTS)
def test_tar_truncated_during_the_run_loses_only_what_is_gone_and_counts_it(tmp_path, where):
    shards = write_shards(tmp_path / "shards")
    loader = train_batches(data_config(shards), seed=0, batch_size=12)
    cut(shards, where)
    keys = keys_of(loader, EPOCH)
    assert loader.skipped == {"truncated_shard": LOST}
    assert set(keys) == GOOD - {sample_key(1, sample) for sample in range(SAMPLES - LOST, SAMPLES)}


@pytest.mark.parametrize("where", CUTS)
def test_tar_truncated_before_it_was_indexed_is_refused_at_every_start(tmp_path, caplog, where):
    shards = write_shards(tmp_path / "shards", index=False)
    path = cut(shards, where)
    for _ in range(2):                               # by the walk, and by the index that it left
        with pytest.raises(UserError, match=rf"{path} is damaged .*data\.bad_shards=skip"):
            ShardIndex.load(str(shards))
    assert any(str(path) in message and "byte" in message for message in caplog.messages)
    index = ShardIndex.load(str(shards), "skip")
    half = where == "between picture and caption"
    assert index.counts.tolist() == [SAMPLES, SAMPLES - LOST + half, *[SAMPLES] * 3] and not index.gone
    assert index.problems["no_caption"] == half      # a sample cut in half is not delivered as whole
    assert (index.bad.counts, index.bad.examples) == ({"damaged_shard": 1}, {"damaged_shard": "00001.tar"})


def test_absurd_size_in_a_tar_header_is_reported(tmp_path, run_here, capsys):
    shards = write_shards(tmp_path / "shards", counts=(3,))
    (good, *_) = sample_of("a", 1)
    with tarfile.open(shards / "00001.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size, info.pax_headers = len(good[1]), {"size": "9" * 5000}
        tar.addfile(info, io.BytesIO(good[1]))
    assert run_here("index_shards", shards, "--workers", 1).status == 0
    assert "truncated_member 1" in capsys.readouterr().out
    job = write_job(tmp_path, shards)
    one_line(run_here("train", job.config), "00001.tar is damaged (truncated_member)")
    assert run_here("train", job.config, "data.bad_shards=skip").status == 0


def test_missing_shard_stops_the_start_and_is_named(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards")
    (shards / "00003.tar").unlink()
    job = write_job(tmp_path, shards)
    one_line(run_here("train", job.config), str(shards / "00003.tar"), "missing", "tools/index_shards.py")
    one_line(run_here("train", job.config, f"data.train={shards}/{{00000..00004}}.tar"), "00003.tar", "does not exist")
    assert not job.steps()


def test_shard_replaced_by_one_of_the_same_size_is_refused_or_left_out(tmp_path, run_here, capsys):
    shards = write_shards(tmp_path / "shards", counts=(3, 3))
    path = shards / "00001.tar"
    other = write_tar(tmp_path / "other.tar", [*sample_of("x1", 1), *sample_of("x2", 2), *sample_of("x3", 3)])
    assert other.stat().st_size == path.stat().st_size
    os.replace(other, path)
    one_line(run_here("train", write_job(tmp_path, shards).config), str(path), "is not the file that was indexed",
             "tools/index_shards.py")
    keys, skipped = one_epoch(shards, bad_shards="skip")
    assert set(keys) == {sample_key(0, sample) for sample in range(3)}
    assert skipped == {"damaged_shard": 1, "in_bad_shard": 2 * 3}                  # a step of 12 is two epochs
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 1
    assert "does not fit: 00001.tar" in capsys.readouterr().out
    assert run_here("index_shards", shards, "--workers", 1).status == 0            # the remedy
    assert set(one_epoch(shards)[0]) == {*keys, "x1", "x2", "x3"}


def test_copied_shards_are_the_same_though_their_times_are_others(tmp_path, run_here, caplog):
    shards = write_shards(tmp_path / "shards", counts=(3, 3))
    keys, _ = one_epoch(shards)
    for path in shards.glob("*.tar"):
        os.utime(path, ns=(0, 12345))
    for times_read in (1, 0):                        # what was read again is kept
        caplog.clear()
        assert one_epoch(shards) == (keys, {})
        assert sum("reading their headers again" in message for message in caplog.messages) == times_read
    assert run_here("index_shards", shards, "--check", "--workers", 1).status == 0


def test_index_of_an_older_version_knows_no_times_and_notices_what_is_newer_than_itself(tmp_path, caplog):
    shards = write_shards(tmp_path / "shards", counts=(3, 3))
    table = shards / "index" / "index.json"
    tree = json.loads(table.read_text())
    for row in tree["shards"]:
        del row["mtime_ns"]
    table.write_text(json.dumps(tree))
    os.utime(table, ns=(0, 10**18))
    for name, time_ns in (("00000", 10**18 - 1), ("00001", 10**18 + 1)):
        os.utime(shards / f"{name}.tar", ns=(0, time_ns))
    one_epoch(shards)
    assert any(message.startswith("1 shards of ") and "again" in message for message in caplog.messages)


def test_index_of_an_older_version_that_left_something_out_is_named_with_the_way_to_a_new_one(tmp_path, caplog):
    extra = {0: [("x.txt", b"alone")]}
    shards = write_shards(tmp_path / "shards", counts=(3, 3), extra=extra)
    table = shards / "index" / "index.json"
    one_epoch(shards)
    assert any("1 no_image (x in 00000.tar): a sample is KEY" in message for message in caplog.messages)
    assert "older version" not in caplog.text
    tree = json.loads(table.read_text())
    del tree["shards"][0]["examples"]
    table.write_text(json.dumps(tree))
    one_epoch(shards)
    assert "is of an older version" in caplog.text and f"tools/index_shards.py {shards}" in caplog.text


def test_link_to_a_shard_that_is_gone_is_a_missing_shard(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards", counts=(3, 3))
    (shards / "00001.tar").rename(tmp_path / "elsewhere.tar")
    (shards / "00001.tar").symlink_to(tmp_path / "elsewhere.tar")
    assert len(one_epoch(shards)[0]) == 6
    (tmp_path / "elsewhere.tar").unlink()
    one_line(run_here("train", write_job(tmp_path, shards).config), "00001.tar is in the index but missing on disk")


def test_shard_that_goes_missing_during_the_run_stops_it_and_is_named(tmp_path):
    shards = write_shards(tmp_path / "shards")
    loader = train_batches(data_config(shards), seed=0, batch_size=12)
    (shards / "00003.tar").unlink()
    with pytest.raises(UserError, match=r"00003\.tar cannot be read: No such file or directory; bring it back"):
        keys_of(loader, EPOCH)


def test_process_that_dies_while_indexing_is_named_in_one_line(tmp_path, run_here, monkeypatch):
    shards = write_shards(tmp_path / "shards", counts=(2, 2), index=False)
    monkeypatch.setattr("dalle.data.index.scan_shard", die)
    ended = run_here("index_shards", shards, "--workers", 2)
    assert ended.status == EXIT_LOST_PROCESS and ended.error.count("\n") == 1 and "--workers" in ended.error


def die(path: Path):
    os._exit(1)


def test_shard_name_in_the_index_cannot_lead_out_of_its_folder(tmp_path, run_here):
    outside = write_shards(tmp_path / "outside", counts=(3,)) / "00000.tar"
    shards = write_shards(tmp_path / "shards", counts=(3,))
    (honest,) = ShardIndex.load(str(shards)).shards
    for name in ("../outside/00000.tar", str(outside)):
        hostile = honest._replace(name=name)
        table = {"version": 1, "fingerprint": ShardIndex([hostile]).fingerprint,
                 "shards": [{key: value for key, value in hostile._asdict().items() if key != "folder"}]}
        (shards / "index" / "index.json").write_text(json.dumps(table))
        one_line(run_here("train", write_job(tmp_path, shards).config), "index.json is damaged", "impossible")


def test_duplicate_keys_adjacent_or_distant_give_one_sample_and_are_counted(tmp_path, run_here, capsys):
    write_tar(tmp_path / "adjacent" / "0.tar", [*sample_of("a", 1), *sample_of("a", 2), *sample_of("b", 3)])
    write_tar(tmp_path / "distant" / "0.tar", [*sample_of("a", 1), *sample_of("b", 2), *sample_of("a", 3)])
    for folder, problem in (("adjacent", "duplicate_member 2"), ("distant", "duplicate_key 1")):
        assert run_here("index_shards", tmp_path / folder, "--workers", 1).status == 0
        assert problem in capsys.readouterr().out
    assert delivered(tmp_path / "adjacent") == [("a", 1), ("b", 3)]
    assert delivered(tmp_path / "distant") == [("a", 1), ("b", 2)]


def test_same_key_in_two_shards_is_two_samples(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / "s" / f"{shard}.tar", [*sample_of("a", shard), *sample_of("b", 10 + shard)])
    assert delivered(tmp_path / "s") == [("a", 0), ("b", 10), ("a", 1), ("b", 11)]


def test_dots_in_file_names_never_merge_two_samples(tmp_path, run_here, capsys):
    members = [*sample_of("img.v1", 1), *sample_of("img.v2", 2), *sample_of("plain", 3), *sample_of("dir.d/img", 4)]
    write_tar(tmp_path / "s" / "0.tar", members)
    assert run_here("index_shards", tmp_path / "s", "--workers", 1).status == 0
    assert "dot_in_name 4" in capsys.readouterr().out
    assert delivered(tmp_path / "s") == [("plain", 3), ("dir.d/img", 4)]
