#!/usr/bin/env python
"""Kill a training at random, again and again, and prove that nothing was lost by it.

    python tools/chaos.py --minutes 10
    python tools/chaos.py --minutes 3 --seed 7 --engine zero1 --out chaos

Trains a small transformer on the CPU over shards of which some samples are damaged: once from start to end in one
process, and once while it is stopped and killed in every way of ``KINDS`` and started again with one, two or four
processes. When the minutes are over, the second run is left alone until it has finished. Then its samples, step by
step, its losses, weights, checkpoints and exit statuses are held against the first. Everything goes through the
commands that a person types. ``--seed`` decides what is done; the exact moments are the machine's.

Exit status: 0 proven, 1 not. OUT/chaos.json holds everything that was seen, OUT/logs what the commands printed.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from dalle.errors import EXIT_LOST_PROCESS, EXIT_STOPPED_BY_SIGNAL, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
MARK = "TESSERA_CHAOS"              # in the environment of a start: the processes that came of it are found by it
ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")      # of launch/engines: those for several processes on CPU cores
WORLD_SIZES = (1, 2, 4)
STEPS_BETWEEN = 15                  # two blows, on average
SECONDS_INTO_SAVE = 0.1             # at most, before it is killed
BATCH_SIZE, SAVE_EVERY = 8, 5
SAMPLES, SAMPLES_PER_SHARD, VALIDATION = 120, 24, 24
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-3
SECONDS_TO_STEP, SECONDS_TO_END, SECONDS_TO_FINISH = 300, 180, 3600
LINES_SHOWN = 30                    # of what a start printed, where it went wrong
LAUNCHER_FAILED = 1                 # what accelerate's launcher ends with, whatever the ranks ended with
Samples = dict[int, list[tuple[int, str]]]        # step -> (position, key) of its samples


# --- what is done to the run --------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Kind:
    """One way to stop or kill, and the exit status it leaves: of the one process, and of a launcher of several."""

    what: str
    status: int
    launcher_status: int
    saves: bool = False              # whether the run writes a checkpoint before it ends


KILLED = -signal.SIGKILL
KINDS = {
    "sigterm": Kind("SIGTERM to all processes, as a scheduler sends it", EXIT_STOPPED_BY_SIGNAL, LAUNCHER_FAILED,
                    saves=True),
    "sigterm-rank": Kind("SIGTERM to one rank", EXIT_STOPPED_BY_SIGNAL, LAUNCHER_FAILED, saves=True),
    "stop-file": Kind("the file `stop` in the run's folder", EXIT_STOPPED_BY_SIGNAL, LAUNCHER_FAILED, saves=True),
    "sigkill": Kind("SIGKILL to all processes", KILLED, KILLED),
    "sigkill-rank": Kind("SIGKILL to one rank", KILLED, LAUNCHER_FAILED),
    "sigkill-worker": Kind("SIGKILL to one loader worker", EXIT_LOST_PROCESS, LAUNCHER_FAILED),
    "sigkill-saving": Kind("SIGKILL to all while a checkpoint is being written", KILLED, KILLED),
    "sigkill-starting": Kind("SIGKILL to all before the first step", KILLED, KILLED),
}
RANK_STATUSES = {EXIT_STOPPED_BY_SIGNAL, EXIT_LOST_PROCESS, -signal.SIGKILL, -signal.SIGTERM}    # that may be reported


@dataclass
class Round:
    """One start of the disturbed run, what was done to it and how it ended."""

    number: int
    kind: str                        # of KINDS, or "none": left alone
    processes: int
    after_steps: int = 0             # finished since the start when it was hit
    from_step: int | None = None
    hit: bool = False                # False: left alone, or it ended before
    at_step: int | None = None       # the last step seen before it was hit
    torn_save: bool = False          # whether an unfinished checkpoint was left behind
    newest_checkpoint: int | None = None
    status: int | None = None
    rank_statuses: list[int] = field(default_factory=list)       # as the launcher reported them
    seconds: float = 0.0             # the whole start
    seconds_to_end: float = 0.0      # from the blow until no process was left
    faults: list[str] = field(default_factory=list)


class Start:
    """One start of a command: its processes, however far down, are found by a mark in their environment."""

    def __init__(self, command: Sequence[object], printed: Path, processes: int):
        self.mark, self.world_size, self.printed = secrets.token_hex(8), processes, printed
        environment = {name: value for name, value in os.environ.items()
                       if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
                        "DS_ACCELERATOR": "cpu", MARK: self.mark}
        printed.parent.mkdir(parents=True, exist_ok=True)
        with open(printed, "wb") as file:
            self.process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=file,
                                            stderr=subprocess.STDOUT, start_new_session=True)

    def __enter__(self) -> "Start":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def all(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def ranks(self) -> list[psutil.Process]:
        """The processes that train: the one, or what torchrun gave a rank and has none above it."""
        if self.world_size == 1:
            return [process for process in self.all() if process.pid == self.process.pid]
        with contextlib.suppress(psutil.NoSuchProcess):
            inside = {process.pid: process for process in self.all() if "RANK" in process.environ()}
            return [process for process in inside.values() if process.ppid() not in inside]
        return []

    def workers(self) -> list[psutil.Process]:
        """Loader workers: forks of a rank's fork server."""
        with contextlib.suppress(psutil.NoSuchProcess):
            return [worker for rank in self.ranks() for server in rank.children()
                    if any("multiprocessing.forkserver" in word for word in server.cmdline())
                    for worker in server.children()]
        return []

    def kill_all(self) -> None:
        while processes := self.all():
            send(processes, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait()

    def wait(self, seconds: float) -> str | None:
        """Until no process is left: at most ``seconds`` for the command itself, and then ``SECONDS_TO_END`` for those
        that came of it. What was left after how long is said, and ended."""
        began = time.monotonic()
        wait_until(lambda: self.ended, seconds, every=0.1)
        if self.ended and wait_until(lambda: not self.all(), SECONDS_TO_END, every=0.1):
            return None
        waited, left = time.monotonic() - began, []
        for process in self.all():
            with contextlib.suppress(psutil.Error):
                left.append(f"{process.pid} ({' '.join(process.cmdline()[-6:])[:100]})")
        self.kill_all()
        return f"processes were left {waited:.0f} s later: {', '.join(left)}" if left else None

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def reported_statuses(self) -> list[int]:
        """What torchrun's report says of the ranks that failed; it names the first of them twice."""
        text = self.printed.read_text(errors="replace")
        by_pid = {pid: int(status) for status, pid in re.findall(r"exitcode\s*: (-?\d+) \(pid: (\d+)\)", text)}
        return list(by_pid.values())


def send(processes: Sequence[psutil.Process], number: int) -> bool:
    """Whether one of the processes was still there to get the signal."""
    reached = False
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)
            reached = True
    return reached


class Progress:
    """The steps that a run has logged since this object was made."""

    def __init__(self, run: Path):
        self.path = run / "log.jsonl"
        self._offset = self.path.stat().st_size if self.path.exists() else 0

    def steps(self) -> list[int]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            file.seek(self._offset)
            return [line["step"] for line in parse_lines(file.read().decode(errors="replace")) if "loss" in line]


def parse_lines(text: str) -> list[dict[str, Any]]:
    """The JSON lines of ``text``; a kill may have torn one."""
    found = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [entry for entry in found if isinstance(entry, dict)]


# --- the data -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Truth:
    """What the shards hold, known from making them: the keys of each shard in order, and the damaged ones."""

    shards: tuple[tuple[str, ...], ...]
    bad: frozenset[str]

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.shards))

    def epoch(self) -> Counter[str]:
        """How often each key must be met in an epoch: once, and once more for each damaged one right before it."""
        expected = Counter()
        for keys in self.shards:
            for index in range(len(keys)):
                behind = itertools.islice(itertools.cycle(keys), index, index + len(keys))
                expected[next(key for key in behind if key not in self.bad)] += 1
        return expected


def damage_shards(folder: Path, rng: random.Random) -> Truth:
    """Damage samples of every shard in each way of ``DAMAGE``, and cut the last shard short."""
    shards, bad = [], set()
    paths = sorted(folder.glob("*.tar"))
    for path in paths:
        samples = read_samples(path)
        chosen = rng.sample(sorted(samples), len(DAMAGE))
        for key, spoil in zip(chosen, DAMAGE, strict=True):
            spoil(samples[key])
        write_samples(path, samples)
        keys = list(samples)
        if path == paths[-1]:
            keys = cut_short(path, keys)
        shards.append(tuple(keys))
        bad |= set(chosen) & set(keys)
    return Truth(tuple(shards), frozenset(bad))


def truncated(sample: dict[str, bytes]) -> None:
    sample["png"] = sample["png"][:len(sample["png"]) // 2]


def not_a_picture(sample: dict[str, bytes]) -> None:
    sample["png"] = b"<html><body>404 Not Found</body></html>"


def empty(sample: dict[str, bytes]) -> None:
    sample["png"] = b""


def caption_not_utf8(sample: dict[str, bytes]) -> None:
    sample["txt"] = b"a \x92 red circle"


DAMAGE: tuple[Callable[[dict[str, bytes]], None], ...] = (truncated, not_a_picture, empty, caption_not_utf8)


def read_samples(path: Path) -> dict[str, dict[str, bytes]]:
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {})[extension] = tar.extractfile(member).read()
    return samples


def write_samples(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for key, parts in samples.items():
            for extension, data in parts.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, BytesIO(data))


def cut_short(path: Path, keys: list[str]) -> list[str]:
    """Cut the shard inside the first member of its last sample; the keys that are left."""
    with tarfile.open(path) as tar:
        first = next(member for member in tar if member.name.startswith(keys[-1]))
    os.truncate(path, first.offset_data + first.size // 2)
    return keys[:-1]


def overwrite_pictures(folder: Path, truth: Truth, rng: random.Random) -> Truth:
    """Overwrite the picture of one good sample a shard where it lies, after the shards were indexed."""
    bad = set(truth.bad)
    for path, keys in zip(sorted(folder.glob("*.tar")), truth.shards, strict=True):
        key = rng.choice([key for key in keys if key not in bad])
        with tarfile.open(path) as tar:
            picture = next(member for member in tar if member.name == f"{key}.png")
        with open(path, "r+b") as file:
            file.seek(picture.offset_data)
            file.write(rng.randbytes(picture.size))
        bad.add(key)
    return Truth(truth.shards, frozenset(bad))


# --- the two runs -------------------------------------------------------------------------------------------------

class Chaos:
    """The folder of one chaos run and the commands that work in it."""

    def __init__(self, out: Path, seed: int, steps: int, engine: str):
        self.out, self.seed, self.steps, self.engine = out, seed, steps, engine
        self.rng = random.Random(seed)      # of the data, then of each round, whatever came of those before
        self.config = out / "transformer.yaml"
        self.calm, self.disturbed = out / "runs" / "undisturbed", out / "runs" / "disturbed"
        self.kinds = self._deal_kinds()
        self.start_seconds = 10.0           # until the first step, as last seen

    def _deal_kinds(self) -> Iterator[str]:
        """Every kind once in random order, then again."""
        rng = random.Random(f"{self.seed} kinds")
        while True:
            yield from rng.sample(sorted(KINDS), len(KINDS))

    # -- before

    def prepare(self) -> Truth:
        """Shards with damage, a tokenizer, a codec, and the config that both runs share."""
        train = self.out / "data" / "train"
        self._command("make_shards", "tools/make_shards.py", "shapes", "--out", self.out / "data", "--count", SAMPLES,
                      "--validation", VALIDATION, "--size", 16, "--samples-per-shard", SAMPLES_PER_SHARD,
                      "--workers", 1)
        truth = damage_shards(train, self.rng)
        self._command("index_shards", "tools/index_shards.py", train, "--workers", 1)
        truth = overwrite_pictures(train, truth, self.rng)
        self._command("train_tokenizer", "tools/train_tokenizer.py", train, "--out", self.out / "tokenizer",
                      "--vocab-size", 300, "--bad-shards", "skip")
        codec = self._write_config("codec.yaml", codec_config(self.out))
        self._command("codec", "launch/train.py", codec)
        self._write_config(self.config.name, transformer_config(self.out, self.steps))
        return truth

    def run_undisturbed(self) -> None:
        self._command("undisturbed", "launch/train.py", self.config, "name=undisturbed")

    def _write_config(self, name: str, tree: dict[str, Any]) -> Path:
        (self.out / name).write_text(yaml.safe_dump(tree, sort_keys=False))
        return self.out / name

    def _command(self, name: str, script: str, *arguments: object) -> None:
        printed = self.out / "logs" / f"{name}.txt"
        with Start([sys.executable, ROOT / script, *arguments], printed, processes=1) as start:
            start.wait(SECONDS_TO_FINISH)
        if start.process.returncode:
            raise UserError(f"{script} ended with status {start.process.returncode}; see {printed}")

    # -- the disturbed run

    def disturb(self, until: float, most: int | None) -> Iterator[Round]:
        """Rounds until the run has finished, or has ended by itself; it is left alone from ``until`` on, or after
        ``most`` blows."""
        between = min(STEPS_BETWEEN, max(1, self.steps // (2 * (most or 4))))
        for number in itertools.count(1):
            self.rng = random.Random(f"{self.seed} round {number}")
            enough = time.monotonic() >= until or (most is not None and number > most)
            kind = "none" if enough else next(self.kinds)
            one = Round(number, kind, self.rng.choice(WORLD_SIZES), after_steps=self.rng.randint(1, 2 * between))
            self._play(one)
            yield one
            if one.status == 0 or not one.hit:
                return

    def _play(self, one: Round) -> None:
        began = time.monotonic()
        progress, before = Progress(self.disturbed), newest_step(self.disturbed)
        one.from_step = before or 0
        with Start(self._train_command(one.processes), self.printed_by(one), one.processes) as start:
            one.hit = one.kind != "none" and self._hit(one, start, progress, began)
            blow = time.monotonic()
            left = start.wait(SECONDS_TO_END if one.hit else SECONDS_TO_FINISH)
        one.seconds, one.seconds_to_end = time.monotonic() - began, time.monotonic() - blow
        one.status, one.rank_statuses = start.process.returncode, start.reported_statuses()
        one.newest_checkpoint = newest_step(self.disturbed)
        one.torn_save = any(self.disturbed.glob("checkpoints/.step_*.tmp"))
        one.faults += [left] if left else []
        one.faults += find_round_faults(one, finished=(self.disturbed / "finished").is_file())

    def printed_by(self, one: Round) -> Path:
        return self.out / "logs" / f"round_{one.number:03d}.txt"

    def _train_command(self, processes: int) -> list[object]:
        train = [ROOT / "launch" / "train.py", self.config, "name=disturbed", "--resume", "auto"]
        if processes == 1:
            return [sys.executable, *train]
        return [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
                ROOT / "launch" / "engines" / f"{self.engine}.yaml", "--num_processes", processes,
                "--main_process_port", free_port(), *train]

    def _hit(self, one: Round, start: Start, progress: Progress, began: float) -> bool:
        """Wait for the moment and strike; False when the run had ended before."""
        if one.kind == "sigkill-starting":
            wait_until(lambda: start.ended, self.rng.random() * self.start_seconds)
        else:
            if not wait_until(lambda: start.ended or progress.steps(), SECONDS_TO_STEP):
                one.faults.append(f"no step within {SECONDS_TO_STEP} s")
            self.start_seconds = time.monotonic() - began
            if not wait_until(lambda: start.ended or len(progress.steps()) >= one.after_steps, SECONDS_TO_STEP):
                one.faults.append(f"not {one.after_steps} steps within {SECONDS_TO_STEP} s of the first")
        struck = not start.ended and STRIKES[one.kind](self, start)
        one.at_step = max(progress.steps(), default=None) if struck else None
        return struck

    # -- the blows; False when there was nobody left to hit

    def _touch_stop_file(self, start: Start) -> bool:
        (self.disturbed / "stop").touch()
        return True

    def _terminate_all(self, start: Start) -> bool:
        return send(start.all(), signal.SIGTERM)

    def _terminate_rank(self, start: Start) -> bool:
        return send(self._one_of(start.ranks()), signal.SIGTERM)

    def _kill_rank(self, start: Start) -> bool:
        return send(self._one_of(start.ranks()), signal.SIGKILL)

    def _kill_worker(self, start: Start) -> bool:
        return send(self._one_of(start.workers()), signal.SIGKILL)

    def _kill_all(self, start: Start) -> bool:
        struck = send(start.all(), signal.SIGKILL)
        start.kill_all()                               # and what was being forked
        return struck

    def _kill_in_save(self, start: Start) -> bool:
        def saves() -> set[Path]:
            return set(self.disturbed.glob("checkpoints/.step_*.tmp"))

        delay, before = self.rng.random() * SECONDS_INTO_SAVE, saves()
        wait_until(lambda: start.ended or saves() - before, SECONDS_TO_STEP, every=0.001)
        time.sleep(delay)
        return self._kill_all(start)

    def _one_of(self, processes: list[psutil.Process]) -> list[psutil.Process]:
        return [self.rng.choice(sorted(processes, key=lambda process: process.pid))] if processes else []


STRIKES: dict[str, Callable[[Chaos, Start], bool]] = {
    "sigterm": Chaos._terminate_all, "sigterm-rank": Chaos._terminate_rank, "stop-file": Chaos._touch_stop_file,
    "sigkill": Chaos._kill_all, "sigkill-rank": Chaos._kill_rank, "sigkill-worker": Chaos._kill_worker,
    "sigkill-saving": Chaos._kill_in_save, "sigkill-starting": Chaos._kill_all,
}


def codec_config(out: Path) -> dict[str, Any]:
    return {"task": "dvae", "name": "codec", "output": str(out / "runs"), "model": {"preset": "tiny"},
            "data": {"train": str(out / "data" / "train"), "image_size": 16, "caption": "none", "workers": 0,
                     "max_bad_fraction": 0.5, "bad_shards": "skip"},
            "train": {"steps": 20, "batch_size": 8, "save_every": 0}}


def transformer_config(out: Path, steps: int) -> dict[str, Any]:
    return {
        "task": "transformer", "output": str(out / "runs"), "name": "transformer", "codec": str(out / "runs" / "codec"),
        "data": {"train": str(out / "data" / "train"), "validation": str(out / "data" / "validation"),
                 "tokenizer": str(out / "tokenizer"), "image_size": 16, "text_length": 16, "bpe_dropout": 0.1,
                 "caption_dropout": 0.1, "workers": 1, "lanes": 4, "window": 2, "max_bad_fraction": 0.5,
                 "bad_shards": "skip"},
        "model": {"dim": 64, "depth": 4, "heads": 2, "token_shift": True, "attention": "dalle"},
        "optimizer": {"lr": 1e-3, "ema": 0.9},
        "train": {"steps": steps, "batch_size": BATCH_SIZE, "precision": "fp32", "log_every": 1,
                  "validate_every": steps, "save_every": SAVE_EVERY, "log_samples": True},
        "engine": {"timeout_minutes": 4, "step_timeout_minutes": 2},
    }


def newest_step(run: Path) -> int | None:
    """The step of the newest checkpoint that has its place."""
    steps = [int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")]
    return max(steps, default=None)


def wait_until(condition: Callable[[], object], seconds: float, every: float = 0.01) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(every)
    return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- the proof ----------------------------------------------------------------------------------------------------

def find_round_faults(one: Round, finished: bool) -> list[str]:
    """What is wrong with how a start ended: its status, its ranks' statuses, its last checkpoint."""
    if one.status == 0 and finished:                   # before the blow could do harm, or left alone
        return []
    if not one.hit:
        return [f"it ended by itself with status {one.status}"]
    faults, kind = [], KINDS[one.kind]
    expected = kind.status if one.processes == 1 else kind.launcher_status
    if one.status != expected:
        faults.append(f"status {one.status} instead of {expected}")
    odd = sorted(set(one.rank_statuses) - RANK_STATUSES)
    if odd:
        faults.append(f"ranks ended with {', '.join(map(str, odd))}")
    if kind.saves and (one.newest_checkpoint or 0) < (one.at_step or 0):
        faults.append(f"it was asked to stop after step {one.at_step}, its newest checkpoint is of "
                      f"{one.newest_checkpoint}")
    return faults


def find_sample_faults(samples: Samples, undisturbed: Samples, truth: Truth, steps: int, batch_size: int) -> list[str]:
    """Where ``samples`` differ from the undisturbed run's, or from what the shards and the reading order promise."""
    return [*find_order_faults(samples, steps, batch_size), *find_differences(samples, undisturbed),
            *find_epoch_faults(samples, truth)]


def find_order_faults(samples: Samples, steps: int, batch_size: int) -> list[str]:
    """Step t holds positions tB ... tB + B - 1, each once."""
    faults = [f"step {step} is not in the log" for step in range(steps) if step not in samples]
    faults += [f"step {step} is beyond the last" for step in sorted(samples) if not 0 <= step < steps]
    for step, entries in sorted(samples.items()):
        positions = [position for position, _ in entries]
        if positions != list(range(step * batch_size, (step + 1) * batch_size)):
            faults.append(f"step {step} was trained on the positions {positions}")
    return faults


def find_differences(samples: Samples, undisturbed: Samples) -> list[str]:
    return [f"step {step} was trained on {samples.get(step)}, undisturbed on {undisturbed.get(step)}"
            for step in sorted(samples.keys() | undisturbed.keys()) if samples.get(step) != undisturbed.get(step)]


def find_epoch_faults(samples: Samples, truth: Truth) -> list[str]:
    """Every good sample once an epoch, and once more for each damaged one it stands in for; no damaged one ever."""
    epochs: dict[int, Counter[str]] = {}
    for position, key in itertools.chain.from_iterable(samples.values()):
        epochs.setdefault(position // truth.num_samples, Counter())[key] += 1
    faults, expected = [], truth.epoch()
    for epoch, counted in sorted(epochs.items()):
        whole = counted.total() >= truth.num_samples
        for key in sorted(expected.keys() | counted.keys()):
            if counted[key] > expected[key] or (whole and counted[key] < expected[key]):
                faults.append(f"epoch {epoch}: sample {key} {counted[key]} times instead of {expected[key]}")
    return faults


def read_losses(run: Path) -> dict[str, dict[int, float]]:
    """Figure -> step -> value, for the training and validation losses; of a step done again, the last."""
    found: dict[str, dict[int, float]] = {}
    for line in parse_lines((run / "log.jsonl").read_text(errors="replace")):
        for name, value in line.items():
            if name == "loss" or name.startswith("validation/"):
                found.setdefault(name, {})[line["step"]] = value
    return found


def compare_losses(disturbed: Path, undisturbed: Path, steps: int) -> tuple[dict[str, float], list[str]]:
    """The largest difference of the losses, at the last step and over all steps; and what is above the tolerance."""
    ours, theirs = read_losses(disturbed), read_losses(undisturbed)
    names = sorted({"loss", *theirs.keys(), *ours.keys()})
    missing = [name for name in names if steps not in ours.get(name, {}) or steps not in theirs.get(name, {})]
    if missing or len(names) < 2:
        return {}, [f"not logged at step {steps} by both runs: {', '.join(missing) or 'a validation loss'}"]
    both = theirs["loss"].keys() & ours["loss"].keys()         # a kill may cost the last lines of a log
    apart = {"training loss, last step": abs(ours["loss"][steps] - theirs["loss"][steps]),
             "validation losses": max(abs(ours[name][steps] - theirs[name][steps]) for name in names if name != "loss"),
             "training loss, any step": max(abs(ours["loss"][step] - theirs["loss"][step]) for step in both)}
    faults = [f"{name}: {difference:.2g} apart, above {LOSS_TOLERANCE}" for name, difference in apart.items()
              if not difference <= LOSS_TOLERANCE]
    return {**apart, "steps compared": len(both)}, faults


def compare_weights(disturbed: Path, undisturbed: Path, steps: int) -> tuple[dict[str, float], list[str]]:
    """The largest difference of weights, averages and optimiser state at the last step."""
    from dalle.training.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS, SavedPlayer

    ours, theirs = (SavedPlayer(run / "checkpoints" / f"step_{steps:08d}" / "transformer")
                    for run in (disturbed, undisturbed))
    figures, faults = {}, []
    for section in (WEIGHTS, AVERAGE, OPTIMIZER):
        if sorted(ours.keys(section)) != sorted(theirs.keys(section)):
            faults.append(f"the names of the {section} differ")
            continue
        figures[section] = max((float((ours.tensor(section, key).float() - theirs.tensor(section, key).float())
                                      .abs().max()) for key in theirs.keys(section)), default=math.nan)
        if not figures[section] <= WEIGHT_TOLERANCE:
            faults.append(f"{section}: {figures[section]:.2g} apart, above {WEIGHT_TOLERANCE}")
    return figures, faults


def find_checkpoint_faults(run: Path, steps: int) -> list[str]:
    from dalle.training.checkpoint import CheckpointStore, find_fault

    faults = [f"{path}: {fault}" for path in CheckpointStore(run / "checkpoints", 2).all()
              if (fault := find_fault(path)) is not None]
    if newest_step(run) != steps:
        faults.append(f"the newest checkpoint of {run} is of step {newest_step(run)}, not {steps}")
    if not (run / "finished").is_file():
        faults.append(f"{run} does not say that it has finished")
    return faults


def prove(chaos: Chaos, truth: Truth, rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """Check -> its faults and figures."""
    from dalle.training.sample_log import surviving

    samples = surviving(chaos.disturbed)
    checks = {
        "starts and ends": ({"starts": len(rounds), "torn saves": sum(one.torn_save for one in rounds)},
                            [f"round {one.number}: {fault}" for one in rounds for fault in one.faults]),
        "samples": ({"steps": len(samples), "good": truth.num_samples - len(truth.bad), "damaged": len(truth.bad),
                     "epochs": round(chaos.steps * BATCH_SIZE / truth.num_samples, 2)},
                    find_sample_faults(samples, surviving(chaos.calm), truth, chaos.steps, BATCH_SIZE)),
        "checkpoints": ({}, find_checkpoint_faults(chaos.disturbed, chaos.steps)),
    }
    if not checks["checkpoints"][1]:                   # otherwise there is nothing to compare
        checks["losses"] = compare_losses(chaos.disturbed, chaos.calm, chaos.steps)
        checks["weights"] = compare_weights(chaos.disturbed, chaos.calm, chaos.steps)
    return {name: {"figures": figures, "faults": faults} for name, (figures, faults) in checks.items()}


# --- the command --------------------------------------------------------------------------------------------------

def parse_arguments() -> argparse.Namespace:
    kinds = "\n".join(f"  {name:18s}{kind.what}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(description=__doc__, epilog=f"what is done to the run:\n{kinds}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10, help="after so many the run is left alone (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="decides what is done to the run")
    parser.add_argument("--steps", type=int, default=None, help="of both runs (default: 60 a minute)")
    parser.add_argument("--rounds", type=int, default=None, help="at most so many blows")
    parser.add_argument("--engine", default="ddp", metavar="NAME",
                        help=f"of starts with several processes: {', '.join(ENGINES)} (default ddp)")
    parser.add_argument("--out", type=Path, default=None, help="an empty folder for everything (default: a temporary "
                        "one, deleted when all is proven)")
    return parser.parse_args()


def check(options: argparse.Namespace) -> None:
    if options.engine not in ENGINES:
        raise UserError(f"no engine {options.engine!r} for several processes on CPU cores; known: {', '.join(ENGINES)}")
    if options.out is not None and options.out.is_dir() and any(options.out.iterdir()):
        raise UserError(f"{options.out} is not empty; give a new folder")
    if options.minutes <= 0 or (options.steps is not None and options.steps < 1):
        raise UserError("--minutes and --steps must be positive")


def show_round(one: Round, printed: Path, console: Console) -> None:
    ranks = f", ranks {one.rank_statuses}" if one.rank_statuses else ""
    console.print(f"  {one.number:3d}  {one.kind:17s} {one.processes} process(es) from step {one.from_step}, hit after "
                  f"{one.at_step}: status {one.status}{ranks}, {one.seconds_to_end:.1f} s to end, "
                  f"{one.seconds:.0f} s in all", soft_wrap=True)
    for fault in one.faults:
        console.print(f"       WRONG: {fault}", soft_wrap=True)
    if one.faults:
        console.print(f"       the end of {printed}:", soft_wrap=True)
        for line in printed.read_text(errors="replace").splitlines()[-LINES_SHOWN:]:
            console.print(f"       | {line}", soft_wrap=True, markup=False)


def show(rounds: Sequence[Round], checks: Mapping[str, dict[str, Any]], console: Console) -> None:
    table = Table(title="what was done", title_justify="left")
    for column in ("", "blow", "processes", "then", "from step", "hit after", "torn save", "status", "ranks",
                   "s to end"):
        table.add_column(column)
    for one, following in itertools.zip_longest(rounds, rounds[1:]):
        table.add_row(str(one.number), one.kind, str(one.processes), str(following.processes) if following else "",
                      str(one.from_step), "" if one.at_step is None else str(one.at_step),
                      "yes" if one.torn_save else "", str(one.status), " ".join(map(str, one.rank_statuses)),
                      "" if one.kind == "none" else f"{one.seconds_to_end:.1f}")
    console.print(table)
    for name, result in checks.items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in result["figures"].items())
        console.print(f"{'ok   ' if not result['faults'] else 'WRONG'} {name}: {figures}", soft_wrap=True)
        for fault in result["faults"][:10]:
            console.print(f"      {fault}", soft_wrap=True)
        if len(result["faults"]) > 10:
            console.print(f"      ... and {len(result['faults']) - 10} more")


def main() -> int:
    options, began = parse_arguments(), time.monotonic()
    check(options)
    console = Console(highlight=False, width=120)
    out = options.out or Path(tempfile.mkdtemp(prefix="chaos-"))
    out.mkdir(parents=True, exist_ok=True)
    out = out.resolve()
    steps = options.steps or max(20, round(60 * options.minutes))
    chaos = Chaos(out, options.seed, steps, options.engine)
    console.print(f"chaos in {out}: seed {options.seed}, {steps} steps", soft_wrap=True)
    truth = chaos.prepare()
    console.print(f"{truth.num_samples} samples in {len(truth.shards)} shards, {len(truth.bad)} of them damaged")
    chaos.run_undisturbed()
    console.print(f"the undisturbed run has finished after {time.monotonic() - began:.0f} s")
    rounds = []
    for one in chaos.disturb(began + 60 * options.minutes, options.rounds):
        rounds.append(one)
        show_round(one, chaos.printed_by(one), console)
    checks = prove(chaos, truth, rounds)
    proven = not any(result["faults"] for result in checks.values())
    show(rounds, checks, console)
    (out / "chaos.json").write_text(json.dumps({
        "seed": options.seed, "minutes": options.minutes, "steps": steps, "engine": options.engine, "proven": proven,
        "rounds": [asdict(one) for one in rounds], "checks": checks}, indent=2) + "\n")
    seconds = time.monotonic() - began
    if proven:
        console.print(f"PROVEN in {seconds:.0f} s: {len(rounds)} starts, no good sample lost or repeated, and the same "
                      "losses as the undisturbed run", soft_wrap=True)
        if options.out is None:
            shutil.rmtree(out)
    else:
        console.print(f"NOT PROVEN after {seconds:.0f} s; everything is in {out}", soft_wrap=True)
    return 0 if proven else 1


if __name__ == "__main__":
    run_command(main)
