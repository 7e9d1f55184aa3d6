"""wandb, TensorBoard or the disk below the log failing in every way: the run ends well, and at its speed."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from dalle.training import trackers

ROOT = Path(__file__).resolve().parents[2]


class FakeRun:
    """A wandb run that keeps what it is given."""

    def __init__(self, module, options):
        self.module, self.options = module, options

    def define_metric(self, *arguments, **named):
        self.module.metrics.append((arguments, named))

    def log(self, values):
        self.module.on_log(values)
        self.module.logged.append(values)

    def finish(self):
        self.module.on_finish()


class FakeWandb:
    """What the tracker uses of the module ``wandb``, with a place for each fault."""

    def __init__(self):
        self.inits, self.logged, self.metrics = [], [], []
        self.on_init = self.on_log = self.on_finish = lambda *arguments: None

    def install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", self)

    def Settings(self, **settings):  # noqa: N802 (wandb's name)
        return settings

    def Image(self, pixels):  # noqa: N802
        return pixels

    def setup(self):
        return SimpleNamespace(settings=SimpleNamespace(base_url="none:", http_proxy=None, https_proxy=None))

    def teardown(self):
        pass

    def init(self, **options):
        self.inits.append(options)
        self.on_init(options)
        return FakeRun(self, options)


def fail(*arguments):
    raise RuntimeError("wandb is broken")


def hang(*arguments):
    threading.Event().wait()


@pytest.fixture
def wandb(monkeypatch):
    module = FakeWandb()
    module.install(monkeypatch)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 1)
    monkeypatch.setattr(trackers, "kill_wandb_service", lambda: None)
    return module


@pytest.fixture
def train(commands, workshop, tmp_path):
    """Train the tiny discrete VAE; gives the lines of its log that hold figures, after checking the status."""

    def run(*arguments, steps=20, **log):
        config = workshop.config("dvae", tmp_path, log={"wandb": "online", **log},
                                 train={"steps": steps, "validate_every": 0, "preview_every": 10, "save_every": 0})
        assert commands["train"](config, *arguments) == 0
        lines = [json.loads(line) for line in (tmp_path / "dvae/log.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]

    return run


def complete(lines, steps=20):
    return [line["step"] for line in lines] == list(range(1, steps + 1))


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_wandb_that_raises_is_switched_off_and_the_log_is_complete(train, wandb, place, caplog):
    setattr(wandb, f"on_{place}", fail)
    assert complete(train())
    assert "wandb failed and is off for the rest of this run: RuntimeError: wandb is broken" in caplog.text


def test_wandb_that_is_not_installed_is_switched_off_and_the_log_is_complete(train, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert complete(train())
    assert "wandb failed and is off for the rest of this run: ModuleNotFoundError" in caplog.text


def test_wandb_server_that_refuses_the_start_leaves_an_offline_run(train, wandb):
    wandb.on_init = lambda options: fail() if options["mode"] == "online" else None
    assert complete(train())
    assert [options["mode"] for options in wandb.inits] == ["online", "offline"]
    assert [values["global_step"] for values in wandb.logged if "loss" in values] == list(range(1, 21))


def test_slow_wandb_does_not_slow_training(train, wandb):
    wandb.on_log = lambda values: time.sleep(1)
    began = time.monotonic()
    lines = train()
    assert complete(lines)
    assert sum(line["seconds_per_step"] for line in lines) < 5       # 20 calls of a second each
    assert time.monotonic() - began < 15


@pytest.mark.parametrize("place", ["init", "log", "finish"])
def test_hung_wandb_is_left_behind_and_the_log_is_complete(train, wandb, place, caplog):
    setattr(wandb, f"on_{place}", hang)
    assert complete(train())
    assert "wandb did not finish within 1 s and is left behind" in caplog.text


def test_resumed_run_goes_on_in_the_same_wandb_run_with_its_own_steps(train, wandb):
    train("--stop-after", "2", steps=4)
    train(steps=4)
    first, second = wandb.inits
    assert first["id"] == second["id"]
    assert {first["resume"], second["resume"]} == {"allow"}
    assert wandb.metrics == 2 * [(("*",), {"step_metric": "global_step"})]
    assert [values["global_step"] for values in wandb.logged if "loss" in values] == [1, 2, 3, 4]


def test_full_disk_under_the_log_is_loud_and_training_goes_on(commands, workshop, tmp_path, caplog):
    config = workshop.config("dvae", tmp_path)
    (tmp_path / "dvae").mkdir()
    (tmp_path / "dvae/log.jsonl").symlink_to("/dev/full")            # every write: no space left on device
    assert commands["train"](config) == 0
    assert (tmp_path / "dvae/model/config.json").is_file()
    assert "log.jsonl CANNOT BE WRITTEN (No space left on device): training goes on" in caplog.text
    assert "lines are lost" in caplog.text


def run(*arguments, **variables):
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=100,
                          env={**inherited, "OMP_NUM_THREADS": "1", **variables})


def test_wandb_server_behind_a_closed_port_leaves_an_offline_run_and_a_complete_log(workshop, tmp_path):
    config = workshop.config("dvae", tmp_path, log={"wandb": "online"}, train={"validate_every": 0})
    ended = run("launch/train.py", str(config), WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY=40 * "d")
    assert ended.returncode == 0, ended.stderr
    assert "logging offline, send it later with `wandb sync`" in ended.stderr
    lines = [json.loads(line) for line in (tmp_path / "dvae/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert list((tmp_path / "dvae/wandb").glob("offline-run-*/run-*.wandb"))


STOPPED_SERVICE = """
import logging, sys, time
from pathlib import Path

import psutil

from dalle.training import trackers

logging.basicConfig()
trackers.CLOSE_SECONDS = 2
folder = Path(sys.argv[1])
group = trackers.Trackers.of_run(folder, trackers.LogConfig(wandb="offline"), "run", {})
group.log(0, {"loss": 1.0})
while not list(folder.glob("wandb/offline-run-*/run-*.wandb")):
    time.sleep(0.05)
for process in psutil.Process().children():
    process.suspend()
for step in range(1, 5000):
    group.log(step, {f"figure/{number}": 0.5 for number in range(20)})
group.close()
"""


def test_wandb_service_that_hangs_does_not_keep_the_process_from_exiting(tmp_path):
    ended = run("-c", STOPPED_SERVICE, str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert "wandb did not finish within 2 s and is left behind" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 5000
