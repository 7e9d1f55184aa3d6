"""Work in numbered blocks, each kept in a file once it is done: any number of processes share them, a stop loses one.

Which samples a block holds never depends on the number of processes, so neither does anything computed from it.
"""

import json
import os
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle.errors import UserError
from dalle.evaluation.processes import Processes
from dalle.files import json_text, replacing
from dalle.words import duration

MANIFEST = "manifest.json"
SECONDS_BETWEEN_LINES = 10      # where the progress is no live line
SECONDS_TO_WRITE = 3600         # a block, at most

Arrays = dict[str, np.ndarray]


class BlockStore:
    """Blocks 0 to ``count`` - 1 in ``folder``; ``manifest`` says what they are, and must be the same at a resume."""

    def __init__(self, folder: Path, count: int, manifest: Mapping[str, Any]):
        self.folder, self.count, self.manifest = folder, count, dict(manifest)

    def open(self) -> None:
        """Make the folder, or accept the one that is there; on one process."""
        path = self.folder / MANIFEST
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for torn in self.folder.glob(".*.tmp"):
                if time.time() - torn.stat().st_mtime > SECONDS_TO_WRITE:     # else another job may be writing it
                    torn.unlink(missing_ok=True)
            if not path.exists():
                with replacing(path) as file:
                    file.write(json_text(self.manifest).encode())
                return
            known = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}); delete the folder {self.folder}") from None
        except OSError as error:
            raise UserError(f"{self.folder} cannot be written: {error.strerror or error}; "
                            "give a folder that can (--out, --cache)") from error
        if known != json.loads(json.dumps(self.manifest)):
            differing = sorted(key for key in {*known, *self.manifest} if known.get(key) != self.manifest.get(key))
            raise UserError(f"{self.folder} holds other work ({', '.join(differing)} differ); delete it")

    def present(self) -> set[int]:
        """The blocks that are done."""
        return {int(name[6:12]) for name in os.listdir(self.folder) if name.startswith("block_")
                and name.endswith(".npz")}

    def path(self, block: int) -> Path:
        return self.folder / f"block_{block:06d}.npz"

    def write(self, block: int, arrays: Arrays) -> None:
        """Keep a block, whole or not at all."""
        try:
            with replacing(self.path(block), synced=True) as file:
                np.savez(file, **arrays)
        except OSError as error:
            raise UserError(f"{self.path(block)} cannot be written: {error.strerror or error}; "
                            "make room and start again, what is done is kept") from error

    def read(self, block: int) -> Arrays:
        path = self.path(block)
        try:
            with np.load(path, allow_pickle=False) as stored:
                return dict(stored)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and start again") from None

    def all(self, name: str) -> np.ndarray:
        """One array of every block, joined in order."""
        return np.concatenate([self.read(block)[name] for block in range(self.count)])

    def blocks(self) -> Iterator[Arrays]:
        for block in range(self.count):
            yield self.read(block)


def fill(store: BlockStore, make: Callable[[int], Arrays], processes: Processes, what: str) -> None:
    """Make the blocks that are missing, each on one process; returns on all once every block is there."""
    def missing() -> list[int]:
        store.open()
        done = store.present()
        return [block for block in range(store.count) if block not in done]

    todo = processes.from_main(missing)
    progress = Progress(store, what, len(todo)) if processes.is_rank0 and todo else None
    for block in todo[processes.rank::processes.size]:
        store.write(block, make(block))
        if progress is not None:
            progress.show()
    processes.wait()
    if progress is not None:
        progress.end()


class Progress:
    """Blocks done by all processes and the time that is left: a live line on a terminal, plain lines elsewhere."""

    def __init__(self, store: BlockStore, what: str, todo: int):
        self.store, self.what = store, what
        self.before = store.count - todo
        self.began = self.shown = time.monotonic()
        self.live = sys.stderr.isatty()

    def show(self) -> None:
        now = time.monotonic()
        if not self.live and now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown = now
        done = len(self.store.present())
        left = (now - self.began) / max(done - self.before, 1) * (self.store.count - done)
        self._line(f"{self.what}: block {done} of {self.store.count}, left {duration(left)}", last=False)

    def end(self) -> None:
        self._line(f"{self.what}: {self.store.count} blocks in {duration(time.monotonic() - self.began)}", last=True)

    def _line(self, text: str, last: bool) -> None:
        print(f"\r\x1b[K{text}" if self.live else text, end="" if self.live and not last else "\n", file=sys.stderr,
              flush=True)
