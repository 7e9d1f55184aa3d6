import json
import shutil

import pytest

from dalle.errors import UserError
from dalle.training.checkpoint import (
    FORMAT,
    CheckpointStore,
    check_resumable,
    find_fault,
    read_state,
    replace_folder,
    write_json,
)


def save(store: CheckpointStore, step: int, text: str = "weights"):
    temporary = store.begin(step)
    (temporary / "net").mkdir()
    (temporary / "net" / "weights").write_text(text)
    write_json(temporary / "state.json", {"format": FORMAT, "step": step})
    return store.commit(temporary, step)


def test_only_the_newest_are_kept(tmp_path):
    store = CheckpointStore(tmp_path / "checkpoints", keep_last=2)
    for step in (0, 5, 10):
        save(store, step)
    assert [path.name for path in store.all()] == ["step_00000010", "step_00000005"]
    assert read_state(store.newest()[0])["step"] == 10
    assert sorted(path.name for path in store.folder.iterdir()) == ["step_00000005", "step_00000010"]


@pytest.mark.parametrize(("damage", "reason"), [
    (lambda path: (path / "net/weights").write_text("weight"), "6 bytes instead of 7"),
    (lambda path: (path / "net/weights").write_text("weightz"), "damaged"),
    (lambda path: (path / "net/weights").unlink(), "net/weights is missing"),
    (lambda path: (path / "manifest.json").unlink(), "manifest.json is missing"),
    (lambda path: (path / "manifest.json").write_text("{"), "cannot be read"),
    (lambda path: (path / "manifest.json").write_text("[]"), "cannot be read"),
])
def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, damage, reason):
    store = CheckpointStore(tmp_path, keep_last=3)
    save(store, 1)
    damage(save(store, 2))
    newest, passed_over = store.newest()
    assert newest == store.path(1)
    assert len(passed_over) == 1 and "step_00000002" in passed_over[0] and reason in passed_over[0]


def test_an_unfinished_save_is_never_seen_and_is_swept_by_the_next(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    (store.begin(3) / "half").write_text("x")
    assert store.newest() == (None, [])
    assert find_fault(save(store, 3)) is None
    assert not (store.path(3) / "half").exists()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        read_state(tmp_path)


SAVED = {"config": {"task": "toy", "seed": 0, "model": {"dim": 4}, "optimizer": {"lr": 1.0},
                    "data": {"train": "a", "text_length": 4}, "train": {"batch_size": 8, "steps": 4}},
         "data": {"fingerprint": "abc"}, "players": ["net"], "layout": {"format": "full"}}


def changed(path: str, value):
    config = json.loads(json.dumps(SAVED["config"]))
    *parents, last = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[last] = value
    return config


@pytest.mark.parametrize(("path", "value"), [("model.dim", 8), ("seed", 1), ("train.batch_size", 16),
                                             ("data.text_length", 5)])
def test_what_must_stay_is_shown_when_it_changes(path, value):
    with pytest.raises(UserError, match=rf"{path}: .* -> {value}"):
        check_resumable("c", SAVED, changed(path, value), SAVED["data"], SAVED["layout"], ["net"])


@pytest.mark.parametrize(("path", "value"), [("train.steps", 9), ("optimizer.lr", 2.0), ("data.train", "moved")])
def test_what_may_change_passes(path, value):
    check_resumable("c", SAVED, changed(path, value), SAVED["data"], SAVED["layout"], ["net"])


@pytest.mark.parametrize(("identity", "layout", "players", "message"), [
    ({"fingerprint": "xyz"}, {"format": "full"}, ["net"], "data fingerprint: 'abc' -> 'xyz'"),
    ({"fingerprint": "abc"}, {"format": "zero2", "world_size": 2}, ["net"], "this run is zero2 on 2 processes"),
    ({"fingerprint": "abc"}, {"format": "full"}, ["g", "d"], "the task has g, d"),
])
def test_other_data_engine_or_players_are_refused(identity, layout, players, message):
    with pytest.raises(UserError, match=message):
        check_resumable("c", SAVED, SAVED["config"], identity, layout, players)


def test_another_task_is_refused_by_name():
    with pytest.raises(UserError, match="of the task 'toy', not 'clip'"):
        check_resumable("c", SAVED, changed("task", "clip"), SAVED["data"], SAVED["layout"], ["net"])


def test_replacing_a_folder_leaves_only_the_new_one(tmp_path):
    for turn in ("old", "new"):
        (tmp_path / "next").mkdir()
        (tmp_path / "next" / "file").write_text(turn)
        replace_folder(tmp_path / "next", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(tmp_path / "model")
