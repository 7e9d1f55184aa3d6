import contextlib
import io
import itertools
import json
import os
import pickle
import re
import socket
import struct
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError

from dalle.data import opening, streaming
from dalle.data.index import ShardIndex
from dalle.data.loader import DataConfig, train_batches, validation_batches
from dalle.data.opening import LostShard, Patience, ShardStream, shard_urls
from dalle.data.reasons import Tally
from dalle.data.streaming import DamagedShard, drawn_shard, raw_samples
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

SIZE, PER_SHARD, SHARDS = 8, 6, 3
KEYS = [f"{shard:05d}{number:04d}" for shard in range(SHARDS) for number in range(PER_SHARD)]


def png(number):
    buffer = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (number, 2 * number, 0)).save(buffer, "png")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "train", PER_SHARD) as writer:
        for number in range(SHARDS * PER_SHARD):
            writer.write(png(number), "png", [f"picture {number}", f"also {number}"], {"class_id": number % 3})
    return folder


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(opening, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")


def config(spec, **changes):
    values = {"train": str(spec), "image_size": SIZE, "workers": 0, "tier": "sequential", "shuffle_buffer": 4,
              "read_timeout": 2.0, "read_retries": 2}
    return DataConfig(**{**values, **changes})


def batches_of(settings, count, **share):
    loader = train_batches(settings, **{"seed": 0, "batch_size": 3, **share})
    try:
        return list(itertools.islice(loader, count)), loader
    finally:
        loader.close()


def keys_in(batches):
    return [key for batch in batches for key in batch["key"]]


# --- a server with moods ----------------------------------------------------------------------------------------------


class Server(ThreadingHTTPServer):
    """Serves ``files``; the answers to a path follow ``moods[path]``, then it serves well. ``asked``: (path, range)."""

    daemon_threads, ranges, tag = True, True, '"1"'

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.moods, self.asked, self.over = {}, {}, [], threading.Event()

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, name = self.server, self.path[1:].partition("?")[0]
        wanted = self.headers.get("Range")
        server.asked.append((name, wanted))
        moods = server.moods.get(name, [])
        mood = moods.pop(0) if moods else "serve"
        if mood.isdigit() or name not in server.files:
            self.send_error(int(mood) if mood.isdigit() else 404)
            return
        if mood == "silent":
            server.over.wait(20)
            return
        if mood == "another file":
            server.tag = '"2"'
        whole = server.files[name]
        begin = int(re.fullmatch(r"bytes=(\d+)-", wanted).group(1)) if wanted and server.ranges else 0
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(whole) - 1}/{len(whole)}")
        self.send_header("Content-Length", str(len(whole) - begin))
        self.send_header("ETag", server.tag)
        self.end_headers()
        half = begin + (len(whole) - begin) // 2
        self.wfile.write(whole[begin:] if mood == "serve" else whole[begin:half])
        self.wfile.flush()
        if mood == "stall":
            server.over.wait(20)
        elif mood == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(data):
    with Server() as server:
        server.files = {path.name: path.read_bytes() for path in (data / "train").glob("*.tar")}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


def read_keys(url, timeout=0.5, retries=2):
    stream = ShardStream(url, Patience(timeout, retries))
    with contextlib.closing(stream):
        return [sample.key.decode() for sample in raw_samples(stream, Tally())]


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


def test_pipes_run_only_when_allowed(data, tmp_path, monkeypatch):
    spec = f"pipe:touch {tmp_path}/executed; cat {data}/train/{{00000..00002}}.tar"
    with pytest.raises(UserError, match=r"would run a shell command; set data\.allow_pipe=true"):
        batches_of(config(spec), 1)
    with pytest.raises(UserError, match="allow_pipe"):
        batches_of(config(f"{data}/train::PIPE:touch {tmp_path}/executed"), 1)
    assert not list(tmp_path.iterdir())
    assert keys_in(batches_of(config(spec, allow_pipe=True), 6)[0]) == KEYS
    assert [path.name for path in tmp_path.iterdir()] == ["executed"]
    monkeypatch.setattr("webdataset.utils.enforce_security", True)
    with pytest.raises(UserError, match="WDS_SECURE forbids"):
        batches_of(config(spec, allow_pipe=True), 1)


def test_a_pipe_that_fails_or_hangs_half_way_goes_on_from_its_byte(data, tmp_path):
    shard = data / "train" / "00000.tar"
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


def test_object_stores_are_read_by_their_program_without_a_shell(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    spec = "s3://bucket/$(touch executed)/{00000..00001}.tar"
    with pytest.raises(UserError, match="'aws', which is not installed"):
        shard_urls(spec, allow_pipe=False)
    program = tmp_path / "aws"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/log\ncat {data}/train/$(basename "$4")\n')
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


def test_local_specs_name_the_same_shards(data):
    folder = data / "train"
    expected = [str(folder / f"{number:05d}.tar") for number in range(SHARDS)]
    for spec in (str(folder), f"{folder}/*.tar", f"{folder}/{{00000..00002}}.tar", f"file://{folder}/*.tar",
                 f"{folder}/00000.tar::{folder}/0000[12].tar"):
        assert shard_urls(spec, allow_pipe=False) == expected


def test_a_missing_file_is_found_before_training(data, tmp_path):
    for number in (0, 2):
        os.link(data / "train" / f"0000{number}.tar", tmp_path / f"0000{number}.tar")
    spec = f"{tmp_path}/{{00000..00002}}.tar"
    with pytest.raises(UserError, match=r"00001\.tar does not exist.*data\.bad_shards=skip"):
        train_batches(config(spec), seed=0, batch_size=3)
    batches, loader = batches_of(config(spec, bad_shards="skip"), 4)
    assert keys_in(batches) == KEYS[:6] + KEYS[12:] and loader.skipped == {"missing_shard": 1}
    assert loader.identity == train_batches(config(data / "train"), seed=0, batch_size=3).identity


# --- what is in a shard -----------------------------------------------------------------------------------------------


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_stream_holds_the_samples_that_the_index_finds(tmp_path, format):
    long = "d/" + ("k" * 140 if format != tarfile.USTAR_FORMAT else "k" * 90)
    members = [("a.jpg", b"A" * 600), ("a.txt", b"a"), (f"{long}.png", b"B"), (f"{long}.json", b"{}"),
               ("README", b"x"), ("n.txt", b"alone"), ("a.jpg", b"again"), ("c.webp", b""), ("c.pkl", b"!"),
               ("._c.jpg", b"mac"), ("v.x.jpg", b"v"), ("../../up.jpg", b"up")]
    path = write_tar(tmp_path / "0.tar", members, format)
    index = ShardIndex.build([path])
    stream, problems = ShardStream(str(path), Patience(1, 0)), Tally()
    samples = list(raw_samples(stream, problems))
    stream.close()
    assert [sample.key for sample in samples] == index.members(0)["key"].tolist()
    contents = path.read_bytes()
    for sample, row in zip(samples, index.members(0), strict=True):
        for part in ("image", "text", "json"):
            offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
            assert sample.parts.get(part) == (contents[offset:offset + size] if size >= 0 else None)
    assert {**problems.counts, "no_caption": index.problems["no_caption"]} == index.problems


def test_what_lies_between_the_members_of_a_streamed_sample_does_not_part_them(tmp_path):
    between = [("._a.png", b"mac"), ("Thumbs.db", b"!"), ("README", b"")]
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), *between, ("a.txt", b"a caption")])
    batches, loader = batches_of(config(tmp_path), 1, batch_size=1)
    assert batches[0]["caption"] == ["a caption"] and not loader.skipped


def test_members_that_a_stream_cannot_join_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("b.png", png(2)), ("b.txt", b"b"), ("a.txt", b"a")])
    batches, loader = batches_of(config(tmp_path, max_bad_fraction=1), 1, batch_size=2)
    assert keys_in(batches) == ["b", "b"] and loader.skipped["members_apart"] == 1


def test_every_cut_is_noticed_and_nothing_halved_is_delivered(data, tmp_path):
    whole = (data / "train" / "00000.tar").read_bytes()
    rows = ShardIndex.build([data / "train" / "00000.tar"]).members(0)
    row = rows[3]
    ends = sorted(int(row[f"{part}_offset"]) for part in ("image", "text", "json"))
    cuts = {"payload": ends[0] + 5, "header": ends[1] - 300, "between members": ends[1] - 512,
            "between samples": ends[0] - 512}
    for name, cut in cuts.items():
        path = tmp_path / "00000.tar"
        path.write_bytes(whole[:cut])
        keys = []
        with contextlib.closing(ShardStream(str(path), Patience(1, 0))) as stream, \
                pytest.raises(DamagedShard, match="truncated_shard"):
            for sample in raw_samples(stream, Tally()):
                keys.append(sample.key.decode())
        assert keys == KEYS[:2 if name == "between samples" else 3], name
        batches, loader = batches_of(config(tmp_path), 4)
        assert keys_in(batches) == [key for key, _ in zip(itertools.cycle(keys), range(12), strict=False)]
        assert loader.skipped["truncated_shard"] >= 2       # at every pass


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"<html>" * 200)
    with pytest.raises(UserError, match="none of the shards .*no tar .*compressed ones are not read"):
        batches_of(config(tmp_path), 1)
    write_tar(tmp_path / "0.tar", [("a.txt", b"a")])
    with pytest.raises(UserError, match="no sample with a picture"):
        batches_of(config(tmp_path), 1)


def test_claims_of_size_take_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "LARGEST_MEMBER", 2000)
    path = write_tar(tmp_path / "0.tar", [("big.png", bytes(5000)), ("big.txt", b"big"), ("a.png", png(1)),
                                          ("a.txt", b"a")])
    batches, loader = batches_of(config(tmp_path, max_bad_fraction=1), 1, batch_size=2)
    assert keys_in(batches) == ["a", "a"] and loader.skipped["member_too_large"] == loader.skipped["no_image"] >= 1
    header = bytearray(path.read_bytes()[:512])
    header[124:136] = b"\x80" + (1 << 60).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "0.tar").write_bytes(bytes(header))
    with pytest.raises(UserError, match="inside a member of 1152921504606846976 bytes"):
        batches_of(config(tmp_path), 1)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_pickles_in_a_shard_are_never_loaded(tmp_path, monkeypatch, tier):
    monkeypatch.chdir(tmp_path)
    poison = pickle.dumps(Payload())
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"a"),
                                   *((f"a.{kind}", poison) for kind in ("pkl", "pickle", "pyd", "pth", "npy")),
                                   ("b.png", poison), ("b.txt", b"b"), ("c.png", png(2)), ("c.json", poison)])
    batches, _ = batches_of(config(tmp_path, tier=tier, max_bad_fraction=1), 4)
    assert set(keys_in(batches)) == {"a"} and not (tmp_path / "executed").exists()


# --- the batches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_batches_are_as_in_the_exact_tier(data, tier):
    batches, loader = batches_of(config(data / "train", tier=tier), 12, start_step=5)
    exact, _ = batches_of(config(data / "train", tier="exact"), 1)
    for step, batch in enumerate(batches, start=5):
        assert batch.keys() == exact[0].keys()
        assert all(torch.is_tensor(value) == torch.is_tensor(exact[0][name]) for name, value in batch.items())
        assert batch["image"].shape == exact[0]["image"].shape and batch["image"].dtype == torch.uint8
        assert batch["position"].tolist() == [3 * step, 3 * step + 1, 3 * step + 2]
        for row, key in enumerate(batch["key"]):
            number = KEYS.index(key)
            assert batch["image"][row, 0].unique().tolist() == [number]
            assert batch["caption"][row] in (f"picture {number}", f"also {number}")
            assert batch["class_id"][row] == number % 3
    assert {caption.split()[0] for batch in batches for caption in batch["caption"]} == {"picture", "also"}
    assert pickle.loads(pickle.dumps(loader._loader.dataset)).urls == loader._loader.dataset.urls
    assert not loader.skipped and loader.index is None and set(loader.identity) == {"fingerprint"}


def test_sequential_is_pass_after_pass_in_order(data):
    assert keys_in(batches_of(config(data / "train"), 12)[0]) == 2 * KEYS
    resumed = keys_in(batches_of(config(data / "train"), 6, start_step=4)[0])
    assert sorted(resumed) == KEYS and resumed[0] in KEYS[::PER_SHARD]      # whole shards, from another one on


def test_resampled_repeats_with_the_seed_and_differs_without(data):
    settings = config(data / "train", tier="resampled", flip=True)
    first, second = (batches_of(settings, 20)[0] for _ in range(2))
    assert keys_in(first) == keys_in(second)
    assert all(torch.equal(one["image"], two["image"]) for one, two in zip(first, second, strict=True))
    others = [keys_in(batches_of(settings, 20, **change)[0])
              for change in ({"seed": 1}, {"start_step": 1}, {"rank": 1, "world_size": 3, "batch_size": 9})]
    assert all(keys != keys_in(first) for keys in others)
    assert keys_in(first) != (4 * KEYS)[:60] and set(keys_in(first)) == set(KEYS)


def test_draws_are_a_pure_function_and_even():
    draws = [drawn_shard(3, 7, 0, 1, draw, 10) for draw in range(3000)]
    assert draws == [drawn_shard(3, 7, 0, 1, draw, 10) for draw in range(3000)]
    assert all(230 < count < 370 for count in Counter(draws).values()) and len(set(draws)) == 10
    lanes = {tuple(drawn_shard(3, 7, rank, worker, draw, 10) for draw in range(20))
             for rank in range(2) for worker in range(3)}
    assert len(lanes) == 6


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_fewer_shards_than_workers_starve_nobody(data, tier):
    for rank in range(2):
        settings = config(data / "train", tier=tier, workers=2)
        batches, loader = batches_of(settings, 9, batch_size=4, rank=rank, world_size=2)
        assert [batch["position"].tolist() for batch in batches] == [[4 * step + rank, 4 * step + 2 + rank]
                                                                     for step in range(9)]
        assert not loader.skipped


def test_lanes_divide_shards_or_samples(data, tmp_path):
    def lanes(spec, world, count):
        parts = [batches_of(config(spec), count, batch_size=world, rank=rank, world_size=world)[0]
                 for rank in range(world)]
        return [keys_in(part) for part in parts]

    assert lanes(data / "train", 3, 6) == [KEYS[6 * lane:6 * lane + 6] for lane in range(3)]
    assert sorted(itertools.chain(*lanes(data / "train", 6, 3))) == KEYS
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"a")])
    assert lanes(tmp_path, 4, 3) == [["a"] * 3] * 4
    os.link(data / "train" / "00001.tar", tmp_path / "1.tar")
    (tmp_path / "2.tar").write_bytes(b"")
    damaged = lanes(tmp_path, 3, 7)                         # the lane whose only shard is empty reads the others'
    assert set(damaged[2]) <= {"a", *KEYS} and len(damaged[2]) == 7


def damaged_set(folder):
    with ShardWriter(folder, 9) as writer:
        for number in range(18):
            image = {2: png(2)[:-30], 3: b"<html>"}.get(number, png(number))
            writer.write(image, "png", ["" if number == 8 else f"caption {number}"])
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_are_passed_over_counted_and_named(tmp_path, caplog, workers):
    settings = config(damaged_set(tmp_path / "d"), max_bad_fraction=0.3, workers=workers)
    batches, loader = batches_of(settings, 5)
    numbers = [int(value) for batch in batches for value in batch["image"][:, 0, 0, 0]]
    assert numbers == [0, 1, 4, 5, 6, 7, *range(9, 18)]
    assert loader.skipped == {"truncated_image": 1, "not_an_image": 1, "empty_caption": 1}
    assert not any({"skipped", "read"} & batch.keys() for batch in batches)
    if not workers:
        assert re.search(r"passed over: not_an_image.* key 000000003, sample 3 of .*00000\.tar", caplog.text)


@pytest.mark.parametrize("tier", ["sequential", "resampled"])
def test_too_many_bad_samples_stop_the_run(tmp_path, tier):
    folder = damaged_set(tmp_path / "d")
    with pytest.raises(UserError, match=r"of \d+ samples in .*d/00000\.tar and 1 more cannot be used.*not_an_image"):
        batches_of(config(folder, tier=tier, max_bad_fraction=0.1), 200)
    with pytest.raises(UserError, match="no usable sample among 1000 in a row.*caption=none"):
        with ShardWriter(tmp_path / "blank", 4) as writer:
            for number in range(9):
                writer.write(png(number), "png", [""])
        batches_of(config(tmp_path / "blank", tier=tier), 1)


def test_members_missing_from_a_sample_are_counted(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", png(1)), ("a.txt", b"a"), ("b.txt", b"b"), ("c.png", png(3)),
                                   ("d.png", png(4)), ("d.json", b'{"caption": "d"}'), ("a.png", png(5))])
    batches, loader = batches_of(config(tmp_path, max_bad_fraction=1), 2, batch_size=2)
    assert keys_in(batches) == ["a", "d", "a", "d"]
    assert loader.skipped == {"no_caption": 2, "no_image": 1, "duplicate_key": 1}


def test_cached_codes_need_the_exact_tier(data):
    with pytest.raises(ValidationError, match="codes belong to an index.*set tier to exact"):
        config(data / "train", codes="codes")


def test_validation_stays_exact(data):
    settings = config(data / "train", validation=str(data / "train"), tier="resampled")
    assert keys_in(validation_batches(settings, seed=0, batch_size=5)) == KEYS
    with pytest.raises(UserError, match="needs local tar files"):
        validation_batches(config(data / "train", validation="https://host/0.tar"), seed=0, batch_size=5)


def test_identity_follows_the_shards_and_not_their_place(data, server):
    def identity(spec):
        return train_batches(config(spec), seed=0, batch_size=3).identity

    assert identity(data / "train") == identity(server.url("{00000..00002}.tar?token=1"))
    assert identity(data / "train") != identity(f"{data}/train/{{00000..00001}}.tar")


def test_a_shard_whose_name_is_not_utf8_is_streamed(data, tmp_path):
    os.link(data / "train" / "00000.tar", os.fsencode(tmp_path) + b"/caf\xe9.tar")
    batches, loader = batches_of(config(tmp_path), 2)
    assert keys_in(batches) == KEYS[:6] and len(loader.identity["fingerprint"]) == 32


def test_a_run_trains_and_resumes_on_streams(workshop, commands, server, tmp_path):
    folder = workshop.folder / "data" / "train"
    server.files = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    tree = yaml.safe_load(workshop.config("dvae", tmp_path).read_text())
    tree["data"] |= {"train": server.url("{00000..00002}.tar"), "tier": "resampled", "shuffle_buffer": 16}
    (tmp_path / "dvae.yaml").write_text(yaml.safe_dump(tree))
    server.moods["00001.tar"] = ["cut", "503"]
    train = commands["train"]
    assert train(tmp_path / "dvae.yaml", "--stop-after", 2) == 0
    assert train(tmp_path / "dvae.yaml") == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "dvae" / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 4 and set(steps) >= {1, 2, 3, 4}
    with pytest.raises(UserError, match="data fingerprint: "):
        train(tmp_path / "dvae.yaml", f"data.train={folder}/00000.tar", "train.steps=6")
