"""The `emoji` set: real pictures and captions that nobody here made, from two Debian packages.

The pictures are the glyphs of the Noto Color Emoji font at its own resolution, on white; the captions are the names and
keywords of Unicode's CLDR. A sample is ``KEY.png``, ``KEY.txt`` (the name, then the name with two keywords at a time)
and ``KEY.json`` (emoji, code points, name, keywords, split).
"""

import hashlib
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features
from pydantic import Field

from dalle.config import Section
from dalle.data import debian
from dalle.data.building import LeftOut, Sample, build_dataset, hash_fraction, in_batches, in_order
from dalle.errors import UserError

VERSION = 1
FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
ANNOTATIONS = Path("/usr/share/unicode/cldr/common")
FONT_PACKAGE, ANNOTATIONS_PACKAGE = "fonts-noto-color-emoji", "unicode-cldr-core"
ANNOTATION_FILES = ("annotations/en.xml", "annotationsDerived/en.xml")
STRIKE = 109          # the only size of the font's bitmaps, which are 136 x 128 pixels
HELD_OUT_FRACTION = 0.05
CHUNK = 200
MIN_SIZE, MAX_SIZE = 16, 1024


class EmojiConfig(Section):
    """Everything that decides the bytes of the set, beside the font and the names."""

    size: int = Field(64, description="side of a picture, in pixels")
    samples_per_shard: int = Field(1_000, description="samples in each shard but the last of a split")


@dataclass(frozen=True)
class Named:
    """One emoji: its characters, its CLDR name, its keywords that the name does not say already."""

    text: str
    name: str
    keywords: tuple[str, ...]

    def captions(self) -> list[str]:
        """The name, then the name with two keywords at a time."""
        return [self.name, *(", ".join((self.name, *pair)) for pair in in_batches(self.keywords, 2))]


def make_emoji(config: EmojiConfig, out: Path, font: Path | None = None, annotations: Path | None = None,
               workers: int = 1, force: bool = False, report=print) -> dict[str, Any]:
    """Write the set below ``out`` (:func:`build_dataset`). :class:`UserError` if a Debian package is missing."""
    if not MIN_SIZE <= config.size <= MAX_SIZE:
        raise UserError(f"--size {config.size}: emoji are drawn at {MIN_SIZE} to {MAX_SIZE} pixels")
    if not features.check("raqm"):
        raise UserError("this Pillow lacks Raqm, which emoji of several characters need; install Pillow from its wheel")
    font, annotations = font or FONT, annotations or ANNOTATIONS
    files = [annotations / name for name in ANNOTATION_FILES]
    _check_sources(font, files)
    named = read_annotations(files)
    recipe = {"kind": "emoji", "version": VERSION, **config.model_dump(), "font": _digest_of_source(font),
              "annotations": [_digest_of_source(file) for file in files]}
    return build_dataset(out, recipe, lambda: _samples(named, font, config.size, workers), total=len(named),
                         samples_per_shard=config.samples_per_shard, force=force, report=report)


def missing_packages() -> list[str]:
    """The Debian packages whose files are not there."""
    found = {FONT_PACKAGE: FONT.is_file(), ANNOTATIONS_PACKAGE: all((ANNOTATIONS / name).is_file()
                                                                    for name in ANNOTATION_FILES)}
    return [package for package, there in found.items() if not there]


def install_packages(report=print) -> None:
    """Install what :func:`missing_packages` names; only root can."""
    missing = missing_packages()
    if not missing:
        return
    if os.geteuid() != 0:
        raise UserError(f"--install needs root; run: {_install_command(sudo=True)}")
    debian.install(missing, report)


def _install_command(sudo: bool = False) -> str:
    prefix = "sudo " if sudo else ""
    return f"{prefix}apt-get update && {prefix}apt-get install -y {FONT_PACKAGE} {ANNOTATIONS_PACKAGE}"


def _check_sources(font: Path, files: list[Path]) -> None:
    absent = [str(path) for path in (font, *files) if not path.is_file()]
    if absent:
        command = _install_command(sudo=os.geteuid() != 0)
        raise UserError(f"the emoji set needs the Debian packages {FONT_PACKAGE} and {ANNOTATIONS_PACKAGE} "
                        f"(there is no {absent[0]}); run: {command} (or, as root, give --install)")


def _digest_of_source(path: Path) -> str:
    """As ``dataset.json`` keeps it; another one would say that the set was made of other files."""
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def read_annotations(files: list[Path]) -> list[Named]:
    """Every character (or sequence) that CLDR names, in the order of the files."""
    names: dict[str, str] = {}
    keywords: dict[str, tuple[str, ...]] = {}
    for file in files:
        try:
            entries = ElementTree.parse(file).iter("annotation")
        except (ElementTree.ParseError, OSError) as error:
            raise UserError(f"{file} cannot be read as CLDR annotations: {error}") from None
        for entry in entries:
            text, value = entry.get("cp", ""), (entry.text or "").strip()
            if entry.get("type") == "tts":
                names[text] = value
            else:
                keywords[text] = tuple(word.strip() for word in value.split("|"))
    return [Named(text, name, tuple(word for word in keywords.get(text, ()) if word and word not in name))
            for text, name in names.items() if text and name]


@dataclass(frozen=True)
class _Chunk:
    named: tuple[Named, ...]
    font: Path
    size: int


def _samples(named: list[Named], font: Path, size: int, workers: int) -> Iterator[Sample | LeftOut]:
    seen: set[str] = set()
    for drawn in in_order(_draw_chunk, [_Chunk(part, font, size) for part in in_batches(named, CHUNK)], workers):
        for item, digest in drawn:
            if digest in seen:  # the font draws some flags and people alike: one of them, or validation is not held out
                yield LeftOut("same picture as another emoji", item.meta["name"])
                continue
            if digest:
                seen.add(digest)
            yield item


def _draw_chunk(chunk: _Chunk) -> list[tuple[Sample | LeftOut, str]]:
    font = load_font(chunk.font)
    results = []
    for named in chunk.named:
        glyph = draw_glyph(named.text, font)
        if isinstance(glyph, LeftOut):
            results.append((glyph, ""))
        else:
            digest = hashlib.blake2b(glyph.tobytes(), digest_size=16).hexdigest()
            results.append((_sample(named, glyph, chunk.size), digest))
    return results


def load_font(path: Path) -> ImageFont.FreeTypeFont:
    """The font at the size of its bitmaps. :class:`UserError` for a font without them."""
    try:
        return ImageFont.truetype(str(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise UserError(f"{path} is not the Noto Color Emoji font with bitmaps of size {STRIKE}: {error}") from None


def draw_glyph(text: str, font: ImageFont.FreeTypeFont) -> Image.Image | LeftOut:
    """One emoji as a square RGB picture on white, at the font's own resolution, or why there is none."""
    one = font.getlength("\N{GRINNING FACE}")
    if font.getlength(text) > 1.5 * one:
        return LeftOut("more than one glyph", text)
    side = round(one)
    layer = Image.new("RGBA", (side, side), (255, 255, 255, 0))
    ImageDraw.Draw(layer).text((0, (side - font.getbbox(text)[3]) // 2), text, font=font, embedded_color=True)
    if layer.getchannel("A").getextrema()[1] == 0:
        return LeftOut("no glyph in the font", text)
    matte = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    return Image.alpha_composite(matte, layer).convert("RGB")


def _sample(named: Named, glyph: Image.Image, size: int) -> Sample:
    codepoints = "-".join(f"{ord(character):x}" for character in named.text)
    split = "validation" if hash_fraction(codepoints) < HELD_OUT_FRACTION else "train"
    buffer = BytesIO()
    glyph.resize((size, size), Image.Resampling.LANCZOS).save(buffer, format="PNG", compress_level=6)
    meta = {"emoji": named.text, "codepoints": codepoints, "name": named.name, "keywords": list(named.keywords),
            "split": split}
    return Sample(split, buffer.getvalue(), "png", named.captions(), meta)
