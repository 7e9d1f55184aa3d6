"""A run is known by what its companions hold: at a resume, between ranks, in an export and beside cached codes."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from toys import GanTask, ToyLoader, toy_run

from dalle.errors import UserError
from dalle.tensor_file import module_digest
from dalle.training.checkpoint import CheckpointStore, read_state
from dalle.training.companions import agreed_records, records_of
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.task import Companion


class Companioned(GanTask):
    """Its frozen layer was trained elsewhere; ``shift`` trains it again."""

    companion_settings = {"half": "data.train"}

    def __init__(self, shift: float = 0.0):
        super().__init__()
        with torch.no_grad():
            self.frozen["half"].bias += shift


def train(folder, task, **settings):
    options = {name: settings.pop(name) for name in ("stop_after", "resume") if name in settings}
    config = toy_run(folder, **settings)
    return Trainer(task, config, create_engine(config), ToyLoader, **options).run()


def files_of(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_companion_that_was_trained_again_is_refused_with_old_and_new_and_nothing_is_touched(tmp_path):
    train(tmp_path, Companioned(), stop_after=2)
    before = files_of(tmp_path)
    old, new = module_digest(Companioned().frozen["half"]), module_digest(Companioned(1e-6).frozen["half"])
    with pytest.raises(UserError, match=rf"step_00000002 was trained with another companion, half: data.train=none "
                                        rf"\(digest {old[:8]}\) -> data.train=none \(digest {new[:8]}\)"):
        train(tmp_path, Companioned(1e-6))
    assert files_of(tmp_path) == before
    assert train(tmp_path, Companioned()).status == "finished"


def test_a_companion_that_was_changed_on_purpose_is_taken_loudly_and_is_then_the_runs_own(tmp_path, caplog):
    train(tmp_path, Companioned(), stop_after=2)
    train(tmp_path, Companioned(1.0), stop_after=3, accept_companions=("half",))
    assert "goes on with another companion" in caplog.text
    assert train(tmp_path, Companioned(1.0)).status == "finished"


def test_a_checkpoint_that_is_older_than_the_record_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("dalle.training.state.agreed_records", lambda engine, task: None)
    train(tmp_path, Companioned(), stop_after=2)
    monkeypatch.undo()
    assert train(tmp_path, Companioned(1.0)).status == "finished"
    assert "whether half is still the same is not checked" in caplog.text


@pytest.mark.parametrize("known", [[], {"half": None}, {"half": {"digest": 3}},
                                   {"half": {"digest": "x", "setting": 5}}])
def test_a_hostile_record_is_refused_or_passed_over_in_one_line(tmp_path, monkeypatch, known):
    monkeypatch.setattr("dalle.training.state.agreed_records", lambda engine, task: known)
    train(tmp_path, Companioned(), stop_after=2)
    monkeypatch.undo()
    try:
        assert train(tmp_path, Companioned()).status == "finished"
    except UserError as error:
        assert "another companion" in str(error) and "\n" not in str(error)


def test_the_digest_is_of_what_a_module_holds_not_of_where_or_how_it_lies():
    def layer(dtype=torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).to(dtype)

    same = layer().to(memory_format=torch.channels_last).requires_grad_(False).eval()
    assert module_digest(same) == module_digest(layer())
    moved = layer()
    moved[1].running_mean += 1
    renamed = nn.Sequential(nn.Identity(), *layer())
    others = [layer(torch.float64), moved, renamed, nn.Sequential(layer()[0])]
    assert len({module_digest(module) for module in [layer(), *others]}) == 5


def test_what_parts_were_computed_from_counts_and_a_shared_module_is_read_once(monkeypatch):
    class Task(Companioned):
        def companions(self):
            half = self.frozen["half"]
            return {"one": Companion(half, "a"), "two": Companion(half, "b", "of these"),
                    "three": Companion(half, "c", "of those")}

    records = records_of(Task())
    assert len({record["digest"] for record in records.values()}) == 3
    assert [record["setting"] for record in records.values()] == ["a", "b", "c"]


def test_ranks_that_read_different_files_are_named():
    class TwoNodes:
        def gather(self, value):
            host, records = value
            return [value, ("node2", {"half": {**records["half"], "digest": "0" * 32}})]

    with pytest.raises(UserError, match="the half of rank 1 on node2 is not that of rank 0 on"):
        agreed_records(TwoNodes(), Companioned())


def test_a_checkpoint_keeps_the_record(tmp_path):
    train(tmp_path, Companioned(), stop_after=1)
    state = read_state(CheckpointStore(tmp_path / "toy/checkpoints", 1).newest()[0])
    assert state["companions"] == {"half": {"digest": module_digest(Companioned().frozen["half"]),
                                            "setting": "data.train"}}
    assert json.dumps(state)
