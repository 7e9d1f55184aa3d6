"""A process of a job that trains toys in which something goes wrong, and the functions that start such processes.

    toy_worker.py JOBS    a JSON list of trainings, done one after the other; what came of each is in NAME.rankR.json
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

import torch
import toys
from launching import ROOT, free_port
from toys import BATCH

from dalle.errors import USER_ERROR_STATUS, UserError, run_command
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.task import Loss

NOT_A_NUMBER = float("nan")
FOR_EVER = 600          # seconds; nobody waits so long
EXPLODED = 100          # what a spike multiplies a loss by


class NumberedLoader(toys.ToyLoader):
    """Batches that say which of the reading order they are; those of ``without`` are not in it."""

    def __init__(self, start: int = 0, rank: int = 0, world_size: int = 1, *, without: Collection[int] = (),
                 hangs_at: int | None = None):
        super().__init__(start, rank, world_size)
        self.without, self.hangs_at = without, hangs_at

    def __iter__(self):
        numbers = (number for number in itertools.count() if number not in self.without)
        for number in itertools.islice(numbers, self.start, None):
            if number == self.hangs_at:
                time.sleep(FOR_EVER)
            share = slice(self.rank, None, self.world_size)
            yield {"x": toys.global_batch(number)[share], "position": positions(number)[share],
                   "key": keys(number)[share]}


def positions(number: int) -> torch.Tensor:
    return torch.arange(number * BATCH, (number + 1) * BATCH)


def keys(number: int) -> list[str]:
    return [f"sample{position:04d}" for position in positions(number).tolist()]


class FaultyTask(toys.SingleTask):
    """On the last rank a step may meet one of ``faults``, and the loss of the batches ``spikes`` explodes."""

    def __init__(self, folder: Path, faults: Mapping[int, str] | None = None, spikes: Collection[int] = (),
                 dropout: float = 0.0):
        super().__init__(dropout=dropout)
        self.folder, self.faults, self.spikes = folder, faults or {}, spikes

    def fit(self, networks, batch, step):
        loss = super().fit(networks, batch, step)
        if networks.rank == networks.world_size - 1:
            if int(batch["position"][0]) // BATCH in self.spikes:
                loss.total = loss.total * EXPLODED
            if step in self.faults:
                self.meet(self.faults[step], loss)
        return loss

    def meet(self, fault: str, loss: Loss) -> None:
        marker = self.folder / fault
        if fault == "nan":
            loss.total = loss.total + NOT_A_NUMBER
        elif fault == "inf":
            loss.total = loss.total + float("inf")
        elif fault == "gradient":                       # of a loss that is a number
            loss.total.register_hook(lambda gradient: gradient * NOT_A_NUMBER)
        elif fault == "stop_file":
            (self.folder / "toy/stop").touch()
            time.sleep(1.5)                             # rank 0 looks once a second
        elif fault == "pause":                          # until whoever sees the marker takes it away
            marker.touch()
            while marker.exists():
                time.sleep(0.01)
        elif fault == "die":
            marker.touch()
            os._exit(1)
        elif fault == "bug":
            marker.touch()
            raise RuntimeError("a bug that only rank 1 meets")
        elif fault == "hang":
            marker.touch()
            time.sleep(FOR_EVER)
        else:
            os.kill(os.getpid(), signal.Signals[fault])


@dataclass
class Toy:
    """One training; those with the same ``folder`` go on from one another."""

    name: str
    folder: str = ""
    kind: str = "ddp"
    faults: dict[int, str] = field(default_factory=dict)      # by step
    spikes: list[int] = field(default_factory=list)           # by batch number
    without: list[int] = field(default_factory=list)
    hangs_at: int | None = None                               # batch number: the loader's turn to hang
    stop_after: int | None = None
    settings: dict = field(default_factory=dict)


def train(toy: Toy, out: Path, last: bool = True) -> dict:
    """What came of it: how it ended, and what this rank knows of it."""
    folder = out / (toy.folder or toy.name)
    if toy.kind.startswith("zero"):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = toy.kind[-1]
    config = toys.toy_run(folder, **toy.settings)
    engine = create_engine(config)
    if not last:
        engine.close = engine.barrier               # the next one uses the same process group
    task = FaultyTask(folder, {int(step): fault for step, fault in toy.faults.items()}, toy.spikes)
    trainer = Trainer(task, config, engine, lambda start: NumberedLoader(
        start, engine.rank, engine.world_size, without=toy.without, hangs_at=toy.hangs_at), stop_after=toy.stop_after)
    summary = trainer.run()
    return {"exit": summary.exit_status, "status": summary.status, "steps": summary.steps, "kind": engine.kind,
            "skipped": trainer.skips.total, "excluded": trainer.evolving.numbers.excluded,
            "rollbacks": trainer.evolving.rollbacks, "digest": digest(task.players["net"].module.state_dict())}


def digest(state: Mapping[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in state.values())).hexdigest()


@dataclass
class Ranks:
    """The processes of one job, with what each wrote on stderr."""

    processes: list[subprocess.Popen]
    out: Path
    name: str

    def wait(self, seconds: float = 300) -> list[int]:
        """How each ended."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        finally:
            self.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def errors(self, rank: int) -> str:
        return (self.out / f"{self.name}.stderr{rank}").read_text()

    def error_lines(self, rank: int) -> list[str]:
        return [line for line in self.errors(rank).splitlines() if line.startswith("error")]


def start(toys_to_train: Iterable[Toy], out: Path, world_size: int = 2, **environment: str) -> Ranks:
    """One process a rank, without an agent above them, as ``srun`` starts them."""
    listed = [asdict(toy) for toy in toys_to_train]
    name = listed[-1]["name"]
    jobs = out / f"{name}.jobs.json"
    jobs.write_text(json.dumps(listed))
    port = str(free_port())
    processes = []
    for rank in range(world_size):
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                     "DS_ACCELERATOR": "cpu", **environment}
        if world_size > 1:
            variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                          "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        with open(out / f"{name}.stderr{rank}", "w") as errors:
            processes.append(subprocess.Popen([sys.executable, __file__, str(jobs)], env=variables, cwd=out,
                                              stdout=subprocess.DEVNULL, stderr=errors))
    return Ranks(processes, out, name)


def main() -> int:
    torch.set_num_threads(1)
    path = Path(sys.argv[1])
    jobs = [Toy(**job) for job in json.loads(path.read_text())]
    for toy in jobs:
        place = path.parent / f"{toy.name}.rank{os.environ.get('RANK', '0')}.json"
        try:
            result = train(toy, path.parent, last=toy is jobs[-1])
        except UserError as error:
            place.write_text(json.dumps({"exit": USER_ERROR_STATUS, "error": str(error)}))
            if toy is jobs[-1]:
                raise
            continue
        place.write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(result["exit"])     # as `Engine.leave` does: the threads that gloo leaves behind abort some ordinary exits


if __name__ == "__main__":
    run_command(main)
