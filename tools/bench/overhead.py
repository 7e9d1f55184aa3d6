#!/usr/bin/env python
"""What saving costs training, and what the loop costs over a bare PyTorch loop; some five and two minutes.

    python tools/bench/overhead.py checkpoint [--save-every 50] [--rounds 5]
    python tools/bench/overhead.py step [--rounds 16]
    python tools/bench/overhead.py checkpoint --device cuda --size xl --folder /dev/shm

Both train a transformer with the real task, Trainer and engine, on batches that lie in memory, with the allocator
settings of `launch/train.py`. What is compared takes turns inside one run, block by block, in an order that turns round
in every round; a ratio is the median over rounds, so that a slow drift of the machine weighs on both sides of it.

``checkpoint``: 28.4 M parameters with AdamW and a weight average. Every ``--save-every`` steps the loop calls for a
save; here this begins a block, whose mode says whether the save happens: not at all, asynchronously (the default of
training) or synchronously. A block is all the time from one call to the next: the copy, the steps beside the thread
that writes, the log, and the wait for a save that is not done when the next is due. Checkpoints, each with its export,
go to ``--folder``.

``step``: the same model and a small one, without the average. The loader of the run trains a second copy of the model
in a bare loop (forward, cross-entropy, backward, clip_grad_norm_, fused AdamW, zero_grad) for a block of steps whenever
it is asked for the first batch of a block; the loop's own block is the time from that batch on to the request for the
next block. It holds meter, progress, agreement and all else of an iteration, and a line of figures every 10 steps.

On a GPU every look at the clock waits for the device, batches lie in pinned memory, and both sides run without
torch.compile. ``--size xl`` is the 1.3B model of the preset: 21 GB of state, of which the folder must hold three times
as much, and the host's memory twice; ``--depth 6`` makes steps and saves a quarter of that alike.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from dalle.data.batch import Batch, BatchSource
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.tasks.transformer import TransformerRun
from dalle.training.allocator import keep_freed_memory
from dalle.training.engines.base import Engine
from dalle.training.loop import Summary, Trainer
from dalle.training.saving import SaveFailed
from dalle.training.state import Checkpoints
from dalle.training.task import parameter_count
from rounds import Synthetic

BATCHES_IN_MEMORY = 8
LOG_EVERY = 10
STEP_BAR, SAVE_BAR = 1.02, 0.97            # at most, at least


@dataclass(frozen=True)
class Size:
    """A model, its batch, and how many steps a block has."""

    dim: int
    depth: int
    grid: int
    batch: int
    block: int = 10
    text: int = 32
    words: int = 2048
    codes: int = 1024

    @property
    def heads(self) -> int:
        return max(1, self.dim // 64)


REALISTIC = Size(dim=512, depth=8, grid=8, batch=8)       # some 0.3 s a step on two cores
SMALL = Size(dim=128, depth=4, grid=8, batch=4, block=50)
TINY = Size(dim=16, depth=1, grid=2, batch=2)
XL = Size(dim=2048, depth=24, grid=32, batch=8, text=256, words=16_384, codes=8192)
SIZES = {"realistic": REALISTIC, "small": SMALL, "xl": XL}
SAVING_BATCH = 16                                         # some 0.5 s


def build(size: Size) -> TextToImageTransformer:
    torch.manual_seed(0)
    return TextToImageTransformer(TransformerConfig(
        dim=size.dim, depth=size.depth, heads=size.heads, text_length=size.text, num_text_tokens=size.words,
        grid=(size.grid, size.grid), num_codes=size.codes, attention="full"))


def make_batches(size: Size, device: torch.device) -> list[Batch]:
    keys = [f"{index:08d}" for index in range(size.batch)]
    text = torch.randint(1, size.words, (BATCHES_IN_MEMORY, size.batch, size.text))
    codes = torch.randint(0, size.codes, (BATCHES_IN_MEMORY, size.batch, size.grid**2))
    if device.type == "cuda":
        text, codes = text.pin_memory(), codes.pin_memory()
    return [{"text": text[index], "codes": codes[index], "key": keys} for index in range(BATCHES_IN_MEMORY)]


def make_config(folder: Path, size: Size, precision: str, steps: int, save_every: int, ema: float) -> TransformerRun:
    return TransformerRun.model_validate({
        "name": folder.name, "output": str(folder.parent), "codec": "none",
        "data": {"train": "memory", "tokenizer": "none", "text_length": size.text},
        "optimizer": {"lr": 3e-4, "clip": 1.0, "ema": ema, "schedule": "constant"},
        "train": {"steps": steps, "batch_size": size.batch, "precision": precision, "log_every": LOG_EVERY,
                  "save_every": save_every, "keep_last": 1, "compile": False}})


# -- saving

NONE, ASYNCHRONOUS, SYNCHRONOUS = "no save", "asynchronous", "synchronous"


@dataclass
class Block:
    """A save, or none, and the steps up to the next."""

    mode: str
    seconds: float = 0.0
    saved: dict[str, float] = field(default_factory=dict)     # seconds of the copy (in the step) and of the writing


class SavingByBlocks(Checkpoints):
    """The checkpoints of a run, of which only those are saved that the mode of the block asks for."""

    def __init__(self, *arguments: object, modes: list[str], clock: Callable[[], float]):
        super().__init__(*arguments)
        self.to_come, self.blocks = [Block(mode) for mode in modes], [Block("warm-up")]
        self.clock, self.began = clock, clock()

    def save(self, required: bool) -> None:
        self._end_block()
        if self._steps.done == 0 or not self.to_come:       # the loop's own first and last
            super().save(required)
            self.began = self.clock()
            return
        self.blocks.append(self.to_come.pop(0))
        self.began = self.clock()
        if self.blocks[-1].mode != NONE:
            super().save(required=self.blocks[-1].mode == SYNCHRONOUS)

    def failed(self, error: SaveFailed, required: bool) -> None:
        raise error                                  # training would go on, the figures would mean nothing

    def _end_block(self) -> None:
        block = self.blocks[-1]
        self.finish()                                # as the next save would
        block.seconds = self.clock() - self.began
        if block.mode in (ASYNCHRONOUS, SYNCHRONOUS):
            block.saved = dict(self.saver.seconds)


def block_modes(rounds: int) -> list[str]:
    """A round is a block without and one with a save, in turns the one and the other first; every third adds a sync."""
    modes = []
    for index in range(rounds):
        modes += [ASYNCHRONOUS, NONE] if index % 2 else [NONE, ASYNCHRONOUS]
        modes += [] if index % 3 else [SYNCHRONOUS]
    return modes


def bench_checkpoint(folder: Path, size: Size, precision: str, save_every: int, rounds: int,
                     clock: Callable[[], float], device: torch.device) -> float:
    """Prints the table; returns the ratio of throughputs, with saves over without."""
    modes = block_modes(rounds)
    config = make_config(folder, size, precision, save_every * (len(modes) + 1), save_every, ema=0.999)
    engine = Engine(config, device)
    task, batches = Synthetic(config, build(size)), make_batches(size, device)
    trainer = Trainer(task, config, engine, lambda start: InMemory(batches, start))
    saves = SavingByBlocks(task, config, engine, trainer.checkpoints.store, "auto", trainer.steps, trainer.evolving,
                           trainer.limits, trainer.output, modes=modes, clock=clock)
    trainer.checkpoints = saves
    run_quietly(trainer.run)
    blocks = {mode: [block for block in saves.blocks if block.mode == mode]
              for mode in (NONE, ASYNCHRONOUS, SYNCHRONOUS)}
    size_on_disk = sum(path.stat().st_size for path in saves.store.all()[0].rglob("*") if path.is_file())
    exported = sum(path.stat().st_size for path in (config.folder / "model").rglob("*") if path.is_file())
    print(f"checkpoint: {parameter_count(task.players['transformer'].module) / 1e6:.1f} M parameters, {precision}, "
          f"batch {size.batch}, a save every {save_every} steps; a checkpoint has {size_on_disk / 1e6:.0f} MB, its "
          f"export {exported / 1e6:.0f} MB")
    for mode, those in blocks.items():
        median = statistics.median(block.seconds for block in those)
        line = f"  {mode:13s} {median / save_every * 1e3:8.1f} ms a step, {len(those)} blocks"
        if mode != NONE:
            copy, write = (statistics.median(block.saved[part] for block in those) for part in ("copy", "write"))
            line += f"; copy {copy:.2f} s, writing {write:.2f} s"
        print(line)
    seconds = {mode: [block.seconds for block in those] for mode, those in blocks.items()}
    lost = statistics.median(b - a for a, b in zip(seconds[NONE], seconds[ASYNCHRONOUS], strict=True))
    print(f"  an asynchronous save costs training {lost:.2f} s")
    ratio = print_ratios("throughput, asynchronous / no save", seconds[NONE], seconds[ASYNCHRONOUS],
                         f"at least {SAVE_BAR}")
    base = [statistics.median(seconds[NONE])] * len(seconds[SYNCHRONOUS])
    print_ratios("throughput, synchronous / no save", base, seconds[SYNCHRONOUS])
    return ratio


# -- the step

class InMemory(BatchSource):
    """The same few batches again and again."""

    def __init__(self, batches: list[Batch], start: int):
        self.batches, self.start = batches, start

    def __iter__(self) -> Iterator[Batch]:
        for number in itertools.count(self.start):
            yield self.batches[number % len(self.batches)]


class TakingTurns(BatchSource):
    """Batches of a run with which a bare loop takes turns, a block of steps each."""

    def __init__(self, batches: list[Batch], block: int, rounds: int, bare_step: Callable[[Batch], None],
                 clock: Callable[[], float]):
        self.batches, self.block, self.rounds, self.bare_step, self.clock = batches, block, rounds, bare_step, clock
        self.steps = block * (rounds + 1) + 1     # with a warm-up, and one to ask for what comes after the last block
        self.bare: list[float] = []
        self.loop: list[float] = []

    def __iter__(self) -> Iterator[Batch]:
        self._run_bare()
        yield from self._block()                  # warm-up
        for index in range(self.rounds):
            if index % 2 == 0:
                self.bare.append(self._run_bare())
            began = self.clock()
            yield from self._block()
            self.loop.append(self.clock() - began)
            if index % 2:
                self.bare.append(self._run_bare())
        yield self.batches[0]

    def _block(self) -> Iterator[Batch]:
        for index in range(self.block):
            yield self.batches[index % len(self.batches)]

    def _run_bare(self) -> float:
        began = self.clock()
        for batch in self._block():
            self.bare_step(batch)
        return self.clock() - began


def make_bare_step(size: Size, config: TransformerRun, device: torch.device) -> Callable[[Batch], None]:
    """What one would write without a trainer."""
    model, settings = build(size).to(device), config.optimizer
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, betas=settings.betas, weight_decay=settings.weight_decay,
                                  fused=True)

    def step(batch: Batch) -> None:
        text, codes = (batch[key].to(device, non_blocking=True) for key in ("text", "codes"))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
            text_sum, image_sum = model(text, codes, model.text_targets(text))
            loss = (config.loss.text_weight * text_sum / text.numel()
                    + config.loss.image_weight * image_sum / codes.numel())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bench_step(folder: Path, name: str, size: Size, precision: str, rounds: int, clock: Callable[[], float],
               device: torch.device) -> float:
    """Prints the table; returns the loop's time over the bare loop's."""
    config = make_config(folder, size, precision, size.block * (rounds + 1) + 1, save_every=0, ema=0.0)
    turns = TakingTurns(make_batches(size, device), size.block, rounds, make_bare_step(size, config, device), clock)
    task = Synthetic(config, build(size))
    run_quietly(Trainer(task, config, Engine(config, device), lambda start: turns).run)
    print(f"step, {name}: {parameter_count(task.players['transformer'].module) / 1e6:.1f} M parameters, {precision}, "
          f"batch {size.batch}, {rounds} rounds of {size.block} steps each")
    for label, seconds in (("bare loop", turns.bare), ("Trainer", turns.loop)):
        print(f"  {label:13s} {statistics.median(seconds) / size.block * 1e3:8.2f} ms a step")
    lost = statistics.median(b - a for a, b in zip(turns.bare, turns.loop, strict=True)) / size.block
    print(f"  the Trainer adds {lost * 1e3:.2f} ms a step")
    return print_ratios("time, Trainer / bare loop", turns.loop, turns.bare, f"at most {STEP_BAR}")


# -- both

def print_ratios(label: str, above: list[float], below: list[float], bar: str = "none") -> float:
    """The median of the rounds' ratios, their spread, and the ratio of the fastest of each side."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    median = statistics.median(ratios)
    print(f"  {label}: {median:.3f} (rounds {ratios[0]:.3f} to {ratios[-1]:.3f}, fastest "
          f"{min(above) / min(below):.3f}; bar: {bar})")
    return median


def clock_of(device: torch.device, cpu_time: bool) -> Callable[[], float]:
    """Seconds, once the device has done what it was given."""
    if device.type != "cuda":
        return time.process_time if cpu_time else time.perf_counter

    def clock() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return clock


def run_quietly(run: Callable[[], Summary]) -> None:
    """Without the lines that training prints."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        status = run().status
    if status != "finished":
        raise SystemExit("stopped by a signal before the end: no figures")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["checkpoint", "step"])
    parser.add_argument("--rounds", type=int, help="default: 5 for checkpoint, 16 for step")
    parser.add_argument("--save-every", type=int, default=50, help="steps, and those of a block of `checkpoint`")
    parser.add_argument("--batch-size", type=int, help=f"default: the size's own; of the 28 M model {SAVING_BATCH} for "
                        f"checkpoint, {REALISTIC.batch} for step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="default: realistic for checkpoint, realistic and small "
                        "for step")
    parser.add_argument("--depth", type=int, help="blocks, in place of the size's own")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the runs go (default: the system's temporary folder)")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine shared with others: count the process's "
                        "own processor seconds, those of the thread that writes in full; one thread for torch")
    parser.add_argument("--tiny", action="store_true", help="models of no use, to see that this script works")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1 if options.cpu_time else options.threads)      # waiting threads would count as work
    device = torch.device("cuda", 0) if options.device == "cuda" else torch.device("cpu")
    clock = clock_of(device, options.cpu_time)
    if device.type == "cpu":
        keep_freed_memory()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder, precision = Path(name), options.precision
        if options.part == "checkpoint":
            size = chosen(options, options.size or "realistic", SAVING_BATCH)
            bench_checkpoint(folder / "run", size, precision, options.save_every, options.rounds or 5, clock, device)
            return 0
        for title in [options.size] if options.size else ["realistic", "small"]:
            size = chosen(options, title, REALISTIC.batch)
            bench_step(folder / title, title, size, precision, options.rounds or 16, clock, device)
    return 0


def chosen(options: argparse.Namespace, title: str, realistic_batch: int) -> Size:
    if options.tiny:
        return TINY
    size = SIZES[title]
    batch = options.batch_size or (realistic_batch if title == "realistic" else size.batch)
    return replace(size, batch=batch, depth=options.depth or size.depth)


if __name__ == "__main__":
    main()
