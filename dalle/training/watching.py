"""What a run shows of itself: log lines, validation, previews, evaluation, and where all of that is written."""

import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from dalle.data.batch import Batch
from dalle.training.engines.base import Engine
from dalle.training.feeding import Feed
from dalle.training.figures import Figure, Max, joined_values
from dalle.training.guards import SkipCounter
from dalle.training.meter import Meter, memory_gigabytes, speeds
from dalle.training.progress import ProgressLine
from dalle.training.randomness import seed_random
from dalle.training.run import RunConfig
from dalle.training.sample_log import SampleLog
from dalle.training.steps import Steps
from dalle.training.task import Networks, Task
from dalle.training.trackers import Images, Trackers
from dalle.training.watchdog import Limits

ValidationLoader = Callable[[], Iterable[Batch]]
Evaluate = Callable[[Networks, Callable[[], None]], dict[str, float]]

OWN_PARTS = ("data", "prepare", "ahead", "forward")      # of a step, in which no engine but FSDP and ZeRO-3 exchanges


class Output:
    """The log of record with its trackers, the lines on the terminal, and the log of samples.

    Before :meth:`open` and on all ranks but the first, nothing is logged and nothing is said.
    """

    def __init__(self, config: RunConfig, engine: Engine, steps: Steps):
        self._config, self._engine, self._steps = config, engine, steps
        self.last: dict[str, float] = {}               # the newest value of every figure
        self._line: ProgressLine | None = None
        self._trackers: Trackers | None = None
        self._sample_log: SampleLog | None = None
        self._closing = ExitStack()

    def open(self) -> None:
        folder, config = Path(self._config.folder), self._config
        self._line = ProgressLine(config.name, self._steps.done, self._steps.last, shown=self._engine.is_rank0)
        self._closing.callback(self._line.close)
        if self._engine.is_rank0:
            self._trackers = Trackers.of_run(folder, config.log, config.name, config.model_dump(mode="json"),
                                             self._steps.done)
            self._closing.callback(self._trackers.close)
        if config.train.log_samples:
            self._sample_log = SampleLog(folder, self._engine.rank, self._engine.world_size)
            self._closing.callback(self._sample_log.close)
        self.start_samples()

    def close(self) -> None:
        self._closing.close()

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """A line in the log and its trackers, as it is."""
        if self._trackers is not None:
            self._trackers.log(step, values)

    def publish(self, values: dict[str, Any]) -> None:
        """Figures, which the run remembers the newest of."""
        self.last |= values
        self.log(self._steps.done, values)

    def images(self, images: Images) -> None:
        if self._trackers is not None:
            self._trackers.images(self._steps.done, images)

    def say(self, message: str) -> None:
        """A line on the terminal."""
        if self._line is not None:
            self._line.say(message)

    def advance(self, batch: Batch) -> None:
        """One more step is done, with ``batch``."""
        self._line.advance(self._steps.done)
        if self._sample_log is not None:
            self._sample_log.add(self._steps.done - 1, batch)

    def show(self, values: Mapping[str, float]) -> None:
        """The main ones of ``values`` on the terminal."""
        self._line.log(self._steps.done, values)

    def start_samples(self) -> None:
        """What the log of samples has of the steps to come is void from here on; every rank must say so."""
        identity = self._engine.together(lambda: secrets.token_hex(8), only_rank0=True)
        if self._sample_log is not None:
            self._sample_log.start(self._steps.done, identity)


class LogLines:
    """The line of figures that is due every so many steps; all ranks take part."""

    def __init__(self, task: Task, config: RunConfig, engine: Engine, steps: Steps, feed: Feed, meter: Meter,
                 skips: SkipCounter, output: Output):
        self._task, self._config, self._engine, self._steps = task, config, engine, steps
        self._feed, self._meter, self._skips, self._output = feed, meter, skips, output

    def write(self) -> None:
        """The figures of the steps since the line before, over all ranks."""
        steps = self._meter.steps
        figures, seconds, by_part = self._meter.read()
        metrics = self._task.metrics(self._steps.done)
        figures |= {name: value for name, value in metrics.items() if isinstance(value, Figure)}
        figures["memory_gb"] = Max(memory_gigabytes(self._engine.device))      # the fullest rank is the one to fail
        source = self._feed.source
        shares = self._engine.gather((figures, dict(source.skipped), dict(source.partly_used), seconds, by_part))
        values = joined_values([figures for figures, *_ in shares])
        skipped = sum((Counter(counts) for _, counts, *_ in shares), Counter())
        partly_used = sum((Counter(counts) for _, _, counts, *_ in shares), Counter())
        values |= {name: float(value) for name, value in metrics.items() if not isinstance(value, Figure)}
        values |= {f"lr{suffix}": rate for suffix, rate in self._learning_rates()}
        values |= speeds(steps * self._config.train.batch_size / seconds, self._task, self._engine.device,
                         self._engine.world_size)
        values |= {"seconds_per_step": seconds / steps,
                   "data_wait": sum(by_part["data"] / seconds for *_, seconds, by_part in shares) / len(shares),
                   "samples": self._steps.samples, "skipped_steps": self._skips.total,
                   "bad_samples": sum(skipped.values())}
        values |= seconds_by_part([by_part for *_, by_part in shares], steps)
        if len(shares) > 1:
            values |= seconds_of_ranks([(seconds, by_part) for *_, seconds, by_part in shares], steps)
        values |= {f"bad_samples/{reason}": count for reason, count in sorted(skipped.items())}
        values |= {f"partly_used/{reason}": count for reason, count in sorted(partly_used.items())}
        self._output.publish(values)
        self._output.show(values)

    def _learning_rates(self) -> Iterator[tuple[str, float]]:
        """("", rate) for a single player, ("/NAME", rate) for several: AdamW's, which is the one that ``lr`` sets."""
        for name, player in self._task.players.items():
            factor = player.optimizer.factor(self._steps.done - 1, self._steps.total)
            yield (f"/{name}" if len(self._task.players) > 1 else ""), player.optimizer.lr * factor


def seconds_by_part(by_rank: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """``seconds/PART``: of one step, the mean over the ranks. On a GPU the device's for what networks do, which the
    host's (data, agreement, save) run beside."""
    names = dict.fromkeys(name for parts in by_rank for name in parts)
    return {f"seconds/{name}": sum(parts.get(name, 0.0) for parts in by_rank) / len(by_rank) / steps for name in names}


def seconds_of_ranks(shares: Sequence[tuple[float, Mapping[str, float]]], steps: int) -> dict[str, float]:
    """The quickest and the slowest rank's time of one step, and the same of what a rank does before it first meets the
    others (data, prepare, forward): the whole steps are as long as the slowest rank's on all of them."""
    whole = [seconds / steps for seconds, _ in shares]
    own = [sum(time for name, time in parts.items() if name.rpartition("/")[2] in OWN_PARTS) / steps
           for _, parts in shares]
    return {"rank_seconds/smallest": min(whole), "rank_seconds/largest": max(whole),
            "rank_seconds/own_smallest": min(own), "rank_seconds/own_largest": max(own)}


class Looks:
    """Validations, previews and evaluations of one run, when they are due; all ranks take part.

    ``evaluate(networks, came_forward)`` gives figures of what the averaged networks make, and calls ``came_forward()``
    after each part of it.
    """

    def __init__(self, task: Task, config: RunConfig, engine: Engine, steps: Steps, limits: Limits, output: Output,
                 validation_loader: ValidationLoader | None, evaluate: Evaluate | None):
        self._task, self._config, self._engine, self._steps = task, config, engine, steps
        self._limits, self._output = limits, output
        self._validation_loader, self._evaluator = validation_loader, evaluate

    def due(self) -> list[Callable[[], None]]:
        """Those of validation, preview and evaluation that are due, in their order."""
        settings = self._config.train
        return [look for look, every, possible in (
            (self._validate, settings.validate_every, self._validation_loader is not None),
            (self._preview, settings.preview_every, True),
            (self._evaluate, settings.evaluate_every, self._evaluator is not None))
            if possible and self._steps.due(every)]

    def _validate(self) -> None:
        """The task's figures over the validation set, under the averaged weights, exact over ragged shares."""
        with self._limits.allow("validating"), self._engine.evaluation(), self._engine.autocast():
            seed_random(self._config.seed, 0, 0, self._engine.rank, 0)      # the same noise at every validation
            batches = self._limits.each(in_step(self._engine, self._validation_loader()))
            shares = self._engine.gather(self._task.validate(self._engine.networks,
                                                             map(self._engine.to_device, batches)))
        values = {f"validation/{name}": value for name, value in joined_values(shares).items()}
        if not values:
            self._output.say(f"validation after step {self._steps.done}: no figure, the samples of data.validation are "
                             f"fewer than a {self._config.task} run measures")
            return
        self._output.publish(values)
        figures = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in values.items())
        self._output.say(f"validation after step {self._steps.done}: {figures}")

    def _preview(self) -> None:
        def draw(came_forward: Callable[[], None]) -> dict[str, Tensor]:
            seed_random(self._config.seed, 0, 0, 0, 0)
            return self._task.preview(self._engine.networks, self._steps.done)

        with self._limits.allow("drawing a preview"):
            pictures = self._with_networks(draw)
        if self._engine.is_rank0:
            self._output.images({name: picture.permute(1, 2, 0).contiguous().cpu().numpy()
                                 for name, picture in pictures.items()})

    def _evaluate(self) -> None:
        with self._limits.allow("evaluating"):
            figures = self._with_networks(lambda came_forward: self._evaluator(self._engine.networks, came_forward))
        if self._engine.is_rank0:
            self._output.publish({f"evaluation/{name}": value for name, value in figures.items()})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self._output.say(f"evaluation after step {self._steps.done}: {shown}")

    def _with_networks(self, action: Callable[[Callable[[], None]], Any]) -> Any:
        """What ``action(came_forward)`` makes of the averaged networks on rank 0; the other ranks wait, or do the same
        where every forward needs them. Each ``came_forward()`` begins the watchdog's time anew, on those that wait too.
        """
        if self._engine.splits_parameters:
            with self._engine.evaluation(), self._engine.whole_networks(), self._engine.autocast():
                result = action(self._limits.feed)
            self._engine.barrier()
            return result
        if not self._engine.is_rank0:
            while self._engine.all_reduce_max(0)[0]:
                self._limits.feed()
            return None

        def came_forward() -> None:
            self._engine.all_reduce_max(1)
            self._limits.feed()

        with self._engine.evaluation(), self._engine.autocast():
            result = action(came_forward)
        self._engine.all_reduce_max(0)
        return result


def in_step(engine: Engine, batches: Iterable[Batch]) -> Iterator[Batch]:
    """``batches``; where every forward needs all ranks, only as many as the rank with the fewest has."""
    if not engine.evaluates_in_step:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if engine.all_reduce_max(int(batch is None))[0]:
            return
        yield batch
