"""What the benches share: contenders that take turns in shuffled rounds, their table, and a step of the real loop."""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from dalle.models.transformer import TextToImageTransformer
from dalle.tasks.transformer import TransformerRun, TransformerTask
from dalle.training.allocator import keep_freed_memory
from dalle.training.engines.base import Engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from dalle.training.run import RunConfig
from dalle.training.task import Batch, Task

Contenders = dict[str, Callable[[], None]]
Clock = Callable[[], float]


class Synthetic(TransformerTask):
    """The transformer task without a codec and a tokenizer: the codes come with the batch."""

    def __init__(self, config: TransformerRun, model: TextToImageTransformer):
        self.frozen = {}
        self.assemble(config, model)

    def export(self, folder: str, states: dict) -> None:
        self._model.save_pretrained(folder, states["transformer"])


def trained_by_the_loop(task: Task, config: RunConfig, batch: Batch) -> Callable[[], None]:
    """A step of training as the loop makes it: the real engine and ``train_step``, its figures into a meter."""
    engine, meter, steps = Engine(config, torch.device("cpu")), Meter(), 0
    engine.prepare(task, Path(config.folder))

    def step() -> None:
        nonlocal steps
        train_step(engine, task, batch, steps, config, meter)
        steps += 1

    return step


def bench_arguments(description: str, rounds: int) -> argparse.ArgumentParser:
    """The options of every bench with a peer."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--cpu-time", action="store_true",
                        help="count the process's own processor seconds, for a machine shared with others; one thread")
    parser.add_argument("--plain-memory", action="store_true", help="leave the C library's memory as it is, where the "
                        "project's training has it keep what is freed: as the peers come")
    return parser


def set_up(arguments: argparse.Namespace) -> Clock:
    """Threads, seeds and memory as training has it, for all contenders alike; the clock that was asked for."""
    torch.set_num_threads(1 if arguments.cpu_time else arguments.threads)   # waiting threads would count as work
    if not arguments.plain_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    random.seed(0)
    return time.process_time if arguments.cpu_time else time.perf_counter


def interleave(contenders: Contenders, rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds of each contender in each of ``rounds`` rounds, after a warm-up, in a new order each round."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            start = clock()
            contenders[name]()
            times[name].append(clock() - start)
    return times


def report(times: dict[str, list[float]], work: float, unit: str, pairs: list[tuple[str, str]]) -> None:
    """Medians of each contender, then for each (slow, fast) pair of which both ran: the median of the rounds' ratios,
    the quarters between which half of them lie, and the ratio of the fastest rounds."""
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"  {name:20s} {median * 1e3:10.1f} ms  {work / median:10.1f} {unit}")
    for slow, fast in pairs:
        if slow in times and fast in times:
            ratios = [a / b for a, b in zip(times[slow], times[fast], strict=True)]
            quarters = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
            best = min(times[slow]) / min(times[fast])
            print(f"  {slow} / {fast}: {statistics.median(ratios):.2f}x (half of the rounds {quarters[0]:.2f} to "
                  f"{quarters[2]:.2f}, fastest rounds {best:.2f}x)")
