"""Steps that are recorded and replayed train as plain ones: on a CPU, by a recorder that repeats operations."""

import logging
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from tapes import TapedEngine
from toys import GanTask, OftenPaintsOnceTask, OftenTask, PaintsOnceTask, SingleTask, ToyLoader, toy_run

from dalle.training.capture import PLAIN_STEPS, reason_to_run_plainly
from dalle.training.engines.base import Engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from dalle.training.optimizers import OptimizerConfig
from dalle.training.task import Loss

STEPS = PLAIN_STEPS + 6
ADAMW = OptimizerConfig(lr=1e-2, weight_decay=0.1, clip=0.5, warmup=4, ema=0.8, ema_every=2)
MUON = ADAMW.model_copy(update={"name": "muon"})


def capturable(task):
    task.phases = [replace(phase, capturable=True) for phase in task.phases]
    return task


def trained(task, tmp_path, recorded: bool, steps: int = STEPS, batches=None, **settings):
    """All that evolves after some steps, their log figures, and the recorder's tapes."""
    config = toy_run(tmp_path, steps=steps, **settings)
    engine = Engine(config, torch.device("cpu"))
    engine.prepare(capturable(task), tmp_path)
    # both read the rates from tensors, which are fp32
    taped = TapedEngine(engine)
    if not recorded:
        engine.capture = None
    meter = Meter()
    for step, batch in zip(range(steps), batches or ToyLoader(), strict=False):
        train_step(engine, task, batch, step, config, meter)
    state = {f"{name}/{section}/{key}": value.clone() for name, member in engine.members.items()
             for section, key, value in engine.whole_state(member)}
    figures = {name: [float(value) for value in values] for name, values in meter._figures.items()}
    return state, figures, taped.tapes


@pytest.mark.parametrize("make", [
    lambda: SingleTask(ADAMW, dropout=0.3), lambda: SingleTask(MUON, dropout=0.3), lambda: GanTask(),
    lambda: PaintsOnceTask(dropout=0.3), lambda: OftenTask(), lambda: OftenPaintsOnceTask()])
def test_replayed_steps_train_as_plain_ones(tmp_path, make):
    expected, logged, _ = trained(make(), tmp_path, recorded=False, steps=2 * STEPS)
    found, replayed, tapes = trained(make(), tmp_path, recorded=True, steps=2 * STEPS)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert replayed == logged
    assert [tape.warmed for tape in tapes] == [PLAIN_STEPS] * len(tapes)
    assert sum(tape.warmed + tape.replayed for tape in tapes) == 2 * STEPS and all(tape.replayed for tape in tapes)


def test_a_step_that_is_not_finite_is_skipped_in_a_replay_too(tmp_path):
    def batches():
        for step, batch in enumerate(ToyLoader()):
            if step == STEPS - 3:
                batch["x"] = batch["x"] * torch.nan
            yield batch

    expected, logged, _ = trained(SingleTask(MUON), tmp_path, recorded=False, batches=batches())
    found, replayed, tapes = trained(SingleTask(MUON), tmp_path, recorded=True, batches=batches())
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert replayed["skipped"] == logged["skipped"] == [float(step == STEPS - 3) for step in range(STEPS)]
    assert all(value.isfinite().all() for value in found.values()) and tapes[0].replayed == STEPS - PLAIN_STEPS


class Reading(SingleTask):
    """Its loss reads a value on the host."""

    def fit(self, networks, batch, step):
        loss = super().fit(networks, batch, step)
        return Loss(loss.total * (2.0 if loss.total.item() > 0 else 1.0), loss.parts)


def test_what_cannot_be_recorded_is_run_plainly_and_said_once(tmp_path, caplog):
    expected, *_ = trained(Reading(ADAMW), tmp_path, recorded=False)
    with caplog.at_level(logging.WARNING):
        found, _, tapes = trained(Reading(ADAMW), tmp_path, recorded=True)
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert sum(tape.replayed for tape in tapes) == 0
    assert caplog.text.count("cannot be recorded: aten._local_scalar_dense") == 1


class OfTheStep(SingleTask):
    """Its loss follows from the step: a recording of it would be wrong, as the test sees."""

    def fit(self, networks, batch, step):
        loss = super().fit(networks, batch, step)
        return Loss(loss.total * (1 + step), loss.parts)


def test_a_phase_that_depends_on_the_step_differs_where_it_is_recorded_all_the_same(tmp_path):
    expected, *_ = trained(OfTheStep(ADAMW), tmp_path, recorded=False)
    found, *_ = trained(OfTheStep(ADAMW), tmp_path, recorded=True)
    assert any(not torch.equal(found[key], expected[key]) for key in expected)


def test_batches_of_another_shape_have_a_recording_of_their_own(tmp_path):
    def batches():
        for step, batch in enumerate(ToyLoader()):
            yield batch if step % 2 else {key: value[:4] for key, value in batch.items()}

    expected, *_ = trained(SingleTask(ADAMW), tmp_path, recorded=False, steps=2 * STEPS, batches=batches())
    found, _, tapes = trained(SingleTask(ADAMW), tmp_path, recorded=True, steps=2 * STEPS, batches=batches())
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert [tape.replayed for tape in tapes] == [STEPS - PLAIN_STEPS] * 2


def test_when_steps_are_recorded():
    task, usual = capturable(SingleTask()), {"alone_on_cuda": True, "accumulation": 1, "compiled": False}
    assert reason_to_run_plainly(None, task, **usual) is None
    assert reason_to_run_plainly(False, task, **usual) == "train.capture is false"
    for changed, reason in (({"alone_on_cuda": False}, "single process on a GPU"), ({"compiled": True}, "compiled"),
                            ({"accumulation": 2}, "several micro-batches")):
        assert reason in reason_to_run_plainly(True, task, **{**usual, **changed})
    assert "the phase 'fit'" in reason_to_run_plainly(None, SingleTask(), **usual)
    task.players["net"].module = torch.nn.Linear(10_000, 6_000, device="meta")
    assert "not bound by the host" in reason_to_run_plainly(None, task, **usual)
    assert reason_to_run_plainly(True, task, **usual) is None
