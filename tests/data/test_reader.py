"""How many shards a reader keeps open."""

import os
import resource
from collections import Counter

import pytest
from numbered import SIZE, numbered_shards

from dalle.data.dataset import ShardDataset
from dalle.data.index import ShardIndex
from dalle.data.reader import most_open
from dalle.data.settings import DataConfig


def test_a_reader_opens_each_shard_of_the_windows_once(tmp_path, monkeypatch):
    shards = 300                                                    # all of them in 64 lanes, a window each
    numbered_shards(tmp_path / "d", count=2 * shards, per_shard=2)
    settings = DataConfig(train=str(tmp_path / "d"), image_size=SIZE, caption="none")
    dataset = ShardDataset(settings, ShardIndex.load(settings.train), seed=0, training=True)
    opened, really = Counter(), os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.update([str(path)]) or really(path, *rest))
    for start in range(0, 4 * shards, 100):                         # two epochs
        dataset.fetch(range(start, start + 100))
    assert len(opened) == shards and set(opened.values()) == {1}
    dataset._reader.close()


@pytest.mark.parametrize(("soft", "hard", "raised", "expected"), [
    (4096, 4096, None, 1000), (resource.RLIM_INFINITY, resource.RLIM_INFINITY, None, 1000),
    (1024, 1 << 20, 3256, 1000), (1024, resource.RLIM_INFINITY, 3256, 1000), (1024, 1156, 1156, 300),
    (1024, 2048, "not allowed", 256), (64, 64, 64, 1),
])
def test_shards_stay_open_as_far_as_the_process_may_open_files(monkeypatch, soft, hard, raised, expected):
    asked = []

    def setrlimit(kind, limits):
        asked.append(limits)
        if raised == "not allowed":
            raise ValueError

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert most_open(1000) == expected and asked in ([], [(raised, hard)], [(2048, 2048)])
