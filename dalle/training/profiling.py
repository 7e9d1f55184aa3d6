"""A trace of a few steps, for a person to look at: ``train.profile``."""

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from dalle.training.settings import ProfileConfig
from dalle.training.timing import Timings

FOLDER = "profile"


class ProfileWindow:
    """Steps ``start`` to ``start + steps - 1`` of a run in ``profile/step_START_rankRRRRR.json`` of its folder.

    The file is a Chrome trace (chrome://tracing, ui.perfetto.dev): what the processor called, the kernels of a GPU, and
    the parts of a step by the names that the log has for their seconds. Outside of the window nothing is recorded. A
    run that ends in it has fewer steps there, one that goes back from it the same ones again; one that fails has none.
    """

    def __init__(self, config: ProfileConfig | None, folder: Path, rank: int, device: torch.device, timings: Timings):
        self._waits = config is not None and (rank == 0 or config.all_ranks)
        self._start, self._left = (config.start, config.steps) if self._waits else (-1, 0)
        self._file = folder / FOLDER / f"step_{self._start:08d}_rank{rank:05d}.json"
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        self._timings = timings
        self._profile: profile | None = None

    @property
    def is_open(self) -> bool:
        return self._profile is not None

    def is_over(self, step: int) -> bool:
        """Called before each step, when ``step`` are done: begins where it is due; whether all of the window are."""
        if self._profile is not None:
            self._left -= 1
            return self._left == 0
        if self._waits and step == self._start:
            self._waits = False
            self._profile = profile(activities=self._activities)
            self._profile.start()
            self._timings.traced = True
        return False

    def write(self) -> Path:
        """End what is open; the trace's file. Waits for the device."""
        self._timings.traced = False
        self._profile.stop()
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._profile.export_chrome_trace(str(self._file))
        self._profile = None
        return self._file
