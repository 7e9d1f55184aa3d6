"""Fixtures of the data tests: a set with a tokenizer and codes, and shards behind a server."""

import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from dalle.data import opening
from dalle.data.codes import CodesWriter
from dalle.data.index import ShardIndex
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.writer import ShardWriter

sys.path.insert(0, str(Path(__file__).parent))      # for numbered and streams

from numbered import COUNT, png  # noqa: E402
from streams import PER_SHARD, SHARDS, Server  # noqa: E402


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "train", 6) as writer:
        for number in range(COUNT):
            writer.write(png(number), "png", [f"picture number {number}", f"second caption of {number}"],
                         {"class_id": number % 3, "name": str(number)} if number != 5 else None)
    index = ShardIndex.load(str(folder / "train"))
    CaptionTokenizer.train_from_shards(index, 300).save(folder / "tokenizer")
    with CodesWriter(folder / "codes", index, codec_digest="d", num_codes=1000, grid=(2, 2), views=3) as writer:
        numbers = np.arange(COUNT)[:, None, None] * 10
        writer.write(numbers + np.arange(3)[None, :, None] + np.zeros((1, 1, 4), int))
    return folder


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    with ShardWriter(folder / "train", PER_SHARD) as writer:
        for number in range(SHARDS * PER_SHARD):
            writer.write(png(number), "png", [f"picture {number}", f"also {number}"], {"class_id": number % 3})
    return folder


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(opening, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server(streamed):
    with Server() as server:
        server.files = {path.name: path.read_bytes() for path in (streamed / "train").glob("*.tar")}
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()
