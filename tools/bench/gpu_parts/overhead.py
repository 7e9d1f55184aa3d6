"""What the loop and its saves cost: the rows of `tools/bench/overhead.py`, on this device."""

import re
import subprocess
import sys
from pathlib import Path

from gpu_parts.rows import Row, Setting, emit
from gpu_parts.stages import ROOT, environment

SCRIPT = Path(__file__).resolve().parents[1] / "overhead.py"


def overhead(setting: Setting, only: str = "") -> None:
    """The loop against a bare one, and training with a save every 50 steps against training without."""
    tiny = ["--tiny", "--threads", "1"] if setting.small else []
    few = ["--rounds", "2"] if setting.small else ["--rounds", "6"]
    large = ["--size", "xl", "--depth", "6"] if setting.device.type == "cuda" and not setting.small else []
    for part, name, bar, goal in (("step", "loop / bare loop, time", 1.02, 1.0),
                                  ("checkpoint", "with saves / without, time", 1.03, 1.01)):
        if only and only not in part:
            continue
        said = run(setting, part, *few, *tiny, *(large if part == "checkpoint" else []))
        print(said, flush=True)
        if part == "step":
            sizes = re.findall(r"^step, (\S+):", said, re.MULTILINE)
            for size, ratio in zip(sizes, re.findall(r"Trainer / bare loop: ([\d.]+)", said), strict=True):
                emit(Row(f"{size}: {name}", float(ratio), "x", bar=bar, goal=goal, more_is_better=False))
        else:
            throughput = float(re.search(r"asynchronous / no save: ([\d.]+)", said)[1])
            emit(Row(name, 1 / throughput, "x", bar=bar, goal=goal, more_is_better=False))


def run(setting: Setting, *words: str) -> str:
    return subprocess.run([sys.executable, str(SCRIPT), *words, "--folder", str(setting.folder), "--device",
                           str(setting.device)], check=True, cwd=ROOT, env=environment(setting, ROOT),
                          stdout=subprocess.PIPE, text=True).stdout
