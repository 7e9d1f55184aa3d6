"""The real pictures that generated ones are measured against: the samples of a split, or the pictures of a folder."""

import hashlib
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dalle.data.decode import BadSample, decode_image, read_member
from dalle.data.index import ShardIndex
from dalle.data.members import key_text
from dalle.data.order import SequentialOrder
from dalle.data.reader import ShardReader
from dalle.data.transforms import to_square
from dalle.errors import UserError

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class References(Protocol):
    """Pictures by number, in a fixed order."""

    name: str            # where they are, as the user said it
    fingerprint: str     # changes with the data

    def __len__(self) -> int: ...

    def key(self, number: int) -> str:
        """What the picture is called."""
        ...

    def picture(self, number: int, size: int) -> np.ndarray:
        """uint8 [size, size, 3], the largest square in the middle; raises :class:`BadSample` for an unreadable one."""
        ...


class ShardReferences:
    """The pictures of indexed shards."""

    def __init__(self, spec: str, index: ShardIndex | None = None):
        self.name = spec
        self.index = index or ShardIndex.load(spec)
        self.fingerprint = self.index.fingerprint
        self._order = SequentialOrder(self.index.counts)
        self._reader = ShardReader(self.index)

    def __len__(self) -> int:
        return self.index.num_samples

    def key(self, number: int) -> str:
        shard, index = self._place(number)
        return f"{self.index.shards[shard].name}:{key_text(bytes(self._reader.row(shard, index)['key']))}"

    def picture(self, number: int, size: int) -> np.ndarray:
        shard, index = self._place(number)
        return square(read_member(self._reader, shard, self._reader.row(shard, index), "image"), size)

    def _place(self, number: int) -> tuple[int, int]:
        _, shards, indices = self._order.locate(np.array([number]))
        return int(shards[0]), int(indices[0])


class FolderReferences:
    """The picture files below a folder, by their paths; no captions are needed."""

    def __init__(self, folder: str):
        self.name, self.folder = folder, Path(folder)
        self.files = sorted(path for path in self.folder.rglob("*")
                            if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".") and path.is_file())
        if not self.files:
            raise UserError(f"the reference folder {folder} holds neither shards (.tar) nor pictures "
                            f"({', '.join(sorted(EXTENSIONS))})")
        hasher = hashlib.blake2b(digest_size=16)
        for number, path in enumerate(self.files):
            hasher.update(f"{self.key(number)}\0".encode(errors="surrogateescape") + self._bytes(path) + b"\0")
        self.fingerprint = hasher.hexdigest()

    def __len__(self) -> int:
        return len(self.files)

    def key(self, number: int) -> str:
        return self.files[number].relative_to(self.folder).as_posix()

    def picture(self, number: int, size: int) -> np.ndarray:
        return square(self._bytes(self.files[number]), size)

    @staticmethod
    def _bytes(path: Path) -> bytes:
        """Nothing for a file that may not be read: an empty picture, which is counted."""
        try:
            return path.read_bytes()
        except OSError:
            return b""


def open_references(spec: str) -> References:
    """Shards (a folder with ``.tar`` files, a glob, a brace range) or a folder of pictures."""
    folder = Path(spec)
    if folder.is_dir() and not any(folder.glob("*.tar")):
        return FolderReferences(spec)
    return ShardReferences(spec)


def square(data: bytes | None, size: int) -> np.ndarray:
    return to_square(decode_image(data or b""), size, "center", False, None)


def read_pictures(references: References, numbers: list[int], size: int) -> tuple[Tensor, list[int], list[str]]:
    """uint8 [n, 3, size, size] of the good ones, their numbers, and a line ``KEY: reason`` for each of the others."""
    squares, good, left_out = [], [], []
    for number in numbers:
        try:
            squares.append(references.picture(number, size))
        except BadSample as bad:
            left_out.append(f"{references.key(number)}: {bad.reason}")
            continue
        good.append(number)
    pictures = np.stack(squares) if squares else np.empty((0, size, size, 3), np.uint8)
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))), good, left_out
