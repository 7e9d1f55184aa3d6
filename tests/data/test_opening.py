"""A shard as a stream of bytes: servers, pipes and programs that fail, and what may be opened at all."""

import contextlib
import os
import time

import pytest
from streams import KEYS, PER_SHARD, SHARDS, batches_of, config, keys_in, read_keys

from dalle.data.loader import train_batches
from dalle.data.opening import LostShard, shard_urls
from dalle.errors import UserError

pytestmark = pytest.mark.usefixtures("short_pauses")


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("moods", [["503", "503"], ["stall"], ["reset"], ["cut"], ["silent"],
                                   ["cut", "stall", "503", "reset"]])
def test_a_server_that_fails_and_recovers_gives_every_sample_once(server, moods, ranges):
    server.moods["00001.tar"], server.ranges = list(moods), ranges
    assert read_keys(server.url("00001.tar"), retries=5) == KEYS[PER_SHARD:2 * PER_SHARD]
    assert not server.moods["00001.tar"] and len(server.asked) > len(moods)
    partly = [mood for mood in moods if mood in ("stall", "reset", "cut")]
    if partly:                                              # the first byte again is asked for only before any came
        assert server.asked[-1][1] not in (None, "bytes=0-")


def test_patience_ends(server):
    server.moods["00000.tar"] = ["503"] * 9
    with pytest.raises(LostShard, match="the server answered 503"):
        read_keys(server.url("00000.tar"), timeout=5)
    assert len(server.asked) == 3                           # two retries
    server.moods["00000.tar"] = ["silent"] * 9
    started = time.monotonic()
    with pytest.raises(LostShard, match="timed out"):
        read_keys(server.url("00000.tar"), timeout=0.1)
    assert time.monotonic() - started < 5


def test_what_no_retry_mends_is_not_retried(server):
    with pytest.raises(LostShard, match="404"):
        read_keys(server.url("absent.tar"))
    assert len(server.asked) == 1
    server.moods["00000.tar"] = ["cut", "another file"]
    with pytest.raises(LostShard, match="changed on the server"):
        read_keys(server.url("00000.tar"))


def test_a_lost_shard_stops_the_run_or_is_counted(server, caplog):
    spec = server.url("{00000..00002}.tar?token=secret")
    with pytest.raises(UserError, match=r"00001\.tar: the server answered 404.*data\.bad_shards=skip") as caught:
        del server.files["00001.tar"]
        batches_of(config(spec), 9)
    assert "secret" not in str(caught.value)
    batches, loader = batches_of(config(spec, bad_shards="skip"), 8)
    assert keys_in(batches) == 2 * (KEYS[:PER_SHARD] + KEYS[2 * PER_SHARD:])
    assert loader.skipped == {"missing_shard": 1}           # not asked for again in the second pass
    assert "training without the shard" in caplog.text and "secret" not in caplog.text
    server.files.clear()
    for tier in ("sequential", "resampled"):
        with pytest.raises(UserError, match="none of the shards .* can be read"):
            batches_of(config(spec, bad_shards="skip", tier=tier), 1)


def test_a_shard_lost_half_way_gives_its_first_half_once(server):
    server.moods["00001.tar"] = ["cut", "503", "503", "503"]
    batches, loader = batches_of(config(server.url("{00000..00002}.tar"), bad_shards="skip"), 4, batch_size=PER_SHARD)
    keys = keys_in(batches)
    seen = keys[PER_SHARD:keys.index(KEYS[2 * PER_SHARD])]
    assert 0 < len(seen) < PER_SHARD and seen == KEYS[PER_SHARD:PER_SHARD + len(seen)]
    assert loader.skipped == {"missing_shard": 1}


# --- what may be opened -----------------------------------------------------------------------------------------------


def test_pipes_run_only_when_allowed(streamed, tmp_path, monkeypatch):
    spec = f"pipe:touch {tmp_path}/executed; cat {streamed}/train/{{00000..00002}}.tar"
    with pytest.raises(UserError, match=r"would run a shell command; set data\.allow_pipe=true"):
        batches_of(config(spec), 1)
    with pytest.raises(UserError, match="allow_pipe"):
        batches_of(config(f"{streamed}/train::PIPE:touch {tmp_path}/executed"), 1)
    assert not list(tmp_path.iterdir())
    assert keys_in(batches_of(config(spec, allow_pipe=True), 6)[0]) == KEYS
    assert [path.name for path in tmp_path.iterdir()] == ["executed"]
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(UserError, match="WDS_SECURE forbids"):
        batches_of(config(spec, allow_pipe=True), 1)


def test_a_pipe_that_fails_or_hangs_half_way_goes_on_from_its_byte(streamed, tmp_path):
    shard = streamed / "train" / "00000.tar"
    for ending in ("exit 3", "sleep 60.125"):
        marker = tmp_path / ending.replace(" ", "")
        command = f"pipe:if [ -e {marker} ]; then cat {shard}; else touch {marker}; head -c 3000 {shard}; {ending}; fi"
        assert read_keys(command, timeout=1.5) == KEYS[:PER_SHARD]
    started = time.monotonic()
    with pytest.raises(LostShard, match="status 7"):
        read_keys(f"pipe:head -c 3000 {shard}; exit 7", timeout=5)
    again = f"pipe:if [ -e {tmp_path}/m ]; then sleep 60.125; else touch {tmp_path}/m; head -c 3000 {shard}; exit 1; fi"
    with pytest.raises(LostShard, match="nothing came for 0.1 s"):
        read_keys(again, timeout=0.1)
    with pytest.raises(LostShard, match="nothing came for 0.1 s"):
        read_keys("pipe:sleep 60.125", timeout=0.1)
    assert time.monotonic() - started < 15
    while processes_with("sleep\x0060.125"):                 # the shell's children were ended with it
        assert time.monotonic() - started < 20
        time.sleep(0.01)


def processes_with(words):
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{process}/cmdline") as file:
            found += [process] if words in file.read() else []
    return found


def test_object_stores_are_read_by_their_program_without_a_shell(streamed, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    spec = "s3://bucket/$(touch executed)/{00000..00001}.tar"
    with pytest.raises(UserError, match="'aws', which is not installed"):
        shard_urls(spec, allow_pipe=False)
    program = tmp_path / "aws"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ncat {streamed}/train/$(basename "$4")\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert keys_in(batches_of(config(spec), 4)[0]) == KEYS[:12]
    asked = (tmp_path / "log").read_text().splitlines()
    assert asked == [f"s3 cp --only-show-errors s3://bucket/$(touch executed)/0000{n}.tar -" for n in range(2)]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("spec", "message"), [
    ("ftp://host/0.tar", r"ftp: is not read; use .*https:.*pipe:"), ("", "is empty"), ("*.tar", "no shard matches"),
    ("full/0.tar::full/0.tar", "twice"), ("absent/{0..3}.tar", "does not exist"),
])
def test_useless_specs(tmp_path, monkeypatch, spec, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "0.tar").write_bytes(bytes(1024))
    with pytest.raises(UserError, match=message):
        batches_of(config(spec), 1)


def test_local_specs_name_the_same_shards(streamed):
    folder = streamed / "train"
    expected = [str(folder / f"{number:05d}.tar") for number in range(SHARDS)]
    for spec in (str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar", f"file://{folder}/*.tar",
                 f"{folder}/00000.tar::{folder}/0000[12].tar"):
        assert shard_urls(spec, allow_pipe=False) == expected


def test_a_missing_file_is_found_before_training(streamed, tmp_path):
    for number in (0, 2):
        os.link(streamed / "train" / f"0000{number}.tar", tmp_path / f"0000{number}.tar")
    spec = f"{tmp_path}/{{00000..00002}}.tar"
    with pytest.raises(UserError, match=r"00001\.tar does not exist.*data\.bad_shards=skip"):
        train_batches(config(spec), seed=0, batch_size=3)
    batches, loader = batches_of(config(spec, bad_shards="skip"), 4)
    assert keys_in(batches) == KEYS[:6] + KEYS[12:] and loader.skipped == {"missing_shard": 1}
    assert loader.identity == train_batches(config(streamed / "train"), seed=0, batch_size=3).identity
