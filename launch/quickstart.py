#!/usr/bin/env python
"""The main job, stage by stage, each through the command a person would type; `bash launch/quickstart.sh` calls it.

A stage that is done leaves its time in the run folder's ``stages.json`` and is not run again; a training that was cut
off goes on from its last checkpoint.
"""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dalle.errors import UserError, run_command
from dalle.training.run_log import read_log
from dalle.training.signals import run_in_turn

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Stage:
    """One command of the job, the line that says what it does, and the file that exists once it is done."""

    name: str
    title: str
    command: Sequence[str]
    product: str


def shapes_stages() -> list[Stage]:
    data, runs = "data/shapes", "runs/quickstart"
    judged = ["--model", f"{runs}/transformer", "--rerank", f"{runs}/clip", "--temperature", "0.5", "--guidance", "1.5"]
    return [
        Stage("data", "30,000 pictures of shapes with ten captions each, as tars", [
            "tools/make_shards.py", "shapes", "--out", data, "--count", "30000", "--validation", "1000",
            "--size", "64", "--max-objects", "2"], f"{data}/dataset.json"),
        *model_stages(data, "quickstart", vocabulary=512),
        Stage("judge", "200 held-out captions, 16 pictures each, ranked and read back by the judge", [
            "tools/judge.py", *judged, "--data", f"{data}/validation", "--captions", "200", "--candidates", "16",
            "--out", f"{runs}/judge.json"], f"{runs}/judge.json"),
        Stage("gallery", "the gallery", [
            "launch/sample.py", *judged, "--prompts", "configs/quickstart/prompts.txt", "--candidates", "32",
            "--keep", "8", "--out", f"{runs}/gallery"], f"{runs}/gallery/index.html"),
    ]


def emoji_stages() -> list[Stage]:
    data, runs = "data/emoji", "runs/emoji"
    return [
        Stage("data", "Noto Color Emoji with their CLDR names, as tars", [
            "tools/make_shards.py", "emoji", "--out", data, "--size", "64", "--install"], f"{data}/dataset.json"),
        *model_stages(data, "emoji", vocabulary=4096),
        Stage("gallery", "the gallery", [
            "launch/sample.py", "--model", f"{runs}/transformer", "--rerank", f"{runs}/clip", "--temperature", "0.5",
            "--guidance", "1.5", "--prompts", "configs/emoji/prompts.txt", "--candidates", "16", "--keep", "4",
            "--out", f"{runs}/gallery"], f"{runs}/gallery/index.html"),
    ]


def model_stages(data: str, configs: str, vocabulary: int) -> list[Stage]:
    """Tokenizer, codec, cached codes, transformer, CLIP: the same for every data set."""
    runs = f"runs/{configs}"

    def train(model: str, title: str) -> Stage:
        command = ["launch/train.py", f"configs/{configs}/{model}.yaml", *precision_override()]
        return Stage(model, title, command, f"{runs}/{model}/model/config.json")

    def cache(split: str) -> Stage:
        return Stage(f"codes_{split}", f"the codes of the {split} pictures, computed once", [
            "tools/cache_codes.py", "--codec", f"{runs}/dvae", "--data", f"{data}/{split}",
            "--out", f"{data}/codes/{split}"], f"{data}/codes/{split}/codes.json")

    return [
        Stage("tokenizer", "a BPE tokenizer from the training captions", [
            "tools/train_tokenizer.py", f"{data}/train", "--out", f"{data}/tokenizer",
            "--vocab-size", str(vocabulary)], f"{data}/tokenizer/tokenizer.json"),
        train("dvae", "the discrete VAE: pictures to codes and back"),
        cache("train"),
        cache("validation"),
        train("transformer", "the transformer that writes codes after a caption"),
        train("clip", "the CLIP that ranks what was written"),
    ]


STAGES = {"shapes": (shapes_stages, Path("runs/quickstart")), "emoji": (emoji_stages, Path("runs/emoji"))}


def precision_override() -> list[str]:
    """bf16, the configs' default, is an emulation on processors without the instructions: there fp32 is faster."""
    import torch

    if torch.cuda.is_available() or torch.cpu._is_avx512_bf16_supported():
        return []
    return ["train.precision=fp32"]


def run_stage(stage: Stage, console: Console) -> float:
    """Run one stage's command in the project's root and return its seconds."""
    console.print(f"\n[bold]== {stage.name}[/bold]: {stage.title}")
    console.print(f"   python {shlex.join(stage.command)}", style="dim", soft_wrap=True)
    started = time.time()
    status = run_in_turn([sys.executable, *stage.command], cwd=ROOT)
    if status:
        raise UserError(f"the stage {stage.name!r} ended with status {status}; mend what it says and start again, "
                        "what is done is kept")
    return time.time() - started


def read_json(path: Path, text: str) -> dict[str, Any]:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged; delete it, and its stage is run again") from None


def read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def last_values(log: Path, prefix: str) -> dict[str, float]:
    """The newest value of every figure in a run's JSONL log whose name starts with ``prefix``."""
    values = {}
    for line in read_log(log):
        values.update({key: value for key, value in line.items() if key.startswith(prefix)})
    if not values:
        raise UserError(f"{log} is damaged: it holds no figure {prefix}*; delete the run, and its stage is run again")
    return values


def figures(runs: Path) -> list[tuple[str, str]]:
    """The rows of the closing table: what each stage reached."""
    dvae = last_values(runs / "dvae/log.jsonl", "validation/")
    transformer = last_values(runs / "transformer/log.jsonl", "validation/")
    clip = last_values(runs / "clip/log.jsonl", "validation/")
    rows = [
        ("codec: PSNR of held-out reconstructions", f"{dvae['validation/psnr']:.1f} dB"),
        ("codec: codes in use",
         f"{dvae['validation/codes_used']:.0f} (perplexity {dvae['validation/perplexity']:.0f})"),
        ("transformer: validation loss", f"{transformer['validation/bits_per_image_token']:.2f} bits per image token"),
        ("CLIP: recall@1 in 64", f"{100 * clip['validation/recall@1_in_64']:.1f} %"),
    ]
    judged = runs / "judge.json"
    if judged.is_file():
        result = read_json(judged, read_text(judged))
        rows += [
            ("judge: every colour and shape right, unranked", f"{100 * result['unranked']:.1f} %"),
            (f"judge: the same, best of {result['candidates']} by CLIP", f"{100 * result['best_by_clip']:.1f} %"),
        ]
    return rows


def report(seconds: dict[str, float], runs: Path, console: Console) -> None:
    """The table of times and figures, and where the gallery lies."""
    table = Table(title="Tessera quickstart", title_justify="left", show_header=False)
    for name, value in seconds.items():
        table.add_row(f"time: {name}", f"{value:.0f} s")
    table.add_row("time: all stages", f"{sum(seconds.values()) / 60:.1f} min", end_section=True)
    for name, value in figures(runs):
        table.add_row(name, value)
    console.print()
    console.print(table)
    console.print(f"the gallery: {runs / 'gallery' / 'index.html'}", soft_wrap=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", nargs="?", default="shapes", choices=sorted(STAGES))
    dataset = parser.parse_args().dataset
    os.chdir(ROOT)
    make_stages, runs = STAGES[dataset]
    console = Console(highlight=False)
    times = runs / "stages.json"
    seconds: dict[str, float] = read_json(times, read_text(times)) if times.is_file() else {}
    if "TESSERA_STARTED" in os.environ and "setup" not in seconds:
        seconds["setup"] = time.time() - int(os.environ["TESSERA_STARTED"])
    for stage in make_stages():
        if stage.name in seconds and Path(stage.product).is_file():
            console.print(f"== {stage.name}: done before ({seconds[stage.name]:.0f} s)", style="dim")
            continue
        seconds[stage.name] = run_stage(stage, console)
        runs.mkdir(parents=True, exist_ok=True)
        times.write_text(json.dumps(seconds, indent=2) + "\n")
    report(seconds, runs, console)


if __name__ == "__main__":
    run_command(main)
