"""Members of indexed shards by positioned reads, from as many open files as the process may have."""

import os
import resource
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from dalle.data.damage import REBUILD, SKIP
from dalle.data.index import ShardIndex
from dalle.errors import UserError

READ_ATTEMPTS = 3
Read = TypeVar("Read")
GONE_ERRORS = (FileNotFoundError, PermissionError, NotADirectoryError)
FILES_A_SHARD = 3                          # itself, its rows and its codes: a mapped file keeps its descriptor
FILES_LEFT = 256                           # for all else that a process opens


@dataclass
class _OpenShard:
    """A shard's rows, and the file once a member was asked for."""

    rows: np.ndarray
    handle: int | None = None


@dataclass
class ShardReader:
    """Positioned reads of members; picklable, safe after a fork.

    At most ``max_open`` shards stay open, fewer where the process may not open so many files; a reader that goes to and
    fro between more of them opens one at almost every read.
    """

    index: ShardIndex
    max_open: int = 128
    _open: OrderedDict[int, _OpenShard] = field(default_factory=OrderedDict, repr=False)
    _most: int = 0                # of `max_open`, what this process may; asked for with the first shard

    def __getstate__(self) -> dict:
        return {"index": self.index, "max_open": self.max_open, "_open": OrderedDict(), "_most": 0}

    def row(self, shard: int, sample: int) -> np.void:
        """The sample's row of :func:`member_dtype`."""
        return self._opened(shard).rows[sample]

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """``size`` bytes at ``offset``, fewer if the shard was cut since it was indexed.

        Raises :class:`UserError` for one that cannot be read, and of these :class:`VanishedShard` for one that is gone.
        """
        return self._retried(shard, lambda: os.pread(self._handle(shard), size, offset))

    def close(self) -> None:
        for shard in list(self._open):
            self._forget(shard)

    def __del__(self) -> None:
        self.close()          # a descriptor is a number: nothing else would close it

    def _opened(self, shard: int) -> _OpenShard:
        entry = self._open.get(shard)
        if entry is not None:
            self._open.move_to_end(shard)
            return entry
        if not self._most:
            self._most = most_open(self.max_open)
        entry = self._open[shard] = _OpenShard(self.index.members(shard))
        if len(self._open) > self._most:
            self._forget(next(iter(self._open)))
        return entry

    def _handle(self, shard: int) -> int:
        entry = self._opened(shard)
        if entry.handle is None:
            entry.handle = os.open(self.index.shards[shard].path, os.O_RDONLY)
        return entry.handle

    def _retried(self, shard: int, action: Callable[[], Read]) -> Read:
        """``action``, again after a failure: network file systems drop handles (ESTALE) and come back."""
        for attempt in range(READ_ATTEMPTS):
            try:
                return action()
            except OSError as error:
                self._forget(shard)
                failure = error
            if attempt < READ_ATTEMPTS - 1:
                time.sleep(0.1 * 4**attempt)
        path = self.index.shards[shard].path
        kind = VanishedShard if isinstance(failure, GONE_ERRORS) else UserError
        raise kind(f"the shard {path} cannot be read: {failure.strerror}; bring it back, {SKIP}, "
                   f"or {REBUILD.format(folder=path.parent)}")

    def _forget(self, shard: int) -> None:
        entry = self._open.pop(shard, None)
        if entry is not None and entry.handle is not None:
            os.close(entry.handle)


class VanishedShard(UserError):
    """A shard that was there at the start and is no more; a disk or a server that fails is another matter."""


def most_open(wanted: int) -> int:
    """How many of ``wanted`` shards this process may keep open, beside ``FILES_LEFT`` other files; its soft limit is
    raised as far as needed and as the hard one allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = FILES_A_SHARD * wanted + FILES_LEFT
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):      # systems have limits of their own beside it
        allowed = soft
    return max(1, (allowed - FILES_LEFT) // FILES_A_SHARD)
