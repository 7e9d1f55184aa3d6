"""Fixtures of the fault tests: the commands, ended as a shell would see it."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from dalle.errors import run_command

sys.path.insert(0, str(Path(__file__).parent))      # for tiny_shards

from saved_runs import train


@dataclass
class Ended:
    """What a shell sees of a command that ended: its status, and stderr."""

    status: int
    error: str


@pytest.fixture
def run_here(commands) -> Callable[..., Ended]:
    """``run_here("train", ...)``: a command in this process, as its script would run and end."""

    def run(name: str, *arguments: object) -> Ended:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            run_command(lambda: commands[name](*arguments))
        return Ended(ended.value.code, errors.getvalue())

    return run


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A toy's run of six steps with all its checkpoints."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(folder, steps=6, save_every=1, keep_last=9)
    return folder
