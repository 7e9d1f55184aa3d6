"""A run's folder has a clean beginning, shows every step once, and says when there is nothing to do."""

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from toys import SingleTask, ToyData, ToyLoader, toy_run

from dalle.errors import UserError
from dalle.training.checkpoint import CheckpointStore
from dalle.training.engines.launching import create_engine
from dalle.training.export import newest_validation
from dalle.training.lock import FolderLock
from dalle.training.loop import Trainer
from dalle.training.run_folder import exported_step, finished_steps
from dalle.training.run_log import read_log
from dalle.training.settings import LogConfig


class Killed(BaseException):
    """The process is gone, as far as a test in one process can have that."""


def train(folder, *, resume="auto", stop_after=None, killed_at=None, loader=ToyLoader, log=None, **settings):
    class Loader(loader):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__(), self.start):
                if step == killed_at:
                    raise Killed
                yield batch

    config = toy_run(folder, **{"log_every": 1, **settings})
    if log is not None:
        config = config.model_copy(update={"log": LogConfig(**log)})
    return Trainer(SingleTask(), config, create_engine(config), Loader, lambda: ToyLoader(steps=2), resume=resume,
                   stop_after=stop_after).run()


def not_opened(start):
    pytest.fail("the data was opened")


def unchanged(folder) -> dict[str, tuple[bytes, int]]:
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file()}


# -- a clean beginning

def test_starting_over_leaves_nothing_of_the_old_run_but_its_log_aside_and_what_is_the_users(tmp_path):
    pytest.importorskip("tensorboard")
    run = tmp_path / "toy"
    train(tmp_path, preview_every=2, validate_every=2, log_samples=True, log={"tensorboard": True})
    (run / "wandb_id").write_text("deadbeef\n")
    mine = [run / "notes.txt", run / "samples/mine.png", run / "checkpoints/best/weights", run / "tensorboard/notes"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    old_log = (run / "log.jsonl").read_text()
    train(tmp_path, resume="none", stop_after=1)
    assert [path.read_text() for path in mine] == ["mine"] * 4
    assert (run / "log.1.jsonl").read_text() == old_log
    assert {path.name for path in run.iterdir()} == {"checkpoints", "config.yaml", "log.jsonl", "log.1.jsonl", "model",
                                                     "notes.txt", "samples", "tensorboard"}
    assert exported_step(run) == 1 and [path.name for path in (run / "samples").iterdir()] == ["mine.png"]
    assert {path.name for path in (run / "tensorboard").iterdir()} == {"notes"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "step_00000000", "step_00000001"}
    assert newest_validation(run, 1) == {}                        # a card states nothing of the old run
    train(tmp_path, resume="none", stop_after=1)
    assert (run / "log.2.jsonl").exists()


def test_a_model_that_no_run_wrote_is_left_alone(tmp_path):
    (tmp_path / "toy/model").mkdir(parents=True)
    (tmp_path / "toy/model/mine").write_text("mine")
    with pytest.raises(Killed):
        train(tmp_path, resume="none", killed_at=1)
    assert (tmp_path / "toy/model/mine").read_text() == "mine"


def test_a_start_over_that_is_refused_deletes_nothing(tmp_path):
    train(tmp_path)
    before = unchanged(tmp_path)

    def damaged(start):
        raise UserError("the data cannot be read")

    with pytest.raises(UserError, match="the data cannot be read"):
        run_with(tmp_path, damaged, resume="none")
    assert unchanged(tmp_path) == before


def run_with(folder, loader, **options):
    config = toy_run(folder, log_every=1)
    return Trainer(SingleTask(), config, create_engine(config), loader, **options).run()


def test_starting_over_keeps_the_copy_of_a_companion_that_the_run_reads(tmp_path):
    train(tmp_path)
    config = toy_run(tmp_path, log_every=1)
    config = config.model_copy(update={"data": ToyData(train=str(tmp_path / "toy/model"))})
    with pytest.raises(Killed):
        Trainer(SingleTask(), config, create_engine(config), Ending, resume="none").run()
    assert exported_step(tmp_path / "toy") == 4


class Ending(ToyLoader):
    def __iter__(self):
        raise Killed


# -- every step once

def test_steps_past_the_checkpoint_that_a_kill_left_are_shown_once(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = {"steps": 6, "save_every": 2, "async_save": False, "validate_every": 1, "log": {"tensorboard": True}}
    with pytest.raises(Killed):
        train(tmp_path, killed_at=3, **settings)
    run = tmp_path / "toy"
    (run / "log.jsonl").open("a").write('{"step": 4, "validation/error": 99')       # torn
    assert newest_validation(run, 6)
    train(tmp_path, **settings)
    raw = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines() if '"loss"' in line]
    assert raw == [1, 2, 3, 3, 4, 5, 6]
    lines = read_log(run / "log.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "validation/error" in line] == [1, 2, 3, 4, 5, 6]
    shown = accumulator.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in shown.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_what_a_rollback_or_a_new_start_made_void_is_left_out_of_the_log(tmp_path):
    lines = [{"step": 0, "event": "start"}, {"step": 1, "loss": 9.0}, {"step": 0, "event": "start"},
             {"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "event": "rollback", "to_step": 1},
             {"step": 2, "loss": 2.5}, {"step": 3, "loss": 3.0}, {"step": 2, "event": "resume"}, {"step": 3, "loss": 4}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n[1]\n"x"\n{"step": "y"}\n{"ste')
    assert [line["loss"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line] == [1.0, 2.5, 4]
    assert [line["event"] for line in read_log(tmp_path / "log.jsonl") if "event" in line] == ["start", "resume"]


def test_tensorboard_forgets_the_steps_before_a_rollback(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from dalle.training.trackers import TensorBoardTracker

    tracker = TensorBoardTracker(tmp_path, send_images=False, done=0)
    for step in (1, 2, 3):
        tracker.log(step, {"loss": float(step)})
    tracker.log(4, {"event": "rollback", "to_step": 1})
    tracker.log(2, {"loss": 20.0})
    tracker.close()
    shown = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [(event.step, event.value) for event in shown.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


# -- nothing to do

def test_a_finished_run_says_so_and_touches_nothing(tmp_path, capsys):
    train(tmp_path)
    before = unchanged(tmp_path)
    capsys.readouterr()
    summary = run_with(tmp_path, not_opened)
    assert (summary.status, summary.exit_status, summary.steps) == ("finished", 0, 4)
    said = capsys.readouterr().out
    assert "is finished, 4 of 4 steps are done: nothing to do" in said and "resuming" not in said
    assert unchanged(tmp_path) == before


def test_a_run_that_was_killed_before_it_could_say_that_it_is_finished_says_it(tmp_path):
    train(tmp_path)
    (tmp_path / "toy/finished").unlink()
    (tmp_path / "toy/model/source.json").write_text('{"step": 2}')
    assert run_with(tmp_path, not_opened).status == "finished"
    assert finished_steps(tmp_path / "toy") == exported_step(tmp_path / "toy") == 4


def test_fewer_steps_than_are_done_are_refused_and_nothing_is_rewritten(tmp_path):
    train(tmp_path)
    before = unchanged(tmp_path)
    with pytest.raises(UserError, match="train.steps is 3, but .*toy has 4 steps done: nothing was changed. Set it to "
                                        "4 or more, or start over with --resume none"):
        train(tmp_path, steps=3)
    assert unchanged(tmp_path) == before


def test_stop_after_fewer_steps_than_are_done_touches_nothing(tmp_path, capsys):
    train(tmp_path, stop_after=3)
    before = unchanged(tmp_path)
    assert train(tmp_path, stop_after=2).status == "stopped"
    assert "has 3 of 4 steps done, and 2 were asked for" in capsys.readouterr().out
    assert unchanged(tmp_path) == before


def test_a_finished_run_with_more_steps_is_not_finished_until_they_are_done(tmp_path):
    train(tmp_path)
    train(tmp_path, steps=6, stop_after=5)
    assert not (tmp_path / "toy/finished").exists()
    train(tmp_path, steps=6)
    assert finished_steps(tmp_path / "toy") == 6


def test_a_finished_run_whose_checkpoints_were_deleted_is_not_trained_again(tmp_path):
    train(tmp_path)
    CheckpointStore(tmp_path / "toy/checkpoints", 1).clear()
    before = unchanged(tmp_path)
    assert run_with(tmp_path, not_opened).status == "finished"
    with pytest.raises(UserError, match="has finished 4 steps and its checkpoints are gone"):
        train(tmp_path, steps=6)
    assert unchanged(tmp_path) == before
    assert train(tmp_path, resume="none").status == "finished"


def test_a_finished_run_with_a_changed_seed_is_refused_as_any_other(tmp_path):
    train(tmp_path)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        train(tmp_path, seed=1)


# -- one owner

def test_a_second_start_is_refused_while_the_first_runs_and_disturbs_nothing(tmp_path):
    seen = []

    class Starting(ToyLoader):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__()):
                if step == 2:
                    with pytest.raises(UserError, match=f"already running, process {os.getpid()} on ") as refused:
                        run_with(tmp_path, not_opened, resume="none")
                    seen.append(refused)
                yield batch

    assert train(tmp_path, loader=Starting).status == "finished"
    assert len(seen) == 1 and not (tmp_path / "toy/lock").exists()


@pytest.mark.parametrize("end", [UserError("bad data"), RuntimeError("unexpected"), Killed()])
def test_the_folder_is_given_back_at_every_end(tmp_path, end):
    class Failing(ToyLoader):
        def __iter__(self):
            raise end

    with pytest.raises(type(end)):
        train(tmp_path, loader=Failing)
    lock = FolderLock(tmp_path / "toy")
    lock.acquire()
    lock.release()
