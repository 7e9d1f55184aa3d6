"""Tensors in files, written beside a running training past the page cache and hashed on the way; and their digests.

safetensors' own writer goes through the page cache. That takes two to three times the processor time, which the step
beside it pays on a CPU, pushes the training data out of memory, and makes the hash a second reading.
"""

import errno
import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PIECE = 4 << 20     # bytes a write: a multiple of every disk's block
DIGEST_BYTES = 16   # of a module's digest
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
          torch.bool: "BOOL"}


def write_synced(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write contiguous tensors (on the CPU) as a safetensors file, on the disk when this returns: its size and sha256.

    Raises ``OSError``.
    """
    sha256, size = hashlib.sha256(), 0
    with DirectFile(path) as file:
        for piece in serialized(tensors):
            sha256.update(piece)
            size += len(piece)
            file.write(piece)
    return size, sha256.hexdigest()


def serialized(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file: 8 of the header's length, the header, each tensor; wide types first, to be aligned."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield memoryview(len(text).to_bytes(8, "little") + text)
    for _, tensor in ordered:
        yield memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class DirectFile:
    """A new file written in order, in whole pieces without the page cache where the file system allows that."""

    def __init__(self, path: Path):
        flags, direct = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, getattr(os, "O_DIRECT", 0)
        try:
            self._file = os.open(path, flags | direct, 0o644)
        except OSError:                                # not on this file system; any other fault comes again
            self._file, direct = os.open(path, flags, 0o644), 0
        self._is_direct = bool(direct)
        self._piece = mmap.mmap(-1, PIECE)             # a page's alignment is what direct writes want
        self._filled = 0

    def write(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            count = min(len(data) - start, PIECE - self._filled)
            self._piece[self._filled:self._filled + count] = data[start:start + count]
            start += count
            self._filled += count
            if self._filled == PIECE:
                self._flush()

    def _flush(self) -> None:
        with memoryview(self._piece) as piece:
            start = 0
            while start < self._filled:
                try:
                    start += os.write(self._file, piece[start:self._filled])
                except OSError as error:
                    if not self._is_direct or error.errno != errno.EINVAL:
                        raise
                    self._end_direct()                 # allowed at the opening, and then not, or not from here on
        self._filled = 0

    def _end_direct(self) -> None:
        if self._is_direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~os.O_DIRECT)
            self._is_direct = False

    def __enter__(self) -> "DirectFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            if kind is None:
                self._end_direct()                     # the last piece is no multiple of a block
                self._flush()
                os.fsync(self._file)
        finally:
            os.close(self._file)
            self._piece.close()


# -- what a network holds, wherever it lies: both digests are kept in files, so neither may change

def module_digest(module: nn.Module) -> str:
    """32 hex digits (blake2b) of the names, types, shapes and bytes of a module's state: a checkpoint's and
    ``codes.json``'s name for a companion."""
    state = module.state_dict()
    whole = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:      # hashing leaves Python's lock
        for name, part in zip(state, threads.map(tensor_digest, state.values()), strict=True):
            whole.update(f"{name} {state[name].dtype} {list(state[name].shape)} ".encode() + part)
    return whole.hexdigest()


def tensor_digest(tensor: Tensor) -> bytes:
    return hashlib.blake2b(bytes_of(tensor), digest_size=DIGEST_BYTES).digest()


def state_digest(module: nn.Module) -> str:
    """16 hex digits (sha256) of the names and bytes of a module's state, in the names' order: a result's name for
    weights that came from a hub, whose file may lie anywhere."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        sha256.update(name.encode())
        sha256.update(bytes_of(tensor))
    return sha256.hexdigest()[:16]


def bytes_of(tensor: Tensor) -> np.ndarray:
    """uint8 [n], on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
