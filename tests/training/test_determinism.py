"""``train.deterministic``: torch is told for the run alone, and what cannot be is one line that names it."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import SingleTask, ToyLoader, toy_run

from dalle.errors import UserError
from dalle.training import determinism
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer


def flags() -> dict[str, bool]:
    import torch._inductor.config

    return {"algorithms": torch.are_deterministic_algorithms_enabled(), "cudnn": torch.backends.cudnn.deterministic,
            "search": torch.backends.cudnn.benchmark, "inductor": torch._inductor.config.deterministic}


class Watching(SingleTask):
    def __init__(self, spoiled: bool = False):
        super().__init__()
        self.seen, self.spoiled = [], spoiled

    def prepare(self, batch, networks, step):
        self.seen.append(flags())
        if self.spoiled:
            batch["x"].put_(torch.tensor([0, 0]), torch.zeros(2))        # of two to one place, either may win
        return super().prepare(batch, networks, step)


@pytest.fixture
def environment(monkeypatch):
    """What is set in it by a run goes after the test."""
    for name in determinism.ENVIRONMENT:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return determinism.os.environ


def run(folder: Path, task: Watching, **settings) -> list[dict[str, bool]]:
    config = toy_run(folder, steps=1, **settings)
    Trainer(task, config, create_engine(config), ToyLoader).run()
    return task.seen


def test_torch_is_told_for_the_run_alone(tmp_path, environment):
    before = flags()
    assert run(tmp_path, Watching(), deterministic=True) == [
        {"algorithms": True, "cudnn": True, "search": False, "inductor": True}]
    assert flags() == before
    assert {name: environment[name] for name in determinism.ENVIRONMENT} == determinism.ENVIRONMENT


def test_by_default_nothing_is_told(tmp_path, environment):
    assert run(tmp_path, Watching()) == [flags()] and not flags()["algorithms"]
    assert not determinism.ENVIRONMENT.keys() & environment.keys()


def test_a_workspace_that_was_set_stays(tmp_path, environment):
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    run(tmp_path, Watching(), deterministic=True)
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_an_operation_without_a_fixed_order_is_one_line_that_names_it(tmp_path, environment):
    before = flags()
    run(tmp_path / "free", Watching(spoiled=True))
    with pytest.raises(UserError) as caught:
        run(tmp_path, Watching(spoiled=True), deterministic=True)
    assert "train.deterministic: put_" in str(caught.value) and "set it to false" in str(caught.value)
    assert "\n" not in str(caught.value) and flags() == before
