"""THE loop: it walks a task's phases and never asks which kind of task it runs."""

import hashlib
import logging
import platform
import secrets
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import psutil
import torch
from pydantic import Field, field_validator
from torch import Tensor

from dalle.config import FIXED, FREE, Section, to_yaml
from dalle.errors import EXIT_STOPPED_BY_SIGNAL, UserError
from dalle.files import replace_folder, write_json
from dalle.training.checkpoint import (
    FORMAT,
    CheckpointStore,
    SavedPlayer,
    check_is_checkpoint,
    check_resumable,
    read_run_state,
    step_of,
    unusable,
)
from dalle.training.companions import agreed_records, check_companions
from dalle.training.export import export_checkpoint
from dalle.training.figures import Figure, Largest, joined_values
from dalle.training.guards import BatchNumbers, SkipCounter, SpikeConfig, SpikeWatch, lost_processes_named
from dalle.training.lock import FolderLock
from dalle.training.meter import Meter, memory_gigabytes, speeds
from dalle.training.progress import ProgressLine
from dalle.training.run_folder import (
    FINISHED_FILE,
    MODEL_FOLDER,
    STOP_FILE,
    begin_anew,
    exported_step,
    finished_steps,
)
from dalle.training.sample_log import SampleLog
from dalle.training.saving import SaveFailed, Saver
from dalle.training.signals import STOP_SIGNALS, StopSignals
from dalle.training.task import Batch, Networks, Phase, Task, detached
from dalle.training.trackers import Trackers
from dalle.training.verifying import newest_that_verifies
from dalle.training.watchdog import Watchdog

if TYPE_CHECKING:
    from dalle.training.engine import Engine, Outcome
    from dalle.training.run import RunConfig

log = logging.getLogger(__name__)

GO_ON, BUDGET_SPENT, SIGNALLED = 0, 1, 2       # what the ranks agree on after every step; the largest wins
FAILED_SAVES_ALLOWED = 3                       # in a row
STOP_FILE_SECONDS = 1.0                        # between two looks


class TrainConfig(Section, json_schema_extra=FREE):
    """How long, how much at once, and how often to look."""

    steps: int = Field(default=1000, ge=1, description="optimiser steps of the whole run; the schedules end there")
    batch_size: int = Field(default=32, ge=1, description="samples a step over all processes",
                            json_schema_extra=FIXED)
    micro_batch_size: int | None = Field(default=None, ge=1, description="samples at once in a process; null: all")
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = Field(default=False, description="torch.compile the players")
    log_every: int = Field(default=10, ge=1)
    validate_every: int = Field(default=0, ge=0, description="0: never")
    validation_samples: int | None = Field(default=None, ge=1, description="null: all")
    preview_every: int = Field(default=0, ge=0, description="0: never")
    evaluate_every: int = Field(default=0, ge=0, description="0: never; what is measured: `evaluation`")
    save_every: int = Field(default=500, ge=0, description="steps; 0: at the end only")
    save_minutes: float | None = Field(default=None, gt=0, description="save also when so much time has passed")
    async_save: bool = Field(default=True, description="write checkpoints while training goes on")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept")
    accept_companions: tuple[str, ...] = Field(default=(), description="go on with another codec, text encoder, ... "
                                               "than before: names of those that were changed on purpose")
    stop_signals: tuple[str, ...] = Field(default=STOP_SIGNALS, description="save, and end with status 75")
    log_samples: bool = Field(default=False, description="write the samples of every step into sample_log/")
    spike: SpikeConfig = SpikeConfig()
    max_skipped: int = Field(default=20, ge=1, description="non-finite steps of a phase in a row before the run stops")
    minutes: float | None = Field(default=None, gt=0, description="stop, with a checkpoint and status 75, when "
                                  "they are over")

    @field_validator("stop_signals")
    @classmethod
    def _known_signals(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a signal that can be handled; SIGTERM and SIGUSR2 are usual")
        return names


@dataclass
class Summary:
    """How a run ended."""

    status: Literal["finished", "stopped", "minutes", "signal"]      # stopped: after so many steps as was asked for
    steps: int
    samples: int
    seconds: float
    folder: Path
    last: dict[str, float] = field(default_factory=dict)      # the newest value of every figure logged

    @property
    def exit_status(self) -> int:
        return EXIT_STOPPED_BY_SIGNAL if self.status in ("signal", "minutes") else 0


@dataclass
class Played:
    """What came of a phase: this rank's losses, 0-d on the device, one a micro-batch, and the player's step."""

    phase: Phase
    losses: list[Tensor]
    outcome: "Outcome"


def train_step(engine: "Engine", task: Task, batch: Batch, step: int, config: "RunConfig", meter: Meter) \
        -> list["Played"]:
    """One step on this rank's share of the batch: every phase that is due, over all micro-batches, moves its player."""
    count = engine.accumulation
    micro_batches = []
    for index, part in enumerate(split(batch, count)):
        seed_random(config.seed, step, index, engine.rank, 0)
        with torch.no_grad(), engine.autocast():
            micro_batches.append(task.prepare(engine.to_device(part), engine.networks, step))

    waiting: dict[tuple[str, int], Batch] = {}       # (phase, micro-batch) -> what it made ahead, with its graph
    for phase in task.phases:
        if phase.ahead:
            made = make_ahead(engine, phase, micro_batches, step, config)
            micro_batches = [batch | detached(own) for batch, own in zip(micro_batches, made, strict=True)]
            waiting |= {(phase.name, index): own for index, own in enumerate(made)}

    played = []
    for number, phase in enumerate(task.phases, start=1):
        if not phase.is_due(step):
            continue
        for repeat in range(phase.repeats):
            engine.begin_phase(phase, step, config.train.steps)
            losses = []
            for index, micro_batch in enumerate(micro_batches):
                seed_random(config.seed, step, index, engine.rank, number, repeat)
                engine.begin_micro_batch(last=index + 1 == count)
                with engine.autocast():
                    own = waiting.pop((phase.name, index), None) or phase.make(engine.networks, micro_batch, step)
                    loss = phase.loss(engine.networks, micro_batch | own, step)
                engine.backward(loss.total / count)
                losses.append(loss.total.detach())
                record(meter, task, phase, {"loss": loss.total, **loss.parts})
            outcome = engine.step()
            record(meter, task, phase, {"grad_norm": outcome.grad_norm, "skipped": outcome.skipped})
            played.append(Played(phase, losses, outcome))
    engine.update_averages(step + 1)
    return played


def make_ahead(engine: "Engine", phase: Phase, micro_batches: list[Batch], step: int, config: "RunConfig") \
        -> list[Batch]:
    """What ``phase`` makes before the step's phases, of each micro-batch; with its graph where the phase is due."""
    engine.begin_phase(phase, step, config.train.steps)
    made = []
    for index, micro_batch in enumerate(micro_batches):
        seed_random(config.seed, step, index, engine.rank, phase.name)
        engine.begin_micro_batch(last=index + 1 == len(micro_batches))
        with torch.set_grad_enabled(phase.is_due(step)), engine.autocast():
            made.append(phase.make(engine.networks, micro_batch, step))
    return made


class Trainer:
    """One run of one task, from the newest checkpoint to the last step.

    ``train_loader(start_step)`` gives an endless iterable of this rank's batches from that step on;
    ``validation_loader()`` a finite one. ``resume`` is "auto" (the newest checkpoint that verifies, or none), "none"
    (start over: what the run wrote is deleted) or a checkpoint's folder. ``stop_after`` ends the run, with a
    checkpoint, once so many steps are done, without changing its schedules. ``evaluate(networks, came_forward)``
    gives figures of what the averaged networks make, every ``train.evaluate_every`` steps, and calls ``came_forward()``
    after each part of it, none of which may take longer than ``engine.timeout_minutes``.
    """

    def __init__(self, task: Task, config: "RunConfig", engine: "Engine",
                 train_loader: Callable[[int], Iterable[Batch]],
                 validation_loader: Callable[[], Iterable[Batch]] | None = None, *,
                 resume: str = "auto", stop_after: int | None = None,
                 evaluate: Callable[[Networks, Callable[[], None]], dict[str, float]] | None = None):
        self.task, self.config, self.engine = task, config, engine
        self.train_loader, self.validation_loader, self.evaluate = train_loader, validation_loader, evaluate
        self.resume, self.last_step = resume, min(stop_after or config.train.steps, config.train.steps)
        self.folder = Path(config.folder)
        self.store = CheckpointStore(self.folder / "checkpoints", config.train.keep_last)
        self.saver = Saver(self.store, engine, list(task.players), self._published)
        self.watchdog = Watchdog(engine.rank)
        self.lock = FolderLock(self.folder)
        self.done = 0                                  # finished steps
        self.last: dict[str, float] = {}
        self.skips = SkipCounter(config.train.max_skipped)
        self.spikes = SpikeWatch(config.train.spike)
        self.numbers = BatchNumbers()
        self.rollbacks = 0
        self.unexported: Path | None = None            # the checkpoint loaded, until the next one is published
        self.saved_at = self.looked_at = time.monotonic()

    # -- the run

    def run(self) -> Summary:
        """Train; raises :class:`UserError` for what the user can mend, :class:`LostProcess` for a dead or hung one."""
        began = time.monotonic()
        with ExitStack() as closing:
            closing.enter_context(self.watchdog)
            closing.callback(self.lock.release)
            closing.callback(self._leave)
            closing.callback(self.saver.close)
            closing.enter_context(lost_processes_named(self.engine.rank, self.watchdog))
            signals = closing.enter_context(StopSignals(self.config.train.stop_signals, self.engine.is_main))
            # not watched: reading the headers of new shards takes as long as it takes, and so does another's end
            self.engine.together(self._open_folder, only_main=True)
            self.companions = agreed_records(self.engine, self.task)
            checkpoint = self._choose_checkpoint()
            if checkpoint is not None:
                self.engine.together(lambda: self._check(checkpoint), only_main=True)
            if self.done >= self.last_step:
                return self._nothing_to_do(checkpoint, began)
            self._open_data()
            closing.callback(self._close_data)
            if checkpoint is not None:
                check_resumable(checkpoint, self.saved, self.config, self.identity, list(self.task.players))
            self.engine.prepare(self.task, self.folder)
            if checkpoint is not None:
                self._load(checkpoint)
            self._open_output(closing, checkpoint)
            self._announce(checkpoint)
            if checkpoint is None:
                self._save(required=True)              # a path that cannot be written fails here, not hours later
            signals.begin()
            status = self._loop(signals, began)
        return Summary(status, self.done, self.samples, time.monotonic() - began, self.folder, self.last)

    def _check(self, checkpoint: Path) -> None:
        """Refuse, before anything is touched, what may not go on from the checkpoint; its data is not open yet."""
        check_resumable(checkpoint, self.saved, self.config, self.saved["data"], list(self.task.players))
        check_companions(str(checkpoint), self.saved, self.config.model_dump(mode="json"), self.companions,
                         copies=self.folder / MODEL_FOLDER, accepted=self.config.train.accept_companions)

    def _nothing_to_do(self, checkpoint: Path | None, began: float) -> Summary:
        """The end of a start that has no step to make: it opens no data, and writes only what a kill kept from it."""
        steps, asked = self.config.train.steps, self.last_step
        if self.done > steps:
            raise UserError(f"train.steps is {steps}, but {self.folder} has {self.done} steps done: nothing was "
                            f"changed. Set it to {self.done} or more, or start over with --resume none")
        finished = self.done == steps
        if finished and checkpoint is not None:
            self.engine.together(self._mend_finished, only_main=True)
        if self.engine.is_main:
            print(f"{self.folder} is finished, {steps} of {steps} steps are done: nothing to do (a larger train.steps "
                  "goes on, --resume none starts over)" if finished else
                  f"{self.folder} has {self.done} of {steps} steps done, and {asked} were asked for: nothing to do",
                  flush=True)
        return Summary("finished" if finished else "stopped", self.done, self.samples, time.monotonic() - began,
                       self.folder)

    def _mend_finished(self) -> None:
        if {finished_steps(self.folder), exported_step(self.folder)} != {self.done}:
            self._mark_finished()

    def _leave(self) -> None:
        with self._allowed("leaving the process group"):
            self.engine.close()

    def _loop(self, signals: StopSignals, began: float) -> str:
        settings, decision, first = self.config.train, GO_ON, True
        while self.done < self.last_step and decision == GO_ON:
            with self._allowed("waiting for data", first), self.meter.waiting():
                batch = self._next_batch()
            with self._allowed("training", first):
                played = train_step(self.engine, self.task, batch, self.done, self.config, self.meter)
            self.done += 1
            self.meter.steps += 1
            self.progress.advance(self.done)
            if self.sample_log is not None:
                self.sample_log.add(self.done - 1, batch)
            with self._allowed("agreeing with the other ranks", first):
                self._count_skips(played, batch)
                if settings.spike.zscore is not None and self._roll_back_on_spike(played, batch):
                    first = True
                    continue
                decision, save_due = self._agree(signals, began)
                if self._due(settings.log_every):
                    self._log_line()
            ends = decision != GO_ON or self.done == self.last_step
            with self.meter.paused():
                if ends or save_due or self._due(settings.save_every):
                    self._save(required=ends)
                self._look()
            first = False
        return self._end(decision)

    def _look(self) -> None:
        """What is due of validation, preview and evaluation. A save that was begun is published first: one of them may
        fail, or be killed, and must not cost the steps since the checkpoint before."""
        settings = self.config.train
        looks = [look for look, every, possible in (
            (self._validate, settings.validate_every, self.validation_loader is not None),
            (self._preview, settings.preview_every, True),
            (self._evaluate, settings.evaluate_every, self.evaluate is not None)) if possible and self._due(every)]
        if not looks:
            return
        self._finish_saving()
        self.engine.share_buffers()
        for look in looks:
            look()

    def _end(self, decision: int) -> str:
        share = " of this process" if self.engine.world_size > 1 else ""
        for line in getattr(self.loader, "report", list)():
            self.progress.say(f"samples{share} {line}")
        if self.done == self.config.train.steps:
            self.engine.together(self._mark_finished, only_main=True)
            return "finished"
        if decision == SIGNALLED:
            self.progress.say(f"stopped by a signal after step {self.done}; start again to go on")
            return "signal"
        return "minutes" if decision == BUDGET_SPENT else "stopped"

    @contextmanager
    def _allowed(self, what: str, long: bool = True) -> Iterator[None]:
        """The time that the part ``what`` of the step may take, in seconds of the watchdog."""
        options = self.config.engine
        minutes = options.timeout_minutes if long else min(options.timeout_minutes, options.step_timeout_minutes)
        with self.watchdog.allow(60 * minutes, self.done, what):
            yield

    def _watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches``, each of which may take the time that was allowed for one."""
        for batch in batches:
            self.watchdog.feed()
            yield batch

    def _next_batch(self) -> Batch:
        wanted = self.numbers.of(self.done)
        while True:
            batch, number = next(self.batches), self.next_number
            self.next_number += 1
            if number == wanted:
                return batch

    def _open_data(self) -> None:
        self.next_number = self.numbers.of(self.done)
        self.loader = self.train_loader(self.next_number)
        self.batches = iter(self.loader)
        self.skipped_samples = getattr(self.loader, "skipped", Counter())
        self.partly_used = getattr(self.loader, "partly_used", Counter())
        self.identity = data_identity(self.loader)

    def _close_data(self) -> None:
        getattr(self.loader, "close", lambda: None)()

    def _agree(self, signals: StopSignals, began: float) -> tuple[int, bool]:
        """What all ranks do next: (go on, or why not; whether a save is due by the clock). Moves a running save on."""
        minutes = self.config.train.save_minutes
        late = self.engine.is_main and minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        decision, save_due, busy, failed = self.engine.largest(
            self._wish(signals, began), int(late), int(self.saver.busy), int(self.saver.failed))
        try:
            self.saver.advance(bool(busy), bool(failed))
        except SaveFailed as error:
            self._save_failed(error, required=False)
        return decision, bool(save_due)

    def _due(self, every: int) -> bool:
        """At every multiple of ``every``, and after the last step; never for 0."""
        return every > 0 and (self.done % every == 0 or self.done == self.config.train.steps)

    def _wish(self, signals: StopSignals, began: float) -> int:
        minutes, now = self.config.train.minutes, time.monotonic()
        if signals.received or (self.engine.is_main and self._stop_file_found(now)):
            return SIGNALLED
        return BUDGET_SPENT if minutes is not None and now - began >= 60 * minutes else GO_ON

    def _stop_file_found(self, now: float) -> bool:
        if now - self.looked_at < STOP_FILE_SECONDS:
            return False
        self.looked_at = now
        try:
            (self.folder / STOP_FILE).unlink()
        except OSError:
            return False
        return True

    @property
    def samples(self) -> int:
        return self.done * self.config.train.batch_size

    # -- what goes wrong

    def _count_skips(self, played: list[Played], batch: Batch) -> None:
        """On a CPU in every step; elsewhere, where it reads the device, only when a line is due anyway."""
        self.skips.add(self.done - 1, list(batch.get("key", ())), [(one.phase, one.outcome) for one in played])
        if self.engine.device.type != "cpu" and not self._due(self.config.train.log_every) \
                and self.done < self.last_step:
            return
        for entry in self.skips.read():
            keys = [key for share in self.engine.gather(entry.keys) for key in share]
            if self.engine.is_main:
                self.trackers.log(entry.step + 1, {"event": "skipped", "phase": entry.phase.name,
                                                   "player": entry.phase.player, "keys": keys})
            self.skips.check(entry, keys)

    def _roll_back_on_spike(self, played: list[Played], batch: Batch) -> bool:
        """Go back to the newest checkpoint, and past the batch, when a loss has jumped on the average of all ranks."""
        losses = self.engine.mean(torch.stack([torch.stack(one.losses).mean().float() for one in played])).tolist()
        scores = [self.spikes.zscore(one.phase.name, loss) for one, loss in zip(played, losses, strict=True)]
        index = next((index for index, score in enumerate(scores) if score is not None), None)
        if index is None:
            return False
        phase, step, spike = played[index].phase, self.done - 1, self.config.train.spike
        keys = [key for share in self.engine.gather(list(batch.get("key", ()))) for key in share]
        self.rollbacks += 1
        if self.rollbacks > spike.max_rollbacks:
            raise UserError(f"player {phase.player!r}, phase {phase.name!r}: the loss jumped to {losses[index]:.4g} in "
                            f"step {step}, {self.rollbacks} times so far, above train.spike.max_rollbacks="
                            f"{spike.max_rollbacks}; lower the learning rate, or look at the data")
        self._finish_saving()
        excluded = self.numbers.exclude(step, spike.skip_batches)
        checkpoint = self._choose_checkpoint(newest=True)
        size = self.config.train.batch_size
        event = {"event": "rollback", "phase": phase.name, "player": phase.player, "loss": losses[index],
                 "zscore": scores[index], "to_step": self.saved["step"], "keys": keys,
                 "left_out_positions": [[number * size, (number + 1) * size - 1] for number in excluded]}
        self._load(checkpoint)
        self.meter.read()                              # figures of the steps that were given up
        self._close_data()
        self._open_data()
        if self.engine.is_main:
            self.trackers.log(step + 1, event)
        self._start_sample_log()
        self.progress.say(f"the loss of {phase.name!r} jumped to {losses[index]:.4g} in step {step}: back to step "
                          f"{self.done}, without the batch")
        return True

    # -- looking at it

    def _log_line(self) -> None:
        steps = self.meter.steps
        figures, seconds, waited = self.meter.read()
        metrics = self.task.metrics(self.done)
        figures |= {name: value for name, value in metrics.items() if isinstance(value, Figure)}
        figures["memory_gb"] = Largest(memory_gigabytes(self.engine.device))      # the fullest rank is the one to fail
        parts = self.engine.gather((figures, dict(self.skipped_samples), dict(self.partly_used), waited / seconds))
        values = joined_values([figures for figures, *_ in parts])
        skipped = sum((Counter(counts) for _, counts, _, _ in parts), Counter())
        partly_used = sum((Counter(counts) for _, _, counts, _ in parts), Counter())
        values |= {name: float(value) for name, value in metrics.items() if not isinstance(value, Figure)}
        values |= {f"lr{suffix}": rate for suffix, rate in self._learning_rates()}
        values |= speeds(steps * self.config.train.batch_size / seconds, self.task, self.engine.device,
                         self.engine.world_size)
        values |= {"seconds_per_step": seconds / steps,
                   "data_wait": sum(share for *_, share in parts) / len(parts),
                   "samples": self.samples, "skipped_steps": self.skips.total,
                   "bad_samples": sum(skipped.values())}
        values |= {f"bad_samples/{reason}": count for reason, count in sorted(skipped.items())}
        values |= {f"partly_used/{reason}": count for reason, count in sorted(partly_used.items())}
        self._publish(values)
        self.progress.log(self.done, values)

    def _learning_rates(self) -> Iterator[tuple[str, float]]:
        """("", rate) for a single player, ("/NAME", rate) for several: AdamW's, which is the one that ``lr`` sets."""
        for name, player in self.task.players.items():
            factor = player.optimizer.factor(self.done - 1, self.config.train.steps)
            yield (f"/{name}" if len(self.task.players) > 1 else ""), player.optimizer.lr * factor

    def _validate(self) -> None:
        """The task's figures over the validation set, under the averaged weights, exact over ragged shares."""
        with self._allowed("validating"), self.engine.evaluation(), self.engine.autocast():
            seed_random(self.config.seed, 0, 0, self.engine.rank, 0)      # the same noise at every validation
            batches = map(self.engine.to_device, self._watched(in_step(self.engine, self.validation_loader())))
            shares = self.engine.gather(self.task.validate(self.engine.networks, batches))
        values = {f"validation/{name}": value for name, value in joined_values(shares).items()}
        if not values:
            self.progress.say(f"validation after step {self.done}: no figure, the samples of data.validation are fewer "
                              f"than a {self.config.task} run measures")
            return
        self._publish(values)
        figures = "  ".join(f"{name.removeprefix('validation/')} {value:.4g}" for name, value in values.items())
        self.progress.say(f"validation after step {self.done}: {figures}")

    def _preview(self) -> None:
        def draw(came_forward: Callable[[], None]) -> dict[str, Tensor]:
            seed_random(self.config.seed, 0, 0, 0, 0)
            return self.task.preview(self.engine.networks, self.done)

        with self._allowed("drawing a preview"):
            pictures = self._with_networks(draw)
        if self.engine.is_main:
            self.trackers.images(self.done, {name: picture.permute(1, 2, 0).contiguous().cpu().numpy()
                                             for name, picture in pictures.items()})

    def _evaluate(self) -> None:
        with self._allowed("evaluating"):
            figures = self._with_networks(lambda came_forward: self.evaluate(self.engine.networks, came_forward))
        if self.engine.is_main:
            self._publish({f"evaluation/{name}": value for name, value in figures.items()})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
            self.progress.say(f"evaluation after step {self.done}: {shown}")

    def _with_networks(self, action: Callable[[Callable[[], None]], Any]) -> Any:
        """What ``action(came_forward)`` makes of the averaged networks on rank 0; the other ranks wait, or do the same
        where every forward needs them. Each ``came_forward()`` begins the watchdog's time anew, on those that wait too.
        """
        if self.engine.splits_parameters:
            with self.engine.evaluation(), self.engine.whole_networks(), self.engine.autocast():
                result = action(self.watchdog.feed)
            self.engine.barrier()
            return result
        if not self.engine.is_main:
            while self.engine.largest(0)[0]:
                self.watchdog.feed()
            return None

        def came_forward() -> None:
            self.engine.largest(1)
            self.watchdog.feed()

        with self.engine.evaluation(), self.engine.autocast():
            result = action(came_forward)
        self.engine.largest(0)
        return result

    def _publish(self, values: dict[str, Any]) -> None:
        self.last |= values
        if self.engine.is_main:
            self.trackers.log(self.done, values)

    # -- the run folder

    def _open_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            stop = self.folder / STOP_FILE
            if stop.exists() and stop.stat().st_mtime < psutil.Process().create_time():
                stop.unlink()                                         # meant for an earlier start
            self.store.sweep()
        except OSError as error:
            raise self._not_writable(error) from error

    def _begin(self, checkpoint: Path | None) -> None:
        """The folder of a run that goes on from ``checkpoint``, or of a new one; and what it is from now on."""
        try:
            if checkpoint is None:
                begin_anew(self.folder, self.store, keep_model=self.resume != "none" or self._reads_its_own_model())
            (self.folder / FINISHED_FILE).unlink(missing_ok=True)
            (self.folder / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        except OSError as error:
            raise self._not_writable(error) from error

    def _reads_its_own_model(self) -> bool:
        """Whether a companion's copy in ``model/`` is what the run reads."""
        inside = (self.folder / MODEL_FOLDER).absolute()
        return any(isinstance(value, str) and inside in (Path(value).absolute(), *Path(value).absolute().parents)
                   for value in leaves(self.config.model_dump(mode="json")))

    def _not_writable(self, error: OSError) -> UserError:
        return UserError(f"the run folder {self.folder} cannot be written: {error.strerror}; "
                         "set `output` to a folder that can")

    def _open_output(self, closing: ExitStack, checkpoint: Path | None) -> None:
        self.meter = Meter()
        self.progress = ProgressLine(self.config.name, self.done, self.last_step, shown=self.engine.is_main)
        closing.callback(self.progress.close)
        # not before all was accepted: a start that is refused leaves the folder as it was
        self.engine.together(lambda: self._begin(checkpoint), only_main=True)
        if self.engine.is_main:
            self.trackers = Trackers.of_run(self.folder, self.config.log, self.config.name,
                                            self.config.model_dump(mode="json"), self.done)
            closing.callback(self.trackers.close)
        self.sample_log = None
        if self.config.train.log_samples:
            self.sample_log = SampleLog(self.folder, self.engine.rank, self.engine.world_size)
            closing.callback(self.sample_log.close)
        self._start_sample_log()

    def _start_sample_log(self) -> None:
        identity = self.engine.together(lambda: secrets.token_hex(8), only_main=True)
        if self.sample_log is not None:
            self.sample_log.start(self.done, identity)

    def _announce(self, checkpoint: Path | None) -> None:
        if self.engine.is_main:
            self.trackers.log(self.done, {"event": "resume" if checkpoint else "start", "engine": self.engine.kind,
                                          "processes": self.engine.world_size, "device": self.engine.device.type})
        begin = f"resuming {checkpoint}" if checkpoint else f"starting {self.folder}"
        self.progress.say(f"{begin}: {self.engine.kind}, {self.engine.world_size} process(es) on "
                          f"{self.engine.device.type}, {self.config.train.precision}")

    def _choose_checkpoint(self, newest: bool = False) -> Path | None:
        """The checkpoint to go on from, as ``resume`` says, or the newest; its state becomes the run's.

        It is verified here, once, by all ranks.
        """
        if self.resume == "none" and not newest:
            return None
        with self._allowed("verifying the checkpoint"):
            candidates, is_given = self.engine.together(lambda: self._candidates(newest), only_main=True)
            path, faults = newest_that_verifies(self.engine, candidates, self.watchdog.feed)
            self._name_faults(faults, path, is_given)
            if path is None:
                return self._finished_without_checkpoints()
            self.saved = self.engine.together(lambda: self._state_of(path, is_given and not newest), only_main=True)
        self.unexported = path
        self.done = self.saved["step"]
        self.numbers = BatchNumbers([*self.numbers.excluded, *self.saved["excluded_batches"]])
        self.rollbacks = max(self.rollbacks, self.saved["rollbacks"])
        self.spikes = SpikeWatch(self.config.train.spike, self.saved["usual_losses"])
        return path

    def _candidates(self, newest: bool) -> tuple[list[Path], bool]:
        """The checkpoints to choose from, in their order, and whether there is no other choice. Known to rank 0."""
        if newest and self.unexported is not None:           # later ones are of steps that were given up
            return [self.unexported], True
        if newest or self.resume == "auto":
            return self.store.all(), False
        check_is_checkpoint(Path(self.resume))
        return [Path(self.resume)], True

    def _name_faults(self, faults: dict[Path, str], chosen: Path | None, is_given: bool) -> None:
        """A warning for each checkpoint that was passed over; :class:`UserError` where none is left."""
        if chosen is None and is_given:
            raise unusable(*next(iter(faults.items())))
        lines = [f"passed over {path}: {fault}" for path, fault in faults.items()]
        for line in lines if self.engine.is_main else ():
            log.warning("%s", line)
        if chosen is None and lines:
            raise UserError(f"none of the checkpoints in {self.store.folder} can be used ({lines[0]}); "
                            "--resume none starts over")

    def _state_of(self, path: Path, is_given: bool) -> dict[str, Any]:
        """The state of the checkpoint to go on from; a word on those that one given by the user leaves behind."""
        state = read_run_state(path)
        left = [other.name for other in self.store.all() if step_of(other) > state["step"]]
        if left and is_given:
            log.warning("going on from %s leaves %s behind: deleted by the next save", path, ", ".join(left))
        return state

    def _finished_without_checkpoints(self) -> None:
        """A run whose checkpoints were deleted, to make room, when all was done, is as far as it was."""
        steps = self.engine.together(lambda: finished_steps(self.folder), only_main=True)
        if 0 < steps < self.last_step:
            raise UserError(f"{self.folder} has finished {steps} steps and its checkpoints are gone: there is nothing "
                            "to go on from. --resume none starts over, another `name` begins a run beside it")
        self.done = steps

    def _load(self, checkpoint: Path) -> None:
        for name in self.task.players:
            try:
                self.engine.load_player(name, SavedPlayer(checkpoint / name))
            except (ValueError, RuntimeError, KeyError) as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"{checkpoint} does not fit the player {name!r}: {first}") from error
        self.engine.barrier()

    def _save(self, required: bool) -> None:
        """Begin a checkpoint, and wait for it when it is ``required`` or saves are not asynchronous.

        A failure ends the run only when ``required``, or when it is one too many in a row.
        """
        state = {"format": FORMAT, "step": self.done, "samples": self.samples, "players": list(self.task.players),
                 "engine": self.engine.kind, "world_size": self.engine.world_size, "data": self.identity,
                 "companions": self.companions,
                 "excluded_batches": self.numbers.excluded, "rollbacks": self.rollbacks,
                 "usual_losses": self.spikes.state(), "config": self.config.model_dump(mode="json"),
                 "versions": versions()}
        self._finish_saving()
        with self._allowed("saving"):
            try:
                self.saver.start(self.done, state)
                if required or not self.config.train.async_save:
                    self.saver.finish()
            except SaveFailed as error:
                self._save_failed(error, required)
        self.saved_at = time.monotonic()

    def _finish_saving(self) -> None:
        with self._allowed("saving"):
            try:
                self.saver.finish()
            except SaveFailed as error:
                self._save_failed(error, required=False)

    def _save_failed(self, error: SaveFailed, required: bool) -> None:
        if required or self.saver.failures >= FAILED_SAVES_ALLOWED:
            raise UserError(f"the checkpoint of step {self.saver.step or self.done} cannot be written in "
                            f"{self.store.folder}: {error.strerror or error}; make room or set `output` to a folder "
                            "that can") from error
        if self.engine.is_main:
            log.warning("THE CHECKPOINT of step %d COULD NOT BE WRITTEN (%s); the older ones stay, training goes on, "
                        "and after %d such failures in a row it stops", self.saver.step, error, FAILED_SAVES_ALLOWED)
            self.trackers.log(self.done, {"event": "save_failed", "error": str(error)})

    def _published(self, checkpoint: Path) -> None:
        """On rank 0, in the thread that writes."""
        self._export(checkpoint)
        self.unexported = None
        self.trackers.log(self.saver.step, {"event": "checkpoint", "path": str(checkpoint),
                                            **{f"{name}_seconds": round(seconds, 3)
                                               for name, seconds in self.saver.seconds.items()}})

    def _export(self, checkpoint: Path) -> None:
        """``model/``: what ``from_pretrained`` reads, of the averaged weights where there are any."""
        if checkpoint == self.store.path(0):
            return
        temporary = self.folder / ".model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        export_checkpoint(self.task, checkpoint, temporary)
        replace_folder(temporary, self.folder / MODEL_FOLDER)

    def _mark_finished(self) -> None:
        if self.unexported is not None:      # no step was made since: `model/` may be of an older one
            self._export(self.unexported)
        write_json(self.folder / FINISHED_FILE, {"step": self.done})


def record(meter: Meter, task: Task, phase: Phase, figures: dict[str, Tensor | float | Largest]) -> None:
    """Into the meter, by the phase's name where there are several."""
    prefix = f"{phase.name}/" if len(task.phases) > 1 else ""
    for name, value in figures.items():
        meter.add(prefix + name, value)


def leaves(tree: Any) -> Iterator[Any]:
    """Every value in nested mappings and lists."""
    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    if inner is None:
        yield tree
        return
    for value in inner:
        yield from leaves(value)


def split(batch: Batch, count: int) -> Iterator[Batch]:
    """``batch`` in ``count`` equal parts, in order."""
    if count == 1:
        yield batch
        return
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {key: value[start:start + size] for key, value in batch.items()}


def seed_random(*key: int | str) -> None:
    """Seed torch from what identifies the draw, so that a resumed run draws the same without any saved state."""
    text = ",".join(map(str, key)).encode()
    seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
    torch.default_generator.manual_seed(seed)     # torch.manual_seed spends 0.15 ms on devices that nobody uses
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def in_step(engine: "Engine", batches: Iterable[Batch]) -> Iterator[Batch]:
    """``batches``; where every forward needs all ranks, only as many as the rank with the fewest has."""
    if not engine.evaluates_in_step:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        if engine.largest(int(batch is None))[0]:
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
