#!/usr/bin/env python
"""Kill a training at random, again and again, and prove that nothing was lost by it.

    python tools/chaos.py --minutes 10
    python tools/chaos.py --minutes 3 --seed 7 --engine zero1 --out chaos

Trains a small transformer on the CPU over shards of which some samples are damaged: once from start to end in one
process, and once while it is stopped and killed in every way (``--help`` lists them) and started again with one, two or
four processes. When the minutes are over, the second run is left alone until it has finished. Then its samples, step by
step, its losses, weights, checkpoints and exit statuses are held against the first. Everything goes through the
commands that a person types. ``--seed`` decides what is done; the exact moments are the machine's.

Exit status: 0 proven, 1 not. OUT/chaos.json holds everything that was seen, OUT/logs what the commands printed.
"""

import argparse
import json
import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from chaos_parts.blows import KINDS
from chaos_parts.proof import prove
from chaos_parts.report import show, show_round
from chaos_parts.runs import ENGINES, Chaos
from dalle.errors import UserError, run_command


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
