#!/usr/bin/env python
"""Paint what changes when one thing changes: the caption, its conditioning augmentation, the noise or the text.

    python launch/vary.py --model runs/gans/fusedgan_shapes --out out/ \\
        --prompt "a large red star" --prompt "a small blue circle"
    python launch/vary.py --model runs/gans/controlgan_shapes --out out/ --edit "a red circle" "a blue circle"

Of any GAN of the family: `style` keeps each row's noise and gives each column another caption; `detail` keeps noise and
caption and draws the conditioning augmentation anew; `noises` and `texts` go from one to another, all else kept;
`edits` paints two captions with one noise and measures what changed, of any model that paints captions. Out:
`index.html` (everything inside it), a picture of each, `results.json`. Those of an earlier call in the folder are
replaced; other files are left alone.
"""

import argparse
import html
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sample import (
    OneLineParser,
    check_writable,
    choose_device,
    natural,
    own_options,
    positive,
    read_prompts,
    say,
    shortened,
)

import gans
from dalle.errors import UserError, run_command

if TYPE_CHECKING:
    from PIL import Image

    from gans.varying import Request, Sheet

PAGE, RESULTS = "index.html", "results.json"
LABEL = 150              # least pixels of a row's label


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run folder or an exported model of a GAN")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write into")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times (default: "
                        "those of the run's previews)")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="captions, one a line; blank lines and lines that begin with # are skipped")
    parser.add_argument("--edit", nargs=2, action="append", default=[], metavar=("BEFORE", "AFTER"), help="two "
                        "captions that are painted with the same noise; may be given several times")
    parser.add_argument("--edit-seeds", type=positive, default=64, help="noises that are measured of each edit "
                        "(default 64)")
    parser.add_argument("--edit-pairs", type=natural, default=256, help="captions of shapes with a colour word swapped "
                        "that are measured, too, where the edits are such (default 256)")
    parser.add_argument("--kinds", metavar="A,B", help="of style, detail, noises, texts, edits, ... (default: all that "
                        "the model can, or with --edit edits alone)")
    parser.add_argument("--rows", type=positive, default=4, help="noises of style, and of each edit that are shown "
                        "(default 4)")
    parser.add_argument("--columns", type=positive, default=8, help="draws of detail, steps between two noises or "
                        "texts (default 8)")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to change, for a model that edits")
    parser.add_argument("--truncation", type=float, help="of the noise; below 1: safer and less varied (default 1)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="one of the model's own")
    parser.add_argument("--seed", type=natural, default=0, help="the first of the seeds (default 0)")
    parser.add_argument("--batch-size", type=positive, help="pictures side by side")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    if arguments.edit and not arguments.kinds:
        arguments.kinds = "edits"
    arguments.prompt = arguments.prompt or ([] if arguments.prompts else preview_captions(Path(arguments.model)))
    prompts = [] if arguments.kinds == "edits" else read_prompts(arguments)
    check_writable(arguments.out)
    gans.register()
    vary(arguments, prompts, choose_device(arguments.device))


def preview_captions(run: Path) -> list[str]:
    """Those of a run's previews; none where the folder is no run's."""
    import yaml

    try:
        return list(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["preview"]["captions"])
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return []


def vary(arguments: argparse.Namespace, prompts: list[str], device: Any) -> None:
    """Load, paint, write."""
    import torch

    from dalle.data.formats import read_picture
    from dalle.store import load_generator
    from gans.generator import GANGenerator
    from gans.varying import Request

    say(f"model: {arguments.model}")
    generator = load_generator(arguments.model, device)
    if not isinstance(generator, GANGenerator) and not arguments.edit:
        raise UserError(f"{arguments.model} is no GAN: it has no noise to keep; see launch/sample.py, or give --edit")
    options = own_options(arguments.option)
    if arguments.truncation is not None:
        options["truncation"] = arguments.truncation
    settings = generator.settings(**options)
    if generator.edits != (arguments.image is not None):
        raise UserError(f"{arguments.model} changes pictures: give it one with --image FILE" if generator.edits
                        else f"{arguments.model} paints from nothing: leave --image out")
    source = torch.from_numpy(read_picture(arguments.image)) if arguments.image is not None else None
    if arguments.batch_size:
        options["batch_size"] = arguments.batch_size
    request = Request(generator, prompts, arguments.rows, arguments.columns, arguments.seed, options, source,
                      [tuple(edit) for edit in arguments.edit], arguments.edit_seeds, arguments.edit_pairs)
    kinds = chosen_kinds(arguments.kinds, request)
    check_folder(arguments.out, kinds)
    warnings = generator.caption_warnings([*prompts, *(caption for edit in arguments.edit for caption in edit)])
    for warning in shortened(warnings):
        say(f"warning: {warning}")
    sheets = {}
    for name, kind in kinds.items():
        sheets[name] = kind.make(request)
        say(f"{name}: {len(sheets[name].images)} pictures")
        if name == "edits":
            say("\n".join(f"  {figure}: {value:.4g}" for figure, value in sheets[name].figures.items()))
    about = {"model": generator.identity, "seed": arguments.seed,
             "options": {**settings, "image": str(arguments.image) if arguments.image else None}}
    say(f"page: {write(arguments.out, sheets, about, warnings)}")


def chosen_kinds(asked: str | None, request: "Request") -> dict[str, Any]:
    """The kinds that ``--kinds`` names, or all that the model can; what is left out is said."""
    from gans.varying import KINDS

    names = list(KINDS) if asked is None else [name.strip() for name in asked.split(",")]
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise UserError(f"--kinds: unknown kind {unknown[0]!r}; known: {', '.join(KINDS)}")
    chosen = {}
    for name in names:
        hindrance = KINDS[name].hindrance(request)
        if hindrance is None:
            chosen[name] = KINDS[name]
        elif asked is not None:
            raise UserError(f"--kinds {name}: {hindrance}")
        else:
            say(f"left out: {name}: {hindrance}")
    return chosen


# -- what is written

def picture_name(kind: str) -> str:
    return f"{kind}.png"


def check_folder(folder: Path, kinds: dict[str, Any]) -> None:
    """:class:`UserError` for a file of the user's that would be overwritten."""
    own = written_before(folder)
    for name in (PAGE, RESULTS, *map(picture_name, kinds)):
        if name not in own and (folder / name).exists():
            raise UserError(f"{folder / name} is not of an earlier call and would be overwritten: give another --out, "
                            "or move it")


def written_before(folder: Path) -> set[str]:
    """The files of an earlier call, as its ``results.json`` lists them."""
    try:
        sheets = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["varied"]
        return {PAGE, RESULTS, *(Path(picture_name(kind)).name for kind in sheets)}
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def write(folder: Path, sheets: dict[str, "Sheet"], about: dict[str, Any], warnings: list[str]) -> Path:
    """A picture of each sheet, ``results.json`` and ``index.html``; returns the page."""
    from dalle.sampling.gallery import project_version

    told = {name: {"file": picture_name(name), "rows": sheet.rows, "columns": sheet.columns, "figures": sheet.figures,
                   "pictures": sheet.made_of} for name, sheet in sheets.items()}
    results = {"version": project_version(), **about, **({"warnings": warnings} if warnings else {}), "varied": told}
    try:
        for stale in written_before(folder) - {PAGE, RESULTS}:
            (folder / stale).unlink(missing_ok=True)
        (folder / RESULTS).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, sheet in sheets.items():
            drawn(sheet).save(folder / picture_name(name))
        (folder / PAGE).write_text(page(sheets, about, warnings), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror or error}") from error
    return folder / PAGE


def drawn(sheet: "Sheet") -> "Image.Image":
    """The pictures in rows and columns; each row's label before it, each column's above."""
    from PIL import Image

    from dalle.pictures import to_pillow
    from dalle.sampling.gallery import CAPTION_LINE, INK, PAPER, SHEET_GAP, SHEET_SIDE, wrap_text
    from dalle.sampling.lettering import Lettering

    side = sheet.images.shape[-1]
    side *= max(1, math.ceil(SHEET_SIDE / side))
    cell, label = side + SHEET_GAP, max(LABEL, side)
    font = Lettering([*sheet.rows, *sheet.columns])
    heads = [wrap_text(name, font, side) for name in sheet.columns]
    top = SHEET_GAP + max(map(len, heads)) * CAPTION_LINE
    left = 2 * SHEET_GAP + label
    canvas = Image.new("RGB", (left + len(heads) * cell, top + len(sheet.rows) * cell), PAPER)
    for column, lines in enumerate(heads):
        for number, line in enumerate(lines):
            font.draw(canvas, left + column * cell, SHEET_GAP // 2 + number * CAPTION_LINE, line, INK)
    for row, name in enumerate(sheet.rows):
        for number, line in enumerate(wrap_text(name, font, label, most=side // CAPTION_LINE)):
            font.draw(canvas, SHEET_GAP, top + row * cell + number * CAPTION_LINE, line, INK)
    for place, image in enumerate(sheet.images):
        row, column = divmod(place, len(heads))
        picture = to_pillow(image).resize((side, side), Image.Resampling.NEAREST)
        canvas.paste(picture, (left + column * cell, top + row * cell))
    return canvas


def page(sheets: dict[str, "Sheet"], about: dict[str, Any], warnings: list[str]) -> str:
    """A page with its pictures inside, without scripts or anything to fetch; every caption is escaped."""
    from dalle.sampling.gallery import SMALL_PICTURE, STYLE, count, facts

    sections = "\n".join(section(number, sheet) for number, sheet in enumerate(sheets.values(), start=1))
    total = count(sum(len(sheet.images) for sheet in sheets.values()), "picture")
    side = min((sheet.images.shape[-1] for sheet in sheets.values()), default=0)
    noticed = "".join(f"<p class=\"warning\">{html.escape(warning)}</p>\n" for warning in warnings)
    rows = "\n".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts(about))
    size = "small" if side < SMALL_PICTURE else "large"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Tessera: {total}, one thing changed</title>
<style>{STYLE}{TABLE_STYLE}</style></head>
<body class="{size}">
<header><h1>Tessera</h1><p>{total}, one thing changed</p></header>
<main>
{noticed}{sections}
</main>
<footer><dl>
{rows}
</dl></footer>
</body></html>
"""


def section(number: int, sheet: "Sheet") -> str:
    """One sheet as a table."""
    from dalle.sampling.gallery import embedded

    width = len(sheet.columns)
    heads = "".join(f"<th scope=\"col\">{html.escape(name)}</th>" for name in sheet.columns)
    lines = []
    for row, name in enumerate(sheet.rows):
        cells = "".join(f"<td>{embedded(image, f'{name}, {column}')}</td>" for image, column in
                        zip(sheet.images[row * width:(row + 1) * width], sheet.columns, strict=True))
        lines.append(f"<tr><th scope=\"row\">{html.escape(name)}</th>{cells}</tr>")
    figures = "; ".join(f"{name.replace('_', ' ')}: {value:.3g}" for name, value in sheet.figures.items())
    body = "\n".join(lines)
    return f"""<section>
<h2><span class="number">{number}</span>{html.escape(sheet.title)}</h2>
<p class="order">{html.escape(sheet.about)}{f" {html.escape(figures)}." if figures else ""}</p>
<div class="wide"><table><tr><td></td>{heads}</tr>
{body}
</table></div>
</section>"""


TABLE_STYLE = """
.wide { overflow-x: auto; }
table { border-spacing: .4rem; }
td { min-width: 4.5rem; max-width: 9rem; vertical-align: top; }
th { color: var(--soft); font-size: .8rem; font-weight: 400; line-height: 1.3; text-align: left;
  vertical-align: bottom; }
th[scope=row] { min-width: 7rem; max-width: 12rem; vertical-align: middle; }
"""


if __name__ == "__main__":
    run_command(main, save_memory="set --batch-size to less")
