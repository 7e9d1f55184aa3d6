"""What a person looks at: the kept pictures, one sheet of them, ``results.json`` and a page that needs nothing else."""

import base64
import html
import json
import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from PIL import Image, ImageFont
from torch import Tensor

from dalle.errors import UserError
from dalle.pictures import png, to_pillow
from dalle.sampling.candidates import Candidate, PromptResult
from dalle.sampling.lettering import Lettering

SMALL_PICTURE = 96       # below this side, pixels are shown as squares instead of being blurred
SHEET_SIDE = 128         # least side of a picture on the sheet
SHEET_GAP = 12
PAGE, SHEET, RESULTS, KEPT, SOURCE = "index.html", "grid.png", "results.json", "kept", "source.png"
PAGE_FILES = (PAGE, SHEET, RESULTS)
CAPTION_LINE = 20
INK, PAPER = (29, 29, 27), (250, 249, 246)


def write_gallery(folder: Path, results: Sequence[PromptResult], keep: int, about: dict[str, Any],
                  source: Tensor | None = None, warnings: Sequence[str] = ()) -> Path:
    """Write ``kept/*.png``, ``grid.png``, ``results.json`` and ``index.html`` into ``folder``; returns the page.

    The first ``keep`` candidates of each caption are kept; the others are on the page, folded away. ``about`` says what
    made the pictures (``model``, ``reranker``, ``options``, ``seed``). ``source``, uint8 [3, H, W], is the picture that
    all of them change; it is shown before them and written to ``source.png``. A candidate's ``details["pictures"]``
    (name -> uint8 [3, h, w]) are written beside it, and shown below it. ``warnings``: what the models did not read of
    the captions; on the page and in ``results.json``. What an earlier call wrote is replaced, and no
    other file (see :func:`check_folder`).
    """
    if source is not None:
        about = {**about, "source": SOURCE}
    kept = folder / KEPT
    try:
        kept.mkdir(parents=True, exist_ok=True)
        for stale in written_before(folder) - set(PAGE_FILES):
            (folder / stale).unlink(missing_ok=True)
        # before the pictures: it lists them, so that one which was stopped here knows its own the next time
        told = {**about, "warnings": list(warnings)} if warnings else about
        description = json.dumps(describe(results, keep, told), indent=2, ensure_ascii=False)
        (folder / RESULTS).write_text(description + "\n", encoding="utf-8")
        for prompt, result in enumerate(results):
            for place, candidate in enumerate(result.candidates[:keep]):
                (kept / picture_name(prompt, place)).write_bytes(png(candidate.image))
                for name, picture in more_pictures(candidate).items():
                    (kept / picture_name(prompt, place, name)).write_bytes(png(picture))
        if source is not None:
            (folder / SOURCE).write_bytes(png(source))
        sheet(results, keep, source).save(folder / SHEET)
        page = folder / PAGE
        page.write_text(render_page(results, keep, about, source, warnings), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the gallery into {folder}: {error.strerror or error}") from error
    return page


def check_folder(folder: Path, prompts: int, keep: int, with_source: bool) -> None:
    """:class:`UserError` for a file of the user's where the gallery of so many prompts would write one."""
    names = [*PAGE_FILES, *([SOURCE] if with_source else []),
             *(f"{KEPT}/{picture_name(prompt, place)}" for prompt in range(prompts) for place in range(keep))]
    own = written_before(folder)
    other = next((name for name in names if name not in own and (folder / name).exists()), None)
    if other is not None:
        raise UserError(f"{folder / other} is not of a gallery and would be overwritten: give another --out, or move "
                        "it")


def written_before(folder: Path) -> set[str]:
    """The files of the gallery in ``folder``, as its ``results.json`` lists them; none where there is no gallery."""
    try:
        found = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        candidates = [candidate for prompt in found["prompts"] for candidate in prompt["candidates"]]
        listed = [candidate["kept"] for candidate in candidates if candidate["kept"]]
        listed += [name for candidate in candidates for name in candidate.get("pictures", {}).values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()
    names = {f"{KEPT}/{Path(name).name}" for name in listed}       # nothing outside the folder, whatever is listed
    return names | {*PAGE_FILES, *([SOURCE] if found.get("source") == SOURCE else [])}


def picture_name(prompt: int, place: int, name: str | None = None) -> str:
    """The file of the picture at ``place`` (0 the best) of prompt ``prompt``, or of what is shown with it."""
    return f"{prompt:03d}-{place + 1:02d}{f'-{name}' if name else ''}.png"


def more_pictures(candidate: Candidate) -> dict[str, Tensor]:
    """What a generator shows beside the picture itself, such as where it looked."""
    return candidate.details.get("pictures", {})


def describe(results: Sequence[PromptResult], keep: int, about: dict[str, Any]) -> dict[str, Any]:
    """The content of ``results.json``; every candidate can be painted again from its codes or its seed."""

    def entry(prompt: int, place: int, candidate: Candidate) -> dict[str, Any]:
        kept = place < keep
        details = {name: value for name, value in candidate.details.items() if name != "pictures"}
        if kept and more_pictures(candidate):
            details["pictures"] = {name: f"{KEPT}/{picture_name(prompt, place, name)}"
                                   for name in more_pictures(candidate)}
        return {
            "candidate": candidate.number,
            "seed": candidate.seed,
            "score": candidate.score,
            "rank": place if results[prompt].ranked else None,
            "kept": f"{KEPT}/{picture_name(prompt, place)}" if kept else None,
            **details,
        }

    prompts = [
        {
            "caption": result.caption,
            "ranked": result.ranked,
            "candidates": [entry(prompt, place, candidate) for place, candidate in enumerate(result.candidates)],
        }
        for prompt, result in enumerate(results)
    ]
    return {"version": project_version(), **about, "prompts": prompts}


def project_version() -> str | None:
    """Tessera's version, or ``None`` when it runs from a folder that is not installed."""
    try:
        return version("tessera-t2i")
    except PackageNotFoundError:
        return None


def sheet(results: Sequence[PromptResult], keep: int, source: Tensor | None = None) -> Image.Image:
    """The kept pictures as one picture: a row of pictures a caption (wrapped after eight), the caption above it.

    ``source``, of the pictures' size, comes first in every row.
    """
    height, width = results[0].candidates[0].image.shape[-2:]
    factor = max(1, math.ceil(SHEET_SIDE / min(height, width)))
    cell_width, cell_height = width * factor + SHEET_GAP, height * factor + SHEET_GAP
    first = [source] if source is not None else []
    shown = [first + [candidate.image for candidate in result.candidates[:keep]] for result in results]
    columns = min(8, max(len(pictures) for pictures in shown))
    font = Lettering(result.caption for result in results)
    sheet_width = SHEET_GAP + columns * cell_width
    captions = [wrap_text(result.caption, font, sheet_width - 2 * SHEET_GAP) for result in results]
    heights = [
        len(lines) * CAPTION_LINE + SHEET_GAP // 2 + math.ceil(len(pictures) / columns) * cell_height + SHEET_GAP
        for lines, pictures in zip(captions, shown, strict=True)
    ]
    canvas = Image.new("RGB", (sheet_width, SHEET_GAP + sum(heights)), PAPER)
    top = SHEET_GAP
    for lines, pictures, block in zip(captions, shown, heights, strict=True):
        for number, line in enumerate(lines):
            font.draw(canvas, SHEET_GAP, top + number * CAPTION_LINE, line, INK)
        pictures_top = top + len(lines) * CAPTION_LINE + SHEET_GAP // 2
        for place, image in enumerate(pictures):
            picture = to_pillow(image).resize((width * factor, height * factor), Image.Resampling.NEAREST)
            row, column = divmod(place, columns)
            canvas.paste(picture, (SHEET_GAP + column * cell_width, pictures_top + row * cell_height))
        top += block
    return canvas


def wrap_text(text: str, font: Lettering | ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """``text`` in at most ``most`` lines no wider than ``width`` pixels; the last ends in an ellipsis if it was cut."""
    lines = [""]
    text = text[: most * width]            # a character takes a pixel; what is left would be cut letter by letter
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    cut = len(lines) > most
    lines = lines[:most]
    for index, line in enumerate(lines):
        ends = "…" if cut and index == len(lines) - 1 else ""
        while line and font.getlength(line + ends) > width:
            line, ends = line[:-1], "…"
        lines[index] = line + ends
    return lines


def render_page(results: Sequence[PromptResult], keep: int, about: dict[str, Any],
                source: Tensor | None = None, warnings: Sequence[str] = ()) -> str:
    """A page with its pictures inside, without scripts or anything to fetch; every caption is escaped."""
    side = min(results[0].candidates[0].image.shape[-2:])
    sections = "\n".join(render_prompt(number, result, keep, source) for number, result in enumerate(results, start=1))
    total = sum(len(result.candidates) for result in results)
    summary = f"{count(len(results), 'caption')}, {count(total, 'picture')}"
    noticed = "".join(f"<p class=\"warning\">{html.escape(warning)}</p>\n" for warning in warnings)
    rows = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts(about))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tessera: {summary}</title>
<style>{STYLE}</style>
</head>
<body class="{'small' if side < SMALL_PICTURE else 'large'}">
<header>
<h1>Tessera</h1>
<p>{summary}</p>
</header>
<main>
{noticed}{sections}
</main>
<footer>
<dl>
{rows}
</dl>
</footer>
</body>
</html>
"""


def render_prompt(number: int, result: PromptResult, keep: int, source: Tensor | None = None) -> str:
    """One caption: what is changed, its kept pictures open, the rest folded away."""
    kept, rest = result.candidates[:keep], result.candidates[keep:]
    order = "best first" if result.ranked else "unranked, in order of their seeds"
    pictures = "\n".join(
        render_picture(candidate, result.caption, place + 1 if result.ranked else None)
        for place, candidate in enumerate(kept)
    )
    if source is not None:
        changed = f"<figure>{embedded(source, 'the picture that is changed')}<figcaption>source</figcaption></figure>"
        pictures = f"{changed}\n{pictures}"
    folded = ""
    if rest:
        others = "\n".join(
            render_picture(candidate, result.caption, keep + place + 1 if result.ranked else None)
            for place, candidate in enumerate(rest)
        )
        folded = (f"<details>\n<summary>the other {len(rest)}</summary>\n"
                  f"<div class=\"pictures rest\">\n{others}\n</div>\n</details>")
    return f"""<section>
<h2><span class="number">{number}</span>{html.escape(result.caption)}</h2>
<p class="order">{len(kept)} of {len(result.candidates)}, {order}</p>
<div class="pictures">
{pictures}
</div>
{folded}
</section>"""


def render_picture(candidate: Candidate, caption: str, place: int | None) -> str:
    """One picture with its place and score; the seed shows when the pointer rests on it."""
    shown = embedded(candidate.image, caption) + "".join(
        embedded(picture, f"{caption}: {name}") for name, picture in more_pictures(candidate).items())
    label = f"candidate {candidate.number}"
    if place is not None:
        label = f"<b>{place}</b><span>{candidate.score:.3f}</span>"
    return (f"<figure title=\"candidate {candidate.number}, seed {candidate.seed}\">{shown}"
            f"<figcaption>{label}</figcaption></figure>")


def embedded(image: Tensor, text: str) -> str:
    """An image with its bytes inside the page."""
    data = base64.b64encode(png(image)).decode("ascii")
    return f"<img alt=\"{html.escape(text, quote=True)}\" src=\"data:image/png;base64,{data}\">"


def facts(about: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """``about`` as rows of the footer; nested settings are joined by a dot, absent ones left out."""
    rows: list[tuple[str, str]] = []
    for name, value in about.items():
        if isinstance(value, dict):
            rows += facts(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((f"{prefix}{name}", str(value)))
    return rows


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


STYLE = """
:root { color-scheme: light dark; --paper: #faf9f6; --ink: #1d1d1b; --soft: #77746c; --line: #e4e1d8; --card: #fff; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #161615; --ink: #ecebe6; --soft: #96938a; --line: #302f2c; --card: #1f1f1d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 2.5rem 1.5rem 3rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
header { display: flex; align-items: baseline; gap: 1rem; }
h1 { margin: 0; font-size: 1.05rem; letter-spacing: .14em; text-transform: uppercase; }
header p, .order, figcaption, summary, footer { color: var(--soft); font-size: .85rem; }
header p, .order { margin: 0; }
.warning { margin: .75rem 0 0; padding-left: .75rem; border-left: 3px solid #d55e00; font-size: .9rem; }
section { margin-top: 1.75rem; padding-top: 1.5rem; border-top: 1px solid var(--line); }
h2 { margin: 0; font-size: 1.3rem; line-height: 1.35; font-weight: 600; overflow-wrap: anywhere; }
.number { display: inline-block; min-width: 1.8em; color: var(--soft); font-weight: 400;
  font-variant-numeric: tabular-nums; }
.order { margin-bottom: 1rem; }
.pictures { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(8.25rem, 1fr)); }
.large .pictures { grid-template-columns: repeat(auto-fill, minmax(14rem, 1fr)); }
.pictures.rest { gap: .6rem; grid-template-columns: repeat(auto-fill, minmax(5.25rem, 1fr)); padding-top: .9rem; }
figure { margin: 0; padding: .35rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
img { display: block; width: 100%; height: auto; border-radius: .35rem; }
.small img { image-rendering: pixelated; }
figcaption { display: flex; justify-content: space-between; padding: .3rem .2rem 0;
  font-variant-numeric: tabular-nums; }
figcaption b { color: var(--ink); }
.rest figcaption { font-size: .72rem; }
details { margin-top: 1rem; }
summary { cursor: pointer; width: fit-content; }
summary:hover { color: var(--ink); }
footer { margin-top: 2.5rem; padding-top: 1.25rem; border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.25rem; margin: 0; }
dd { margin: 0; color: var(--ink); overflow-wrap: anywhere; }
@media print { details { display: none; } }
"""
