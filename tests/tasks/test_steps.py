"""What every task promises of its steps: the host waits for nothing in them, and replayed they train as plain ones."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from fake_gpu import step_without_waiting
from tapes import PLAIN_STEPS, assert_replay_trains_alike

from dalle.config import load_config
from dalle.data.loader import train_batches
from dalle.tasks import RUNS, TASKS

FULL = {"attention": "full"}      # the other layouts are compiled, which takes a device
CASES = {
    "dvae": ("dvae", {}),
    "dvae_gumbel": ("dvae", {"model": {"preset": "tiny", "quantizer": {"kind": "gumbel", "num_codes": 16}},
                             "loss": {"even_usage": 1.0, "edges": 0.1}}),
    "transformer": ("transformer", {"optimizer": {"name": "muon", "lr": 1e-3}, "loss": {"text_pads": False},
                                    "model": FULL}),
    "transformer_modern": ("transformer", {"model": {**FULL, "norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary",
                                                     "qk_norm": True, "dropout": 0.1}}),
    "clip": ("clip", {}),
    "siglip": ("clip", {"loss": {"kind": "siglip"}}),
    "vs": ("vs", {}),
}


@pytest.fixture(scope="module")
def clip(workshop, tmp_path_factory) -> str:
    """An untrained CLIP, exported."""
    folder = tmp_path_factory.mktemp("clip")
    task = TASKS["clip"](load_config(workshop.config("clip", folder), [], RUNS))
    task.export(folder / "run" / "model", {"clip": task.players["clip"].module.state_dict()})
    return str(folder / "run")


@pytest.fixture
def case(request, workshop, clip, tmp_path):
    """(a function that makes the task, its config, some batches)."""
    task, changes = CASES[request.param]
    config = load_config(workshop.config("clip" if task == "vs" else task, tmp_path / "runs", **changes), [], RUNS)
    if task == "vs":
        config = RUNS["vs"](name="vs", output=config.output, data=config.data, train=config.train,
                            image_features=clip, text_features=clip)

    def make():
        torch.manual_seed(0)
        return TASKS[task](config)

    loader = train_batches(config.data, seed=0, batch_size=config.train.batch_size)
    return make, config, [batch for _, batch in zip(range(PLAIN_STEPS + 3), loader, strict=False)]


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_step_does_not_wait_for_the_device(case, tmp_path):
    make, config, batches = case
    assert step_without_waiting(make(), config, batches[0], tmp_path).on_device > 100


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_replayed_steps_train_as_plain_ones(case, tmp_path):
    make, config, batches = case
    assert_replay_trains_alike(make, config, batches, tmp_path)
