"""Steps that are recorded and replayed train as plain ones: on a CPU, by a recorder that repeats operations."""

import logging
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from fake_gpu import step_without_waiting
from tapes import Tape, Trained, trained
from toys import GanTask, OftenPaintsOnceTask, OftenTask, PaintsOnceTask, SingleTask, ToyLoader, toy_run

from dalle.training.capture import PLAIN_STEPS, GraphRecorder, reason_to_run_plainly
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


def both(make, folder, batches) -> tuple[Trained, Trained]:
    """Plain steps of a toy, and the same replayed."""
    batches = list(batches)
    return tuple(trained(capturable(make()), toy_run(folder, steps=len(batches)), batches, folder, recorded=recorded)
                 for recorded in (False, True))


def first(count: int):
    return islice(ToyLoader(), count)


@pytest.mark.parametrize("make", [
    lambda: SingleTask(ADAMW, dropout=0.3), lambda: SingleTask(MUON, dropout=0.3), lambda: GanTask(),
    lambda: PaintsOnceTask(dropout=0.3), lambda: OftenTask(), lambda: OftenPaintsOnceTask()])
def test_replayed_steps_train_as_plain_ones(tmp_path, make):
    plain, replayed = both(make, tmp_path, first(2 * STEPS))
    assert replayed.different_from(plain) == []
    tapes = replayed.tapes
    assert [tape.warmed for tape in tapes] == [PLAIN_STEPS] * len(tapes)
    assert sum(tape.warmed + tape.replayed for tape in tapes) == 2 * STEPS and all(tape.replayed for tape in tapes)


def test_a_step_that_is_not_finite_is_skipped_in_a_replay_too(tmp_path):
    def batches():
        for step, batch in enumerate(first(STEPS)):
            yield {"x": batch["x"] * torch.nan} if step == STEPS - 3 else {"x": batch["x"]}

    plain, replayed = both(lambda: SingleTask(MUON), tmp_path, batches())
    assert [key for key, value in plain.state.items() if not torch.equal(replayed.state[key], value)] == []
    assert replayed.figures["skipped"] == [float(step == STEPS - 3) for step in range(STEPS)]
    assert all(value.isfinite().all() for value in replayed.state.values())
    assert replayed.tapes[0].replayed == STEPS - PLAIN_STEPS


class Reading(SingleTask):
    """Its loss reads a value on the host."""

    def fit(self, networks, batch, step):
        loss = super().fit(networks, batch, step)
        return Loss(loss.total * (2.0 if loss.total.item() > 0 else 1.0), loss.parts)


def test_what_cannot_be_recorded_is_run_plainly_and_said_once(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        plain, replayed = both(lambda: Reading(ADAMW), tmp_path, first(STEPS))
    assert replayed.different_from(plain) == []
    assert sum(tape.replayed for tape in replayed.tapes) == 0
    assert caplog.text.count("cannot be recorded: aten._local_scalar_dense") == 1


class OfTheStep(SingleTask):
    """Its loss follows from the step: a recording of it would be wrong, as the test sees."""

    def fit(self, networks, batch, step):
        loss = super().fit(networks, batch, step)
        return Loss(loss.total * (1 + step), loss.parts)


def test_a_phase_that_depends_on_the_step_differs_where_it_is_recorded_all_the_same(tmp_path):
    plain, replayed = both(lambda: OfTheStep(ADAMW), tmp_path, first(STEPS))
    assert replayed.different_from(plain) != []


def test_batches_of_another_shape_have_a_recording_of_their_own(tmp_path):
    def batches():
        for step, batch in enumerate(first(2 * STEPS)):
            yield batch if step % 2 else {key: value[:4] for key, value in batch.items()}

    plain, replayed = both(lambda: SingleTask(ADAMW), tmp_path, batches())
    assert replayed.different_from(plain) == []
    assert [tape.replayed for tape in replayed.tapes] == [STEPS - PLAIN_STEPS] * 2


class Loaded:
    """A snapshot as a checkpoint gives it back."""

    def __init__(self, sections: dict[str, dict[str, torch.Tensor]]):
        self.section = sections.__getitem__

    def keys(self, section: str) -> list[str]:
        return list(self.section(section))

    def tensor(self, section: str, key: str) -> torch.Tensor:
        return self.section(section)[key].clone()


def test_a_checkpoint_that_is_loaded_ends_the_recordings_of_before(tmp_path):
    """As a rollback does: the optimiser's state is then in other tensors than those that were recorded."""
    def run(recorded: bool) -> dict[str, torch.Tensor]:
        config = toy_run(tmp_path, steps=2 * STEPS)
        engine, task = Engine(config, torch.device("cpu")), capturable(SingleTask(MUON))
        engine.prepare(task, tmp_path)
        engine.record_steps(Tape)
        if not recorded:
            engine.capture = None
        meter, saved = Meter(), {}
        for step, batch in enumerate(first(2 * STEPS)):
            if step == 2:
                saved = engine.snapshot("net")
            if step == STEPS:
                engine.load_player("net", Loaded(saved))
            train_step(engine, task, batch, step, config, meter)
        return engine.snapshot("net")

    plain, replayed = run(False), run(True)
    assert all(torch.equal(value, replayed[section][key])
               for section, values in plain.items() for key, value in values.items())


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


# -- the toys on a GPU that is not there

@pytest.mark.parametrize("make", [lambda: SingleTask(MUON), lambda: SingleTask(ADAMW), GanTask, PaintsOnceTask])
def test_a_step_of_the_loop_itself_does_not_wait_for_the_device(tmp_path, make):
    watch = step_without_waiting(capturable(make()), toy_run(tmp_path), next(iter(ToyLoader())), tmp_path)
    assert watch.on_device > 100


@pytest.mark.parametrize(("wait", "reason"), [
    (lambda x: torch.full((), x.square().mean().item(), device=x.device), "aten._local_scalar_dense"),
    (lambda x: torch.tensor(2.0, device=x.device), "waits for its copy"),
    (lambda x: torch.ones(()).to(x.device, non_blocking=True), "copies from the host in phases that are recorded"),
    (lambda x: x[x > 0].sum(), "aten.index.Tensor"),
    (lambda x: x.nonzero().sum(), "aten.nonzero"),
    (lambda x: x.cpu().sum().to(x.device, non_blocking=True), "reads the device")])
def test_what_waits_for_the_device_is_seen(tmp_path, wait, reason):
    class Waits(SingleTask):
        def fit(self, networks, batch, step):
            loss = super().fit(networks, batch, step)
            return Loss(loss.total * (wait(batch["x"]) if step else 1), loss.parts)

    with pytest.raises(Exception, match=reason):
        step_without_waiting(capturable(Waits(ADAMW)), toy_run(tmp_path), next(iter(ToyLoader())), tmp_path)


# -- what is asked of CUDA graphs, told by stand-ins

class FakeGraphs:
    """``torch.cuda`` as far as a recorder asks it; writes down what it was asked for."""

    def __init__(self, monkeypatch, spoilt: bool = False):
        self.calls: list[tuple] = []
        said, fakes = self.calls, self

        class Graph:
            def __init__(self):
                self.number = sum(call[0] == "begin" for call in said)

            def replay(self):
                said.append(("replay", self.number))

        class Recording:
            def __init__(self, graph, pool, stream, capture_error_mode):
                self.told = (graph.number, pool, stream, capture_error_mode)

            def __enter__(self):
                said.append(("begin", *self.told))
                fakes.stream = self.told[2]

            def __exit__(self, *_):
                said.append(("end", self.told[0]))
                if spoilt:
                    raise RuntimeError("operation failed due to a previous error during capture")
                fakes.stream = "default"

        self.stream = "default"
        for name, fake in {"CUDAGraph": Graph, "graph": Recording, "graph_pool_handle": lambda: "pool",
                           "current_stream": lambda: self.stream,
                           "set_stream": lambda stream: setattr(self, "stream", stream)}.items():
            monkeypatch.setattr(torch.cuda, name, fake)


def test_pieces_are_graphs_of_one_pool_and_one_stream_replayed_in_order(monkeypatch):
    fakes = FakeGraphs(monkeypatch)
    recorder = GraphRecorder("side")
    recorder.stop()                                  # nothing is begun yet
    for _ in range(2):
        recorder.start()
        assert fakes.stream == "side"
        recorder.stop()
    recorder.replay(0)
    recorder.replay(1)
    assert fakes.calls == [("begin", 0, "pool", "side", "thread_local"), ("end", 0),
                           ("begin", 1, "pool", "side", "thread_local"), ("end", 1), ("replay", 0), ("replay", 1)]


def test_a_spoilt_capture_leaves_the_stream_of_before(monkeypatch):
    fakes = FakeGraphs(monkeypatch, spoilt=True)
    recorder = GraphRecorder("side")
    recorder.start()
    recorder.abandon()
    assert fakes.stream == "default" and fakes.calls[-1] == ("end", 0)
