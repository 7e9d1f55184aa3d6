"""Starts a real launcher with two processes on CPU cores and brings back what its jobs left."""

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from reference import statistics_of_rank_0
from safetensors.torch import load_file
from torch import Tensor
from toys import Normed, ToyLoader

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAUNCH_SECONDS = 600    # the first DeepSpeed start on a machine compiles its CPU collective


@dataclass
class Job:
    """One training in the worker; jobs with the same ``folder`` go on from one another."""

    name: str
    kind: str
    task: str = "SingleTask"
    folder: str = ""
    optimizer: dict | None = None
    options: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(jobs: list[Job], out: Path, arguments: list[str], processes: int = 2) -> None:
    """Run ``jobs`` under ``accelerate launch ARGUMENTS`` with so many processes."""
    path = out / "jobs.json"
    path.write_text(json.dumps([{**vars(job), "out": str(out / (job.folder or job.name))} for job in jobs]))
    # the repository's own `deepspeed` switch: without a GPU it must be told that it is on a CPU
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                   "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "--num_processes", str(processes),
               "--main_process_port", str(free_port()), str(HERE / "worker.py"), str(path)]
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def result(out: Path, job: str, folder: str = "", rank: int = 0) -> dict:
    return json.loads((out / (folder or job) / f"{job}.rank{rank}.json").read_text())


def weights(out: Path, folder: str) -> dict[str, Tensor]:
    """Every player's exported weights, as PLAYER.NAME."""
    return {f"{path.stem}.{name}": tensor for path in sorted((out / folder / "toy" / "model").glob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def assert_statistics_are_those_of_rank_0(out: Path, folder: str, found: dict) -> None:
    """Of a ``NormedTask`` after four steps on two ranks: those exported, and those that validation went by."""
    state = {name.removeprefix("net."): tensor for name, tensor in weights(out, folder).items()}
    mean, variance = statistics_of_rank_0(4)
    torch.testing.assert_close(state["norm.running_mean"], mean)
    torch.testing.assert_close(state["norm.running_var"], variance)
    net = Normed()
    net.load_state_dict(state)
    x = torch.cat([batch["x"] for batch in ToyLoader(steps=3)])
    error = (net.eval()(x) - x.mean(dim=1, keepdim=True)).square().mean().item()
    assert found["validation/error"] == pytest.approx(error, rel=1e-5)


def largest_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys() and left
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def mean_difference(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    assert left.keys() == right.keys() and left
    return sum(float((left[name] - right[name]).abs().sum()) for name in left) / sum(map(Tensor.numel, left.values()))
