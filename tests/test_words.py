"""What commands print keeps its form: these are lines that people and scripts have read before."""

import pytest

from dalle.words import cell, duration, one_line, shorten


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"),
                                               (100 * 3600, "100:00:00")])
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_lines_and_cells():
    assert one_line(ValueError("two\n  lines\t")) == "two lines"
    assert cell("a | b\nc") == r"a \| b c" and cell(3) == "3"


def test_long_text_ends_in_an_ellipsis():
    assert shorten("four", 4) == "four" and shorten("fives", 4) == "fiv…" and len(shorten("x" * 100)) == 60
