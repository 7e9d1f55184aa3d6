"""THE loop: it walks a task's phases and never asks which kind of task it runs."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dalle.data.batch import Batch, BatchSource
from dalle.errors import EXIT_STOPPED_BY_SIGNAL, UserError
from dalle.training.agreement import Agreement
from dalle.training.capture import Seed
from dalle.training.checkpoint import CheckpointStore
from dalle.training.determinism import deterministic_algorithms
from dalle.training.engines.base import Engine, Outcome
from dalle.training.feeding import Feed
from dalle.training.figures import Max
from dalle.training.guards import SkipCounter, lost_processes_named
from dalle.training.meter import Meter
from dalle.training.profiling import ProfileWindow
from dalle.training.randomness import seed_random
from dalle.training.run import RunConfig
from dalle.training.run_folder import RunFolder
from dalle.training.signals import StopSignals
from dalle.training.state import Checkpoints, Evolving
from dalle.training.steps import Steps
from dalle.training.task import Phase, Task, detached
from dalle.training.watchdog import Limits, Watchdog
from dalle.training.watching import Evaluate, LogLines, Looks, Output, ValidationLoader

GO_ON, BUDGET_SPENT, SIGNALLED = 0, 1, 2       # what the ranks agree on after every step; the largest wins
EARLY_STEPS = 2        # may take long: the first, in which much is made, and the next, in which others wait for that


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
    """What came of a phase: this rank's losses, 0-d on the device, and parts, one a micro-batch; the player's step."""

    phase: Phase
    losses: list[Tensor]
    parts: list[dict[str, Tensor | float | Max]]
    outcome: Outcome

    def mapped(self, work: Callable[[Tensor], Tensor]) -> "Played":
        """The same with ``work`` done to every tensor in it."""
        def done(value: Any) -> Any:
            if isinstance(value, Max):
                return Max(done(value.maximum))
            return work(value) if isinstance(value, Tensor) else value

        return Played(self.phase, [work(loss) for loss in self.losses],
                      [{name: done(value) for name, value in parts.items()} for parts in self.parts],
                      Outcome(work(self.outcome.grad_norm), work(self.outcome.skipped)))


def train_step(engine: Engine, task: Task, batch: Batch, step: int, config: RunConfig, meter: Meter) \
        -> list[Played]:
    """One step on this rank's share of the batch: every phase that is due, over all micro-batches, moves its player."""
    def seed(step: int, *draws: int | str) -> None:
        micro_batch, *rest = draws
        seed_random(config.seed, step, micro_batch, engine.rank, *rest)

    micro_batches = []
    for index, part in enumerate(split(batch, engine.accumulation)):
        seed(step, index, 0)
        with meter.part("prepare"), torch.no_grad(), engine.autocast():
            micro_batches.append(task.prepare(engine.to_device(task.on_host(part, step)), engine.networks, step))
    engine.set_rates(step, config.train.steps)

    def play(micro_batches: list[Batch], seed: Seed) -> list[Played]:
        return play_phases(engine, task, micro_batches, step, seed, meter)

    if engine.capture is None:
        played = play(micro_batches, seed)
    else:
        due = tuple(phase.name for phase in task.phases if phase.is_due(step))
        with meter.part("phases"):      # of a replay all that there is
            played = engine.capture.play(due, micro_batches, step, seed, play)
    for one in played:
        record(meter, task, one)
    with meter.part("average"):
        engine.update_ema(step + 1)
    return played


def play_phases(engine: Engine, task: Task, micro_batches: list[Batch], step: int, seed: Seed,
                meter: Meter) -> list[Played]:
    """The phases of ``step`` that are due, on prepared micro-batches; the draws are seeded by ``seed``."""
    count = engine.accumulation
    waiting: dict[tuple[str, int], Batch] = {}       # (phase, micro-batch) -> what it made ahead, with its graph
    for phase in task.phases:
        if phase.ahead:
            with meter.part(named(task, phase, "ahead")):
                made = make_ahead(engine, phase, micro_batches, step, seed)
            micro_batches = [batch | detached(own) for batch, own in zip(micro_batches, made, strict=True)]
            waiting |= {(phase.name, index): own for index, own in enumerate(made)}

    played = []
    for number, phase in enumerate(task.phases, start=1):
        if not phase.is_due(step):
            continue
        for repeat in range(phase.repeats):
            engine.begin_phase(phase)
            losses, parts = [], []
            for index, micro_batch in enumerate(micro_batches):
                seed(step, index, number, repeat)
                engine.begin_micro_batch(last=index + 1 == count)
                with meter.part(named(task, phase, "forward")), engine.autocast():
                    own = waiting.pop((phase.name, index), None) or phase.make(engine.networks, micro_batch, step)
                    loss = phase.loss(engine.networks, micro_batch | own, step)
                with meter.part(named(task, phase, "backward")):
                    engine.backward(loss.total / count)
                losses.append(loss.total.detach())
                parts.append(loss.parts)
            with meter.part(named(task, phase, "step")):
                outcome = engine.step()
            played.append(Played(phase, losses, parts, outcome))
    return played


def make_ahead(engine: Engine, phase: Phase, micro_batches: list[Batch], step: int, seed: Seed) -> list[Batch]:
    """What ``phase`` makes before the step's phases, of each micro-batch; with its graph where the phase is due."""
    engine.begin_phase(phase)
    made = []
    for index, micro_batch in enumerate(micro_batches):
        seed(step, index, phase.name)
        engine.begin_micro_batch(last=index + 1 == len(micro_batches))
        with torch.set_grad_enabled(phase.is_due(step)), engine.autocast():
            made.append(phase.make(engine.networks, micro_batch, step))
    return made


class Trainer:
    """One run of one task, from the newest checkpoint to the last step.

    ``train_loader(number)`` gives this rank's batches from the one of that number on, endlessly;
    ``validation_loader()`` a finite iterable. ``resume`` is "auto" (the newest checkpoint that verifies, or none),
    "none" (start over: what the run wrote is deleted) or a checkpoint's folder. ``stop_after`` ends the run, with a
    checkpoint, once so many steps are done, without changing its schedules. ``evaluate(networks, came_forward)``
    gives figures of what the averaged networks make, every ``train.evaluate_every`` steps, and calls ``came_forward()``
    after each part of it, none of which may take longer than ``engine.timeout_minutes``.
    """

    def __init__(self, task: Task, config: RunConfig, engine: Engine, train_loader: Callable[[int], BatchSource],
                 validation_loader: ValidationLoader | None = None, *, resume: str = "auto",
                 stop_after: int | None = None, evaluate: Evaluate | None = None):
        self.task, self.config, self.engine, self.resume = task, config, engine, resume
        self.steps = Steps(config.train, stop_after)
        self.evolving = Evolving(config.train.spike)
        self.watchdog = Watchdog(engine.rank)
        self.limits = Limits(self.watchdog, config.engine, self.steps)
        store = CheckpointStore(Path(config.folder) / "checkpoints", config.train.keep_last)
        self.folder = RunFolder(config, store)
        self.feed, self.meter = Feed(train_loader), Meter(engine.device)
        self.profile = ProfileWindow(config.train.profile, self.folder.path, engine.rank, engine.device,
                                     self.meter.timings)
        self.skips = SkipCounter(config.train.max_skipped)
        self.output = Output(config, engine, self.steps)
        self.checkpoints = Checkpoints(task, config, engine, store, resume, self.steps, self.evolving, self.limits,
                                       self.output)
        self.log_lines = LogLines(task, config, engine, self.steps, self.feed, self.meter, self.skips, self.output)
        self.looks = Looks(task, config, engine, self.steps, self.limits, self.output, validation_loader, evaluate)

    # -- the run

    def run(self) -> Summary:
        """Train; raises :class:`UserError` for what the user can mend, :class:`LostProcess` for a dead or hung one."""
        began = time.monotonic()
        with ExitStack() as closing:
            closing.enter_context(deterministic_algorithms(self.config.train.deterministic))
            closing.enter_context(self.watchdog)
            closing.callback(self.folder.release)
            closing.callback(self._leave)
            closing.callback(self.checkpoints.close)
            closing.enter_context(lost_processes_named(self.engine.rank, self.watchdog))
            signals = closing.enter_context(StopSignals(self.config.train.stop_signals, self.engine.is_rank0))
            # not watched: reading the headers of new shards takes as long as it takes, and so does another's end
            self.engine.together(self.folder.open, only_rank0=True)
            checkpoint = self.checkpoints.find()
            if self.steps.done >= self.steps.last:
                return self._summary(self._nothing_to_do(checkpoint), began)
            closing.callback(self.feed.close)
            self.feed.open(self.steps.done, self.evolving.numbers)
            self.checkpoints.check_data(checkpoint, self.feed.source.identity)
            self.engine.prepare(self.task, self.folder.path)
            if checkpoint is not None:
                self.checkpoints.load(checkpoint)
            self.meter.restart()
            # not before all was accepted: a start that is refused leaves the folder as it was
            self.engine.together(lambda: self.folder.begin(anew=checkpoint is None, keep_model=self.resume != "none"),
                                 only_rank0=True)
            closing.callback(self.output.close)
            self.output.open()
            self._announce(checkpoint)
            if checkpoint is None:
                self.checkpoints.save(required=True)   # a path that cannot be written fails here, not hours later
            signals.begin()
            status = self._loop(signals, began)
        return self._summary(status, began)

    def _loop(self, signals: StopSignals, began: float) -> str:
        settings, steps, decision, early = self.config.train, self.steps, GO_ON, EARLY_STEPS
        agreement = Agreement(self.engine, lambda: self._wishes(signals, began))
        while steps.done < steps.last and decision == GO_ON:
            if self.profile.is_over(steps.done):
                self._write_trace()
            with self.limits.allow("waiting for data", early > 0), self.meter.waiting():
                batch = self.feed.next(steps.done, self.evolving.numbers)
            with self.limits.allow("training", early > 0):
                played = train_step(self.engine, self.task, batch, steps.done, self.config, self.meter)
            steps.done += 1
            self.meter.steps += 1
            self.output.advance(batch)
            with self.limits.allow("agreeing with the other ranks", early > 0):
                self._count_skips(played, batch)
                if settings.spike.zscore is not None and self._roll_back_on_spike(played, batch):
                    early = EARLY_STEPS
                    continue
                with self.meter.timings.host("agreement"):
                    decision, save_due = self._agreed(agreement)
                if steps.due(settings.log_every):
                    self.log_lines.write()
            early -= 1
            ends = decision != GO_ON or steps.done == steps.last
            with self.meter.paused():
                if ends or save_due or steps.due(settings.save_every):
                    with self.meter.timings.host("save"):
                        self.checkpoints.save(required=ends)
                self._look()
            if not ends:
                agreement.ask()
        return self._end(decision)

    def _wishes(self, signals: StopSignals, began: float) -> tuple[int, ...]:
        """What this rank has to say at the end of a step: to go on, or why not; whether its clock asks for a save;
        whether it still writes the one before, or has failed to."""
        saver = self.checkpoints.saver
        return self._wish(signals, began), int(self.checkpoints.is_late()), int(saver.busy), int(saver.failed)

    def _agreed(self, agreement: Agreement) -> tuple[int, bool]:
        """What all ranks do next: (go on, or why not; whether a save is due by the clock). Moves a running save on."""
        answer = agreement.answer()
        if answer is None:
            return GO_ON, False
        decision, save_due, busy, failed = answer
        self.checkpoints.advance(bool(busy), bool(failed))
        return decision, bool(save_due)

    def _wish(self, signals: StopSignals, began: float) -> int:
        minutes, now = self.config.train.minutes, time.monotonic()
        if signals.received or (self.engine.is_rank0 and self.folder.stop_asked()):
            return SIGNALLED
        return BUDGET_SPENT if minutes is not None and now - began >= 60 * minutes else GO_ON

    def _look(self) -> None:
        """What is due of validation, preview and evaluation. A save that was begun is published first: one of them may
        fail, or be killed, and must not cost the steps since the checkpoint before."""
        looks = self.looks.due()
        if not looks:
            return
        self.checkpoints.finish()
        self.engine.share_buffers()
        for look in looks:
            look()

    def _write_trace(self) -> None:
        with self.limits.allow("writing a trace"), self.meter.paused():
            self.output.say(f"a trace for chrome://tracing or ui.perfetto.dev: {self.profile.write()}")

    # -- what goes wrong

    def _count_skips(self, played: list[Played], batch: Batch) -> None:
        """On a CPU in every step; elsewhere, where it reads the device, only when a line is due anyway."""
        self.skips.add(self.steps.done - 1, keys_of(batch), [(one.phase, one.outcome) for one in played])
        if self.engine.device.type != "cpu" and not self.steps.due(self.config.train.log_every) \
                and self.steps.done < self.steps.last:
            return
        for entry in self.skips.read():
            keys = self._of_all_ranks(entry.keys)
            self.output.log(entry.step + 1, {"event": "skipped", "phase": entry.phase.name,
                                             "player": entry.phase.player, "keys": keys})
            self.skips.check(entry, keys)

    def _roll_back_on_spike(self, played: list[Played], batch: Batch) -> bool:
        """Go back to the newest checkpoint, and past the batch, when a loss has jumped on the average of all ranks."""
        losses = self.engine.all_reduce_mean(
            torch.stack([torch.stack(one.losses).mean().float() for one in played])).tolist()
        scores = [self.evolving.spikes.zscore(one.phase.name, loss) for one, loss in zip(played, losses, strict=True)]
        index = next((index for index, score in enumerate(scores) if score is not None), None)
        if index is None:
            return False
        self._roll_back(played[index].phase, losses[index], scores[index], batch)
        return True

    def _roll_back(self, phase: Phase, loss: float, score: float, batch: Batch) -> None:
        step, spike, evolving = self.steps.done - 1, self.config.train.spike, self.evolving
        keys = self._of_all_ranks(keys_of(batch))
        evolving.rollbacks += 1
        if evolving.rollbacks > spike.max_rollbacks:
            raise UserError(f"player {phase.player!r}, phase {phase.name!r}: the loss jumped to {loss:.4g} in "
                            f"step {step}, {evolving.rollbacks} times so far, above train.spike.max_rollbacks="
                            f"{spike.max_rollbacks}; lower the learning rate, or look at the data")
        self.checkpoints.finish()
        excluded = evolving.numbers.exclude(step, spike.skip_batches)
        self.checkpoints.load(self.checkpoints.choose(newest=True))
        self.meter.restart()                           # figures of the steps that were given up
        self.feed.close()
        self.feed.open(self.steps.done, evolving.numbers)
        size = self.config.train.batch_size
        self.output.log(step + 1, {
            "event": "rollback", "phase": phase.name, "player": phase.player, "loss": loss, "zscore": score,
            "to_step": self.steps.done, "keys": keys,
            "left_out_positions": [[number * size, (number + 1) * size - 1] for number in excluded]})
        self.output.start_samples()
        self.output.say(f"the loss of {phase.name!r} jumped to {loss:.4g} in step {step}: back to step "
                        f"{self.steps.done}, without the batch")

    def _of_all_ranks(self, keys: list[str]) -> list[str]:
        return [key for share in self.engine.gather(keys) for key in share]

    # -- how it begins and ends

    def _announce(self, checkpoint: Path | None) -> None:
        engine = self.engine
        self.output.log(self.steps.done, {"event": "resume" if checkpoint else "start", "engine": engine.kind,
                                          "processes": engine.world_size, "device": engine.device.type,
                                          "computes": engine.computes})
        begin = f"resuming {checkpoint}" if checkpoint else f"starting {self.folder.path}"
        self.output.say(f"{begin}: {engine.kind}, {engine.world_size} process(es) on {engine.device.type}, "
                        f"{engine.computes}")

    def _nothing_to_do(self, checkpoint: Path | None) -> str:
        """The end of a start that has no step to make: it opens no data, and writes only what a kill kept from it."""
        done, total, asked, folder = self.steps.done, self.steps.total, self.steps.last, self.folder.path
        if done > total:
            raise UserError(f"train.steps is {total}, but {folder} has {done} steps done: nothing was "
                            f"changed. Set it to {done} or more, or start over with --resume none")
        finished = done == total
        if finished and checkpoint is not None:
            self.engine.together(self.checkpoints.mend_finished, only_rank0=True)
        if self.engine.is_rank0:
            print(f"{folder} is finished, {total} of {total} steps are done: nothing to do (a larger train.steps "
                  "goes on, --resume none starts over)" if finished else
                  f"{folder} has {done} of {total} steps done, and {asked} were asked for: nothing to do", flush=True)
        return "finished" if finished else "stopped"

    def _end(self, decision: int) -> str:
        if self.profile.is_open:
            self._write_trace()
        share = " of this process" if self.engine.world_size > 1 else ""
        for line in self.feed.source.report():
            self.output.say(f"samples{share} {line}")
        if self.steps.done == self.steps.total:
            self.engine.together(self.checkpoints.mark_finished, only_rank0=True)
            return "finished"
        if decision == SIGNALLED:
            self.output.say(f"stopped by a signal after step {self.steps.done}; start again to go on")
            return "signal"
        return "minutes" if decision == BUDGET_SPENT else "stopped"

    def _summary(self, status: str, began: float) -> Summary:
        return Summary(status, self.steps.done, self.steps.samples, time.monotonic() - began, self.folder.path,
                       self.output.last)

    def _leave(self) -> None:
        with self.limits.allow("leaving the process group"):
            self.engine.close()


def keys_of(batch: Batch) -> list[str]:
    return list(batch.get("key", ()))


def record(meter: Meter, task: Task, played: Played) -> None:
    """Into the meter."""
    for loss, parts in zip(played.losses, played.parts, strict=True):
        for name, value in {"loss": loss, **parts}.items():
            meter.add(named(task, played.phase, name), value)
    meter.add(named(task, played.phase, "grad_norm"), played.outcome.grad_norm)
    meter.add(named(task, played.phase, "skipped"), played.outcome.skipped)


def named(task: Task, phase: Phase, name: str) -> str:
    """What a figure, or the time of a part, is called: by the phase's name, too, where there are several."""
    return f"{phase.name}/{name}" if len(task.phases) > 1 else name


def split(batch: Batch, count: int) -> Iterator[Batch]:
    """``batch`` in ``count`` equal parts, in order."""
    if count == 1:
        yield batch
        return
    size = len(next(iter(batch.values()))) // count
    for start in range(0, size * count, size):
        yield {key: value[start:start + size] for key, value in batch.items()}
