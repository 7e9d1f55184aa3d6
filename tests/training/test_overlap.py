"""How much of the gradients is on its way while the backward still runs, counted on two real processes.

Each block of the toy notes when its own backward is computed, and each exchange of gradients when it is begun. Compiled
by block, the order is that of the plain network; compiled whole, all of the backward is over before the first exchange.

Run as a script it is one of the two processes.
"""

import json
import os
import subprocess
import sys
import time
from functools import wraps
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import toys
from launching import LAUNCH_SECONDS, ROOT

from dalle.training import compiling
from dalle.training.engines.launching import create_engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from dalle.training.optimizers import OptimizerConfig
from dalle.training.task import Player

BLOCKS, DIM = 6, 16
# FSDP wraps blocks, so there is no whole; ZeRO-1 and 2 are one code
WAYS = {"ddp": ("plain", "blocks", "whole"), "zero1": ("plain", "blocks", "whole"), "zero2": ("plain", "blocks"),
        "fsdp2": ("plain", "blocks")}
events: list[str] = []


@torch.library.custom_op("tessera_tests::computed", mutates_args=())
def computed(gradient: torch.Tensor) -> torch.Tensor:
    """Stays one operation in what is compiled, and so tells when it runs."""
    events.append("backward")
    return gradient.clone()


computed.register_fake(torch.empty_like)


@torch.library.custom_op("tessera_tests::watched", mutates_args=())
def watched(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.clone()


watched.register_fake(torch.empty_like)
watched.register_autograd(lambda context, gradient: computed(gradient))


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, inputs):
        return inputs + torch.tanh(self.linear(watched(inputs)))


class WatchedNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, DIM), nn.Linear(DIM, 1)
        self.blocks = nn.ModuleList(Watched() for _ in range(BLOCKS))

    def forward(self, inputs):
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


class WatchedTask(toys.SingleTask):
    def __init__(self):
        super().__init__()
        self.players = {"net": Player(toys.seeded(WatchedNet), OptimizerConfig(lr=1e-2))}


@pytest.fixture(scope="module")
def counts(tmp_path_factory) -> dict[str, dict[str, list]]:
    """Engine -> way -> exchanges begun before the last block's backward, and in all, graphs, losses."""
    out = tmp_path_factory.mktemp("overlap")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
               str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                   "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads((out / "counts.json").read_text())


@pytest.mark.parametrize("kind", WAYS)
def test_compiled_by_block_the_exchange_overlaps_as_it_does_uncompiled(counts, kind):
    plain, blocks = counts[kind]["plain"], counts[kind]["blocks"]
    # a block's own gradients may be on their way before its input's, or right after
    assert min(blocks["early"], plain["early"]) >= BLOCKS - 1 and blocks["all"] == plain["all"]
    assert blocks["graphs"] > plain["graphs"] == 0


@pytest.mark.parametrize("kind", ["ddp", "zero1"])
def test_compiled_whole_nothing_overlaps(counts, kind):
    whole = counts[kind]["whole"]
    assert whole["early"] == 0 and whole["all"] >= BLOCKS and whole["graphs"] > 0


@pytest.mark.parametrize("kind", WAYS)
def test_the_losses_are_those_of_the_plain_network(counts, kind):
    expected = counts["ddp"]["plain"]["losses"]
    for way in counts[kind].values():
        assert way["losses"] == pytest.approx(expected, rel=1e-4)


def noting(function):
    @wraps(function)
    def noted(*arguments, **named):
        events.append("exchange")
        return function(*arguments, **named)

    return noted


def measure(kind: str, way: str, out: Path) -> dict:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiling.repeated_blocks = (lambda module: []) if way == "whole" else repeated_blocks
    os.environ["ACCELERATE_USE_DEEPSPEED"] = str(kind.startswith("zero")).lower()
    os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp2").lower()
    if kind.startswith("zero"):
        # on CPU cores the engine has DeepSpeed's overlap off, without which stage 1 exchanges all at the end
        zero = {"stage": int(kind[-1]), "overlap_comm": True}
        path = out / f"deepspeed{os.environ['RANK']}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    config = toys.toy_run(out, compile=way != "plain", engine={"bucket_elements": DIM * DIM + DIM})
    task, engine = WatchedTask(), create_engine(config)
    engine.prepare(task, out)
    if kind == "ddp":
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
        engine.members["net"].wrapper.register_comm_hook(None, allreduce_hook)      # calls what is noted below
    losses = []
    for step in range(4):
        events.clear()
        batch = {"x": toys.global_batch(step)[engine.rank::engine.world_size]}
        played, = train_step(engine, task, batch, step, config, Meter())
        losses.append(engine.all_reduce_mean(played.losses[0]).item())
        if step == 2:
            found = list(events)
    last = max(index for index, event in enumerate(found) if event == "backward")
    assert found.count("backward") == BLOCKS
    return {"early": found[:last].count("exchange"), "all": found.count("exchange"),
            "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"], "losses": losses}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    compiling.BACKEND, repeated_blocks = "aot_eager", compiling.repeated_blocks
    for name in ("all_reduce", "reduce", "reduce_scatter_tensor", "reduce_scatter_single"):    # one by torch's version
        if hasattr(dist, name):
            setattr(dist, name, noting(getattr(dist, name)))
    found = {kind: {way: measure(kind, way, folder) for way in ways} for kind, ways in WAYS.items()}
    if int(os.environ["RANK"]) == 0:
        (folder / "counts.json").write_text(json.dumps(found))
    while not (folder / "counts.json").exists():       # who leaves while another is in a collective ends that one, too
        time.sleep(0.05)
    sys.stderr.flush()
    os._exit(0)     # as `Engine.leave` does
