import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle import tensor_file
from dalle.tensor_file import write_synced

TENSORS = {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "flags": torch.tensor([True, False, True]),
           "codes": torch.arange(7), "half": torch.randn(5, 3).bfloat16(), "weight": torch.randn(70, 1001)}


@pytest.mark.parametrize("piece", [4096, 1 << 20])
def test_safetensors_reads_what_was_written(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(tensor_file, "PIECE", piece)
    path = tmp_path / "x.safetensors"
    size, sha256 = write_synced(path, TENSORS)
    assert (size, sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype, name


def test_file_systems_without_direct_writes_get_ordinary_ones(tmp_path, monkeypatch):
    def open_file(path, flags, mode, real=os.open):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, mode)

    monkeypatch.setattr(os, "open", open_file)
    write_synced(tmp_path / "x.safetensors", TENSORS)
    assert torch.equal(load_file(tmp_path / "x.safetensors")["weight"], TENSORS["weight"])


def test_direct_writes_that_fail_at_the_first_write_become_ordinary_ones(tmp_path, monkeypatch):
    def write(file, data, real=os.write):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr(tensor_file, "PIECE", 4096)
    size, _ = write_synced(tmp_path / "x.safetensors", TENSORS)
    assert size == (tmp_path / "x.safetensors").stat().st_size
    assert torch.equal(load_file(tmp_path / "x.safetensors")["weight"], TENSORS["weight"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_os_error():
    with pytest.raises(OSError, match="No space left"):
        write_synced(Path("/dev/full"), TENSORS)
