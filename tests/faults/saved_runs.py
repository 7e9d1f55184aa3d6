"""Toys' runs whose checkpoints are looked at: how they are trained, and what is left of them."""

import contextlib
import io
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_shards import ROOT

sys.path.insert(0, str(ROOT / "tests/training"))

from toys import SingleTask, ToyLoader, toy_run

from dalle.errors import run_command
from dalle.training.checkpoint import CheckpointStore, find_fault
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig

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


def saved_steps_so_far(folder: Path) -> list[int]:
    """Steps of the checkpoints that can be seen, where a save may be under way."""
    return sorted(int(path.name.removeprefix("step_")) for path in store_of(folder).all())
