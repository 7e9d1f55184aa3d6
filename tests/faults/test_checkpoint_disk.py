"""A disk that is full, or nearly so: the old checkpoint stays, and training goes on."""

import contextlib
import errno
import logging
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from saved_runs import (
    BOTH,
    assert_same,
    events,
    refused,
    saved_steps,
    store_of,
    tensors,
    train,
    until_written,
)

from dalle.training import checkpoint, saving, state
from dalle.training.state import FAILED_SAVES_ALLOWED


class Disk:
    """What the checkpoint's files are written through; full from ``room`` bytes on while ``is_full``."""

    def __init__(self, monkeypatch):
        self.is_full, self.room, self.written = False, 0, 0
        write_synced, write_text = checkpoint.write_synced, Path.write_text

        def save(path, tensors):
            written = write_synced(path, tensors)
            if self.cut(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            return written

        def write(path, text, **options):
            write_text(path, text, **options)
            if path.name in ("state.json", "manifest.json") and self.cut(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        monkeypatch.setattr(checkpoint, "write_synced", save)
        monkeypatch.setattr(Path, "write_text", write)

    def cut(self, path) -> bool:
        """Whether the file did not fit; what is over is cut off."""
        size = os.path.getsize(path)
        fits = not self.is_full or self.written + size <= self.room
        if not fits:
            os.truncate(path, max(0, self.room - self.written))
        self.written += size
        return not fits

    def fill(self, room: int) -> None:
        self.is_full, self.room, self.written = True, room, 0


@pytest.fixture
def disk(monkeypatch) -> Disk:
    return Disk(monkeypatch)


def bytes_of_a_save(folder: Path) -> int:
    train(folder, steps=2)
    return sum(path.stat().st_size for path in store_of(folder).path(2).rglob("*") if path.is_file())


class Emptied:
    """Called in the loader: the disk is full for the save of step 8 and has room again from step 11 on."""

    def __init__(self, folder: Path, fill, empty):
        self.folder, self.fill, self.empty, self.left = folder, fill, empty, None

    def __call__(self, step: int) -> None:
        until_written()
        if step == 7:
            self.fill()
        if step == 11:
            self.left = saved_steps(self.folder)
            self.empty()


OUTLIVED = {"steps": 16, "save_every": 4, "keep_last": 9}


def assert_outlived(folder: Path, emptied: Emptied, caplog, reason: str) -> None:
    """The run went past the failed save of step 8."""
    assert emptied.left == [0, 4]                          # whole, and no temporary folder
    (failed,) = events(folder, "save_failed")
    assert 8 <= failed["step"] < 11 and reason in failed["error"]
    (warning,) = [record for record in caplog.records if record.name == state.__name__]
    assert warning.levelno >= logging.WARNING
    assert "CHECKPOINT of step 8 COULD NOT BE WRITTEN" in warning.getMessage() and reason in warning.getMessage()
    assert [line["step"] for line in events(folder, "checkpoint")] == [0, 4, 12, 16]
    assert saved_steps(folder) == [0, 4, 12, 16] and (folder / "toy/finished").is_file()


@BOTH
@pytest.mark.parametrize("share", [0, 0.05, 0.3, 0.6, 0.75, 0.9, 0.99])
def test_disk_full_at_any_byte_of_a_save_keeps_the_old_checkpoint_and_training_goes_on(tmp_path, disk, caplog, share,
                                                                                       async_save):
    size = bytes_of_a_save(tmp_path / "measured")
    folder = tmp_path / "run"

    def empty():
        disk.is_full = False

    emptied = Emptied(folder, lambda: disk.fill(int(share * size)), empty)
    summary = train(folder, emptied, **OUTLIVED, async_save=async_save)
    assert (summary.status, summary.exit_status) == ("finished", 0)
    assert_outlived(folder, emptied, caplog, "No space left")
    train(tmp_path / "undisturbed", **OUTLIVED)
    assert_same(tensors(folder, 16), tensors(tmp_path / "undisturbed", 16))


@BOTH
def test_disk_nearly_full_is_noticed_before_anything_is_written_and_training_goes_on(tmp_path, monkeypatch, caplog,
                                                                                     async_save):
    free = {"bytes": 1 << 40}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(free["bytes"]))
    monkeypatch.setattr(saving.Saver, "_write", watched := Writes(saving.Saver._write))
    emptied = Emptied(tmp_path, lambda: free.update(bytes=2000), lambda: free.update(bytes=1 << 40))
    assert train(tmp_path, emptied, **OUTLIVED, async_save=async_save).status == "finished"
    assert_outlived(tmp_path, emptied, caplog, "no room")
    assert watched.steps == [0, 4, 12, 16]


@dataclass
class Usage:
    free: int


class Writes:
    """In place of ``Saver._write``: the steps whose files were begun."""

    def __init__(self, write):
        self.write, self.steps = write, []

    def __get__(self, saver, kind=None):
        def write(snapshots):
            self.steps.append(saver.step)
            self.write(saver, snapshots)
        return write


@BOTH
@pytest.mark.parametrize("kind", ["write", "estimate"])
def test_disk_that_stays_full_ends_the_run_with_status_2_and_the_old_checkpoint(tmp_path, disk, monkeypatch, kind,
                                                                                async_save):
    def fill(step):
        until_written()
        if step == 1:
            if kind == "write":
                disk.fill(1000)
            else:
                monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0))

    line = refused(lambda: train(tmp_path, fill, steps=20, async_save=async_save))
    assert "the checkpoint of step 6 cannot be written" in line and "make room" in line
    assert len(events(tmp_path, "save_failed")) == FAILED_SAVES_ALLOWED - 1
    assert saved_steps(tmp_path) == [0]


@BOTH
def test_disk_full_now_and_then_never_ends_the_run(tmp_path, disk, async_save):
    def fill(step):
        until_written()
        if step % 4 == 3:
            disk.fill(0)
            disk.is_full = (step + 1) // 4 % FAILED_SAVES_ALLOWED != 0       # all but the last of so many saves

    assert train(tmp_path, fill, steps=48, save_every=4, keep_last=99, async_save=async_save).status == "finished"
    assert len(events(tmp_path, "save_failed")) == 8
    assert saved_steps(tmp_path) == [0, 12, 24, 36, 48]


@BOTH
@pytest.mark.parametrize("last", ["all steps", "a stop"])
def test_disk_full_at_the_last_save_ends_with_status_2_and_the_old_checkpoint(tmp_path, disk, last, async_save):
    def fill(step):
        until_written()
        if step == 3:
            disk.fill(1000)

    line = refused(lambda: train(tmp_path, fill, steps=4 if last == "all steps" else 9, async_save=async_save,
                                 stop_after=4 if last == "a stop" else None))
    assert "the checkpoint of step 4 cannot be written" in line and "make room" in line
    assert saved_steps(tmp_path) == [0, 2] and not (tmp_path / "toy/finished").exists()


def test_disk_full_before_the_first_step_ends_with_status_2(tmp_path, disk):
    disk.fill(1000)
    line = refused(lambda: train(tmp_path, lambda step: pytest.fail("a step was made")))
    assert "the checkpoint of step 0 cannot be written" in line


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 400 kB."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(place)], capture_output=True,
                             text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@BOTH
@pytest.mark.parametrize("kind", ["write", "estimate"])
def test_disk_really_full_keeps_the_old_checkpoint_and_training_goes_on(small_disk, monkeypatch, caplog, kind,
                                                                        async_save):
    if kind == "write":                   # the room was there when it was looked for
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1 << 40))
    ballast = small_disk / "ballast"

    def fill():
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert ballast.stat().st_size > 100_000
        left = 8192 if kind == "write" else 4096           # for the log, and for the first bytes of a save
        os.truncate(ballast, ballast.stat().st_size - left)

    emptied = Emptied(small_disk, fill, ballast.unlink)
    assert train(small_disk, emptied, **OUTLIVED, async_save=async_save).status == "finished"
    assert_outlived(small_disk, emptied, caplog, "No space left" if kind == "write" else "no room")
