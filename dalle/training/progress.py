"""What a person sees while training: one live line on a terminal, plain lines in a file."""

import sys
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from dalle.words import duration

BAR_WIDTH, NAME_WIDTH = 14, 16       # letters
SECONDS_BETWEEN = 0.1                # two numbers in the bar: it is drawn no oftener, and to be told costs a step time
SHOWN = ("loss", "grad_norm", "lr", "samples_per_second", "data_wait")


def live_line(console: Console) -> Progress:
    """Name, bar, count and time that is left at their full width; the figures in what the terminal has left of it."""
    bar = BarColumn(bar_width=BAR_WIDTH, table_column=Column(min_width=BAR_WIDTH, no_wrap=True))
    figures = TextColumn("{task.fields[figures]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis"))
    name = TextColumn("{task.description}",
                      table_column=Column(max_width=NAME_WIDTH, no_wrap=True, overflow="ellipsis"))
    return Progress(name, bar, MofNCompleteColumn(), TimeRemainingColumn(), figures, console=console, expand=True)


class ProgressLine:
    """Step, main figures and the time that is left; silent on all ranks but the first."""

    def __init__(self, name: str, start: int, steps: int, shown: bool):
        self.steps, self._start, self._began = steps, start, time.monotonic()
        self._shown = shown
        self._next = 0.0
        self._bar: Progress | None = None
        if shown and sys.stderr.isatty():
            self._bar = live_line(Console(stderr=True))
            self._bar.start()
            self._row = self._bar.add_task(name, total=steps, completed=start, figures="")

    def advance(self, done: int) -> None:
        """``done`` steps are finished."""
        if self._bar is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN
            self._bar.update(self._row, completed=done)

    def log(self, done: int, values: Mapping[str, float]) -> None:
        figures = "  ".join(f"{key} {value:.4g}" for key, value in values.items()
                            if key in SHOWN or key.endswith("/loss"))
        if self._bar is not None:
            self._bar.update(self._row, completed=done, figures=figures)
        elif self._shown:
            print(f"step {done}/{self.steps}  {figures}  left {duration(self._remaining(done))}", flush=True)

    def say(self, message: str) -> None:
        """A line of its own, above the live one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False, soft_wrap=True)
        elif self._shown:
            print(message, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _remaining(self, done: int) -> float:
        return (time.monotonic() - self._began) / max(done - self._start, 1) * (self.steps - done)
