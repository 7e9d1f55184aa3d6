"""Captions inside pictures: each character by a font that has it, the one that comes with matplotlib before others."""

import unicodedata
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path

from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont

SIZE = 14              # pixels
FIXED_SIZE = 109       # of the bitmaps in a font of coloured emoji
SHIPPED = Path("fonts/ttf/DejaVuSans.ttf")      # Latin, Greek, Cyrillic, Arabic, signs
JOINED = {"Cc", "Cf", "Mn", "Me"}      # categories that are drawn with what they follow, or not at all
SPACES = {"Zs", "Zl", "Zp"}
PLAIN = "bold", "black", "heavy", "light", "thin", "italic", "oblique", "condensed"      # last among fonts
OF_BOXES = "lastresort", "adobeblank"           # "have" every character, and show none


class Face:
    """A font of captions. One of fixed bitmaps is drawn in its own size and scaled."""

    def __init__(self, path: str | Path):
        self.characters = frozenset(FT2Font(str(path)).get_charmap())
        try:
            self.font, self.scale = ImageFont.truetype(str(path), SIZE), 1.0
        except OSError:
            self.font, self.scale = ImageFont.truetype(str(path), FIXED_SIZE), SIZE / FIXED_SIZE

    def getlength(self, text: str) -> float:
        return self.font.getlength(text) * self.scale

    def draw(self, canvas: Image.Image, left: float, baseline: int, text: str, ink: tuple[int, int, int]) -> None:
        if self.scale == 1:
            ImageDraw.Draw(canvas).text((left, baseline), text, fill=ink, font=self.font, anchor="ls")
            return
        width, ascent = round(self.font.getlength(text)), self.font.getmetrics()[0]
        height = ascent + self.font.getmetrics()[1]
        layer = Image.new("RGBA", (max(width, 1), height))
        ImageDraw.Draw(layer).text((0, ascent), text, font=self.font, embedded_color=True, anchor="ls")
        layer = layer.resize((max(1, round(width * self.scale)), max(1, round(height * self.scale))))
        canvas.paste(layer, (round(left), baseline - round(ascent * self.scale)), layer)


class Lettering:
    """The fonts for ``texts``: measures like a font of Pillow, and draws. ``missing``: what no font here has."""

    def __init__(self, texts: Iterable[str]):
        wanted = dict.fromkeys(character for text in texts for character in text if is_drawn(character))
        self._faces = [shipped()]
        self.missing = [character for character in wanted if ord(character) not in shipped().characters]
        if self.missing:
            self._add_installed()

    def _add_installed(self) -> None:
        for face in installed():
            found = [character for character in self.missing if ord(character) in face.characters]
            if found:
                self._faces.append(face)
                self.missing = [character for character in self.missing if character not in found]
            if not self.missing:
                return

    def getlength(self, text: str) -> float:
        return sum(face.getlength(part) for face, part in self._parts(text))

    def draw(self, canvas: Image.Image, left: float, top: int, text: str, ink: tuple[int, int, int]) -> None:
        baseline = top + shipped().font.getmetrics()[0]
        for face, part in self._parts(text):
            face.draw(canvas, left, baseline, part, ink)
            left += face.getlength(part)

    def _parts(self, text: str) -> Iterator[tuple[Face, str]]:
        """The text cut where the font changes."""
        faces: list[Face] = []
        for character in text:
            if faces and unicodedata.category(character) in JOINED:
                faces.append(faces[-1])
                continue
            able = (face for face in self._faces if ord(character) in face.characters)
            faces.append(next(able, self._faces[0]))
        for face, group in groupby(zip(faces, text, strict=True), key=lambda pair: pair[0]):
            yield face, "".join(character for _, character in group)


def is_drawn(character: str) -> bool:
    """Whether a character has a shape of its own."""
    return unicodedata.category(character) not in JOINED | SPACES


def missing_letters(captions: Iterable[str]) -> list[str]:
    """A line about the characters that no font of this machine has, where there are any."""
    missing = Lettering(captions).missing
    if not missing:
        return []
    shown = " ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
    return [f"no font on this machine has {shown}: boxes in grid.png, the page shows what the browser has; install a "
            "font for them, such as Noto (fonts-noto-cjk, fonts-noto-color-emoji)"]


@cache
def shipped() -> Face:
    return Face(Path(get_data_path()) / SHIPPED)


def installed() -> Iterator[Face]:
    """The fonts that the system has, plain ones first; those that cannot be read are passed over."""
    paths = [path for path in findSystemFonts() if not any(word in name_of(path) for word in OF_BOXES)]
    for path in sorted(paths, key=lambda path: (any(word in name_of(path) for word in PLAIN), name_of(path), path)):
        face = face_of(path)
        if face is not None:
            yield face


@cache
def face_of(path: str) -> Face | None:
    try:
        return Face(path)
    except (OSError, RuntimeError):      # of another format, damaged, or of bitmaps in another size
        return None


def name_of(path: str) -> str:
    return Path(path).name.lower()
