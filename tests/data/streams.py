"""What the tests of streams share: three shards, a server of them with moods, and what comes out of a stream."""

import contextlib
import io
import itertools
import re
import socket
import struct
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from numbered import SIZE

from dalle.data.loader import train_batches
from dalle.data.opening import Patience, ShardStream
from dalle.data.reasons import Tally
from dalle.data.settings import DataConfig
from dalle.data.streaming import raw_samples

PER_SHARD, SHARDS = 6, 3
KEYS = [f"{shard:05d}{number:04d}" for shard in range(SHARDS) for number in range(PER_SHARD)]


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


def read_keys(url, timeout=0.5, retries=2):
    stream = ShardStream(url, Patience(timeout, retries))
    with contextlib.closing(stream):
        return [sample.key.decode() for sample in raw_samples(stream, Tally())]


def write_tar(path, members, format=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path
