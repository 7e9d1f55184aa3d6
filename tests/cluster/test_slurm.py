"""Training on a real SLURM of two nodes: a run that is left alone, one that is pre-empted, one that loses a node.

All train the quickstart's transformer, shrunk, on the CPU; what the disturbed runs end with is held against the other.
"""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_nodes import NODES, Cluster

from dalle.errors import EXIT_LOST_PROCESS
from dalle.training.checkpoint import CheckpointStore, read_state
from dalle.training.sample_log import surviving

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "quickstart" / "transformer.yaml"
STEPS, BATCH, SAMPLES = 99, 64, 96      # about ten seconds: time to disturb it
START_SECONDS, RUN_SECONDS, LOSS_SECONDS = 120, 240, 120


@dataclass
class Training:
    """A run on the cluster, or beside it, in ``folder``."""

    cluster: Cluster
    folder: Path
    overrides: list[str]

    def submit(self, *options: str) -> int:
        """The id of a job of two nodes, one process each."""
        told = self._command("launch/submit.py", "--nodes", "2", "--gpus-per-node", "0", "--time", "10:00",
                             "--signal", "USR2@60", *options)
        return int(re.search(r"\bjob (\d+)", told)[1])

    def run_here(self) -> None:
        self._command("launch/train.py")

    def _command(self, script: str, *options: str) -> str:
        command = [sys.executable, str(ROOT / script), str(CONFIG), *self.overrides, *options]
        environment = {**self.cluster.environment, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=RUN_SECONDS)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    def lines(self) -> list[dict]:
        path = self.folder / "log.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines(keepends=True)
                if line.endswith("\n")] if path.exists() else []

    def losses(self) -> list[float]:
        """The loss of each step, in the order they were taken."""
        logged = [line for line in self.lines() if "loss" in line]
        assert [line["step"] for line in logged] == list(range(1, len(logged) + 1))
        return [line["loss"] for line in logged]

    def validation(self) -> dict[str, float]:
        return {name: value for line in self.lines() for name, value in line.items() if name.startswith("validation/")}

    def starts(self) -> list[tuple[str, int, int]]:
        """(start or resume, at which step, with how many processes) of each time that it was started."""
        return [(line["event"], line["step"], line["processes"]) for line in self.lines()
                if line.get("event") in ("start", "resume")]

    def weights(self) -> dict[str, torch.Tensor]:
        return load_file(next((self.folder / "model").glob("*.safetensors")))

    def await_step(self, step: int) -> None:
        ends = time.monotonic() + START_SECONDS
        while max((line["step"] for line in self.lines() if "loss" in line), default=0) < step:
            assert time.monotonic() < ends, f"no step {step} in {START_SECONDS} s\n{self.output()}"
            time.sleep(0.1)

    def output(self) -> str:
        """What the job and its tasks printed, for a failure's message."""
        return "\n".join(f"-- {path.name}\n{path.read_text()[-3000:]}"
                         for path in sorted((self.folder / "slurm").glob("*.out")))


@pytest.fixture(scope="module")
def training(cluster, workshop, tmp_path_factory) -> Callable[..., Training]:
    """``training(NAME, *OVERRIDES)``: a run of the shrunk quickstart in a folder of its own."""
    runs = tmp_path_factory.mktemp("runs")
    data = workshop.folder / "data"
    shrunk = [
        f"output={runs}", f"codec={workshop.folder / 'runs' / 'dvae'}", f"data.train={data / 'train'}",
        f"data.validation={data / 'validation'}", f"data.tokenizer={data / 'tokenizer'}", "data.image_size=16",
        "data.text_length=12", "data.images=true", "data.codes=null", "data.validation_codes=null",
        "model.dim=96", "model.depth=4",
        # Muon orthogonalises in bf16, which lets the last bit of a sum over ranks grow to 1e-3 in a hundred steps
        "optimizer.name=adamw", "optimizer.lr=1e-3", f"train.steps={STEPS}", f"train.batch_size={BATCH}",
        "train.precision=fp32", "train.log_every=1", "train.log_samples=true", f"train.validate_every={STEPS}",
        "train.preview_every=0"]
    return lambda name, *overrides: Training(cluster, runs / name, [*shrunk, f"name={name}", *overrides])


@pytest.fixture(scope="module")
def undisturbed(training, cluster) -> tuple[Training, dict[str, str], dict[str, set[int]]]:
    """A run on two nodes that nothing happened to; what SLURM says of its job; and which ranks each node had."""
    run = training("undisturbed", "train.save_every=1000")
    number = run.submit()
    run.await_step(1)
    ranks = cluster.ranks()
    return run, cluster.await_end(number, RUN_SECONDS), ranks


def assert_finished(run: Training, job: dict[str, str]) -> None:
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.output()
    assert json.loads((run.folder / "finished").read_text())["step"] == STEPS


def assert_same_samples(run: Training, undisturbed: Training) -> None:
    """Every step had the samples that it has in the undisturbed run, and every epoch each sample once."""
    taken = surviving(run.folder)
    assert taken == surviving(undisturbed.folder)
    assert list(taken) == list(range(STEPS))
    samples = [sample for step in taken.values() for sample in step]
    assert [position for position, _ in samples] == list(range(STEPS * BATCH))
    for epoch in range(STEPS * BATCH // SAMPLES):
        assert len({key for _, key in samples[epoch * SAMPLES:(epoch + 1) * SAMPLES]}) == SAMPLES


def assert_same_weights(run: Training, undisturbed: Training) -> None:
    """Not a bit is different."""
    expected, found = undisturbed.weights(), run.weights()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_two_nodes_train_what_one_process_trains(undisturbed, training):
    run, job, ranks = undisturbed
    assert_finished(run, job)
    assert ranks == {NODES[0]: {0}, NODES[1]: {1}}
    assert (job["Restarts"], run.starts()) == ("0", [("start", 0, 2)])
    alone = training("alone", "train.save_every=1000")
    alone.run_here()
    assert alone.starts() == [("start", 0, 1)]
    assert_same_samples(run, alone)
    assert len(run.losses()) == STEPS and run.losses() == pytest.approx(alone.losses(), abs=1e-5)
    assert len(run.validation()) > 0 and run.validation() == pytest.approx(alone.validation(), abs=1e-5)


def test_a_preempted_run_saves_requeues_itself_and_resumes_exactly(undisturbed, training, cluster):
    run = training("preempted", "train.save_every=1000")
    number = run.submit()
    run.await_step(20)
    cluster.call("scancel", "--signal=USR2", str(number))
    job = cluster.await_end(number, RUN_SECONDS)
    assert_finished(run, job)
    assert job["Restarts"] == "1", run.output()
    (_, first), (event, second) = [(event, step) for event, step, _ in run.starts()]
    assert (first, event) == (0, "resume") and 20 <= second < STEPS
    assert_same_samples(run, undisturbed[0])
    assert run.losses() == undisturbed[0].losses()
    assert_same_weights(run, undisturbed[0])


def test_a_run_that_loses_a_process_and_then_a_node_ends_as_if_it_had_not(undisturbed, training, cluster):
    run = training("lost", "train.save_every=10")
    number = run.submit("--requeue", "0")
    run.await_step(35)
    cluster.kill_tasks(NODES[1])
    job = cluster.await_end(number, LOSS_SECONDS)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", f"{EXIT_LOST_PROCESS}:0"), run.output()
    assert re.search(r"rank 0, step \d+: lost another rank", run.output())
    first = newest_step(run)
    assert 10 <= first < STEPS

    number = run.submit()
    run.await_step(first + 35)
    cluster.kill_node(NODES[1])
    cluster.await_requeue(number, 1, LOSS_SECONDS)
    second = newest_step(run)
    assert first < second < STEPS
    cluster.start_node(NODES[1])
    assert_finished(run, cluster.await_end(number, RUN_SECONDS))
    # there may be more: the order to end, which the old tasks on the lost node could not get, may reach the new ones
    assert run.starts()[:3] == [("start", 0, 2), ("resume", first, 2), ("resume", second, 2)]
    assert_same_samples(run, undisturbed[0])
    assert_same_weights(run, undisturbed[0])


def newest_step(run: Training) -> int:
    """The newest checkpoint's; a damaged one is not passed over, since none may be."""
    path, passed_over = CheckpointStore(run.folder / "checkpoints", keep_last=3).newest()
    assert path is not None and passed_over == [] and not (run.folder / "finished").exists()
    return read_state(path)["step"]
