"""Toys' runs in which something goes wrong: how they are trained in this process, and what is left of any."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from toy_worker import FaultyTask, NumberedLoader

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from toys import toy_run

from dalle.training.checkpoint import CheckpointStore, find_fault
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer

EXACT = 2e-6                            # other processes, other order of additions
STEPS, BAD = 10, 5                      # of a run over batches of which one explodes
SPIKE = {"zscore": 30, "history": 8}
LIMITS = {"timeout_minutes": 2}         # a mistake here must not cost ten minutes
UNDISTURBED = {"steps": 6, "save_every": 0, "keep_last": 9, "engine": LIMITS}


def train_here(folder: Path, *, faults=None, spikes=(), without=(), stop_after=None, resume="auto", dropout=0.3,
               **settings):
    """In this process, alone."""
    config = toy_run(folder, **{"steps": STEPS, **settings})
    return Trainer(FaultyTask(folder, faults, spikes, dropout), config, create_engine(config),
                   lambda first: NumberedLoader(first, without=without),
                   resume=str(resume), stop_after=stop_after).run()


def results(out: Path, name: str) -> list[dict]:
    """What each of two ranks knew at the end."""
    return [json.loads((out / f"{name}.rank{rank}.json").read_text()) for rank in (0, 1)]


def log_of(run: Path) -> list[dict]:
    path = run / "log.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def events(folder: Path, name: str) -> list[dict]:
    return [line for line in log_of(folder / "toy") if line.get("event") == name]


def checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of it: weights and moments. It must verify."""
    place = CheckpointStore(folder / "toy/checkpoints", 1).path(step)
    assert find_fault(place) is None
    return {f"{path.name.partition('-')[0]}:{name}": tensor for path in place.glob("net/*.safetensors")
            for name, tensor in load_file(path).items()}         # whichever rank wrote it


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys() and left
    return all(torch.equal(left[name], right[name]) for name in left)


def losses(run: Path) -> dict[int, float]:
    """The newest figure of every step."""
    return {line["step"]: line["loss"] for line in log_of(run) if "loss" in line}
