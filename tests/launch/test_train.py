"""The train command: the same weights after a stop as without one, the same on two processes, and clear refusals."""

import json
import os
import shutil
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


@pytest.mark.parametrize("arguments", [["--dry-run"], ["data.workers=0"]])
@pytest.mark.parametrize(("key", "words"), [
    ("train", "no folder"), ("validation", "set data.validation=null"), ("tokenizer", "no tokenizer in"),
])
def test_data_that_is_not_there_is_refused_before_a_network_is_built(workshop, train, tmp_path, monkeypatch, key, words,
                                                                     arguments):
    monkeypatch.setattr("dalle.tasks.transformer.TransformerTask.__init__", None)
    config = workshop.config("transformer", tmp_path)
    message = refusal(train, config, f"data.{key}={tmp_path}/typo", *arguments)
    assert message.startswith(f"data.{key}: ") and words in message and not (tmp_path / "transformer").exists()


def test_what_the_first_validation_would_refuse_is_refused_at_the_start(workshop, train, tmp_path, monkeypatch):
    monkeypatch.setattr("dalle.tasks.transformer.TransformerTask.__init__", None)
    config = workshop.config("transformer", tmp_path)
    damaged = tmp_path / "validation"
    shutil.copytree(workshop.folder / "data" / "validation", damaged, ignore=shutil.ignore_patterns("index"))
    (path,) = damaged.glob("*.tar")
    os.truncate(path, path.stat().st_size // 2)
    assert "is damaged" in refusal(train, config, f"data.validation={damaged}")


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


def test_a_dry_run_says_what_memory_the_launchers_engine_takes(workshop, train, tmp_path, capsys):
    assert train(workshop.config("transformer", tmp_path), "--dry-run", "--device-gb", "1000") == 0
    plan = json.loads(capsys.readouterr().out)
    (entry,) = plan["memory"]
    assert plan["fits"] and entry["engine"] == "single" and entry["gb_per_device_in_a_step"]["all"] < 1
    assert train(workshop.config("dvae", tmp_path), "--dry-run", "--device-gb", "1") == 1       # less than the reserve
    plan = json.loads(capsys.readouterr().out)
    assert not plan["fits"] and plan["memory"][0]["gb_per_device_in_a_step"]["activations"] == "not counted"


PAPER = ROOT / "configs/paper/transformer.yaml"


def test_the_12b_model_fits_the_devices_that_its_config_is_for(train, capsys):
    """Neither its data nor its codec is here. Weights, gradients, moments and average are 20 bytes a parameter."""
    assert train(PAPER, "--dry-run", "--devices", "64", "--device-gb", "80") == 0
    (entry,) = json.loads(capsys.readouterr().out)["memory"]
    step = entry["gb_per_device_in_a_step"]
    assert (entry["engine"], entry["shard_size"], entry["micro_batch_size"]) == ("fsdp2", 8, 16)
    assert step["weights"] == pytest.approx(4 * 12.294 / 8, rel=1e-3)
    assert step["optimizer"] == pytest.approx(2 * step["weights"], rel=1e-3) and step["average"] == step["weights"]
    assert step["activations"] > 64 * 16 * 1280 * 3968 * 4 / 1e9        # the checkpoints alone
    assert entry["gb_of_host_memory_per_node"]["first_weights"] < 3


@pytest.mark.parametrize("arguments", [("--engine", "zero2", "engine.shard_size=null"), ("engine.shard_size=1",),
                                       ("model.checkpointing=false",)])
def test_and_otherwise_it_does_not(train, capsys, arguments):
    assert train(PAPER, "--dry-run", "--devices", "64", "--device-gb", "80", *arguments) == 1
    assert not json.loads(capsys.readouterr().out)["fits"]


@pytest.mark.parametrize(("arguments", "words"), [
    ((PAPER, "--devices", "60"), "does not divide"),
    ((PAPER, "--devices", "64", "model.preset=null"), "left to the codec"),
    ((ROOT / "configs/paper/dvae.yaml", "--devices", "64"), "not that of a dvae run"),
])
def test_devices_that_cannot_be_counted_are_refused(train, arguments, words):
    assert words in refusal(train, *arguments, "--dry-run")


@pytest.fixture
def chained(workshop, tmp_path) -> Path:
    """The config of a transformer whose codec must be trained first."""
    codec = workshop.config("dvae", tmp_path)
    return workshop.config("transformer", tmp_path, codec=str(tmp_path / "dvae"), prerequisites=[str(codec)])


def test_a_run_that_must_be_made_first_is_named_with_its_command(chained, train, tmp_path):
    message = refusal(train, chained)
    assert f"{tmp_path / 'dvae'} does not exist" in message
    assert message.endswith(f"; make it first: python launch/train.py {tmp_path / 'dvae.yaml'}, "
                            "or add --with-prerequisites")


def test_prerequisites_are_trained_first_and_once(chained, train, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert train(chained, "--with-prerequisites", "--dry-run") == 0
    plan = {"config": str(tmp_path / "dvae.yaml"), "folder": str(tmp_path / "dvae"), "state": "missing",
            "command": f"python launch/train.py {tmp_path / 'dvae.yaml'}"}
    assert json.loads(capfd.readouterr().out) == {"prerequisites": [plan]} and not (tmp_path / "dvae").exists()

    assert train(chained, "--with-prerequisites", "train.steps=2") == 0
    assert f"prerequisite: {tmp_path / 'dvae'} is missing, training it first" in capfd.readouterr().err
    assert losses(tmp_path / "dvae") and len(losses(tmp_path / "transformer")) == 2

    made = (tmp_path / "dvae/finished").stat().st_mtime_ns
    assert train(chained, "--with-prerequisites", "--dry-run") == 0
    assert json.loads(capfd.readouterr().out)["prerequisites"] == [{**plan, "state": "finished"}]
    assert train(chained, "--with-prerequisites", "train.steps=2", "prerequisites=[]") == 0     # no change at a resume
    assert (tmp_path / "dvae/finished").stat().st_mtime_ns == made


def test_a_prerequisite_that_fails_ends_the_command_with_its_status(chained, workshop, train, tmp_path, capfd,
                                                                    monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    workshop.config("dvae", tmp_path, data={"train": str(tmp_path / "nothing")})
    assert train(chained, "--with-prerequisites") == 2
    assert "dvae.yaml ended with status 2; nothing after it was started" in capfd.readouterr().err
    assert not (tmp_path / "transformer").exists()


def test_data_that_was_not_made_yet_is_named_with_its_command(workshop, train, tmp_path, monkeypatch):
    config = workshop.config("dvae", tmp_path, data={"train": "data/shapes/train"})
    monkeypatch.chdir(tmp_path)
    message = refusal(train, config)
    assert message.endswith("make it first: python tools/make_shards.py shapes --out data/shapes")


def test_what_shipped_configs_need_first_is_shipped():
    import gans
    from dalle.config import load_config
    from dalle.tasks import RUNS
    from dalle.training.prerequisites import prerequisites

    gans.register()
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        config = load_config(path, [], RUNS)
        found = prerequisites(str(path), config.model_copy(update={
            "prerequisites": tuple(str(ROOT / name) for name in config.prerequisites)}), RUNS)
        assert len(found) >= len(config.prerequisites), path


def test_shipped_configs_are_valid():
    import gans
    from dalle.config import load_config
    from dalle.tasks import RUNS

    gans.register()
    paths = sorted((ROOT / "configs").rglob("*.yaml"))
    assert paths
    for path in paths:
        load_config(path, [], RUNS)
        header = path.read_text().split("\n\n")[0]
        assert header.startswith("#") and "launch/train.py" in header, f"{path}: no header comment with the command"
