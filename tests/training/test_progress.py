"""The live line in the width of common terminals."""

import io

import pytest
from rich.console import Console

from dalle.training.progress import live_line

FIGURES = "loss 2.345  grad_norm 0.4567  lr 0.0003  samples_per_second 123.4  data_wait 0.01234"


@pytest.mark.parametrize(("width", "shown"), [(60, "loss"), (80, "loss 2.345"), (160, FIGURES)])
def test_the_bar_stays_and_the_figures_take_what_is_left(width, shown):
    out = io.StringIO()
    bar = live_line(Console(file=out, width=width, force_terminal=True, color_system=None, _environ={}))
    bar.add_task("quickstart/transformer", total=120_000, completed=60_000, figures=FIGURES)
    bar.console.print(bar.get_renderable())
    (line,) = out.getvalue().splitlines()
    assert line.count("━") == 7 and "60000/120000" in line and shown in line and len(line) <= width
