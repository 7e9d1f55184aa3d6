"""Faults of pictures and captions: what is damaged, hostile or missing in a sample, and what that does to a run.

The functions are named after the fault and what is promised; each goes through the loader or a command.
"""

import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from epochs import EPOCH, GOOD, data_config, one_epoch, one_line
from PIL import Image
from tiny_shards import ROOT, SAMPLES, SHARDS, encoded, sample_key, write_job, write_shards, write_tar

from dalle.data.loader import validation_batches
from dalle.data.tokenizer import CaptionTokenizer


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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
from dalle.data.loader import train_batches
from dalle.data.settings import DataConfig

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
