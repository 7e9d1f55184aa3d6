"""Damaged checkpoints are passed over by name; one that was chosen is taken, or refused."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from saved_runs import assert_same, events, refused, saved_steps, store_of, tensors, train
from tiny_shards import write_job, write_shards


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


# -- a chosen checkpoint

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
