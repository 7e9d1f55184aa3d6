"""The train command: the same weights after a stop as without one, the same on two processes, and clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
TASKS = ["dvae", "transformer", "clip"]


@pytest.fixture
def train(request):
    """launch/train.py, called in this process."""
    return request.getfixturevalue("commands")["train"]


def newest(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's newest checkpoint, by file and name: weights, moments, averages."""
    folder = sorted((run / "checkpoints").glob("step_*"))[-1]
    tensors = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".safetensors":
            tensors |= {f"{path.relative_to(folder)}:{name}": value for name, value in load_file(path).items()}
        elif path.suffix == ".pt":
            state = torch.load(path, weights_only=True)
            tensors |= {f"{path.relative_to(folder)}:{name}": value for name, value in flatten(state)}
    return tensors


def flatten(tree, prefix=""):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    for key, value in items:
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        else:
            yield from flatten(value, f"{prefix}{key}.")


@pytest.mark.parametrize("task", TASKS)
def test_four_steps_equal_two_a_stop_and_two(task, workshop, train, tmp_path):
    straight = workshop.config(task, tmp_path / "straight")
    assert train(straight) == 0
    stopped = workshop.config(task, tmp_path / "stopped")
    assert train(stopped, "--stop-after", 2) == 0
    assert train(stopped) == 0
    expected, found = newest(tmp_path / "straight" / task), newest(tmp_path / "stopped" / task)
    assert expected.keys() == found.keys() and len(expected) > 10
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def launch_two(config: Path, *overrides: str) -> None:
    """``accelerate launch --num_processes 2`` on a machine without GPUs."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2",
               str(ROOT / "launch/train.py"), str(config), *overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr[-3000:]


def processes(run: Path) -> int:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return next(line["processes"] for line in lines if line.get("event") == "start")


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one(task, workshop, train, tmp_path):
    assert train(workshop.config(task, tmp_path / "one")) == 0
    launch_two(workshop.config(task, tmp_path / "two"))
    assert (processes(tmp_path / "one" / task), processes(tmp_path / "two" / task)) == (1, 2)
    one, two = losses(tmp_path / "one" / task), losses(tmp_path / "two" / task)
    assert len(one) == 4
    assert two == pytest.approx(one, abs=1e-5)


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_data_names_the_folder(workshop, train, tmp_path):
    config = workshop.config("dvae", tmp_path, data={"train": str(tmp_path / "nothing")})
    assert "nothing" in refusal(train, config)


def test_a_codec_whose_grid_does_not_fit(workshop, train, tmp_path):
    config = workshop.config("transformer", tmp_path)
    message = refusal(train, config, "model.grid=[4, 4]")
    assert "grid" in message and "2" in message and "4" in message


def test_a_tokenizer_larger_than_the_vocabulary(workshop, train, tmp_path):
    config = workshop.config("transformer", tmp_path)
    message = refusal(train, config, "model.num_text_tokens=50")
    assert "50" in message and "token" in message


def test_a_codec_of_another_task(workshop, train, tmp_path):
    assert train(workshop.config("clip", tmp_path)) == 0
    message = refusal(train, workshop.config("transformer", tmp_path, codec=str(tmp_path / "clip")))
    assert "clip" in message and "dvae" in message


def test_a_checkpoint_of_another_task_is_not_resumed(workshop, train, tmp_path):
    assert train(workshop.config("dvae", tmp_path)) == 0
    message = refusal(train, workshop.config("clip", tmp_path, name="dvae"))
    assert "task" in message and "dvae" in message


def test_no_write_permission(workshop, train, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = refusal(train, workshop.config("dvae", tmp_path / "configs"), f"output={blocked}")
    assert str(blocked) in message


def test_the_command_says_one_line_and_exits_with_2(workshop, tmp_path):
    config = workshop.config("dvae", tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, str(ROOT / "launch/train.py"), str(config), "train.stps=3"],
                            env=environment, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1 and "did you mean 'steps'" in result.stderr


def test_dry_run_writes_nothing(workshop, train, tmp_path, capsys):
    assert train(workshop.config("transformer", tmp_path), "--dry-run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["samples"] == 32 and plan["players"]["transformer"] > 1000
    assert not (tmp_path / "transformer").exists()


def test_shipped_configs_are_valid():
    from dalle.config import load_config
    from dalle.tasks import RUNS

    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path, [], RUNS)
        header = path.read_text().split("\n\n")[0]
        assert header.startswith("#") and "launch/train.py" in header, f"{path}: no header comment with the command"
