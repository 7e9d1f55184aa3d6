import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from pydantic import Field

sys.path.insert(0, str(Path(__file__).parent))

from toys import ToyRun

from dalle.config import FIXED, FREE, Section, apply_override
from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.files import replace_folder, write_json
from dalle.training.checkpoint import (
    FORMAT,
    CheckpointStore,
    SavedPlayer,
    check_resumable,
    find_fault,
    noted_settings,
    read_state,
    write_tensors,
)
from dalle.training.optimizers import OptimizerConfig


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


class Model(Section, json_schema_extra=FIXED):
    dim: int = 4
    kind: str = "plain"
    checkpointing: bool = Field(False, json_schema_extra=FREE)


class Part(Section, json_schema_extra=FREE):
    weight: float = 1.0
    bias: bool = Field(True, json_schema_extra=FIXED)


class Run(ToyRun):
    model: Model = Model()
    part: Part | None = Part()
    optimizer: OptimizerConfig = OptimizerConfig()
    table: dict[str, int] = {"a": 1}
    schedule: dict[str, int] = Field({"a": 1}, json_schema_extra=FREE)


IDENTITY = {"fingerprint": "abc"}


def saved_by(config: Run | None = None, **changes) -> dict:
    tree = json.loads((config or Run()).model_dump_json())
    for key, value in changes.items():
        apply_override(tree, f"{key.replace('__', '.')}={value}")
    return {"config": tree, "data": IDENTITY, "players": ["net"]}


def changed(*overrides: str) -> Run:
    tree = Run().model_dump(mode="json")
    for override in overrides:
        apply_override(tree, override)
    return Run.model_validate(tree)


@pytest.mark.parametrize("change", ["model.dim=8", "seed=1", "train.batch_size=16", "data.text_length=5",
                                    "optimizer.name=muon", "part.bias=false", "table.a=2", "data.train=moved"])
def test_what_must_stay_is_shown_when_it_changes(change):
    key, _, value = change.partition("=")
    with pytest.raises(UserError, match=rf"(?i){key}: .* -> '?{value}"):
        check_resumable("c", saved_by(), changed(change), IDENTITY, ["net"])


@pytest.mark.parametrize("change", ["train.steps=9", "optimizer.lr=2.0", "optimizer.clip=0", "optimizer.ema=0.9",
                                    "optimizer.betas=[0.5,0.9]", "optimizer.schedule=constant", "name=other",
                                    "model.checkpointing=true", "part.weight=2", "schedule.a=2", "log.tensorboard=true",
                                    "engine.bucket_elements=7", "train.precision=bf16"])
def test_what_may_change_passes(change):
    check_resumable("c", saved_by(), changed(change), IDENTITY, ["net"])


def test_a_change_that_moves_pixels_passes_with_a_word():
    """A run of before decoded whole pictures; what is saved without the setting, or with today's, needs no word."""
    class Reading(Run):
        data: DataConfig

    now = Reading(data={"train": "shards"})
    of_before = saved_by(now, data__jpeg_draft="false", data__workers="7")
    check_resumable("c", of_before, now, IDENTITY, ["net"])
    assert noted_settings(of_before["config"], now) == ["data.jpeg_draft: False -> True"]
    assert noted_settings(saved_by(now)["config"], now) == []


@pytest.mark.parametrize(("identity", "players", "message"), [
    ({"fingerprint": "xyz"}, ["net"], r"data fingerprint: 'abc' -> 'xyz'.*data\.bad_shards=skip"),
    ({"fingerprint": "abc"}, ["g", "d"], "the task has g, d"),
])
def test_other_data_or_players_are_refused(identity, players, message):
    with pytest.raises(UserError, match=message):
        check_resumable("c", saved_by(), Run(), identity, players)


def test_a_setting_that_the_checkpoint_does_not_know_is_no_difference():
    saved = saved_by()
    del saved["config"]["model"]["kind"]
    check_resumable("c", saved, changed("model.kind=fancy"), IDENTITY, ["net"])


def test_a_setting_that_this_version_has_no_more_is_no_difference():
    check_resumable("c", saved_by(model__retired=3, retired=4), Run(), IDENTITY, ["net"])


def test_a_whole_section_that_comes_or_goes_is_a_difference_where_it_must_stay():
    class Deciding(Run):
        part: Model | None = Model()

    there, gone = Deciding(), Deciding(part=None)
    for old, new in ((there, gone), (gone, there)):
        with pytest.raises(UserError, match="part: "):
            check_resumable("c", saved_by(old), new, IDENTITY, ["net"])


def test_another_task_is_refused_by_name():
    saved = saved_by(task="clip")
    with pytest.raises(UserError, match="of the task 'clip', not 'toy'"):
        check_resumable("c", saved, Run(), IDENTITY, ["net"])


def test_replacing_a_folder_leaves_only_the_new_one(tmp_path):
    for turn in ("old", "new"):
        (tmp_path / "next").mkdir()
        (tmp_path / "next" / "file").write_text(turn)
        replace_folder(tmp_path / "next", tmp_path / "model")
    assert (tmp_path / "model" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    shutil.rmtree(tmp_path / "model")
