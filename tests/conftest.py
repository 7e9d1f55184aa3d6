"""What tests share: a tiny main job (data, tokenizer, and the three configs, at 16 pixels), and two processes."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROCESSES_SECONDS = 240     # two processes import everything anew, on a machine that may be busy

# what `nohup` and a shell's `&` have ignored would be ignored by the processes of the tests, too
for ignored in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)


@dataclass
class Command:
    """A script of ``launch`` or ``tools``, called in this process as its command line would be."""

    path: str

    def __call__(self, *arguments: object) -> int:
        name = Path(self.path).stem + "_command"
        spec = importlib.util.spec_from_file_location(name, ROOT / self.path)
        module = importlib.util.module_from_spec(spec)
        argv, path = sys.argv, sys.path
        sys.argv = [self.path, *map(str, arguments)]
        sys.path = [str((ROOT / self.path).parent), *path]     # Python's own beginning, for parts beside the script
        try:
            spec.loader.exec_module(module)
            return module.main() or 0
        finally:
            sys.argv, sys.path = argv, path


@dataclass
class Workshop:
    """Where the tiny job lies. ``config(task)`` writes a YAML with everything in ``runs`` below ``folder``."""

    folder: Path

    def config(self, task: str, runs: Path, **sections: dict) -> Path:
        tree = self._tree(task, runs)
        for name, section in sections.items():
            if isinstance(section, dict):
                tree[name] = {**tree.get(name, {}), **section}
            else:
                tree[name] = section
        runs.mkdir(parents=True, exist_ok=True)
        path = runs / f"{task}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def _tree(self, task: str, runs: Path) -> dict:
        data, codec = self.folder / "data", self.folder / "runs" / "dvae"
        tree = {
            "task": task, "name": task, "output": str(runs),
            "data": {"train": str(data / "train"), "validation": str(data / "validation"), "image_size": 16,
                     "workers": 0},
            "train": {"steps": 4, "batch_size": 8, "precision": "fp32", "log_every": 1, "validate_every": 4,
                      "preview_every": 4, "save_every": 2},
            "optimizer": {"lr": 1e-3, "ema": 0.9},
        }
        if task == "dvae":
            tree["data"] |= {"caption": "none"}
            tree["model"] = {"preset": "tiny"}
            return tree
        tree["data"] |= {"tokenizer": str(data / "tokenizer"), "text_length": 12, "bpe_dropout": 0.1,
                         "caption_dropout": 0.1}
        if task == "transformer":
            tree["codec"] = str(codec)
            tree["model"] = {"dim": 32, "depth": 3, "heads": 2, "token_shift": True, "attention": "dalle"}
        else:
            tree["model"] = {"embed_dim": 16, "vision": {"image_size": 16, "patch_size": 4, "width": 32, "layers": 1,
                             "head_width": 16}, "text": {"width": 32, "heads": 2, "layers": 1}}
            tree["loss"] = {"reconstructions": 0.5, "codec": str(codec)}
        return tree


train = Command("launch/train.py")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Workshop:
    """Data, tokenizer and a discrete VAE trained for four steps."""
    from dalle.data.index import ShardIndex
    from dalle.data.shapes.making import ShapesConfig, make_shapes
    from dalle.data.tokenizer import CaptionTokenizer

    torch.set_num_threads(1)
    shop = Workshop(tmp_path_factory.mktemp("workshop"))
    data = shop.folder / "data"
    make_shapes(ShapesConfig(count=96, validation=24, size=16, samples_per_shard=32), data)
    CaptionTokenizer.train_from_shards(ShardIndex.load(str(data / "train")), 300).save(data / "tokenizer")
    assert train(shop.config("dvae", shop.folder / "runs")) == 0
    return shop


@pytest.fixture(scope="session")
def commands() -> dict[str, Command]:
    """The commands a person runs, by name."""
    scripts = [*(ROOT / "launch").glob("*.py"), *(ROOT / "tools").glob("*.py")]
    return {path.stem: Command(str(path.relative_to(ROOT))) for path in scripts}


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory) -> Callable[..., None]:
    """``two_processes(script, *arguments)``: the script as rank 0 and as rank 1, in what a launcher sets for it.

    Fresh processes: a fork of this one, which has threads, could wait for ever on a lock that one of them held.
    """
    return lambda script, *arguments, seconds=PROCESSES_SECONDS: run_two(
        [str(script), *map(str, arguments)], tmp_path_factory.mktemp("processes"), seconds)


@pytest.fixture(scope="session")
def two_ranks(two_processes, tmp_path_factory) -> Callable[..., list[Any]]:
    """``two_ranks(function, *arguments)``: what ``function(rank, *arguments)`` returns on rank 0 and on rank 1.

    The function is one of the test's own file, which each rank imports anew, and finds a process group. It returns
    tensors, numbers, strings, and lists and dicts of those.
    """

    def run(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        folder, module = tmp_path_factory.mktemp("ranks"), function.__module__
        torch.save(arguments, folder / "arguments.pt")
        two_processes(ROOT / "tests" / "rank.py", module, sys.modules[module].__file__, function.__name__, folder)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]

    return run


def run_two(command: list[str], folder: Path, seconds: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
              "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []
    for rank in range(2):
        with open(folder / f"{rank}.txt", "w") as output:
            processes.append(subprocess.Popen(
                [sys.executable, *command], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, cwd=folder,
                stdout=output, stderr=output))
    wait_for_all(processes, seconds)
    said = "".join(f"-- rank {rank}, status {process.returncode}\n{(folder / f'{rank}.txt').read_text()[-4000:]}\n"
                   for rank, process in enumerate(processes))
    assert [process.returncode for process in processes] == [0, 0], said


def wait_for_all(processes: list[subprocess.Popen], seconds: float) -> None:
    """Until each has ended; they are killed once one has failed, or after ``seconds``."""
    deadline = time.monotonic() + seconds
    try:
        while None in (statuses := [process.poll() for process in processes]):
            if any(statuses) or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
