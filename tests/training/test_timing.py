"""Where the time of a step goes: parts by the clock of the processor or events of the device, in log and trace."""

import json
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from toys import GanTask, PaintsOnceTask, SingleTask, ToyLoader, toy_run

from dalle.training import timing
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.timing import Timings
from dalle.training.watching import seconds_by_part, seconds_of_ranks

ONE_PHASE = ("data", "prepare", "forward", "backward", "step", "average", "agreement")


class Clock:
    """In place of the processor's: each look at it takes a second, and what is done, what it says."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(timing.time, "perf_counter", self.look)

    def look(self) -> float:
        self.now += 1.0
        return self.now


class Device:
    """In place of ``torch.cuda``: a stream whose work takes the seconds it is given; events have its time."""

    def __init__(self, monkeypatch):
        self.clock, self.made, self.waits, self.captures = 0.0, 0, 0, False
        device = self

        class Event:
            def __init__(self, enable_timing: bool):
                assert enable_timing
                device.made += 1

            def record(self) -> None:
                assert not device.captures
                self.time = device.clock

            def synchronize(self) -> None:
                device.waits += 1

            def elapsed_time(self, other: "Event") -> float:
                return 1e3 * (other.time - self.time)              # torch: milliseconds

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.captures)

    def work(self, seconds: float) -> None:
        self.clock += seconds


def train(folder, task, **settings) -> list[dict]:
    """The lines of figures of a run."""
    config = toy_run(folder, **settings)
    Trainer(task, config, create_engine(config), ToyLoader).run()
    lines = [json.loads(line) for line in (folder / "toy/log.jsonl").read_text().splitlines()]
    return [line for line in lines if "seconds_per_step" in line]


# -- the sums

def test_parts_are_summed_by_name_until_they_are_read(monkeypatch):
    clock, timings = Clock(monkeypatch), Timings()
    for seconds in (3, 4):
        with timings.host("data"):
            clock.now += seconds
    with timings.device("step"):                     # on a CPU the same clock
        pass
    assert timings.read() == {"data": 3 + 4 + 2, "step": 1} and timings.read() == {}


def test_parts_on_a_gpu_are_timed_by_its_events_and_nothing_waits_before_they_are_read(monkeypatch):
    device, timings = Device(monkeypatch), Timings(torch.device("cuda", 0))
    for _ in range(2):
        for name, seconds in (("forward", 2.0), ("backward", 3.0), ("forward", 0.5)):
            with timings.device(name):
                device.work(seconds)
            device.work(100.0)
        assert device.waits == 0
        assert timings.read() == {"forward": 2.5, "backward": 3.0}
        device.waits = 0
    assert device.made == 6                          # those that were read are taken again


def test_a_graph_that_is_captured_gets_no_event_and_no_time(monkeypatch):
    device, timings = Device(monkeypatch), Timings(torch.device("cuda", 0))
    with timings.device("forward"):
        device.captures = True
    with timings.device("forward"):
        pass
    device.captures = False
    assert timings.read() == {}


def test_what_was_given_up_is_forgotten(monkeypatch):
    device, timings = Device(monkeypatch), Timings(torch.device("cuda", 0))
    with timings.device("forward"):
        device.work(1.0)
    timings.forget()
    assert timings.read() == {}


# -- in the log

def test_seconds_by_part_are_those_of_a_step_and_a_mean_over_the_ranks():
    assert seconds_by_part([{"data": 4.0, "step": 2.0}, {"data": 8.0}], steps=2) == {
        "seconds/data": 3.0, "seconds/step": 0.5}


def test_the_slowest_rank_shows_in_what_it_does_before_it_meets_the_others():
    quick = {"data": 0.1, "prepare": 0.1, "g/forward": 0.4, "g/backward": 1.4}
    slow = {"data": 0.3, "prepare": 0.1, "g/forward": 0.5, "g/ahead": 0.3, "g/backward": 0.8}
    assert seconds_of_ranks([(2.0, quick), (2.2, slow)], steps=1) == pytest.approx({
        "rank_seconds/smallest": 2.0, "rank_seconds/largest": 2.2,
        "rank_seconds/own_smallest": 0.6, "rank_seconds/own_largest": 1.2})


def test_a_line_has_the_seconds_of_each_part_and_they_add_up(tmp_path):
    first, second = train(tmp_path, SingleTask(), micro_batch_size=4, save_every=0)
    assert {name for name in first if name.startswith("seconds/")} == {f"seconds/{name}" for name in ONE_PHASE}
    assert not any(name.startswith("rank_seconds/") for name in first)        # one process
    for line in (first, second):
        assert 0 < sum(line[f"seconds/{name}"] for name in ONE_PHASE) <= line["seconds_per_step"]
        assert line["data_wait"] == pytest.approx(line["seconds/data"] / line["seconds_per_step"])


@pytest.mark.parametrize(("kind", "ahead"), [(GanTask, set()), (PaintsOnceTask, {"g/ahead"})])
def test_several_phases_are_timed_apart(tmp_path, kind, ahead):
    line = train(tmp_path, kind(), save_every=0)[0]
    of_phases = {f"{phase}/{part}" for phase in ("d", "r1", "g") for part in ("forward", "backward", "step")}
    assert {name.removeprefix("seconds/") for name in line if name.startswith("seconds/")} == {
        "data", "prepare", "average", "agreement", *of_phases, *ahead}


# -- in a trace

def trace(path: Path) -> Counter:
    """How often each named range is in it."""
    events = json.loads(path.read_text())["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def test_a_trace_of_the_window_holds_the_named_parts_of_its_steps_alone(tmp_path):
    train(tmp_path, GanTask(), steps=6, save_every=3, micro_batch_size=4, profile={"start": 2, "steps": 2})
    (path,) = (tmp_path / "toy/profile").iterdir()
    assert path.name == "step_00000002_rank00000.json"
    found = trace(path)
    expected = {"data": 2, "prepare": 4, "agreement": 2, "average": 2, "save": 1}      # the save of step 3
    for phase, times in (("d", 2), ("g", 2), ("r1", 1)):
        expected |= {f"{phase}/forward": 2 * times, f"{phase}/backward": 2 * times, f"{phase}/step": times}
    assert {name: found[name] for name in expected} == expected
    assert any("addmm" in event["name"] for event in json.loads(path.read_text())["traceEvents"])


def test_a_run_that_ends_in_the_window_writes_what_there_is(tmp_path, capsys):
    train(tmp_path, SingleTask(), steps=4, profile={"start": 3, "steps": 9})
    found = trace(tmp_path / "toy/profile/step_00000003_rank00000.json")
    assert found["forward"] == 1 and found["save"] == 1
    assert "chrome://tracing" in capsys.readouterr().out


def test_without_a_window_there_is_no_trace_and_no_profiler(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler, "record_function", lambda name: pytest.fail("a range was made"))
    train(tmp_path, SingleTask(), steps=4, profile={"start": 9})
    assert not (tmp_path / "toy/profile").exists()


def test_a_resumed_run_past_the_window_traces_nothing_and_one_before_it_does(tmp_path):
    settings = {"steps": 6, "profile": {"start": 2, "steps": 1}}
    config = toy_run(tmp_path, **settings)
    Trainer(SingleTask(), config, create_engine(config), ToyLoader, stop_after=2).run()
    assert not (tmp_path / "toy/profile").exists()
    train(tmp_path, SingleTask(), **settings)
    (path,) = (tmp_path / "toy/profile").iterdir()
    assert trace(path)["forward"] == 1


# -- what waits for the device

def test_on_a_gpu_only_a_step_with_a_line_reads_the_device(tmp_path, monkeypatch):
    """The loop's own part and the toy's step, with the events of a stand-in; what reads a tensor would wait for it."""
    Device(monkeypatch)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "none")
    config = toy_run(tmp_path, steps=9, log_every=4, save_every=3, max_skipped=2)
    engine = create_engine(config)
    engine.place = lambda module: module             # where it is
    engine.device = torch.device("cuda", 0)
    trainer, reads = Trainer(SingleTask(), config, engine, ToyLoader), Counter()

    def counted(read):
        def call(tensor, *arguments):
            reads[trainer.steps.done] += threading.current_thread() is threading.main_thread()      # or the saver's
            return read(tensor, *arguments)
        return call

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, counted(getattr(torch.Tensor, name)))
    assert trainer.run().status == "finished"
    assert {step for step, count in reads.items() if count} == {4, 8, 9}
