"""launch/engines: accelerate reads every file, submit says the same, and the engine asked for is the one made."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
from accelerate.commands.config import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from dalle.training.engines.launching import create_engine
from dalle.training.run import RunConfig
from slurm import environment as submitted

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "launch" / "engines"
FILES = sorted(path.stem for path in FOLDER.glob("*.yaml"))

TWO = ("--num_processes", "2", "--main_process_ip", "127.0.0.1")

# file -> the engine with two processes
MADE = {
    "cpu": "ddp", "single_gpu": "ddp", "ddp": "ddp", "multi_node": "ddp", "zero1": "zero1", "zero2": "zero2",
    "zero3": "zero3", "zero3_offload": "zero3", "fsdp2": "fsdp2", "hsdp": "fsdp2",
}


@pytest.fixture
def bare(monkeypatch):
    """An environment without a launcher's traces, restored afterwards."""
    for name in [*os.environ]:
        if name.startswith(("ACCELERATE_", "FSDP_", "SLURM_", "DS_")) or name in (
                "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name)


@pytest.fixture
def launched(monkeypatch, bare):
    """``launched(NAME, *OPTIONS)``: what accelerate hands to torchrun, and its environment; nothing is started."""

    def launch(name: str, *options: str) -> tuple[argparse.Namespace | None, dict[str, str]]:
        caught = []
        monkeypatch.setattr(torch.distributed.run, "run", lambda agent: caught.append((agent, dict(os.environ))))
        monkeypatch.setattr(subprocess, "Popen", lambda command, env: (
            caught.append((None, env)) or SimpleNamespace(wait=lambda: 0, returncode=0)))
        words = ["--config_file", str(FOLDER / f"{name}.yaml"), "--main_process_port", "0", *options, "train.py"]
        launch_command(launch_command_parser().parse_args(words))
        (found,) = caught
        return found

    return launch


def made(monkeypatch, environment: dict[str, str]) -> tuple[str, str]:
    """(engine, its stage or version) that ``create_engine`` makes of an environment; nothing is started."""
    from dalle.training.engines import ddp, fsdp, zero

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    starts = {"ddp": ddp.DistributedEngine, "zero": zero.DeepSpeedEngine, "fsdp": fsdp.FSDPEngine}
    for kind, owner in starts.items():
        monkeypatch.setattr(owner, "start", lambda config, kind=kind: kind)
    monkeypatch.setattr("dalle.training.engines.launching.meet_others", lambda config: None)
    kind = create_engine(RunConfig(task="any", name="any", data={"train": "any"}, train={"batch_size": 8}))
    numbers = {"ddp": "", "zero": os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"),
               "fsdp": os.environ.get("FSDP_VERSION")}
    return kind + numbers[kind]


def test_every_file_is_here():
    assert set(FILES) == set(MADE)


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_the_file(name):
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert config.mixed_precision == "no"      # precision is the run's, and accelerate's own autocast would double it


@pytest.mark.parametrize("name", FILES)
def test_accelerate_launch_leads_to_the_engine(name, monkeypatch, launched):
    _, environment = launched(name, *TWO)
    changed = {key: value for key, value in environment.items() if os.environ.get(key) != value}
    assert made(monkeypatch, {**changed, "RANK": "0", "WORLD_SIZE": "2"}) == MADE[name]


@pytest.mark.parametrize("name", sorted(set(FILES) - {"multi_node", "single_gpu"}))
def test_submit_leads_to_the_same_engine(name, monkeypatch, launched):
    values = submitted.engine_environment(name, on_gpus=True)
    _, environment = launched(name, *TWO)
    assert values == {key: environment.get(key) for key in values}
    assert made(monkeypatch, {**values, "RANK": "0", "WORLD_SIZE": "2"}) == MADE[name]


@pytest.mark.parametrize("name", sorted(set(FILES) - {"cpu", "single_gpu"}))
def test_several_nodes_meet_through_torchrun(name, launched):
    """Not through pdsh, and not each alone: without an endpoint torchrun's c10d meets on the node itself."""
    agent, _ = launched(name, "--num_machines", "2", "--num_processes", "4", "--machine_rank", "1", "--rdzv_backend",
                        "c10d", "--main_process_ip", "node1", "--main_process_port", "10007")
    assert (agent.rdzv_backend, agent.rdzv_endpoint) == ("c10d", "node1:10007")
    assert (agent.nnodes, agent.nproc_per_node) == ("2", "2")


def test_submit_knows_every_engine():
    assert set(submitted.CHOICES) == set(FILES) - {"multi_node", "single_gpu"}


def test_the_deepspeed_file_says_what_the_yaml_says():
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    tree = json.loads((FOLDER / "zero3_offload.json").read_text())
    yaml = load_config_from_file(str(FOLDER / "zero3_offload.yaml")).deepspeed_config
    assert set(tree) == {"zero_optimization"}       # the batch, the clip and the precision are the run's
    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    assert set(tree["zero_optimization"]) <= known
    section = DeepSpeedZeroConfig(**tree["zero_optimization"])
    assert section.stage == yaml["zero_stage"]
    assert section.offload_optimizer.device == yaml["offload_optimizer_device"]
    assert section.offload_param.device == yaml["offload_param_device"]
