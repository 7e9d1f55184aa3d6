"""What is saved and resumed: the checkpoint that a run goes on from, its checks, what evolves and what is published."""

import logging
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dalle.errors import UserError
from dalle.files import replace_folder, write_json
from dalle.store import EXPORT_FOLDER
from dalle.training.checkpoint import (
    FORMAT,
    CheckpointStore,
    SavedPlayer,
    check_is_checkpoint,
    check_resumable,
    noted_settings,
    read_run_state,
    step_of,
    unusable,
)
from dalle.training.companions import Records, agreed_records, check_companions
from dalle.training.engines.base import Engine
from dalle.training.export import export_checkpoint
from dalle.training.guards import BatchNumbers, SpikeWatch
from dalle.training.run import RunConfig
from dalle.training.run_folder import FINISHED_FILE, exported_step, finished_steps
from dalle.training.saving import SaveFailed, Saver
from dalle.training.settings import SpikeConfig
from dalle.training.steps import Steps
from dalle.training.task import Task
from dalle.training.verifying import newest_that_verifies
from dalle.training.watchdog import Limits
from dalle.training.watching import Output

log = logging.getLogger(__name__)

FAILED_SAVES_ALLOWED = 3                       # in a row


class Evolving:
    """What evolves in a run beside its players and its steps; a checkpoint has it, and a resume goes on with it."""

    def __init__(self, spike: SpikeConfig):
        self._spike = spike
        self.numbers = BatchNumbers()
        self.spikes = SpikeWatch(spike)
        self.rollbacks = 0

    def take(self, saved: Mapping[str, Any]) -> None:
        """Go on from a saved state; what a rollback has left out since stays out, and it counts."""
        self.numbers = BatchNumbers([*self.numbers.excluded, *saved["excluded_batches"]])
        self.rollbacks = max(self.rollbacks, saved["rollbacks"])
        self.spikes = SpikeWatch(self._spike, saved["usual_losses"])

    def state(self) -> dict[str, Any]:
        return {"excluded_batches": self.numbers.excluded, "rollbacks": self.rollbacks,
                "usual_losses": self.spikes.state()}


class Checkpoints:
    """The checkpoints of one run: the one that it goes on from, and those that it writes and publishes.

    ``resume`` is "auto" (the newest that verifies, or none), "none" or a checkpoint's folder. Every method is called on
    every rank, in the same order.
    """

    def __init__(self, task: Task, config: RunConfig, engine: Engine, store: CheckpointStore, resume: str,
                 steps: Steps, evolving: Evolving, limits: Limits, output: Output):
        self._task, self._config, self._engine, self._resume = task, config, engine, resume
        self._steps, self._evolving, self._limits, self._output = steps, evolving, limits, output
        self._folder = Path(config.folder)
        self.store = store
        self.saver = Saver(store, engine, list(task.players), self._published)
        self.saved: dict[str, Any] = {}                # the state of the checkpoint that the run goes on from
        self.unexported: Path | None = None            # that checkpoint, until the next one is published
        self._companions: Records = {}
        self._identity: Mapping[str, Any] = {}         # of the data
        self._saved_at = time.monotonic()

    # -- going on

    def find(self) -> Path | None:
        """The checkpoint to go on from, as ``resume`` says, now the run's state; or None, for a new run.

        Refuses, before anything is touched, what may not go on from it; its data is not open yet.
        """
        self._companions = agreed_records(self._engine, self._task)
        checkpoint = self.choose()
        if checkpoint is not None:
            self._engine.together(lambda: self._check(checkpoint), only_rank0=True)
        return checkpoint

    def choose(self, newest: bool = False) -> Path | None:
        """The checkpoint that ``resume`` says, or the newest, verified here, once, by all ranks; its state becomes the
        run's."""
        if self._resume == "none" and not newest:
            return None
        with self._limits.allow("verifying the checkpoint"):
            candidates, is_given = self._engine.together(lambda: self._candidates(newest), only_rank0=True)
            path, faults = newest_that_verifies(self._engine, candidates, self._limits.feed)
            self._name_faults(faults, path, is_given)
            if path is None:
                return self._finished_without_checkpoints()
            self.saved = self._engine.together(lambda: self._state_of(path, is_given and not newest), only_rank0=True)
        self.unexported = path
        self._steps.done = self.saved["step"]
        self._evolving.take(self.saved)
        return path

    def check_data(self, checkpoint: Path | None, identity: Mapping[str, Any]) -> None:
        """Take ``identity`` as that of the run's data; refused where ``checkpoint`` was trained on other data."""
        self._identity = dict(identity)
        if checkpoint is not None:
            check_resumable(checkpoint, self.saved, self._config, self._identity, list(self._task.players))

    def load(self, checkpoint: Path) -> None:
        """Take the players' weights and all that their optimisers and averages hold from ``checkpoint``."""
        for name in self._task.players:
            try:
                self._engine.load_player(name, SavedPlayer(checkpoint / name))
            except (ValueError, RuntimeError, KeyError) as error:
                first = str(error).strip().splitlines()[0]
                raise UserError(f"{checkpoint} does not fit the player {name!r}: {first}") from error
        self._engine.barrier()

    def _check(self, checkpoint: Path) -> None:
        check_resumable(checkpoint, self.saved, self._config, self.saved["data"], list(self._task.players))
        for line in noted_settings(self.saved["config"], self._config):
            log.warning("going on with another setting than the checkpoint's: %s", line)
        check_companions(str(checkpoint), self.saved, self._config.model_dump(mode="json"), self._companions,
                         copies=self._folder / EXPORT_FOLDER, accepted=self._config.train.accept_companions)

    def _candidates(self, newest: bool) -> tuple[list[Path], bool]:
        """The checkpoints to choose from, in their order, and whether there is no other choice. Known to rank 0."""
        if newest and self.unexported is not None:           # later ones are of steps that were given up
            return [self.unexported], True
        if newest or self._resume == "auto":
            return self.store.all(), False
        check_is_checkpoint(Path(self._resume))
        return [Path(self._resume)], True

    def _name_faults(self, faults: dict[Path, str], chosen: Path | None, is_given: bool) -> None:
        """A warning for each checkpoint that was passed over; :class:`UserError` where none is left."""
        if chosen is None and is_given:
            raise unusable(*next(iter(faults.items())))
        lines = [f"passed over {path}: {fault}" for path, fault in faults.items()]
        for line in lines if self._engine.is_rank0 else ():
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
        steps = self._engine.together(lambda: finished_steps(self._folder), only_rank0=True)
        if 0 < steps < self._steps.last:
            raise UserError(f"{self._folder} has finished {steps} steps and its checkpoints are gone: there is nothing "
                            "to go on from. --resume none starts over, another `name` begins a run beside it")
        self._steps.done = steps

    # -- saving

    def state(self) -> dict[str, Any]:
        """``state.json``: what a resume takes, and what people and exports want to know, beside the players."""
        return {"format": FORMAT, "step": self._steps.done, "samples": self._steps.samples,
                "players": list(self._task.players), "engine": self._engine.kind,
                "world_size": self._engine.world_size, "data": self._identity, "companions": self._companions,
                **self._evolving.state(), "config": self._config.model_dump(mode="json"), "versions": versions()}

    def save(self, required: bool) -> None:
        """Begin a checkpoint, and wait for it when it is ``required`` or saves are not asynchronous.

        A failure ends the run only when ``required``, or when it is one too many in a row.
        """
        state = self.state()
        self.finish()
        with self._limits.allow("saving"):
            try:
                self.saver.start(self._steps.done, state)
                if required or not self._config.train.async_save:
                    self.saver.finish()
            except SaveFailed as error:
                self.failed(error, required)
        self._saved_at = time.monotonic()

    def is_late(self) -> bool:
        """Whether the clock asks for a save: rank 0's, whose word all take."""
        minutes = self._config.train.save_minutes
        return (self._engine.is_rank0 and minutes is not None
                and time.monotonic() - self._saved_at >= 60 * minutes)

    def advance(self, busy: bool, failed: bool) -> None:
        """Move a running save on, of which some rank is ``busy`` or has ``failed``."""
        try:
            self.saver.advance(busy, failed)
        except SaveFailed as error:
            self.failed(error, required=False)

    def finish(self) -> None:
        """Wait until a running save is published."""
        with self._limits.allow("saving"):
            try:
                self.saver.finish()
            except SaveFailed as error:
                self.failed(error, required=False)

    def failed(self, error: SaveFailed, required: bool) -> None:
        """Go on without the checkpoint, unless it was ``required`` or one too many in a row."""
        if required or self.saver.failures >= FAILED_SAVES_ALLOWED:
            raise UserError(f"the checkpoint of step {self.saver.step or self._steps.done} cannot be written in "
                            f"{self.store.folder}: {error.strerror or error}; make room or set `output` to a folder "
                            "that can") from error
        if self._engine.is_rank0:
            log.warning("THE CHECKPOINT of step %d COULD NOT BE WRITTEN (%s); the older ones stay, training goes on, "
                        "and after %d such failures in a row it stops", self.saver.step, error, FAILED_SAVES_ALLOWED)
            self._output.log(self._steps.done, {"event": "save_failed", "error": str(error)})

    def close(self) -> None:
        """Wait for what this rank still writes."""
        self.saver.close()

    # -- publishing

    def mark_finished(self) -> None:
        """Note, on rank 0, that all steps are done, with ``model/`` of the last of them."""
        if self.unexported is not None:      # no step was made since: `model/` may be of an older one
            self._export(self.unexported)
        write_json(self._folder / FINISHED_FILE, {"step": self._steps.done})

    def mend_finished(self) -> None:
        """The same where a kill kept a finished run from it."""
        if {finished_steps(self._folder), exported_step(self._folder)} != {self._steps.done}:
            self.mark_finished()

    def _published(self, checkpoint: Path) -> None:
        """On rank 0, in the thread that writes."""
        self._export(checkpoint)
        self.unexported = None
        self._output.log(self.saver.step, {"event": "checkpoint", "path": str(checkpoint),
                                           **{f"{name}_seconds": round(seconds, 3)
                                              for name, seconds in self.saver.seconds.items()}})

    def _export(self, checkpoint: Path) -> None:
        """``model/``: what ``from_pretrained`` reads, of the averaged weights where there are any."""
        if checkpoint == self.store.path(0):
            return
        temporary = self._folder / ".model.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        export_checkpoint(self._task, checkpoint, temporary)
        replace_folder(temporary, self._folder / EXPORT_FOLDER)


def versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__}
