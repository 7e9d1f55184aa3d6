"""Faults of the data: what a damaged, hostile or missing piece of it does to a run.

The functions are named after the fault and what is promised; each goes through the loader or a command.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from tiny_shards import (
    BLOCK,
    ROOT,
    SAMPLES,
    SHARDS,
    encoded,
    sample_key,
    start_command,
    wait_until,
    write_job,
    write_shards,
    write_tar,
)

from dalle.data.index import ShardIndex
from dalle.data.loader import DataConfig, train_batches, validation_batches
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import EXIT_LOST_PROCESS, UserError
from dalle.training.sample_log import surviving

TWO_PROCESSES = ("torch.distributed.run", "--standalone", "--nproc_per_node", "2")
EPOCH = SHARDS * SAMPLES // 12      # steps of 12 samples
GOOD = {sample_key(shard, sample) for shard in range(SHARDS) for sample in range(SAMPLES)}


def data_config(folder: Path | str, **changes) -> DataConfig:
    settings = {"image_size": 32, "workers": 0, "lanes": 4, "window": 2, "max_bad_fraction": 1.0, **changes}
    return DataConfig(train=str(folder), validation=str(folder), **settings)


def one_epoch(folder: Path | str, **changes) -> tuple[list[str], Counter]:
    """The keys that an epoch over the tiny shards trains on, and its counters."""
    loader = train_batches(data_config(folder, **changes), seed=0, batch_size=12)
    samples = loader.samples_per_epoch or len(GOOD)
    return keys_of(loader, -(-samples // 12))[:samples], loader.skipped


def keys_of(batches, count: int) -> list[str]:
    return [key for batch in itertools.islice(batches, count) for key in batch["key"]]


def one_line(ended, *words: str) -> None:
    """The command refused: status 2, and one line on stderr that holds ``words``."""
    assert ended.status == 2 and ended.error.startswith("error: ") and ended.error.count("\n") == 1, ended
    for word in words:
        assert word in ended.error, ended.error


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


# -- pictures ---------------------------------------------------------------------------------------------------------

def broken_pictures() -> dict:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    whole = encoded(noise, "jpeg")
    return {
        (0, 3): {"png": None, "jpg": whole[:len(whole) // 2]},
        (2, 7): {"png": b"<html><body>404 Not Found</body></html>"},
        (4, 11): {"png": b""},
    }


def test_truncated_jpeg_html_and_empty_picture_are_skipped_and_counted(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards", damage=broken_pictures())
    keys, skipped = one_epoch(shards)
    assert skipped == {"truncated_image": 1, "not_an_image": 1, "empty_image": 1}
    bad = {sample_key(shard, sample) for shard, sample in broken_pictures()}
    assert set(keys) == GOOD - bad and len(keys) == len(GOOD)
    job = write_job(tmp_path, shards)
    streamed, skipped_in_stream = one_epoch(shards, tier="sequential")
    assert skipped_in_stream == skipped and set(streamed) == set(keys)
    assert run_here("train", job.config).status == 0
    last = job.figures()[-1]
    assert last["step"] == EPOCH and last["bad_samples"] == 3
    assert {name: last[f"bad_samples/{name}"] for name in skipped} == skipped


def test_captions_that_are_cut_and_damaged_json_are_in_the_log_and_at_the_end(tmp_path, run_here, capsys):
    shards = write_shards(tmp_path / "shards", counts=(6, 6), damage={(0, 1): {"json": b"{"}})
    CaptionTokenizer.train(["sample of shard 0123456789"], 270).save(tmp_path / "tokenizer")
    job = write_job(tmp_path, shards, data={"tokenizer": str(tmp_path / "tokenizer"), "text_length": 5},
                    settings={"steps": 2})
    assert run_here("train", job.config).status == 0
    last = job.figures()[-1]
    assert last["partly_used/caption_cut"] == 24 and last["partly_used/damaged_json"] == 2 and not last["bad_samples"]
    printed = capsys.readouterr().out
    assert "samples used in part: 24 caption_cut (" in printed and "2 damaged_json (000000001): write" in printed


def test_too_many_broken_pictures_end_the_run_with_status_2(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards", damage=broken_pictures())
    job = write_job(tmp_path, shards, data={"max_bad_fraction": 0.04}, settings={"steps": 100})
    one_line(run_here("train", job.config), "not_an_image", "data.max_bad_fraction=0.04", str(shards))
    assert job.steps()[-1] == 16               # judged from 200 samples on: with the 17th batch of 12


def test_a_bad_sample_costs_no_pause(tmp_path, monkeypatch):
    damage = {(shard, sample): {"png": b"?"} for shard in range(SHARDS) for sample in range(0, SAMPLES, 2)}
    shards = write_shards(tmp_path / "shards", damage=damage)

    def sleep(seconds):
        raise AssertionError(f"the loader slept {seconds} s")

    monkeypatch.setattr(time, "sleep", sleep)
    keys, skipped = one_epoch(shards)
    assert skipped == {"not_an_image": len(damage)} and len(keys) == len(GOOD)


BOMB = """
import itertools, sys
from pathlib import Path
from PIL import Image
from dalle.data.loader import DataConfig, train_batches

def peak():        # of this program; ru_maxrss would begin at the peak of the process that started it
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

loader = train_batches(DataConfig.model_validate_json(sys.argv[1]), seed=0, batch_size=1)
batches = iter(loader)
while not any(loader.skipped.values()):
    before = peak()
    next(batches)
print(*loader.skipped, peak() - before)
before = peak()
Image.new("RGB", (5000, 5000))
print(peak() - before)
"""


def test_decompression_bomb_is_refused_by_its_header_in_no_memory(tmp_path):
    shards = write_shards(tmp_path / "shards", damage={(1, 5): {"png": png_of_size(50_000, 50_000)}})
    done = subprocess.run([sys.executable, "-c", BOMB, data_config(shards).model_dump_json()], cwd=ROOT, text=True,
                          capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    reason, grown, control = done.stdout.split()
    assert reason == "too_many_pixels" and int(grown) < 50_000          # kilobytes
    assert int(control) > 50_000                                        # what even a small bomb would have cost


WHITE, BLACK, RED, GREEN, BLUE = (255, 255, 255), (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)
FOUR = [RED, GREEN, BLUE, WHITE]
# name: (the four pixels as stored, how they are stored, the four pixels that training must see)
PICTURES = {
    "rgba on white": ("RGBA", [(255, 0, 0, 255), (255, 0, 0, 0), (0, 0, 0, 127), (10, 20, 30, 255)], "png", {},
                      [RED, WHITE, (128, 128, 128), (10, 20, 30)]),
    "cmyk": ("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (0, 0, 0, 255)], "tiff", {},
             [WHITE, (0, 255, 255), RED, BLACK]),
    "16 bit grey": ("I;16", [0, 257, 40000, 65535], "png", {}, [BLACK, (1,) * 3, (156,) * 3, WHITE]),
    "palette with a clear colour": ("P", [0, 1, 2, 3], "png", {"transparency": 1}, [RED, WHITE, BLUE, WHITE]),
    "animated gif": ("RGB", FOUR, "gif", {"frames": 3}, FOUR),
    "animated webp": ("RGB", FOUR, "webp", {"frames": 3, "lossless": True}, FOUR),
    "exif turned by a quarter": ("RGB", FOUR, "png", {"orientation": 6}, [BLUE, RED, WHITE, GREEN]),
    "exif upside down": ("RGB", FOUR, "png", {"orientation": 3}, FOUR[::-1]),
    "broken exif": ("RGB", FOUR, "png", {"exif": b"Exif\0\0II*\0\xff\xff\xff\xff"}, FOUR),
}


def stored(mode: str, pixels: list, kind: str, options: dict) -> bytes:
    """A picture of 2 x 2 pixels."""
    options = dict(options)
    if mode == "I;16":
        image = Image.fromarray(np.array(pixels, dtype=np.uint16).reshape(2, 2))
    else:
        image = Image.new(mode, (2, 2))
        if mode == "P":
            image.putpalette([value for pixel in FOUR for value in pixel])
        image.putdata(pixels)
    if "frames" in options:
        options |= {"save_all": True, "append_images": [Image.new("RGB", (2, 2))] * (options.pop("frames") - 1)}
    if "orientation" in options:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = options.pop("orientation")
    return encoded(image, kind, **options)


def test_alpha_cmyk_16_bit_animated_and_exif_pictures_come_as_a_viewer_shows_them(tmp_path):
    members = [(f"{number}.{kind}", stored(mode, pixels, kind, options))
               for number, (mode, pixels, kind, options, _) in enumerate(PICTURES.values())]
    write_tar(tmp_path / "0.tar", members)
    loader = validation_batches(data_config(tmp_path, image_size=2, caption="none"), seed=0, batch_size=len(members))
    (batch,) = loader
    assert not loader.skipped
    for name, image, (*_, expected) in zip(PICTURES, batch["image"], PICTURES.values(), strict=True):
        assert image.permute(1, 2, 0).reshape(4, 3).tolist() == [list(pixel) for pixel in expected], name


# -- captions ---------------------------------------------------------------------------------------------------------

def captions_in(folder: Path, captions: dict[tuple[int, int], dict]) -> tuple[Counter, set[str]]:
    """The counters of an epoch, and the samples of ``captions`` that were trained on."""
    keys, skipped = one_epoch(write_shards(folder, damage=captions))
    assert len(keys) == len(GOOD) and GOOD - {sample_key(*place) for place in captions} <= set(keys)
    return skipped, set(keys) & {sample_key(*place) for place in captions}


def test_missing_empty_and_blank_captions_are_skipped_and_counted(tmp_path):
    captions = {(0, 1): {"txt": None}, (1, 1): {"txt": b""}, (2, 1): {"txt": b" \t\r\n \n"},
                (3, 1): {"txt": None, "json": b'{"caption": "from the JSON"}'}, (4, 1): {"txt": None, "json": b"{}"}}
    skipped, used = captions_in(tmp_path / "shards", captions)
    assert skipped == {"no_caption": 2, "empty_caption": 2} and used == {sample_key(3, 1)}
    keys, skipped = one_epoch(tmp_path / "shards", caption="none")
    assert set(keys) == GOOD and not skipped          # pictures alone need no captions


def test_a_set_without_captions_ends_the_run_and_says_so(tmp_path, run_here):
    damage = {(shard, sample): {"txt": None} for shard in range(SHARDS) for sample in range(SAMPLES)}
    job = write_job(tmp_path, write_shards(tmp_path / "shards", damage=damage))
    one_line(run_here("train", job.config), "no_caption", "data.caption=none")
    assert run_here("train", job.config, "data.caption=none", "--resume", "none").status == 0


def test_captions_that_are_not_utf8_are_skipped_and_counted(tmp_path):
    captions = {(0, 2): {"txt": b"the dog\x92s ball"}, (1, 2): {"txt": b"caf\xe9"}, (2, 2): {"txt": b"\xef\xbb\xbf"},
                (3, 2): {"txt": b"\0"}, (4, 2): {"txt": "\ufeffcafé\0".encode()},
                (4, 3): {"txt": None, "json": b'{"caption": "half a pair \\ud83d"}'}}
    skipped, used = captions_in(tmp_path / "shards", captions)
    assert skipped == {"caption_encoding": 3, "empty_caption": 2} and used == {sample_key(4, 2)}
    loader = validation_batches(data_config(tmp_path / "shards"), seed=0, batch_size=12)
    spelled = {key: caption for batch in loader
               for key, caption in zip(batch["key"], batch["caption"], strict=True)}
    assert spelled[sample_key(4, 2)] == "café"


# -- shards -----------------------------------------------------------------------------------------------------------

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


def sample_of(key: str, shade: int) -> list[tuple[str, bytes]]:
    return [(f"{key}.png", encoded(Image.new("RGB", (32, 32), (shade, 0, 0)), "png")), (f"{key}.txt", b"a caption")]


def delivered(folder: Path) -> list[tuple[str, int]]:
    """(key, red of the picture) of every sample of the shards, in order."""
    batches = validation_batches(data_config(folder), seed=0, batch_size=4)
    return [(key, int(image[0, 0, 0])) for batch in batches
            for key, image in zip(batch["key"], batch["image"], strict=True)]


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


# -- the object store -------------------------------------------------------------------------------------------------

class Store(ThreadingHTTPServer):
    """Serves a folder over http with byte ranges. ``faults[name]`` are played out on a shard first, one a request."""

    daemon_threads = True

    def __init__(self, folder: Path, faults: dict[str, list[str]]):
        super().__init__(("127.0.0.1", 0), StoreRequest)
        self.folder, self.faults, self.released = folder, faults, threading.Event()
        self.asked: Counter[str] = Counter()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{{00000..{SHARDS - 1:05d}}}.tar"


class StoreRequest(BaseHTTPRequestHandler):
    def do_GET(self):
        name = self.path.strip("/")
        self.server.asked[name] += 1
        fault = next(iter(self.server.faults.get(name, ())), None)
        if fault != "always stall" and fault is not None:
            self.server.faults[name].pop(0)
        if fault in ("404", "503"):
            self.send_error(int(fault))
            return
        data = (self.server.folder / name).read_bytes()
        begin = int(self.headers.get("Range", "bytes=0-")[6:-1])
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(data) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if fault is None:
            self.wfile.write(data[begin:])
            return
        if fault != "always stall":
            self.wfile.write(data[begin:begin + (len(data) - begin) // 2])      # half of it, and then ...
            self.wfile.flush()
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            self.server.released.wait(30)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def store(folder: Path, **faults: list[str]):
    """A running :class:`Store`; ``shard3=[...]`` are the faults of the fourth shard."""
    server = Store(folder, {f"{int(name.removeprefix('shard')):05d}.tar": listed for name, listed in faults.items()})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


@pytest.fixture
def impatient(monkeypatch) -> dict:
    """Settings of a stream that gives up soon, and pauses that are short."""
    monkeypatch.setattr("dalle.data.opening.FIRST_PAUSE", 0.01)
    return {"tier": "sequential", "read_timeout": 0.5, "read_retries": 3}


def test_slow_object_store_that_stalls_resets_or_says_503_loses_and_repeats_nothing(tmp_path, impatient):
    shards = write_shards(tmp_path / "shards")
    faults = {"shard0": ["stall"], "shard1": ["reset", "reset"], "shard2": ["503", "503"], "shard4": ["503", "stall"]}
    with store(shards, **faults) as server:
        keys, skipped = one_epoch(server.url, **impatient)
    assert keys == sorted(GOOD) and not skipped
    assert server.asked == {"00000.tar": 2, "00001.tar": 3, "00002.tar": 3, "00003.tar": 1, "00004.tar": 3}


@pytest.mark.parametrize("fault", ["404", "always stall"])
def test_absent_object_store_ends_the_run_in_time_and_names_the_shard(tmp_path, run_here, impatient, fault):
    shards = write_shards(tmp_path / "shards")
    began = time.monotonic()
    with store(shards, shard3=[fault]) as server:
        job = write_job(tmp_path, server.url, data=impatient)
        one_line(run_here("train", job.config), f":{server.server_port}/00003.tar", "data.bad_shards=skip")
        assert server.asked["00003.tar"] == (1 if fault == "404" else 4)      # no retry of what is not there
    assert time.monotonic() - began < 20


def test_missing_shard_is_trained_without_only_where_that_was_chosen_and_is_counted(tmp_path, run_here, impatient):
    shards = write_shards(tmp_path / "shards")
    with store(shards, shard3=["404"]) as server:
        job = write_job(tmp_path, server.url, name="stream", data={**impatient, "bad_shards": "skip"})
        assert run_here("train", job.config).status == 0
    assert job.figures()[-1]["bad_samples/missing_shard"] == 1
    (shards / "00003.tar").unlink()
    job = write_job(tmp_path, shards, name="local", data={"bad_shards": "skip"})
    assert run_here("train", job.config).status == 0
    assert job.figures()[-1]["bad_samples/missing_shard"] == 1
    keys, skipped = one_epoch(shards, bad_shards="skip")
    assert set(keys) == {key for key in GOOD if not key.startswith("00003")} and len(keys) == len(GOOD)
    assert skipped == {"missing_shard": 1, "in_bad_shard": SAMPLES}


def test_running_job_goes_on_without_a_shard_where_that_was_chosen_and_with_it_when_it_is_back(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards")
    settings = {"steps": 5, "log_samples": True, "save_every": 1}
    whole = write_job(tmp_path, shards, name="whole", settings=settings)
    assert run_here("train", whole.config).status == 0
    job = write_job(tmp_path, shards, settings=settings)
    assert run_here("train", job.config, "--stop-after", 1).status == 0
    aside = (shards / "00003.tar").rename(tmp_path / "aside.tar")
    one_line(run_here("train", job.config), "00003.tar is in the index but missing", "data.bad_shards=skip")
    assert run_here("train", job.config, "data.bad_shards=skip", "--stop-after", 3).status == 0
    assert job.figures()[-1]["bad_samples/missing_shard"] == 1
    aside.rename(shards / "00003.tar")
    assert run_here("train", job.config).status == 0
    trained, expected = surviving(job.run), surviving(whole.run)
    stood_in = {sample_key(3, sample): sample_key(4, sample) for sample in range(SAMPLES)}
    for step in (1, 2):                              # those that were taken while it was gone
        expected[step] = [(position, stood_in.get(key, key)) for position, key in expected[step]]
    assert trained == expected and set(trained) == set(range(5))


# -- ranks and workers ------------------------------------------------------------------------------------------------

def steps_of_ranks(folder: Path, steps: int, *, batch: int, workers: int) -> list[list[list[str]]]:
    """The keys of every step of each of two ranks."""
    loaders = [train_batches(data_config(folder, workers=workers), seed=0, batch_size=batch, rank=rank, world_size=2)
               for rank in range(2)]
    try:
        return [[part["key"] for part in itertools.islice(loader, steps)] for loader in loaders]
    finally:
        for loader in loaders:
            loader.close()


def test_fewer_shards_than_workers_still_feeds_every_rank(tmp_path):
    shards = write_shards(tmp_path / "shards", counts=(4, 4, 4))
    first, second = steps_of_ranks(shards, 4, batch=6, workers=2)
    assert len(first) == len(second) == 4 and {len(keys) for keys in [*first, *second]} == {3}
    steps = [a + b for a, b in zip(first, second, strict=True)]
    whole = {sample_key(shard, sample) for shard in range(3) for sample in range(4)}
    for epoch in (steps[:2], steps[2:]):
        assert sorted(sum(epoch, [])) == sorted(whole)


def test_uneven_shards_give_every_rank_as_many_batches(tmp_path):
    counts = (7, 11, 5, 1, 13)                       # 37 samples, in batches of 6 over 2 ranks
    shards = write_shards(tmp_path / "shards", counts=counts)
    first, second = steps_of_ranks(shards, sum(counts), batch=6, workers=0)
    assert {len(keys) for keys in [*first, *second]} == {3}
    times = Counter(itertools.chain(*first, *second))
    assert len(times) == sum(counts) and set(times.values()) == {6}
    passes = [list(validation_batches(data_config(shards), seed=0, batch_size=6, rank=rank, world_size=2))
              for rank in range(2)]
    assert len(passes[0]) == len(passes[1]) == 7
    assert Counter(key for batches in passes for batch in batches for key in batch["key"]) == Counter(times.keys())


def test_uneven_and_few_shards_train_validate_and_end_on_two_processes(tmp_path):
    shards = write_shards(tmp_path / "shards", counts=(7, 11, 5))
    job = write_job(tmp_path, shards, data={"workers": 2, "validation": str(shards)},
                    settings={"steps": 8, "batch_size": 6, "validate_every": 3, "log_samples": True})
    process = start_command("launch/train.py", job.config, launcher=TWO_PROCESSES)
    try:
        out, errors = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 0, errors[-3000:]
    assert job.steps()[-1] == 8 and out.count("validation after step") == 3
    of_ranks = [[json.loads(line)["step"] for line in path.read_text().splitlines() if '"position"' in line]
                for path in sorted((job.run / "sample_log").glob("rank*.jsonl"))]
    assert of_ranks == [list(range(8))] * 2


def loader_workers(process: subprocess.Popen) -> list[psutil.Process]:
    """The forks of the command's fork server."""
    return [worker for child in psutil.Process(process.pid).children()
            if any("multiprocessing.forkserver" in word for word in child.cmdline()) for worker in child.children()]


def test_killed_loader_worker_ends_the_run_at_once_with_its_name_and_a_restart_finishes(tmp_path, run_here):
    steps = 80
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), data={"workers": 2},
                    settings={"steps": steps, "save_every": 2})
    process = start_command("launch/train.py", job.config)
    try:
        wait_until(lambda: 3 in job.steps(), process)
        victim = loader_workers(process)[0]
        victim.send_signal(signal.SIGKILL)           # what the kernel does when memory runs out
        killed = time.monotonic()
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - killed < 20
    assert process.returncode == EXIT_LOST_PROCESS and 3 <= len(job.steps()) < steps
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in errors and str(victim.pid) in line and "start" in line and "data.workers" in line
    last = job.steps()[-1]
    assert run_here("train", job.config, "data.workers=0").status == 0
    resumed = job.steps()[job.steps().index(last) + 1:]
    assert resumed[0] > 2 and resumed[-1] == steps and resumed == list(range(resumed[0], steps + 1))


# -- hostile files ----------------------------------------------------------------------------------------------------

def test_pickle_inside_a_shard_is_never_read(tmp_path, run_here):
    marker = tmp_path / "executed"
    payload = pickle.dumps(Payload(marker))
    first = dict.fromkeys(("pkl", "pickle", "pyd", "pth", "pt", "npy", "npz", "cls"), payload)
    damage = {(0, 0): first, (1, 1): {"png": payload}, (2, 2): {"txt": payload}, (3, 3): {"json": payload}}
    extra = {4: [(f"x.{extension}", payload) for extension in first]}
    shards = write_shards(tmp_path / "shards", damage=damage, extra=extra, index=False)
    assert run_here("index_shards", shards, "--workers", 1).status == 0
    keys, skipped = one_epoch(shards)
    assert set(keys) == GOOD - {sample_key(shard, shard) for shard in (1, 2)}         # a JSON is not needed
    assert skipped == {"not_an_image": 1, "caption_encoding": 1}
    streamed, skipped_in_stream = one_epoch(shards, tier="sequential")
    assert set(streamed) == set(keys) and skipped_in_stream == skipped
    assert run_here("train", write_job(tmp_path, shards).config).status == 0
    assert not marker.exists()
    pickle.loads(payload)
    assert marker.exists()                           # the payload was live


@pytest.mark.parametrize("spec", ["pipe:touch {}", "{shards}::pipe:touch {}", "PIPE: touch {}", "pipe:touch {};.tar"])
def test_pipe_in_the_data_spec_is_refused_and_not_run(tmp_path, run_here, spec):
    marker = tmp_path / "executed"
    shards = write_shards(tmp_path / "shards", counts=(4,))
    spec = spec.format(marker, shards=shards)
    job = write_job(tmp_path, shards)
    for tier in ("exact", "resampled", "sequential"):
        ended = run_here("train", job.config, f"data.train={json.dumps(spec)}", f"data.tier={tier}")
        one_line(ended, "touch")
    ended = run_here("train", job.config, f"data.validation={json.dumps(spec)}", "train.validate_every=1")
    one_line(ended, "touch")
    one_line(run_here("index_shards", spec, "--workers", 1))
    assert not marker.exists()
    if spec.lower().startswith("pipe:"):
        allowed = run_here("train", job.config, f"data.train={json.dumps(spec)}", "data.tier=sequential",
                           "data.allow_pipe=true", "data.read_retries=0", "--resume", "none")
        assert allowed.status == 2 and marker.exists()          # only the flag runs it (and it writes no tar)


def test_control_characters_in_a_key_never_reach_the_log(tmp_path, caplog):
    good, bad = "a\nerror: nothing is wrong", "b\x1b[2J"
    write_tar(tmp_path / "0.tar", [*sample_of(good, 1), (f"{bad}.png", b"?"), (f"{bad}.txt", b"?")])
    with caplog.at_level(logging.WARNING):
        ((key, _), (replaced, _)) = delivered(tmp_path)
    assert key == replaced and key.isprintable() and "nothing is wrong" in key
    assert any("not_an_image" in message for message in caplog.messages)
    assert all(message.isprintable() for message in caplog.messages)


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_tar_path_traversal_every_command_writes_only_into_its_own_folder(tmp_path, run_here, monkeypatch):
    room = tmp_path / "a" / "b"
    absolute = tmp_path / "absolute"
    names = ["../../x", "../../../../etc/x", str(absolute / "x"), "..", "a/../../x", "./x", "~/x"]
    members = [member for shade, name in enumerate(names) for member in sample_of(name, shade)]
    members = [(name, b"../../caption" if name.endswith(".txt") else data) for name, data in members]
    shards = write_tar(room / "shards" / "0.tar", members).parent
    (room / "home").mkdir()
    monkeypatch.setenv("HOME", str(room / "home"))
    monkeypatch.chdir(room / "home")
    before = files_below(tmp_path)
    assert run_here("index_shards", shards, "--workers", 1).status == 0
    assert [key for key, _ in delivered(shards)] == [name for name in names if Path(name).name != ".."]
    job = write_job(room, shards, data={"validation": str(shards)},
                    settings={"batch_size": 2, "validate_every": 2, "preview_every": 2})
    assert run_here("train", job.config).status == 0
    tokens, codes = room / "tokenizer", room / "codes"
    assert run_here("train_tokenizer", shards, "--out", tokens, "--vocab-size", 260).status == 0
    assert run_here("cache_codes", "--codec", job.run, "--data", shards, "--out", codes).status == 0
    added = files_below(tmp_path) - before
    own = ("a/b/shards/index", "a/b/runs", "a/b/tokenizer", "a/b/codes", "a/b/job.yaml")
    assert added and all(name.startswith(own) for name in added), sorted(added)
    assert not any("caption" in name or name.endswith(("/x", "x.png", "x.txt")) for name in added)


# -- configs ----------------------------------------------------------------------------------------------------------

def test_unsafe_yaml_is_one_line_and_runs_nothing(tmp_path, run_here):
    marker = tmp_path / "executed"
    job = write_job(tmp_path, write_shards(tmp_path / "shards", counts=(4,)))
    good = job.config.read_text()
    call = f"!!python/object/apply:os.mkdir [{marker}]"
    for text, words in (
        (f"{good}seed: {call}\n", ["python/object/apply", "line"]),
        (f"{good}? {call}\n: 1\n", ["python/object/apply"]),
        (f"{good}seed: !!python/name:os.system\n", ["python/name"]),
        (f"{good}seed: 1\nseed: 2\n", ["'seed' appears twice"]),
        (good.replace("batch_size:", "batch_sise:"), ["train.batch_sise", "did you mean 'batch_size'?"]),
    ):
        job.config.write_text(text)
        one_line(run_here("train", job.config), *words, str(job.config))
    job.config.write_text(good)
    one_line(run_here("train", job.config, f"seed={call}"), "override")
    one_line(run_here("train", job.config, "train.stepps=3"), "did you mean 'steps'?")
    assert not marker.exists() and not job.run.exists()
    yaml.unsafe_load(call)
    assert marker.exists()


@pytest.mark.parametrize("text", [
    "seed: 2024-99-99", "? [a]\n: b", "? {a: b}\n: c", "task: [dvae]", "task: {a: b}", f"seed: {'9' * 5000}",
    f"seed: {'[' * 1200}", "seed: !!int x", "seed: !!bool x", "seed: !!timestamp x", "\0", "seed: 'open", "- a", "",
])
def test_yaml_that_is_no_config_is_one_line(tmp_path, run_here, text):
    config = tmp_path / "job.yaml"
    config.write_text(text)
    one_line(run_here("train", config), str(config))


@pytest.mark.parametrize("value", ["2024-99-99", "{[a]: b}", "[" * 1200, "!!int x", "'open"])
def test_override_that_is_no_yaml_is_one_line(tmp_path, run_here, value):
    job = write_job(tmp_path, tmp_path)
    one_line(run_here("train", job.config, f"seed={value}"), "override")


def test_changed_config_at_resume_is_refused_or_taken_by_its_class(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards")
    job = write_job(tmp_path, shards, settings={"steps": 4})
    assert run_here("train", job.config, "--stop-after", 2).status == 0
    before = files_below(job.run), (job.run / "config.yaml").read_text()
    for change in ("seed=1", "train.batch_size=6", "data.lanes=8", "data.flip=true", "optimizer.name=muon"):
        key, _, value = change.partition("=")
        one_line(run_here("train", job.config, change), f"{key}: ", f"-> {yaml.safe_load(value)!r}")
    other = write_shards(tmp_path / "other", counts=(12,) * 4)
    one_line(run_here("train", job.config, f"data.train={other}"), "fingerprint")
    assert job.steps() == [1, 2]
    assert (files_below(job.run), (job.run / "config.yaml").read_text()) == before          # a refusal changes nothing
    moved = shutil.copytree(shards, tmp_path / "moved")                                     # may change: the same data
    assert run_here("train", job.config, f"data.train={moved}", "data.workers=1", "--stop-after", 3).status == 0
    assert run_here("train", job.config, "train.steps=5", "optimizer.lr=1e-4").status == 0   # free
    assert job.steps() == [1, 2, 3, 4, 5]
