"""Faults of checkpoints: a kill at any moment, a full disk, damaged files, a slow disk, a stop in the middle.

The functions are named after the fault and what is promised; each trains, by the loop or by the command.
"""

import contextlib
import errno
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_shards import ROOT, start_command, wait_until, write_job, write_shards

sys.path.insert(0, str(ROOT / "tests/training"))

from launching import free_port
from toys import SingleTask, ToyLoader, toy_run

from dalle.errors import EXIT_STOPPED_BY_SIGNAL, run_command
from dalle.training import checkpoint, loop, saving
from dalle.training.checkpoint import CheckpointStore, find_fault
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig
from dalle.training.state import FAILED_SAVES_ALLOWED

OPTIMIZER = OptimizerConfig(name="muon", lr=1e-2, ema=0.8, ema_every=2, warmup=1, weight_decay=0.1)
BOTH = pytest.mark.parametrize("async_save", [False, True], ids=["sync", "async"])


def train(folder: Path, at=None, *, resume="auto", stop_after=None, **settings):
    """A toy's run; ``at(step)`` is called in the loader, before each step from the second on."""
    class Watched(ToyLoader):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__(), self.start):
                if at is not None and step > self.start:
                    at(step)
                yield batch

    config = toy_run(folder, **settings)
    trainer = Trainer(SingleTask(OPTIMIZER, dropout=0.3), config, create_engine(config), Watched, resume=resume,
                      stop_after=stop_after)
    return trainer.run()


def store_of(folder: Path) -> CheckpointStore:
    return CheckpointStore(folder / "toy/checkpoints", 1)


def saved_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that verify; nothing else may lie beside them."""
    store = store_of(folder)
    assert sorted(path.name for path in store.folder.iterdir()) == sorted(path.name for path in store.all())
    assert [find_fault(path) for path in store.all()] == [None] * len(store.all())
    return sorted(int(path.name.removeprefix("step_")) for path in store.all())


def events(folder: Path, name: str) -> list[dict]:
    lines = (folder / "toy/log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line.get("event") == name]


def tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return {f"{path.stem}:{name}": tensor
            for path in sorted(store_of(folder).path(step).rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys() and left
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def until_written() -> None:
    """Wait for the thread that writes a checkpoint."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(30)
            assert not thread.is_alive()


def refused(action) -> str:
    """The line on stderr of a command that ends with status 2."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        run_command(action)
    line = errors.getvalue()
    assert ended.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


# -- kill -9 ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> list[dict]:
    """Runs of two steps and three saves, each killed at another operation on the disk, looked at, and resumed."""
    out = tmp_path_factory.mktemp("killed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
                   "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(Path(__file__).parent / "saving_jobs.py"), "kills", str(out)],
                          env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    points = json.loads((out / "points.json").read_text())
    assert all(point["killed"] for point in points)
    modes = {mode: [point["operation"] for point in points if point["mode"] == mode] for mode in ("sync", "async")}
    assert len(modes["sync"]) >= 90 and len(modes["async"]) >= 20
    wanted = {"mkdir", "write", "write half of", "fsync", "rename", "unlink", "rmdir"}
    assert {kind for kind in wanted if any(name.startswith(f"{kind} ") or name == kind for name in modes["sync"])} \
        == wanted
    files = ("weights-00000.safetensors", "optimizer-00000.safetensors", "average-00000.safetensors", "state.json",
             "manifest.json", "net.safetensors")
    assert {f"write half of {name}" for name in files} <= set(modes["sync"])
    renames = {"rename .step_00000002.tmp", "rename step_00000001", "rename .model.tmp", "rename model"}
    assert renames <= set(modes["sync"]) and renames <= set(modes["async"])
    return points


def test_kill_9_at_any_operation_of_a_save_leaves_the_old_or_the_new_checkpoint(killed):
    for point in killed:
        allowed = [None, 0] if point["step"] == 0 else [point["step"] - 1, point["step"]]
        assert point["newest"] in allowed, point


def test_kill_9_during_a_save_never_shows_half_a_checkpoint_nor_half_a_model(killed):
    for point in killed:
        assert point["faults"] == [] and point["model"] in (None, 1, 2), point


def test_kill_9_during_a_save_then_resume_equals_the_undisturbed_run_bit_for_bit(killed):
    for point in killed:
        assert point["resumed"] and point["equal"] and point["finished"], point


def test_kill_9_during_a_save_is_repaired_by_the_next_start(killed):
    for point in killed:
        assert point["last_model"] == 2, point                       # not the model of an older step
        assert not [name for name in point["checkpoints"] if name.startswith(".")], point


def test_power_loss_finds_every_file_and_folder_synced_before_it_is_renamed(tmp_path, monkeypatch):
    synced, checked = set(), []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def recorded_rename(source, target):
        if Path(target).name.startswith(("step_", "model")):
            checked.append((Path(target).name, [str(path) for path in [Path(source), *Path(source).rglob("*")]
                                                if path.stat().st_ino not in synced]))
            synced.clear()
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    train(tmp_path, steps=2, save_every=1)
    assert checked == [("step_00000000", []), ("step_00000001", []), ("model", []), ("step_00000002", []),
                       ("model", [])]
    assert (tmp_path / "toy").stat().st_ino in synced                 # the last rename itself, after it


# -- a full disk ------------------------------------------------------------------------------------------------------

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
    (warning,) = [record for record in caplog.records if record.name == loop.__name__]
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


# -- damaged checkpoints ----------------------------------------------------------------------------------------------

def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


FILE = "net/optimizer-00000.safetensors"
DAMAGE = {
    "zero bytes": (lambda path: (path / FILE).write_bytes(b""), f"{FILE} has 0 bytes instead of "),
    "truncated": (lambda path: os.truncate(path / FILE, 100), f"{FILE} has 100 bytes instead of "),
    "flipped bit": (lambda path: flip(path / FILE), f"{FILE} is damaged (its sha256 differs)"),
    "flipped bit in the state": (lambda path: flip(path / "state.json"), "state.json is damaged"),
    "missing file": (lambda path: (path / FILE).unlink(), f"{FILE} is missing"),
    "missing manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda path: (path / "manifest.json").write_bytes(b""), "manifest.json cannot be read"),
    "empty folder": (lambda path: [shutil.rmtree(path), path.mkdir()], "manifest.json is missing"),
}
DAMAGED = pytest.mark.parametrize("damage", DAMAGE)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A toy's run of six steps with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, steps=6, save_every=1, keep_last=9)
    return folder


def copy_up_to(undisturbed: Path, folder: Path, step: int) -> Path:
    """The run as it was when ``step`` was its newest checkpoint."""
    for path in store_of(undisturbed).all():
        if int(path.name.removeprefix("step_")) <= step:
            shutil.copytree(path, store_of(folder).path(int(path.name.removeprefix("step_"))))
    return folder


@DAMAGED
def test_damaged_checkpoint_is_passed_over_by_name_for_the_older_one(tmp_path, undisturbed, caplog, damage):
    spoil, reason = DAMAGE[damage]
    folder = copy_up_to(undisturbed, tmp_path, 4)
    spoil(store_of(folder).path(4))
    assert train(folder, steps=6, save_every=1, keep_last=9).status == "finished"
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert str(store_of(folder).path(4)) in warning and reason in warning
    assert [line["step"] for line in events(folder, "resume")] == [3]
    assert_same(tensors(folder, 6), tensors(undisturbed, 6))
    assert saved_steps(folder) == [0, 1, 2, 3, 4, 5, 6]                    # the damaged one is written again


def test_several_damaged_checkpoints_are_passed_over_each_by_name(tmp_path, undisturbed, caplog):
    folder = copy_up_to(undisturbed, tmp_path, 4)
    for step, damage in ((4, "zero bytes"), (3, "flipped bit"), (2, "missing manifest")):
        DAMAGE[damage][0](store_of(folder).path(step))
    train(folder, steps=6, save_every=1, keep_last=9)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert [f"step_{step:08d}" in line for step, line in zip((4, 3, 2), warnings, strict=True)] == [True] * 3
    assert [line["step"] for line in events(folder, "resume")] == [1]
    assert_same(tensors(folder, 6), tensors(undisturbed, 6))


def test_all_checkpoints_damaged_ends_with_status_2_and_leaves_them(tmp_path, undisturbed):
    folder = copy_up_to(undisturbed, tmp_path, 1)
    for path in store_of(folder).all():
        flip(path / "net/weights-00000.safetensors")
    before = sorted(folder.rglob("*"))
    line = refused(lambda: train(folder))
    assert "none of the checkpoints" in line and "sha256" in line and "--resume none" in line
    assert sorted(folder.rglob("*")) == before
    assert train(folder, resume="none").status == "finished"


def test_damaged_newer_checkpoints_never_crowd_out_the_good_ones(tmp_path, undisturbed, caplog):
    folder = copy_up_to(undisturbed, tmp_path, 5)
    for step in (5, 4, 3):
        flip(store_of(folder).path(step) / "state.json")
    # a save between: the damaged ones have higher numbers and must not count among the newest that are kept
    assert train(folder, steps=6, save_every=0, keep_last=2, resume=str(store_of(folder).path(1)),
                 stop_after=2).status == "stopped"
    newest, _ = store_of(folder).newest()
    assert newest == store_of(folder).path(2)
    assert saved_steps(folder) == [1, 2]


# -- a chosen checkpoint ----------------------------------------------------------------------------------------------

def test_resume_from_a_chosen_checkpoint_goes_on_from_it(tmp_path, undisturbed):
    chosen = store_of(undisturbed).path(3)
    train(tmp_path, resume=str(chosen), steps=6, save_every=1, keep_last=9)
    assert [line["step"] for line in events(tmp_path, "resume")] == [3]
    assert saved_steps(tmp_path) == [4, 5, 6]
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def test_resume_from_an_older_checkpoint_leaves_the_newer_ones_behind(tmp_path, undisturbed):
    folder = copy_up_to(undisturbed, tmp_path, 5)
    train(folder, resume=str(store_of(folder).path(2)), steps=6, save_every=0, keep_last=9, stop_after=3,
          max_skipped=7)
    assert saved_steps(folder) == [0, 1, 2, 3]
    assert json.loads((store_of(folder).path(3) / "state.json").read_text())["config"]["train"]["max_skipped"] == 7
    train(folder, steps=6, save_every=0, keep_last=9)
    assert [line["step"] for line in events(folder, "resume")] == [2, 3]


@DAMAGED
def test_damaged_checkpoint_that_was_chosen_ends_with_status_2(tmp_path, undisturbed, damage):
    spoil, reason = DAMAGE[damage]
    folder = copy_up_to(undisturbed, tmp_path, 2)
    spoil(store_of(folder).path(2))
    line = refused(lambda: train(folder, resume=str(store_of(folder).path(2))))
    assert str(store_of(folder).path(2)) in line and (reason in line or "is not a checkpoint" in line)
    assert not (folder / "toy/log.jsonl").exists()


def test_chosen_checkpoint_that_is_not_there_ends_with_status_2(tmp_path, run_here):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"))
    for wrong in (tmp_path / "nowhere", tmp_path / "shards", job.config):
        ended = run_here("train", job.config, "--resume", wrong)
        assert ended.status == 2 and ended.error.startswith("error: ") and ended.error.count("\n") == 1
        assert str(wrong) in ended.error and "not a checkpoint" in ended.error
    assert job.steps() == []


def test_damaged_checkpoints_and_a_chosen_one_through_the_command(tmp_path, run_here):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), settings={"save_every": 1, "keep_last": 9, "steps": 4})
    assert run_here("train", job.config, "--stop-after", 3).status == 0
    flip(job.run / "checkpoints/step_00000003/dvae/weights-00000.safetensors")
    ended = run_here("train", job.config, "--resume", job.run / "checkpoints/step_00000003")
    assert ended.status == 2 and ended.error.count("\n") == 1 and "dvae/weights-00000.safetensors" in ended.error
    assert job.steps() == [1, 2, 3]
    assert run_here("train", job.config).status == 0
    assert job.steps() == [1, 2, 3, 3, 4]
    for path in (job.run / "checkpoints").glob("step_*"):
        (path / "manifest.json").write_bytes(b"")
    ended = run_here("train", job.config)
    assert ended.status == 2 and ended.error.count("\n") == 1 and "--resume none" in ended.error


# -- saving off the step ----------------------------------------------------------------------------------------------

class SlowDisk:
    """Holds the writing of a checkpoint, from the second on, until ``go`` is set."""

    def __init__(self, monkeypatch):
        self.go, self.held, self.timed_out = threading.Event(), threading.Event(), False
        write_tensors = saving.write_tensors

        def slow(path, tensors):
            if "step_00000000" not in str(path):
                self.held.set()
                self.timed_out |= not self.go.wait(20)
            return write_tensors(path, tensors)

        monkeypatch.setattr(saving, "write_tensors", slow)


@pytest.fixture
def slow_disk(monkeypatch) -> SlowDisk:
    return SlowDisk(monkeypatch)


def test_slow_disk_does_not_hold_up_the_steps_and_what_is_saved_is_the_step_of_the_save(tmp_path, slow_disk,
                                                                                      undisturbed):
    visible = []

    def at(step):
        if step == 5:                                  # two steps went by since the save of step 3 began
            assert slow_disk.held.wait(20)
            visible.extend(path.name for path in store_of(tmp_path).all())
            slow_disk.go.set()

    train(tmp_path, at, steps=6, save_every=3, keep_last=9)
    assert not slow_disk.timed_out and visible == ["step_00000000"]
    assert saved_steps(tmp_path) == [0, 3, 6]
    assert_same(tensors(tmp_path, 3), tensors(undisturbed, 3))
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def recorded(name: str, method, order: list):
    def call(store, first, second, *rest):
        order.append((name, first if name == "begin" else second))
        return method(store, first, second, *rest)
    return call


def test_slow_disk_makes_the_next_save_wait_for_the_one_before(tmp_path, slow_disk, monkeypatch):
    order = []
    for name in ("begin", "commit"):
        monkeypatch.setattr(CheckpointStore, name, recorded(name, getattr(CheckpointStore, name), order))
    releases = []

    def at(step):
        if step == 1:                                  # the save of step 1 is held; that of step 2 comes next
            assert slow_disk.held.wait(20)
            releases.append(threading.Timer(0.5, lambda: [releases.append(list(order)), slow_disk.go.set()]))
            releases[0].start()

    train(tmp_path, at, steps=3, save_every=1, keep_last=9)
    assert not slow_disk.timed_out
    assert releases[1] == [("begin", 0), ("commit", 0), ("begin", 1)]
    assert order == [(name, step) for step in range(4) for name in ("begin", "commit")]
    assert saved_steps(tmp_path) == [0, 1, 2, 3]


def test_sigterm_during_an_asynchronous_save_finishes_it_and_saves_the_last_step_too(tmp_path, slow_disk, undisturbed):
    def at(step):
        if step == 4:                                  # the save of step 3 is held
            assert slow_disk.held.wait(20)
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.5, slow_disk.go.set).start()

    summary = train(tmp_path, at, steps=6, save_every=3, keep_last=9)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", EXIT_STOPPED_BY_SIGNAL, 5)
    assert not slow_disk.timed_out and saved_steps(tmp_path) == [0, 3, 5]
    assert train(tmp_path, steps=6, save_every=3, keep_last=9).status == "finished"
    for step in (3, 5, 6):
        assert_same(tensors(tmp_path, step), tensors(undisturbed, step))


def test_disk_full_for_one_rank_of_two_fails_the_save_on_both_and_training_goes_on(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                   "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, str(Path(__file__).parent / "saving_jobs.py"), "ranks", str(tmp_path)]
    started = [subprocess.Popen(command, env={**environment, "RANK": rank, "LOCAL_RANK": rank}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in "01"]
    try:
        errors = [process.communicate(timeout=150)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert ranks[0] == ranks[1] and ranks[0]["status"] == "finished"
    (failure,) = ranks[0]["failed"]
    assert "No space left" in failure
    assert [error.count("THE CHECKPOINT of step 4 COULD NOT BE WRITTEN") for error in errors] == [1, 0]
    assert saved_steps(tmp_path) == [0, 2, 6, 8] and len(events(tmp_path, "save_failed")) == 1
    files = json.loads((store_of(tmp_path).path(8) / "manifest.json").read_text())["files"]
    assert {f"net/weights-{rank:05d}.safetensors" for rank in (0, 1)} <= files.keys()


# -- when a save is made ----------------------------------------------------------------------------------------------

@BOTH
def test_crash_between_saves_costs_the_steps_since_the_last_by_steps_or_by_minutes(tmp_path, undisturbed, async_save):
    class PowerCut(Exception):
        pass

    def crash(step):
        until_written()
        if step == 5:
            raise PowerCut

    settings = {"steps": 6, "keep_last": 9, "async_save": async_save}
    with pytest.raises(PowerCut):
        train(tmp_path / "steps", crash, save_every=3, **settings)
    assert saved_steps_so_far(tmp_path / "steps") == [0, 3]
    with pytest.raises(PowerCut):
        train(tmp_path / "minutes", crash, save_every=0, save_minutes=1e-9, **settings)
    assert set(saved_steps_so_far(tmp_path / "minutes")) >= {0, 1, 2, 3}
    with pytest.raises(PowerCut):
        train(tmp_path / "late", crash, save_every=0, save_minutes=60, **settings)
    assert saved_steps_so_far(tmp_path / "late") == [0]
    for name, since in (("steps", 3), ("late", 0)):
        assert train(tmp_path / name, save_every=0, **settings).status == "finished"
        assert [line["step"] for line in events(tmp_path / name, "resume")] == [since]
        assert_same(tensors(tmp_path / name, 6), tensors(undisturbed, 6))


@BOTH
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGUSR1"])
def test_stop_signal_saves_ends_with_75_and_the_next_start_goes_on(tmp_path, undisturbed, name, async_save):
    settings = {"steps": 6, "save_every": 0, "keep_last": 9, "async_save": async_save}
    if name == "SIGUSR1":                              # one that is not a stop signal unless asked for
        settings["stop_signals"] = ("SIGUSR1",)

    def at(step):
        if step == 3:
            os.kill(os.getpid(), signal.Signals[name])

    summary = train(tmp_path, at, **settings)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", EXIT_STOPPED_BY_SIGNAL, 4)
    assert saved_steps(tmp_path) == [0, 4] and not (tmp_path / "toy/finished").exists()
    assert train(tmp_path, **settings).status == "finished"
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def test_stop_file_saves_ends_with_75_and_is_removed(tmp_path, monkeypatch, undisturbed):
    monkeypatch.setattr(loop, "STOP_FILE_SECONDS", 0.0)
    stop = tmp_path / "toy/stop"
    summary = train(tmp_path, lambda step: stop.touch() if step == 3 else None, steps=6, save_every=0, keep_last=9)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", EXIT_STOPPED_BY_SIGNAL, 4)
    assert saved_steps(tmp_path) == [0, 4] and not stop.exists()
    stop.touch()
    os.utime(stop, (1e9, 1e9))                         # left for an earlier start
    assert train(tmp_path, steps=6, save_every=0, keep_last=9).status == "finished"
    assert not stop.exists()
    assert_same(tensors(tmp_path, 6), tensors(undisturbed, 6))


def test_stop_file_ends_the_command_with_75_and_the_next_one_finishes(tmp_path, run_here):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), settings={"steps": 4000})
    process = start_command("launch/train.py", job.config)
    try:
        wait_until(lambda: len(job.steps()) > 2, process)
        (job.run / "stop").touch()
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == EXIT_STOPPED_BY_SIGNAL, errors
    assert "Traceback" not in errors and "start again to go on" in out
    assert not (job.run / "stop").exists() and not (job.run / "finished").exists()
    newest, passed_over = CheckpointStore(job.run / "checkpoints", 1).newest()
    last = job.steps()[-1]
    assert passed_over == [] and newest.name == f"step_{last:08d}"
    assert run_here("train", job.config, f"train.steps={last + 2}").status == 0
    assert job.steps() == list(range(1, last + 3))                 # nothing lost, nothing repeated
    assert json.loads((job.run / "finished").read_text()) == {"step": last + 2}


def test_finished_file_says_so_until_the_run_starts_over(tmp_path):
    mark = tmp_path / "toy/finished"
    train(tmp_path, stop_after=2)
    assert not mark.exists()
    train(tmp_path)
    assert json.loads(mark.read_text()) == {"step": 4}
    train(tmp_path)
    assert json.loads(mark.read_text()) == {"step": 4}
    train(tmp_path, resume="none", stop_after=1)
    assert not mark.exists()


def saved_steps_so_far(folder: Path) -> list[int]:
    """Steps of the checkpoints that can be seen, where a save may be under way."""
    return sorted(int(path.name.removeprefix("step_")) for path in store_of(folder).all())
