"""THE loop: it walks a task's phases and never asks which kind of task it runs."""

import hashlib
import logging
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from dalle.config import Section, to_yaml
from dalle.errors import UserError
from dalle.training.checkpoint import (
    FORMAT,
    STATE,
    CheckpointStore,
    check_resumable,
    read_state,
    replace_folder,
    write_json,
)
from dalle.training.meter import Meter, average, memory_gigabytes, speeds
from dalle.training.progress import ProgressLine
from dalle.training.signals import EXIT_STOPPED_BY_SIGNAL, StopSignals
from dalle.training.task import Batch, Mean, Phase, Task
from dalle.training.trackers import Trackers

if TYPE_CHECKING:
    from dalle.training.engine import Engine, Outcome
    from dalle.training.run import RunConfig

log = logging.getLogger(__name__)

GO_ON, BUDGET_SPENT, SIGNALLED = 0, 1, 2       # what the ranks agree on after every step; the largest wins
FAILED_SAVES_ALLOWED = 3                       # in a row


class TrainConfig(Section):
    """How long, how much at once, and how often to look."""

    steps: int = Field(default=1000, ge=1, description="optimiser steps of the whole run; the schedules end there")
    batch_size: int = Field(default=32, ge=1, description="samples a step over all processes")
    micro_batch_size: int | None = Field(default=None, ge=1, description="samples at once in a process; null: all")
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = Field(default=False, description="torch.compile the players")
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=0, ge=0, description="0: never")
    validation_samples: int | None = Field(default=None, ge=1, description="null: all")
    preview_every: int = Field(default=0, ge=0, description="0: never")
    save_every: int = Field(default=500, ge=0, description="0: at the end only")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept")
    max_skipped: int = Field(default=20, ge=1, description="non-finite steps of a phase in a row before the run stops")
    minutes: float | None = Field(default=None, gt=0, description="stop, after a checkpoint, when they are over")


@dataclass
class Summary:
    """How a run ended."""

    status: Literal["finished", "stopped", "signal"]
    steps: int
    samples: int
    seconds: float
    folder: Path
    last: dict[str, float] = field(default_factory=dict)      # the newest value of every figure logged

    @property
    def exit_status(self) -> int:
        return EXIT_STOPPED_BY_SIGNAL if self.status == "signal" else 0


def train_step(engine: "Engine", task: Task, batch: Batch, step: int, config: "RunConfig", meter: Meter) \
        -> list[tuple[Phase, "Outcome"]]:
    """One step on this rank's share of the batch: every phase that is due, over all micro-batches, moves its player."""
    count = engine.accumulation
    micro_batches = []
    for index, part in enumerate(split(batch, count)):
        seed_random(config.seed, step, index, engine.rank, 0)
        with torch.no_grad(), engine.autocast():
            micro_batches.append(task.prepare(engine.to_device(part), engine.networks, step))

    outcomes = []
    for number, phase in enumerate(task.phases, start=1):
        if step % phase.every:
            continue
        for repeat in range(phase.repeats):
            engine.begin_phase(phase, step, config.train.steps)
            for index, micro_batch in enumerate(micro_batches):
                seed_random(config.seed, step, index, engine.rank, number, repeat)
                engine.begin_micro_batch(last=index + 1 == count)
                with engine.autocast():
                    loss = phase.loss(engine.networks, micro_batch, step)
                engine.backward(loss.total / count)
                record(meter, task, phase, {"loss": loss.total, **loss.parts})
            outcome = engine.step()
            record(meter, task, phase, {"grad_norm": outcome.grad_norm, "skipped": outcome.skipped})
            outcomes.append((phase, outcome))
    engine.update_averages(step + 1)
    return outcomes


class Trainer:
    """One run of one task, from the newest checkpoint to the last step.

    ``train_loader(start_step)`` gives an endless iterable of this rank's batches from that step on;
    ``validation_loader()`` a finite one. ``resume`` is "auto" (the newest checkpoint that verifies, or none), "none"
    (start over: the run's checkpoints are deleted) or a checkpoint's folder. ``stop_after`` ends the run, with a
    checkpoint, once so many steps are done, without changing its schedules.
    """

    def __init__(self, task: Task, config: "RunConfig", engine: "Engine",
                 train_loader: Callable[[int], Iterable[Batch]],
                 validation_loader: Callable[[], Iterable[Batch]] | None = None, *,
                 resume: str = "auto", stop_after: int | None = None):
        self.task, self.config, self.engine = task, config, engine
        self.train_loader, self.validation_loader = train_loader, validation_loader
        self.resume, self.last_step = resume, min(stop_after or config.train.steps, config.train.steps)
        self.folder = Path(config.folder)
        self.store = CheckpointStore(self.folder / "checkpoints", config.train.keep_last)
        self.done = 0                                  # finished steps
        self.last: dict[str, float] = {}
        self.skips = SkipCounter(config.train.max_skipped)
        self.failed_saves = 0

    # -- the run

    def run(self) -> Summary:
        """Train; raises :class:`UserError` for what the user can mend."""
        began = time.monotonic()
        with ExitStack() as closing:
            closing.callback(self.engine.close)
            signals = closing.enter_context(StopSignals())
            self.engine.together(self._open_folder, only_main=True)
            checkpoint = self._choose_checkpoint()
            loader = self.train_loader(self.done)
            closing.callback(getattr(loader, "close", lambda: None))
            self.identity = data_identity(loader)
            self.engine.prepare(self.task, self.folder)
            if checkpoint is not None:
                self._load(checkpoint)
            self._open_output(closing)
            self._announce(checkpoint)
            if checkpoint is None:
                self._save(required=True)              # a path that cannot be written fails here, not hours later
            status = self._loop(loader, signals, began)
        return Summary(status, self.done, self.samples, time.monotonic() - began, self.folder, self.last)

    def _loop(self, loader: Iterable[Batch], signals: StopSignals, began: float) -> str:
        settings, batches = self.config.train, iter(loader)
        self.skipped_samples = getattr(loader, "skipped", Counter())
        decision = GO_ON
        while self.done < self.last_step and decision == GO_ON:
            with self.meter.waiting():
                batch = next(batches)
            outcomes = train_step(self.engine, self.task, batch, self.done, self.config, self.meter)
            self.done += 1
            self.meter.steps += 1
            self.progress.advance(self.done)
            self.skips.add(outcomes)
            if self.engine.device.type == "cpu" or self._due(settings.log_every):
                self.skips.check(self.done)            # reads the device, so elsewhere only when a line is due anyway
            decision = self.engine.largest(self._wish(signals, began))
            if self._due(settings.log_every):
                self._log_line()
            with self.meter.paused():
                if self._due(settings.validate_every) and self.validation_loader is not None:
                    self._validate()
                if self._due(settings.preview_every):
                    self._preview()
                if decision != GO_ON or self.done == self.last_step or self._due(settings.save_every):
                    self._save(required=decision != GO_ON or self.done == self.last_step)
        self.skips.check(self.done)
        if self.done == settings.steps:
            self.engine.together(self._export_if_missing, only_main=True)
            return "finished"
        if decision == SIGNALLED:
            self.progress.say(f"stopped by a signal after step {self.done}; start again to go on")
            return "signal"
        return "stopped"

    def _due(self, every: int) -> bool:
        """At every multiple of ``every``, and after the last step; never for 0."""
        return every > 0 and (self.done % every == 0 or self.done == self.config.train.steps)

    def _wish(self, signals: StopSignals, began: float) -> int:
        minutes = self.config.train.minutes
        if signals.received:
            return SIGNALLED
        return BUDGET_SPENT if minutes is not None and time.monotonic() - began >= 60 * minutes else GO_ON

    @property
    def samples(self) -> int:
        return self.done * self.config.train.batch_size

    # -- looking at it

    def _log_line(self) -> None:
        steps = self.meter.steps
        sums, seconds, waited = self.meter.read()
        parts = self.engine.gather((sums, dict(self.skipped_samples), waited / seconds))
        values = average([figures for figures, _, _ in parts])
        skipped = sum((Counter(counts) for _, counts, _ in parts), Counter())
        values |= {name: float(value) for name, value in self.task.metrics(self.done).items()}
        values |= {f"lr{suffix}": rate for suffix, rate in self._learning_rates()}
        values |= speeds(steps * self.config.train.batch_size / seconds, self.task, self.engine.device,
                         self.engine.world_size)
        values |= {"seconds_per_step": seconds / steps,
                   "data_wait": sum(share for _, _, share in parts) / len(parts),
                   "memory_gb": memory_gigabytes(self.engine.device),
                   "samples": self.samples, "skipped_steps": self.skips.total,
                   "bad_samples": sum(skipped.values())}
        values |= {f"bad_samples/{reason}": count for reason, count in sorted(skipped.items())}
        self._publish(values)
        self.progress.log(self.done, values)

    def _learning_rates(self) -> Iterator[tuple[str, float]]:
        """("", rate) for a single player, ("/NAME", rate) for several: AdamW's, which is the one that ``lr`` sets."""
        for name, player in self.task.players.items():
            factor = player.optimizer.factor(self.done - 1, self.config.train.steps)
            yield (f"/{name}" if len(self.task.players) > 1 else ""), player.optimizer.lr * factor

    def _validate(self) -> None:
        """The task's figures over the validation set, under the averaged weights, exact over ragged shares."""
        with self.engine.evaluation(), self.engine.autocast():
            seed_random(self.config.seed, 0, 0, self.engine.rank, 0)      # the same noise at every validation
            batches = map(self.engine.to_device, in_step(self.engine, self.validation_loader()))
            shares = self.engine.gather(self.task.validate(self.engine.networks, batches))
        values = {}
        for name in dict.fromkeys(name for share in shares for name in share):
            means = [share.get(name, Mean()) for share in shares]
            values[f"validation/{name}"] = Mean(sum(mean.total for mean in means),
                                                sum(mean.count for mean in means)).value
        if not values:
            return
        self._publish(values)
        figures = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in values.items())
        self.progress.say(f"validation after step {self.done}: {figures}")

    def _preview(self) -> None:
        if not (self.engine.is_main or self.engine.splits_parameters):
            return
        with self.engine.evaluation(), self.engine.autocast():
            seed_random(self.config.seed, 0, 0, 0, 0)
            pictures = self.task.preview(self.engine.networks, self.done)
        if self.engine.is_main:
            self.trackers.images(self.done, {name: picture.permute(1, 2, 0).contiguous().cpu().numpy()
                                             for name, picture in pictures.items()})

    def _publish(self, values: dict[str, Any]) -> None:
        self.last |= values
        if self.engine.is_main:
            self.trackers.log(self.done, values)

    # -- the run folder

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
            if self.resume == "none":
                self.store.clear()
        except OSError as error:
            raise UserError(f"the run folder {self.folder} cannot be written: {error.strerror}; "
                            "set `output` to a folder that can") from error

    def _open_output(self, closing: ExitStack) -> None:
        self.meter = Meter()
        self.progress = ProgressLine(self.config.name, self.done, self.last_step, shown=self.engine.is_main)
        closing.callback(self.progress.close)
        if self.engine.is_main:
            self.trackers = Trackers.of_run(self.folder, self.config.log, self.config.name,
                                            self.config.model_dump(mode="json"))
            closing.callback(self.trackers.close)

    def _announce(self, checkpoint: Path | None) -> None:
        if self.engine.is_main:
            self.trackers.log(self.done, {"event": "resume" if checkpoint else "start", "engine": self.engine.kind,
                                          "processes": self.engine.world_size, "device": self.engine.device.type})
        begin = f"resuming {checkpoint}" if checkpoint else f"starting {self.folder}"
        self.progress.say(f"{begin}: {self.engine.kind}, {self.engine.world_size} process(es) on "
                          f"{self.engine.device.type}, {self.config.train.precision}")

    def _choose_checkpoint(self) -> Path | None:
        def choose() -> tuple[Path, dict[str, Any]] | None:
            if self.resume == "none":
                return None
            path: Path | None = Path(self.resume)
            if self.resume == "auto":
                path, passed_over = self.store.newest()
                for line in passed_over:
                    log.warning("%s", line)
                if path is None and passed_over:
                    raise UserError(f"none of the checkpoints in {self.store.folder} can be used ({passed_over[0]}); "
                                    "--resume none starts over")
            return None if path is None else (path, read_state(path))

        chosen = self.engine.together(choose, only_main=True)
        if chosen is None:
            return None
        path, self.saved = chosen
        self.done = self.saved["step"]
        return path

    def _load(self, checkpoint: Path) -> None:
        check_resumable(checkpoint, self.saved, self.config.model_dump(mode="json"), self.identity, self.engine.layout,
                        list(self.task.players))
        for name in self.task.players:
            try:
                self.engine.load_player(name, checkpoint / name)
            except (ValueError, RuntimeError, KeyError) as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"{checkpoint} does not fit the player {name!r}: {first}") from error
        self.engine.barrier()

    def _save(self, required: bool) -> None:
        """A checkpoint and, after the first step, the export; a failure ends the run only when ``required``."""
        state = {"format": FORMAT, "step": self.done, "samples": self.samples, "layout": self.engine.layout,
                 "players": list(self.task.players), "data": self.identity,
                 "config": self.config.model_dump(mode="json"), "versions": versions()}
        engine, store = self.engine, self.store
        try:
            temporary = engine.together(lambda: store.begin(self.done), only_main=True)
            for name in self.task.players:
                engine.together(lambda name=name: (temporary / name).mkdir(), only_main=True)
                engine.together(lambda name=name: engine.save_player(name, temporary / name))
            engine.together(lambda: write_json(temporary / STATE, state), only_main=True)
            engine.together(lambda: store.commit(temporary, self.done), only_main=True)
            if self.done:
                self._export()
            self.failed_saves = 0
        except OSError as error:
            self.failed_saves += 1
            if required or self.failed_saves >= FAILED_SAVES_ALLOWED:
                raise UserError(f"the checkpoint of step {self.done} cannot be written in {store.folder}: "
                                f"{error.strerror or error}; make room or set `output` to a folder that can") from error
            log.warning("the checkpoint of step %d could not be written (%s); the older ones stay", self.done, error)
            if engine.is_main:
                store.discard(store.folder / f".{store.path(self.done).name}.tmp")

    def _export(self) -> None:
        """``model/``: what ``from_pretrained`` reads, of the averaged weights where there are any."""
        with self.engine.evaluation():
            states = {name: self.engine.full_state(name) for name in self.task.players}

        def write() -> None:
            temporary = self.folder / ".model.tmp"
            CheckpointStore.discard(self.store, temporary)
            temporary.mkdir()
            self.task.export(str(temporary), states)
            replace_folder(temporary, self.folder / "model")

        self.engine.together(write, only_main=True)

    def _export_if_missing(self) -> None:
        if not (self.folder / "model").is_dir():
            raise UserError(f"{self.folder} is finished but its model/ is gone; resume an earlier checkpoint")


class SkipCounter:
    """Counts steps skipped for a non-finite loss or gradient; ends the run when one phase does nothing else."""

    def __init__(self, allowed: int):
        self.allowed, self.total = allowed, 0
        self._streaks: Counter[str] = Counter()
        self._pending: list[tuple[int, Phase, Tensor]] = []

    def add(self, outcomes: list[tuple[Phase, "Outcome"]]) -> None:
        self._pending += [(phase, outcome.skipped) for phase, outcome in outcomes]

    def check(self, step: int) -> None:
        """Read what has come in; raises :class:`UserError` naming player and phase after too many in a row."""
        if not self._pending:
            return
        flags = torch.stack([skipped for _, skipped in self._pending]).tolist()
        for (phase, _), skipped in zip(self._pending, flags, strict=True):
            self.total += int(skipped)
            self._streaks[phase.name] = self._streaks[phase.name] + 1 if skipped else 0
            if self._streaks[phase.name] >= self.allowed:
                raise UserError(
                    f"player {phase.player!r}, phase {phase.name!r}: loss or gradient was not finite {self.allowed} "
                    f"times in a row up to step {step}; the weights are those of before. "
                    "Lower its learning rate, or look at the data")
        self._pending.clear()


def record(meter: Meter, task: Task, phase: Phase, figures: dict[str, Tensor | float]) -> None:
    """Into the meter, by the phase's name where there are several."""
    prefix = f"{phase.name}/" if len(task.phases) > 1 else ""
    for name, value in figures.items():
        meter.add(prefix + name, value)


def split(batch: Batch, count: int) -> Iterator[Batch]:
    """``batch`` in ``count`` equal parts, in order."""
    if count == 1:
        yield batch
        return
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {key: value[start:start + size] for key, value in batch.items()}


def seed_random(*key: int) -> None:
    """Seed torch from what identifies the draw, so that a resumed run draws the same without any saved state."""
    text = ",".join(map(str, key)).encode()
    torch.manual_seed(int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1)


def in_step(engine: "Engine", batches: Iterable[Batch]) -> Iterator[Batch]:
    """``batches``; where every forward needs all ranks, only as many as the rank with the fewest has."""
    if not engine.splits_parameters:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if engine.largest(int(batch is None)):
            return
        yield batch


def data_identity(loader: Any) -> dict[str, Any]:
    """What must be the same data at a resume: the loader's own ``identity``, or its index and tokenizer."""
    if hasattr(loader, "identity"):
        return dict(loader.identity)
    found = {"fingerprint": getattr(getattr(loader, "index", None), "fingerprint", None),
             "tokenizer": getattr(getattr(loader, "tokenizer", None), "digest", None)}
    return {key: value for key, value in found.items() if value is not None}


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}
