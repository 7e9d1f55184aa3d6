"""A script kept beside its run and handed to sbatch."""

import os
import shlex
import subprocess
from pathlib import Path

from dalle.errors import UserError


def write_script(script: str, folder: Path) -> Path:
    """The script in the first free ``job-NNN.sh``."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"job-{number:03d}.sh"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(script)
            return path
        except FileExistsError:
            number += 1


def submit(path: Path) -> str:
    """Hand the script to sbatch; the job's id."""
    # of an allocation that this shell may be in, nothing but the cluster's own settings belongs to the new job
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], env=clean, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"there is no sbatch here: run `sbatch {shlex.quote(str(path))}` on the cluster") from None
    if done.returncode:
        raise UserError(f"sbatch refuses {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]
