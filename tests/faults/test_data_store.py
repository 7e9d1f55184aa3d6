"""Faults of the place where shards lie: an object store that is slow or absent, a shard that comes and goes.

The functions are named after the fault and what is promised; each goes through the loader or a command.
"""

import contextlib
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from epochs import GOOD, one_epoch, one_line
from tiny_shards import SAMPLES, SHARDS, sample_key, write_job, write_shards

from dalle.training.sample_log import surviving


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
