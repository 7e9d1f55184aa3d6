#!/usr/bin/env python
"""What one GPU reaches, row by row, each beside what the device could do and what is asked for; some 8 minutes.

    python tools/bench/gpu.py                                  # all parts, in this order, as far as --minutes go
    python tools/bench/gpu.py limits training --only "xl full" # some of them, and of those the rows that hold the words
    python tools/bench/gpu.py quickstart --minutes 6
    python tools/bench/gpu.py --small --device cpu             # models of no use, to see that all of it works

Parts: limits (copy bandwidth, matrix rates), training (tokens/s, MFU), decoding (tokens/s), candidates (512 pictures of
one caption), small (steps/s of small models through their commands), equality (captured and plain decoding, compiled
and plain training), overhead (the loop's, and of saving), quickstart (all of its stages).

Each part runs in a process of its own with a time limit, and a row is printed as soon as it is measured: a part that
fails, hangs or runs out of memory costs none of the others. ``--out FILE`` keeps the rows as JSON lines.

A bare machine needs, besides torch: pydantic (with pydantic_core, annotated_types, typing_inspection), webdataset
(braceexpand), open_clip_torch (ftfy, wcwidth), timm, accelerate, transformers, tokenizers, safetensors, pillow-heif,
pyarrow, psutil, rich, pyyaml, and for fp8 torchao. deepspeed, wandb and tensorboard are not imported by it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from gpu_parts.decoding import candidates, decoding
from gpu_parts.equality import equality
from gpu_parts.limits import limits
from gpu_parts.overhead import overhead
from gpu_parts.rows import Row, Setting, parse
from gpu_parts.stages import quickstart, small_models
from gpu_parts.training import training

# part -> (what it runs, seconds that it may take)
PARTS: dict[str, tuple[Callable[..., None], int]] = {
    "limits": (limits, 60), "training": (training, 210), "decoding": (decoding, 120), "candidates": (candidates, 130),
    "small": (small_models, 150), "equality": (equality, 60), "overhead": (overhead, 120),
    "quickstart": (quickstart, 420)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--only", default="", help="of a part's rows those that hold these words")
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default 8)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="models of no use")
    parser.add_argument("--out", type=Path, help="a file for the rows, JSON lines")
    parser.add_argument("--bandwidth", type=float, help="bytes/s, of an earlier run's `limits`")
    parser.add_argument("--rate", type=float, help="bf16 FLOP/s, the same")
    parser.add_argument("--here", action="store_true", help="the one part in this process (what the others are run by)")
    options = parser.parse_args(arguments)
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        parser.error(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}")
    if options.here:
        run_here(options)
        return 0
    print(describe(options.device), flush=True)
    return 0 if all(run_parts(options)) else 1


def describe(device: str) -> str:
    name = torch.cuda.get_device_name() if device.startswith("cuda") else "CPU"
    return f"{time.strftime('%Y-%m-%d')}, {name}, torch {torch.__version__}, Python {sys.version.split()[0]}"


def run_parts(options: argparse.Namespace) -> list[bool]:
    """Whether each part ended well; what it measured is printed, and handed to the parts after it."""
    ends, ended = time.monotonic() + 60 * options.minutes, []
    for part in options.parts or PARTS:
        left = ends - time.monotonic()
        if left < 10:
            print(f"== {part}: not run, the {options.minutes:g} minutes are over", flush=True)
            ended.append(False)
            continue
        began = time.monotonic()
        rows, status = run_apart(part, options, min(left, PARTS[part][1]))
        end = "" if status == 0 else f", ended with {status}"
        print(f"== {part}: {time.monotonic() - began:.0f} s{end}", flush=True)
        ended.append(status == 0)
        for row in rows:
            if row.what.startswith("limit: copy"):
                options.bandwidth = row.value * 1e9
            if row.what == "limit: bf16 product":
                options.rate = row.value * 1e12
    return ended


def run_apart(part: str, options: argparse.Namespace, seconds: float) -> tuple[list[Row], int | str]:
    """The part in a process of its own, killed with all that it started after ``seconds``: (its rows, its status)."""
    words = [sys.executable, __file__, part, "--here", "--device", options.device, "--only", options.only]
    words += ["--small"] if options.small else []
    for name in ("bandwidth", "rate"):
        value = getattr(options, name)
        words += [f"--{name}", str(value)] if value is not None else []
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)
    late = threading.Event()

    def kill() -> None:
        late.set()
        os.killpg(process.pid, 9)

    timer = threading.Timer(seconds, kill)
    timer.start()
    rows = []
    for line in process.stdout:
        row = parse(line)
        if row and options.small:                       # of no use, so nothing is asked of them
            row = replace(row, bar=None, goal=None)
        print(row.line() if row else line.rstrip(), flush=True)
        if row:
            rows.append(row)
            if options.out:
                with open(options.out, "a") as file:
                    file.write(json.dumps(asdict(row) | {"part": part, "verdict": row.verdict()}) + "\n")
    status = process.wait()
    timer.cancel()
    return rows, f"its time, {seconds:.0f} s, over" if late.is_set() else status


def run_here(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="gpu_") as folder:
        setting = Setting(torch.device(options.device), options.small, Path(folder), options.bandwidth, options.rate)
        PARTS[options.parts[0]][0](setting, options.only)


if __name__ == "__main__":
    sys.exit(main())
