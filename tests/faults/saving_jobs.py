"""Processes that the tests of checkpoints start: runs killed at every operation of a save, and a run of two ranks.

    saving_jobs.py kills OUT     writes OUT/points.json
    saving_jobs.py ranks OUT     one of the two ranks that its environment names; writes OUT/rankR.json
"""

import contextlib
import errno
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "training"))

import torch
import toys
from safetensors.torch import load_file

from dalle.training import checkpoint, saving
from dalle.training.checkpoint import CheckpointStore, find_fault
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig

STEPS = 2
EVERY_ASYNC = 5      # one in so many, and every rename: the operations are those of a synchronous run
OPTIMIZER = OptimizerConfig(lr=1e-2, ema=0.8, ema_every=1, weight_decay=0.1)


def train(folder: Path, **settings) -> str:
    config = toys.toy_run(folder, steps=STEPS, save_every=1, **settings)
    task = toys.SingleTask(OPTIMIZER, dropout=0.3)
    return Trainer(task, config, create_engine(config), toys.ToyLoader).run().status


class Killer:
    """Counts what a run does to its folder, and ends the process with SIGKILL before operation ``fatal``.

    Every writing counts twice: before it, and with half of it done. ``points`` says what each operation was, and in
    the save of which step.
    """

    def __init__(self, fatal: int | None):
        self.fatal, self.points, self.step = fatal, [], 0
        self.lock = threading.RLock()
        self.is_dying = False

    def point(self, name: str, half: Callable[[], object] = lambda: None) -> None:
        if threading.current_thread().name not in ("MainThread", "checkpoint"):
            return                                     # the log has a thread of its own
        with self.lock:
            if self.is_dying:                          # writing its half
                return
            if len(self.points) == self.fatal:
                self.is_dying = True
                half()
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            self.points.append((name, self.step))

    def install(self) -> None:
        for name in ("fsync", "mkdir", "rename", "unlink", "rmdir"):
            setattr(os, name, self.counted(name, getattr(os, name)))
        write_text = Path.write_text

        def counted_write_text(path: Path, text: str, **options) -> int:
            self.point(f"write {path.name}")
            self.point(f"write half of {path.name}", lambda: write_text(path, text[:len(text) // 2], **options))
            return write_text(path, text, **options)

        Path.write_text = counted_write_text
        checkpoint.write_synced = self.counted_save(checkpoint.write_synced)
        save_file = self.counted_save(lambda path, tensors, save=toys.save_file: save(tensors, path))
        toys.save_file = lambda tensors, path: save_file(path, tensors)
        start = saving.Saver.start

        def start_of(saver: saving.Saver, step: int, state: dict) -> None:
            self.step = step
            start(saver, step, state)

        saving.Saver.start = start_of

    def counted(self, name: str, function: Callable) -> Callable:
        def counted(path, *arguments, **options):
            if str(path).endswith("/stop"):            # looked for by the clock
                return function(path, *arguments, **options)
            self.point(name if isinstance(path, int) else f"{name} {Path(path).name}")
            return function(path, *arguments, **options)
        return counted

    def counted_save(self, write: Callable) -> Callable:
        def counted(path: Path, tensors: dict) -> object:
            def half() -> None:
                write(path, tensors)
                os.truncate(path, os.path.getsize(path) // 2)

            self.point(f"write {Path(path).name}")
            self.point(f"write half of {Path(path).name}", half)
            return write(path, tensors)
        return counted


def forked(action: Callable[[], object], out: Path) -> int:
    """Run ``action`` in a fork, its output into ``out``; what it ended with, negative for a signal."""
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException), open(out, "a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                action()
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def tensors_below(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{path.relative_to(folder)}:{name}": tensor for path in sorted(folder.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def equal(left: dict, right: dict) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def model_step(run: Path, reference: Path) -> int | str | None:
    """The step whose averaged weights ``model/`` holds; None without the folder, "half" where it is not whole."""
    if not (run / "model").exists():
        return None
    try:
        model = load_file(run / "model" / "net.safetensors")
    except Exception:
        return "half"
    for step in range(1, STEPS + 1):
        net = CheckpointStore(reference / "toy/checkpoints", 1).path(step) / "net"
        expected = load_file(net / "weights-00000.safetensors") | load_file(net / "average-00000.safetensors")
        if equal(model, expected):
            return step
    return "half"


def kill_at(number: int, folder: Path, reference: Path, settings: dict) -> dict:
    """Kill a run at an operation, look at what it left, resume it, and look again."""
    def doomed() -> None:
        Killer(number).install()
        train(folder, **settings)

    status = forked(doomed, folder.with_suffix(".txt"))
    run = folder / "toy"
    store = CheckpointStore(run / "checkpoints", 1)
    newest, _ = store.newest()
    found = {"number": number, "killed": status == -signal.SIGKILL,
             "faults": [f"{path.name}: {fault}" for path in store.all() if (fault := find_fault(path))],
             "newest": None if newest is None else int(newest.name.removeprefix("step_")),
             "model": model_step(run, reference)}
    found["resumed"] = train(folder, **settings) == "finished"
    last = f"toy/checkpoints/step_{STEPS:08d}"
    found["equal"] = equal(tensors_below(folder / last), tensors_below(reference / last))
    found["last_model"] = model_step(run, reference)
    found["finished"] = (run / "finished").is_file() and json.loads((run / "finished").read_text()) == {"step": STEPS}
    found["checkpoints"] = sorted(path.name for path in store.folder.iterdir())
    return found


def kills(out: Path) -> None:
    """Two workers share the points of the runs with and without asynchronous saves."""
    train(out / "warm")      # imports what a run imports, once for all forks
    gc.freeze()
    reference = out / "reference"
    assert forked(lambda: train(reference, keep_last=9), out / "reference.txt") == 0
    plans = []
    for name, every in (("sync", 1), ("async", EVERY_ASYNC)):
        settings = {"keep_last": 1, "async_save": name == "async"}

        def counting(name: str = name, settings: dict = settings) -> None:
            killer = Killer(None)
            killer.install()
            train(out / f"count_{name}", **settings)
            with open(out / f"{name}.json", "w") as file:
                json.dump(killer.points, file)

        assert forked(counting, out / f"count_{name}.txt") == 0
        points = json.loads((out / f"{name}.json").read_text())
        plans += [(name, number, operation, step, settings) for number, (operation, step) in enumerate(points)
                  if number % every == 0 or operation.startswith("rename")]

    def worker(share: int) -> None:
        found = []
        for name, number, operation, step, settings in plans[share::2]:
            folder = out / f"{name}_{number:03d}"
            found.append({"mode": name, "operation": operation, "step": step,
                          **kill_at(number, folder, reference, settings)})
        (out / f"share{share}.json").write_text(json.dumps(found))

    first = os.fork()
    if first == 0:
        status = 1
        with contextlib.suppress(BaseException):
            worker(0)
            status = 0
        os._exit(status)
    worker(1)
    assert os.waitpid(first, 0)[1] == 0
    points = [point for share in (0, 1) for point in json.loads((out / f"share{share}.json").read_text())]
    (out / "points.json").write_text(json.dumps(points))


@contextlib.contextmanager
def full_disk_at(step: int) -> Iterator[None]:
    """The write of this process's part of the checkpoint of ``step`` fails."""
    write_tensors = saving.write_tensors

    def write(path: Path, tensors: dict) -> dict:
        if f"step_{step:08d}" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_tensors(path, tensors)

    saving.write_tensors = write
    try:
        yield
    finally:
        saving.write_tensors = write_tensors


def ranks(out: Path) -> None:
    """Eight steps, saved every second; in the save of step 4 the disk of rank 1 is full."""
    config = toys.toy_run(out, steps=8, save_every=2, keep_last=9)
    engine = create_engine(config)
    trainer = Trainer(toys.SingleTask(OPTIMIZER), config, engine,
                      lambda start: toys.ToyLoader(start, engine.rank, engine.world_size))
    seen = []
    failed = trainer.checkpoints.failed
    trainer.checkpoints.failed = lambda error, required: (seen.append(str(error)), failed(error, required))
    with full_disk_at(4) if engine.rank == 1 else contextlib.nullcontext():
        summary = trainer.run()
    (out / f"rank{engine.rank}.json").write_text(json.dumps({"status": summary.status, "failed": seen}))
    engine.leave(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"kills": kills, "ranks": ranks}[sys.argv[1]](Path(sys.argv[2]))
