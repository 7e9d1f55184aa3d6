"""The cluster, brought up once for all tests, and what a job of it is given."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from two_nodes import Cluster, missing


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """A SLURM of two nodes; skips where the machine has none, saying what brings it."""
    absent = missing()
    if absent:
        pytest.skip(absent)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster
