"""Kills at any moment of a save, and a loss of power: the old checkpoint is there, or the new one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from saved_runs import train
from tiny_shards import ROOT


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
