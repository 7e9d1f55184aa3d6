"""The bench of the data runs, and its rows are there; no figure is asked for."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = {"Pillow, bicubic", "Pillow, area", "Tessera, whole", "Tessera, shrunk by Pillow", "Tessera, shrunk", "Tessera",
        "webdataset, Pillow, bicubic", "Tessera, captions to ids", "Tessera, codes and captions to ids"}


def test_every_contender_has_a_row():
    command = [sys.executable, "tools/bench/data.py", "--cases", "jpeg-256-64", "codes", "--pictures", "8",
               "--batch-size", "4", "--rounds", "1", "--workers", "0"]
    output = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=200, check=True,
                            capture_output=True, text=True).stdout
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| (\d+\.\d\d) \| ([\d,]+) \|$", output, re.MULTILINE)
    assert {name for name, *_ in rows} == ROWS and len(rows) == 10
    assert [ratio for name, _, ratio, _ in rows if "bicubic" in name] == ["1.00", "1.00"]
