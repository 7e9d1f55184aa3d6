import json
import shutil

import pytest
import torch

from dalle.errors import UserError
from dalle.training.checkpoint import (
    FORMAT,
    CheckpointStore,
    SavedPlayer,
    check_resumable,
    find_fault,
    read_state,
    replace_folder,
    write_json,
    write_tensors,
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
    (lambda path: (path / "manifest.json").write_text('{"files": {"../../secret": {}}}'), "outside the checkpoint"),
    (lambda path: (path / "manifest.json").write_text('{"files": {}}'), "does not list state.json"),
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


def test_too_little_room_is_noticed_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    with pytest.raises(OSError, match="no room"):
        store.begin(3, needed=2**62)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_process_that_is_not_there_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    with pytest.raises(OSError, match="storage that all nodes share"):
        store.commit(store.begin(3), 3, {"net/weights-00001.safetensors": {"size": 1, "sha256": "0"}})
    assert store.newest() == (None, [])


def test_a_player_is_read_back_from_the_files_of_several_ranks(tmp_path):
    write_tensors(tmp_path / "weights-00000.safetensors", {"a": torch.ones(2)})
    write_tensors(tmp_path / "weights-00004.safetensors", {"b": torch.zeros(3)})
    write_tensors(tmp_path / "average-00004.safetensors", {"a": torch.full((2,), 5.0)})
    saved = SavedPlayer(tmp_path)
    assert saved.keys("weights") == ["a", "b"] and saved.keys("optimizer") == []
    assert saved.model_state()["a"].tolist() == [5, 5] and saved.model_state(averaged=False)["a"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no weights"):
        SavedPlayer(tmp_path / "nowhere")


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        read_state(tmp_path)


SAVED = {"config": {"task": "toy", "seed": 0, "model": {"dim": 4}, "optimizer": {"lr": 1.0},
                    "data": {"train": "a", "text_length": 4}, "train": {"batch_size": 8, "steps": 4}},
         "data": {"fingerprint": "abc"}, "players": ["net"]}


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
        check_resumable("c", SAVED, changed(path, value), SAVED["data"], ["net"])


@pytest.mark.parametrize(("path", "value"), [("train.steps", 9), ("optimizer.lr", 2.0), ("data.train", "moved")])
def test_what_may_change_passes(path, value):
    check_resumable("c", SAVED, changed(path, value), SAVED["data"], ["net"])


@pytest.mark.parametrize(("identity", "players", "message"), [
    ({"fingerprint": "xyz"}, ["net"], r"data fingerprint: 'abc' -> 'xyz'.*data\.bad_shards=skip"),
    ({"fingerprint": "abc"}, ["g", "d"], "the task has g, d"),
])
def test_other_data_or_players_are_refused(identity, players, message):
    with pytest.raises(UserError, match=message):
        check_resumable("c", SAVED, SAVED["config"], identity, players)


def test_a_setting_that_the_checkpoint_does_not_know_is_no_difference():
    check_resumable("c", SAVED, changed("data.tier", "exact"), SAVED["data"], ["net"])


def test_another_task_is_refused_by_name():
    with pytest.raises(UserError, match="of the task 'toy', not 'clip'"):
        check_resumable("c", SAVED, changed("task", "clip"), SAVED["data"], ["net"])


def test_replacing_a_folder_leaves_only_the_new_one(tmp_path):
    for turn in ("old", "new"):
        (tmp_path / "next").mkdir()
        (tmp_path / "next" / "file").write_text(turn)
        replace_folder(tmp_path / "next", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(tmp_path / "model")
