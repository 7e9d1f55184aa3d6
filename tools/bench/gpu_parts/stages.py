"""Rows of whole commands: the quickstart's stages, and steps a second of small models, from the runs' own logs."""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from dalle.training.run_log import read_log
from gpu_parts.rows import Row, Setting, emit

ROOT = Path(__file__).resolve().parents[3]
LEFT_BEHIND = {".git", ".venv", "data", "runs"}     # of the tree, at its top
BARS = {"transformer": 150, "attngan": 60}      # steps a second


def small_models(setting: Setting, only: str = "") -> None:
    """Steps a second of the quickstart's transformer, the small AttnGAN and GAN-INT-CLS, without their first third."""
    data, runs, few = setting.folder / "data", setting.folder / "runs", setting.small
    command(setting, "tools/make_shards.py", "shapes", "--out", data, "--count", "64" if few else "2048",
            "--validation", "32", "--size", "64", "--max-objects", "2")
    command(setting, "tools/train_tokenizer.py", data / "train", "--out", data / "tokenizer", "--vocab-size", "512")
    places = [f"output={runs}", f"data.train={data}/train", f"data.validation={data}/validation"]
    quiet = ["train.preview_every=0", "train.validate_every=0", "train.evaluate_every=0", "train.save_every=0"]
    tokenizer = [f"data.tokenizer={data}/tokenizer"]
    short = [*places, *quiet, *(["train.steps=4", "train.batch_size=8"] if few else ["train.steps=20"])]
    long = [*places, *quiet, *(["train.steps=12", "train.log_every=4", "train.batch_size=8"] if few else
                               ["train.steps=900"])]
    train(setting, "quickstart/dvae", *short)
    for split in ("train", "validation"):
        command(setting, "tools/cache_codes.py", "--codec", runs / "quickstart/dvae", "--data", data / split, "--out",
                data / "codes" / split)
    train(setting, "gans/damsm_shapes", *short, *tokenizer)
    for name, config, companions in (
            ("transformer", "quickstart/transformer", [f"codec={runs}/quickstart/dvae", *tokenizer, *(
                f"data.{key}={data}/codes/{split}" for key, split in
                (("codes", "train"), ("validation_codes", "validation")))]),
            ("attngan", "gans/attngan_shapes", [f"damsm={runs}/gans/damsm_shapes"]),
            ("gan_int_cls", "gans/gan_int_cls_shapes", [f"text_encoder={runs}/gans/damsm_shapes"])):
        if only and only not in name:
            continue
        try:
            train(setting, config, *long, *companions)
            steps_a_second(runs / config, name)
        except subprocess.CalledProcessError as error:               # the others are worth having
            print(f"{name}: {error}", flush=True)


def steps_a_second(run: Path, name: str) -> None:
    lines = [line for line in read_log(run / "log.jsonl") if "seconds_per_step" in line]
    settled = lines[len(lines) // 3:]
    rate = 1 / statistics.median(line["seconds_per_step"] for line in settled)
    waiting = statistics.median(line["data_wait"] for line in settled)
    emit(Row(f"steps of the small {name}", rate, "steps/s", bar=BARS.get(name),
             note=f"waiting for data {waiting:.0%} of the time"))


def quickstart(setting: Setting, only: str = "") -> None:
    """All stages of `launch/quickstart.py` in a copy of the tree, set-up apart; minutes."""
    began = time.perf_counter()
    copy = setting.folder / "tree"
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: LEFT_BEHIND if Path(folder) == ROOT else ())
    seconds: dict[str, float] = {}
    try:
        subprocess.run([sys.executable, copy / "launch/quickstart.py"], check=True, cwd=copy,
                       env=environment(setting, copy), stdout=subprocess.DEVNULL)
    finally:
        path = copy / "runs/quickstart/stages.json"
        if path.is_file():
            seconds = json.loads(path.read_text())
        for name, value in seconds.items():
            emit(Row(f"quickstart: {name}", value, "s", more_is_better=False))
    emit(Row("quickstart: all stages", sum(seconds.values()), "s", bar=180, goal=90, more_is_better=False,
             note=f"{time.perf_counter() - began:.0f} s with the copy"))


def train(setting: Setting, config: str, *changes: object) -> None:
    command(setting, "launch/train.py", f"configs/{config}.yaml", *changes)


def command(setting: Setting, *words: object) -> None:
    subprocess.run([sys.executable, *map(str, words)], check=True, cwd=ROOT, env=environment(setting, ROOT),
                   stdout=subprocess.DEVNULL)


def environment(setting: Setting, root: Path) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if setting.device.type == "cpu" else {}
    return {**os.environ, "PYTHONPATH": str(root), **hidden}
