"""The two runs: one that nothing happens to, and one that is stopped and killed until its time is over."""

import itertools
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

from chaos_parts.blows import KINDS, Round, find_round_faults
from chaos_parts.damage import Truth, damage_shards, overwrite_pictures
from chaos_parts.starts import ROOT, SECONDS_TO_END, Progress, Start, free_port, newest_step, send, wait_until
from dalle.errors import UserError

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")      # of launch/engines: those for several processes on CPU cores
WORLD_SIZES = (1, 2, 4)
STEPS_BETWEEN = 15                  # two blows, on average
SECONDS_INTO_SAVE = 0.1             # at most, before it is killed
BATCH_SIZE, SAVE_EVERY = 8, 5
SAMPLES, SAMPLES_PER_SHARD, VALIDATION = 120, 24, 24
SECONDS_TO_STEP, SECONDS_TO_FINISH = 300, 3600


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
