"""What ZeRO moves in a bf16 run, on two real processes: stage 3 gathers bf16 for the forward and the backward, and fp32
for all that is saved, averaged or exported; gradients go as ``engine.gradient_dtype`` says.

Run as a script it is one of the two processes. No parameter is too small to be split again.
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

sys.path.insert(0, str(Path(__file__).parent))

import reference
import toys
from launching import LAUNCH_SECONDS, ROOT, largest_difference, mean_difference, weights

from dalle.training.checkpoint import SavedPlayer
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer, train_step
from dalle.training.meter import Meter
from dalle.training.optimizers import OptimizerConfig

BF16_MEAN = 2e-4
EMA = OptimizerConfig(lr=1e-2, weight_decay=0.1, ema=0.8)
SPLIT = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
MATRICES = sum(layer.weight.numel() + layer.bias.numel() for layer in toys.Block().children()
               if isinstance(layer, torch.nn.Linear))
gathers: list[tuple[str, int]] = []


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("zero3")
    (out / "deepspeed.json").write_text(json.dumps(SPLIT))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
               str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
                   "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_DEEPSPEED": "true",
                   "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(out / "deepspeed.json")}
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return out


def sections(out: Path, run: str) -> dict[str, torch.Tensor]:
    saved = SavedPlayer(out / run / "toy/checkpoints/step_00000004/net")
    return {f"{section}/{key}": tensor for section in ("weights", "optimizer", "average")
            for key, tensor in saved.section(section).items()}


def test_products_gather_in_bf16_and_the_rest_in_fp32(out):
    steps = json.loads((out / "gathers.json").read_text())
    halves = sum(count for dtype, count in steps if dtype == "torch.bfloat16")
    assert halves >= 4 * MATRICES                    # four steps; so small a network is still there in the backward
    assert {count for dtype, count in steps if dtype == "torch.float32"} == {16}     # `scale`, which is of no product


def test_the_weights_are_those_of_autocast_over_fp32_weights(out):
    net = reference.single(4, bf16=True)["net"]
    assert mean_difference({f"net.{name}": value for name, value in net.state_dict().items()},
                           weights(out, "plain")) < BF16_MEAN


def test_what_is_saved_is_fp32_and_resumes_bit_for_bit(out):
    straight = sections(out, "straight")
    rounded = {name: tensor.bfloat16().float() for name, tensor in straight.items()}
    for section in ("weights", "average"):
        assert all(not torch.equal(tensor, rounded[name]) for name, tensor in straight.items()
                   if name.startswith(section) and tensor.numel() > 1)
    assert largest_difference(sections(out, "halves"), straight) == 0


@pytest.mark.parametrize("stage", ["", "1", "2"])
def test_gradients_exchanged_in_bf16_are_close_and_not_the_same(out, stage):
    assert 1e-6 < mean_difference(weights(out, f"small_exchange{stage}"), weights(out, "plain")) < 10 * BF16_MEAN


def test_it_does_not_compile_and_says_so(out):
    assert "not compiled, for ZeRO-3" in (out / "compiled/toy/log.jsonl").read_text().splitlines()[0]
    assert largest_difference(weights(out, "compiled"), weights(out, "plain")) == 0


def train(out: Path, run: str, optimizer: OptimizerConfig | None = None, stop_after: int | None = None,
          engine: dict | None = None, **settings) -> None:
    config = toys.toy_run(out / run, precision="bf16", engine=engine, **settings)
    engine = create_engine(config)
    engine.close = engine.barrier              # the next run uses the same process group
    Trainer(toys.SingleTask(optimizer), config, engine,
            lambda start: toys.ToyLoader(start, engine.rank, engine.world_size),
            lambda: toys.ToyLoader(0, engine.rank, engine.world_size, steps=3), stop_after=stop_after).run()


def gathered_in_steps(folder: Path) -> list[tuple[str, int]]:
    """Type and elements of what was gathered in four steps, without saves."""
    folder.mkdir(exist_ok=True)
    config, task = toys.toy_run(folder, precision="bf16"), toys.SingleTask()
    engine = create_engine(config)
    engine.prepare(task, folder)
    gathers.clear()
    for step, batch in zip(range(4), toys.ToyLoader(0, engine.rank, engine.world_size), strict=False):
        train_step(engine, task, batch, step, config, Meter())
    return list(gathers)


def noting(function):
    @wraps(function)
    def noted(output_tensor, *arguments, **named):
        gathers.append((str(output_tensor.dtype), output_tensor.numel()))
        return function(output_tensor, *arguments, **named)

    return noted


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    dist.all_gather_into_tensor = noting(dist.all_gather_into_tensor)
    noted = gathered_in_steps(folder / "steps")
    train(folder, "plain", save_every=0)
    train(folder, "straight", EMA, validate_every=2)
    train(folder, "halves", EMA, stop_after=2)
    train(folder, "halves", EMA)
    train(folder, "small_exchange", save_every=0, engine={"gradient_dtype": "bf16"})
    train(folder, "compiled", save_every=0, compile=True)
    os.environ.pop("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    for stage in ("1", "2"):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = stage
        train(folder, f"small_exchange{stage}", save_every=0, engine={"gradient_dtype": "bf16"})
    if int(os.environ["RANK"]) == 0:
        (folder / "gathers.json").write_text(json.dumps(noted))
    while not (folder / "gathers.json").exists():      # who leaves while another is in a collective ends that one, too
        time.sleep(0.05)
    sys.stderr.flush()
    os._exit(0)
