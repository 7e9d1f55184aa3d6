"""A cluster of stand-ins, and the script that would be submitted to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from slurm_standins import SBATCH, SCONTROL, SRUN, TRAINER, Cluster


@pytest.fixture
def cluster(tmp_path, monkeypatch, commands) -> Cluster:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, source in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "trainer": TRAINER}.items():
        (programs / name).write_text(f"#!{sys.executable} -S\n{source}")
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    return Cluster(tmp_path, commands["submit"])


@pytest.fixture
def render(cluster, capsys):
    """The script that --dry-run prints."""

    def rendered(*arguments: str) -> str:
        capsys.readouterr()
        assert cluster.submit(cluster.config(), *arguments, "--dry-run") == 0
        script = capsys.readouterr().out
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert not cluster.calls("sbatch") and not (cluster.folder / "runs").exists()
        return script

    return rendered
