"""Tests of this folder import its helper files by name."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> SimpleNamespace:
    """What StackGAN's tests train over, in ``folder``."""
    from stackgans import make_shop

    return make_shop(tmp_path_factory.mktemp("stackgan"))


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)
