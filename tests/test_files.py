"""Files are whole or not there, and no digest that stands in a run, a cache or a result may ever become another."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from dalle.data.emoji import _digest_of_source
from dalle.evaluation.protocol import digest
from dalle.files import file_digest, hub_digest, json_digest, read_json, replacing, sha256_of, write_json
from dalle.tensor_file import module_digest, state_digest

CONTENT = bytes(range(256)) * 10_000      # more than is hashed at once
SHA256 = "2350b445eb01b3dc3c68b3e42b5b5678349472e2cbf75539fd75172f931ad1ee"


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(CONTENT)
    return path


def test_digests_of_files_are_those_of_earlier_versions(file):
    pieces = []
    assert sha256_of(file, lambda: pieces.append(1)) == SHA256 and len(pieces) == 3
    assert (file_digest(file), file_digest(file, digits=12)) == (SHA256[:16], SHA256[:12])
    assert _digest_of_source(file) == "efa3882d4a678a78"
    file.with_name("a.bin").write_bytes(b"another")
    assert hub_digest(file.parent) == SHA256[:16]


def test_digests_of_descriptions_are_those_of_earlier_versions():
    description = {"b": [1, 2], "a": "ä"}
    assert json_digest(description, digits=24) == "dc77cffb208f3d24af965b69"
    assert digest(description) == digest({"a": "ä", "b": [1, 2]}) == "dc77cffb208f"


def test_digests_of_weights_are_those_of_earlier_versions():
    module = nn.Module()
    module.register_buffer("b", torch.arange(6, dtype=torch.float32).view(2, 3))
    module.register_buffer("a", torch.tensor(3))
    module.register_buffer("c", torch.ones(2, dtype=torch.bfloat16))
    assert module_digest(module) == "dd0b1a1143f66059bbcd68c0d54ff847"
    assert state_digest(module) == "2f9ddcf4a15320bc"


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "table.json"
    write_json(path, {"old": True})
    with replacing(path, synced=True) as file:
        file.write(b'{"new": ')
        file.flush()
        assert read_json(path) == {"old": True}
        assert [entry.name for entry in tmp_path.glob(".*")] == [f".table.json.{os.getpid()}.tmp"]
        file.write(b"true}")
    assert read_json(path) == {"new": True}
    with pytest.raises(OSError, match="full"), replacing(path) as file:
        file.write(b"{")
        raise OSError("the disk is full")
    assert read_json(path) == {"new": True} and os.listdir(tmp_path) == ["table.json"]


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000])
def test_what_is_no_object_is_read_as_none(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") is None and read_json(tmp_path / "none.json") is None
