"""What only a GPU shows: copies and events on real streams, no wait in a step, the same bits at every run."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from safetensors.torch import load_file
from toys import GanTask, SingleTask, ToyLoader, toy_run

from dalle.training.engines.base import Engine
from dalle.training.engines.copies import StreamCopies
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda", 0)
NUMBERS, CHANGES = 1 << 22, 20
FULL = OptimizerConfig(lr=1e-2, ema=0.8, ema_every=1, weight_decay=0.1)


def test_a_checkpoint_has_the_state_of_its_step_while_later_ones_change_it():
    """The first save in the step's stream, the others staged."""
    copies = StreamCopies(GPU)
    state = [torch.full((NUMBERS,), float(index), device=GPU) for index in range(8)]
    for save in range(4):
        copies.begin()
        buffers = [copies.to_host(str(index), tensor) for index, tensor in enumerate(state)]
        copies.end()
        for _ in range(CHANGES):
            torch._foreach_add_(state, 1.0)
        copies.wait()
        for index, buffer in enumerate(buffers):
            assert buffer.is_pinned() and bool((buffer == index + save * CHANGES).all())


def test_a_batch_is_whole_in_its_step_however_far_the_host_is_ahead():
    copies, sums = StreamCopies(GPU), []
    for number in range(50):
        moved = copies.to_device({"x": torch.full((NUMBERS,), float(number)).pin_memory(), "key": ["a"]})
        sums.append(moved["x"].double().sum())
        del moved
    assert torch.stack(sums).tolist() == [float(number * NUMBERS) for number in range(50)]


class Strict(ToyLoader):
    """While a step without a line runs, whatever waits for the device is an error; not in the first ones."""

    def __iter__(self):
        for step, batch in zip(itertools.count(self.start), super().__iter__(), strict=False):
            quiet = step >= 3 and (step + 1) % 4
            torch.cuda.set_sync_debug_mode("error" if quiet else "default")
            yield batch


def test_a_step_without_a_line_waits_for_nothing(tmp_path):
    config = toy_run(tmp_path, steps=12, log_every=4, save_every=0)
    try:
        assert Trainer(SingleTask(FULL), config, Engine(config, GPU), Strict).run().status == "finished"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [json.loads(line) for line in (tmp_path / "toy/log.jsonl").read_text().splitlines()]
    assert all(line["seconds/forward"] > 0 and line["seconds/step"] > 0 for line in lines if "loss" in line)


@pytest.mark.parametrize("task", [SingleTask, GanTask])
def test_with_deterministic_algorithms_a_resume_is_bit_for_bit(tmp_path, task):
    def train(folder: Path, stop_after: int | None = None) -> None:
        config = toy_run(folder, steps=6, save_every=1, keep_last=9, deterministic=True)
        Trainer(task(FULL), config, Engine(config, GPU), ToyLoader, stop_after=stop_after).run()

    train(tmp_path / "straight")
    train(tmp_path / "halves", stop_after=3)
    train(tmp_path / "halves")
    last = tmp_path / "straight/toy/checkpoints/step_00000006"
    for path in last.rglob("*.safetensors"):
        other = load_file(tmp_path / "halves" / path.relative_to(tmp_path / "straight"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(path).items())


def test_a_trace_has_the_kernels_of_the_gpu(tmp_path):
    config = toy_run(tmp_path, steps=4, profile={"start": 2, "steps": 1})
    Trainer(SingleTask(), config, Engine(config, GPU), ToyLoader).run()
    (path,) = (tmp_path / "toy/profile").iterdir()
    kinds = {event.get("cat") for event in json.loads(path.read_text())["traceEvents"]}
    assert {"kernel", "user_annotation", "cpu_op"} <= kinds
