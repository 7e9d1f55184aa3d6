"""What each system's own test file says of it, for the tests over all systems, which find it there by the table."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

from torch import Tensor

from gans import SYSTEMS

Case = tuple[tuple, Callable[..., Tensor]]      # shapes, and a call of a function on tensors of these shapes


@dataclass(frozen=True)
class Published:
    """``PUBLISHED[name]`` of a test file: what of a system is known from elsewhere than from its code."""

    paintings: int = 0               # how often a step paints; 0: it never does
    player: str = "generator"        # the player that paints
    finished: str = ""               # the part of its generator that another run has trained
    normalised: bool = True          # whether its generator has batch normalisations, by which paintings are counted
    one_caption: bool = False        # of each sample: read word by word, or compared one by one
    compares: bool = True            # whether samples of a batch are put together, so that it needs two
    zero: Literal[0, 1, 2] = 0       # the stage of ZeRO that it is tried with, one system of each kind; 0: none
    unpaired: tuple[str, ...] = ()   # overrides without which a batch must be even


def published(name: str) -> Published:
    """What the test file of the system ``name`` says of it."""
    return file_of(SYSTEMS[name].module).PUBLISHED[name]


def file_of(module: str) -> ModuleType:
    """The test file of a module of ``gans``."""
    return import_module(f"test_{module.removeprefix('gans.')}")
