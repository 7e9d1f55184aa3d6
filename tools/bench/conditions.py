#!/usr/bin/env python
"""The tests under other processors' instructions, other numbers of threads and other versions of torch.

    python tools/bench/conditions.py
    python tools/bench/conditions.py --python .venv/bin/python OLDEST/bin/python --threads 1 -- tests/gans -n 2

Every combination is one run of pytest, with what stands after ``--``; a line each, as they end: the condition, what
pytest counted, seconds. The whole output goes to ``--logs``. ``default`` and ``avx2`` are what ``ATEN_CPU_CAPABILITY``
takes, and oneDNN is held to the same; ``native`` leaves both alone. Ends with 1 where a run was red.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
ONEDNN = {"default": "SSE41", "avx2": "AVX2"}      # what oneDNN calls the nearest set of instructions
COUNTED = re.compile(r"\d+ (?:passed|failed|error)")


class Condition(NamedTuple):
    """What a run is made under."""

    python: str
    capability: str
    threads: int

    @property
    def name(self) -> str:
        return f"{self.capability}-{self.threads}"

    @property
    def environment(self) -> dict[str, str]:
        own = {"OMP_NUM_THREADS": str(self.threads)}
        if self.capability != "native":
            own |= {"ATEN_CPU_CAPABILITY": self.capability, "ONEDNN_MAX_CPU_ISA": ONEDNN[self.capability]}
        return os.environ | own


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", nargs="+", default=[sys.executable], help="interpreters, one for each torch")
    parser.add_argument("--capabilities", nargs="+", default=["default", "avx2", "native"],
                        choices=["default", "avx2", "native"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--at-once", type=int, default=1, metavar="N",
                        help="runs side by side, on a machine of many cores")
    parser.add_argument("--logs", type=Path, default=Path("runs/conditions"))
    parser.add_argument("pytest", nargs="*", help="after --: arguments of pytest")
    return parser.parse_args()


def version_of_torch(python: str) -> str:
    return subprocess.run([python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True,
                          check=True).stdout.strip()


def passes(condition: Condition, torch: str, arguments: argparse.Namespace) -> bool:
    """One run of pytest, and its line."""
    log = arguments.logs.absolute() / f"torch-{torch.replace('+', '-')}-{condition.name}.log"
    began = time.monotonic()
    with open(log, "w") as file:
        status = subprocess.run([condition.python, "-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider",
                                 *arguments.pytest], cwd=ROOT, env=condition.environment, stdin=subprocess.DEVNULL,
                                stdout=file, stderr=subprocess.STDOUT).returncode
    lines = log.read_text(errors="replace").splitlines()
    counted = next((line.strip("= ") for line in reversed(lines) if COUNTED.search(line)), f"status {status}")
    print(f"torch {torch:14} {condition.capability:8} {condition.threads} thread(s)   {counted}   "
          f"{time.monotonic() - began:.0f} s", flush=True)
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            print(f"    {line}", flush=True)
    return status == 0


def main() -> int:
    arguments = parse_arguments()
    arguments.logs.mkdir(parents=True, exist_ok=True)
    versions = {python: version_of_torch(python) for python in arguments.python}
    conditions = [Condition(*one) for one in itertools.product(arguments.python, arguments.capabilities,
                                                               arguments.threads)]
    with ThreadPoolExecutor(arguments.at_once) as pool:
        outcomes = list(pool.map(lambda one: passes(one, versions[one.python], arguments), conditions))
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
