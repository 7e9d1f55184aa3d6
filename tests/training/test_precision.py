"""What a run computes in, as the engine says and does it."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import SingleTask, ToyLoader, toy_run

from dalle.errors import UserError
from dalle.training.engines.base import Engine, poisoned
from dalle.training.engines.launching import create_engine
from dalle.training.engines.zero import DeepSpeedEngine
from dalle.training.loop import Trainer

CPU = torch.device("cpu")


def test_the_first_line_of_a_run_says_what_it_computes_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dalle.training.compiling.BACKEND", "eager")
    config = toy_run(tmp_path, precision="bf16", compile=True)
    Trainer(SingleTask(), config, create_engine(config), ToyLoader, stop_after=1).run()
    words = "bf16; compiled: the whole network of net"
    assert json.loads((config.folder / "log.jsonl").read_text().splitlines()[0])["computes"] == words
    assert f"process(es) on cpu, {words}\n" in capsys.readouterr().out


def test_fp32_is_fp32(tmp_path):
    """Products that are meant to be exact (distances to codes, metrics) run in the same process."""
    create_engine(toy_run(tmp_path))
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp8_does_not_go_with_zero3(tmp_path, monkeypatch, stage):
    monkeypatch.setattr("dalle.training.engines.base.check_float8", lambda device: None)
    engine = DeepSpeedEngine(toy_run(tmp_path, precision="fp8"), CPU, 0, 1, {"stage": stage})
    if stage < 3:
        engine.check(SingleTask())
    else:
        with pytest.raises(UserError, match="fp8 does not go with ZeRO-3"):
            engine.check(SingleTask())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_spoils_every_gradient(value):
    weight = torch.ones(3, requires_grad=True)
    poisoned((weight * torch.tensor([1.0, 0.0, 0.0])).sum() + value).backward()
    assert weight.grad.isnan().all()


def test_a_finite_loss_is_left_as_it_is():
    weight = torch.tensor([2.0, -3.0], requires_grad=True)
    loss = poisoned(weight.prod())
    loss.backward()
    assert loss == -6 and weight.grad.tolist() == [-3.0, 2.0]


@pytest.mark.parametrize(("device", "settings", "expected"), [
    ("cpu", {"precision": "fp8"}, False), ("cuda", {}, False), ("cuda", {"precision": "fp8"}, True),
    ("cuda", {"precision": "fp8", "compile": False}, False), ("cpu", {"compile": True}, True)])
def test_left_open_small_networks_are_compiled_in_fp8_alone(tmp_path, device, settings, expected):
    engine = Engine(toy_run(tmp_path, steps=10_000, **settings), CPU)
    engine.device = torch.device(device)          # of which nothing but its type is asked
    assert engine.compiles(SingleTask().players["net"].module) is expected
