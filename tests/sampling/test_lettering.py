"""Captions in the sheet are letters and not the box that a font draws for what it lacks."""

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image

from dalle.sampling import lettering
from dalle.sampling.candidates import Candidate, PromptResult
from dalle.sampling.gallery import sheet
from dalle.sampling.lettering import Lettering, missing_letters

NOWHERE = "\uffff"          # no character: what every font draws is its box
FONTS = Path(get_data_path()) / "fonts/ttf"


@pytest.fixture
def fonts(monkeypatch):
    """Sets the fonts that the system has."""
    def have(*paths: Path) -> None:
        monkeypatch.setattr(lettering, "findSystemFonts", lambda: [str(path) for path in paths])

    have()
    return have


def only_in(font: Path) -> str:
    """A letter that the shipped font lacks."""
    numbers = set(FT2Font(str(font)).get_charmap()) - lettering.shipped().characters
    return next(letter for letter in map(chr, sorted(numbers)) if lettering.is_drawn(letter))


def drawn(text: str) -> np.ndarray:
    canvas = Image.new("RGB", (60, 24), (255, 255, 255))
    Lettering([text]).draw(canvas, 4, 2, text, (0, 0, 0))
    return np.array(canvas)


@pytest.mark.parametrize("letter", "żłßЯяΩω—“é")
def test_a_letter_is_no_box(fonts, letter):
    assert missing_letters([letter]) == []
    pixels = drawn(letter)
    assert (pixels != drawn(NOWHERE)).any() and (pixels < 128).any()


def test_the_sheet_shows_letters_where_a_caption_has_them(fonts):
    def head(caption: str) -> np.ndarray:
        picture = torch.zeros(3, 8, 8, dtype=torch.uint8)
        return np.array(sheet([PromptResult(caption, [Candidate(0, 0, picture, None, {})], False)], 1))[:32]

    assert (head("яяя") != head(NOWHERE * 3)).any()


def test_an_installed_font_is_taken_for_what_the_shipped_one_lacks(fonts, tmp_path):
    other = FONTS / "STIXGeneral.ttf"
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    letter = only_in(other)
    (line,) = missing_letters([f"a {letter}"])
    assert line.startswith(f"no font on this machine has {letter}: boxes in grid.png")
    assert (drawn(letter) == drawn(NOWHERE)).all()
    fonts(tmp_path / "broken.ttf", other)
    assert missing_letters([f"a {letter}"]) == []
    assert (drawn(letter) != drawn(NOWHERE)).any()


def test_what_has_no_shape_of_its_own_is_not_missing(fonts):
    assert missing_letters(["a\u200d\ufe0f\u00a0b \u0301"]) == []


def test_lengths_add_up_over_fonts(fonts):
    other = FONTS / "STIXGeneral.ttf"
    letter = only_in(other)
    fonts(other)
    letters = Lettering([f"a{letter}"])
    assert letters.getlength(f"a{letter}") == letters.getlength("a") + letters.getlength(letter)
