"""Saving off the step: the step pays for a copy to host memory, a thread of each rank writes it.

A save goes through three stages, and all ranks go from one to the next together, by the agreement that the loop has at
the end of every step anyway:

    copying      every rank copies what it writes (``Engine.snapshot``), in the step; on a GPU the step only begins it
                 (:mod:`dalle.training.engines.copies`), and the thread waits until it is done
    writing      a thread of every rank writes, hashes and syncs its files
    committing   a thread of rank 0 publishes the checkpoint, exports ``model/``, deletes what is old

Collectives run in the main thread only.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dalle.files import write_json
from dalle.training.checkpoint import STATE, CheckpointStore, Entries, write_tensors
from dalle.training.engines.base import Engine, Snapshot

log = logging.getLogger(__name__)

IDLE, WRITING, COMMITTING = "idle", "writing", "committing"
SECONDS_TO_CLOSE = 60      # a disk that hangs must not keep a process that has lost another


class SaveFailed(OSError):
    """A checkpoint could not be written; raised on every rank. What was there before is untouched."""


class Saver:
    """Writes the checkpoints of one run; every method is called on every rank, in the same order.

    ``publish(checkpoint)`` runs on rank 0 after a checkpoint is in its place (the export).
    """

    def __init__(self, store: CheckpointStore, engine: Engine, players: list[str], publish: Callable[[Path], None]):
        self.store, self.engine, self.players, self.publish = store, engine, players, publish
        self.stage, self.step = IDLE, 0
        self.failures = 0                               # in a row
        self.seconds = {"copy": 0.0, "write": 0.0}      # of the newest save: what the step paid, and what it did not
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._entries: Entries = {}

    # -- what the loop calls

    def start(self, step: int, state: Mapping[str, Any]) -> None:
        """Copy, and begin to write, the checkpoint of ``step``. Raises :class:`SaveFailed`, here or later."""
        assert self.stage == IDLE, "finish the save before"
        began = time.monotonic()
        self.engine.copies.begin()
        snapshots = {name: self.engine.snapshot(name) for name in self.players}
        self.engine.copies.end()
        sizes = self.engine.gather(sum(tensor.nbytes for snapshot in snapshots.values()
                                       for section in snapshot.values() for tensor in section.values()))
        self.step, self._state = step, dict(state)
        try:
            self.engine.together(lambda: self._open(step, sum(sizes)), only_rank0=True)
        except OSError as error:
            self.failures += 1
            raise SaveFailed(*error.args) from error
        self.seconds["copy"] = time.monotonic() - began
        self._began = time.monotonic()
        self.stage = WRITING
        self._run(lambda: self._write(snapshots))

    @property
    def busy(self) -> bool:
        """Whether this rank's thread still works; the largest over the ranks goes into :meth:`advance`."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        return self._error is not None and not self.busy

    def advance(self, busy: bool, failed: bool) -> None:
        """Go to the next stage when no rank is ``busy``; raises :class:`SaveFailed` when one has ``failed``."""
        if self.stage == IDLE or busy:
            return
        if failed:
            self._fail()
        if self.stage == WRITING:
            parts = self.engine.gather(self._entries)
            entries = {name: entry for part in parts for name, entry in part.items()}
            self.stage = COMMITTING
            if self.engine.is_rank0:
                self._run(lambda: self._commit(entries))
            return
        self.stage, self._thread, self.failures = IDLE, None, 0

    def finish(self) -> None:
        """Wait until what was begun is published; raises :class:`SaveFailed`."""
        while self.stage != IDLE:
            if self._thread is not None:
                self._thread.join()
            busy, failed = self.engine.all_reduce_max(int(self.busy), int(self.failed))
            self.advance(bool(busy), bool(failed))

    def close(self) -> None:
        """Wait for this rank's thread, published or not: an interpreter that ends under it aborts (status -6)."""
        if self._thread is not None:
            self._thread.join(SECONDS_TO_CLOSE)

    # -- the work

    def _open(self, step: int, needed: int) -> None:
        temporary = self.store.begin(step, needed)
        for name in self.players:
            (temporary / name).mkdir()

    def _run(self, action: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                action()
            except Exception as error:      # told to all ranks at the next agreement
                self._error = error

        self._error = None
        self._thread = threading.Thread(target=guarded, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, snapshots: dict[str, Snapshot]) -> None:
        self._entries = {}
        self.engine.copies.wait()
        for name, snapshot in snapshots.items():
            for section, tensors in snapshot.items():
                if tensors:
                    file = f"{name}/{section}-{self.engine.rank:05d}.safetensors"
                    self._entries[file] = write_tensors(self.store.temporary(self.step) / file, tensors)
                tensors.clear()

    def _commit(self, entries: Entries) -> None:
        temporary = self.store.temporary(self.step)
        write_json(temporary / STATE, self._state)
        place = self.store.commit(temporary, self.step, entries)
        self.seconds["write"] = time.monotonic() - self._began
        self.publish(place)

    def _fail(self) -> None:
        errors = self.engine.gather(None if self._error is None else f"{type(self._error).__name__}: {self._error}")
        first = next(text for text in errors if text is not None)
        self.stage, self._thread, self._error = IDLE, None, None
        self.failures += 1
        if self.engine.is_rank0:
            self.store.discard(self.step)
        raise SaveFailed(first)
