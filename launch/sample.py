#!/usr/bin/env python
"""Paint captions, rank the pictures and write a gallery.

    python launch/sample.py --model runs/quickstart/transformer --rerank runs/quickstart/clip \\
        --prompt "a large red star above a small blue circle" --candidates 64 --keep 8 --out out/
    python launch/sample.py --model runs/gans/tagan_shapes --image picture.png --prompt "a blue circle" --out out/

Candidate i of prompt p has a seed that follows from (--seed, p, i) alone: it is the same picture however many are asked
for and however they are batched. Out: `index.html` (everything inside it), `grid.png`, `kept/*.png`, `results.json`.
Those of an earlier gallery in the folder are replaced; other files are left alone.
"""

import argparse
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import gans
from dalle.errors import UserError, run_command
from dalle.text_file import read_text_file

WARNINGS_SHOWN = 10
OF_COMPLETION = "--image FILE says which picture is completed, --rows K how much of it is kept"


class OneLineParser(argparse.ArgumentParser):
    """Argument errors as one line, like every other mistake of a user."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a run folder or an exported model that paints captions")
    parser.add_argument("--prompt", action="append", default=[], help="a caption; may be given several times")
    parser.add_argument("--prompts", type=Path, metavar="FILE",
                        help="captions, one a line; blank lines and lines that begin with # are skipped")
    parser.add_argument("--candidates", type=positive, default=16, help="pictures a prompt (default 16)")
    parser.add_argument("--keep", type=positive, help="how many of them to keep (default: the smaller of 8 and all)")
    parser.add_argument("--rerank", metavar="CLIP", help="a CLIP run folder, open_clip:NAME/TAG or "
                        "open_clip:NAME/FILE; without it the pictures stay in the order of their seeds")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write the gallery into")
    parser.add_argument("--temperature", type=float, help="below 1: safer and less varied (default 1)")
    parser.add_argument("--top-k", type=int, help="choose among the k likeliest codes only")
    parser.add_argument("--top-p", type=float, help="choose among the likeliest codes that hold this much probability")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default 1: none)")
    parser.add_argument("--truncation", type=float, help="of a GAN's noise; below 1: safer and less varied (default 1)")
    parser.add_argument("--box", metavar="X,Y,W,H", help="where the objects are to stand, for a model that is told: "
                        "left, top, width and height in shares of the side, such as 0.1,0.2,0.5,0.5")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="one of the model's own "
                        "(see gans/README.md); may be given several times")
    parser.add_argument("--image", type=Path, metavar="FILE", help="a picture to complete, with --rows, or to change, "
                        "for a model that edits")
    parser.add_argument("--rows", type=int, metavar="K", help="keep the first K rows of codes of --image")
    parser.add_argument("--seed", type=natural, default=0)
    parser.add_argument("--batch-size", type=positive, help="pictures side by side (default: sized to the memory)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default auto)")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto",
                        help="of the generator (default: bf16 on a GPU, else fp32); ranking is always fp32")
    return parser


def positive(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def natural(text: str) -> int:
    if not text.strip().isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Everything that can be wrong before a model is loaded."""
    if arguments.keep is None:
        arguments.keep = min(8, arguments.candidates)
    if arguments.keep > arguments.candidates:
        raise UserError(f"--keep {arguments.keep} is more than --candidates {arguments.candidates}: "
                        "keep fewer or ask for more candidates")
    if arguments.rows is not None and arguments.image is None:
        raise UserError(f"--rows needs --image: {OF_COMPLETION}")


def own_options(given: list[str]) -> dict[str, str]:
    """``NAME=VALUE`` of each ``--option``; the model checks the names and reads the values."""
    options = {}
    for one in given:
        name, equals, value = one.partition("=")
        if not name or not equals:
            raise UserError(f"--option {one!r}: write NAME=VALUE")
        options[name.replace("-", "_")] = value
    return options


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    """The captions of ``--prompt``, then those of ``--prompts``."""
    prompts = [prompt.strip() for prompt in arguments.prompt]
    if any(not prompt for prompt in prompts):
        raise UserError("--prompt is empty: say what the picture should show")
    if arguments.prompts is not None:
        try:
            lines = read_text_file(arguments.prompts).splitlines()
        except UserError as error:
            raise UserError(f"--prompts {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:
            raise UserError(f"--prompts {arguments.prompts} holds no prompt: write one caption a line")
        prompts += found
    if not prompts:
        raise UserError("nothing to paint: give --prompt TEXT or --prompts FILE")
    return prompts


def check_writable(folder: Path) -> None:
    """Make the folder and a file in it, so that a missing permission is known before an hour of sampling."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write into --out {folder}: {error.strerror or error}") from error


def choose_device(name: str) -> Any:
    """The torch device that ``--device`` names; ``auto`` is the first GPU if there is one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--device {name} cannot be used here: {reason}") from error
    return device


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    arguments = build_parser().parse_args()
    check_arguments(arguments)
    prompts = read_prompts(arguments)
    check_writable(arguments.out)
    gans.register()
    device = choose_device(arguments.device)
    paint_gallery(arguments, prompts, device)


def painter(generator: Any, arguments: argparse.Namespace, picture: Any) -> tuple[Any, Any]:
    """What paints instead of the generator's own way, if anything, and the picture that it changes, in its size."""
    from dalle.pictures import fit_picture, to_bytes

    if picture is None:
        if generator.edits:
            raise UserError(f"{arguments.model} changes pictures: give it one with --image FILE")
        return None, None
    if arguments.rows is not None:
        if not generator.completes:
            raise UserError(f"--rows: {arguments.model} cannot complete pictures; only a transformer can"
                            + ("; it edits the whole of --image, leave --rows out" if generator.edits else ""))
        return partial(generator.complete, image=picture, rows=arguments.rows), None
    if not generator.edits:
        raise UserError(f"--image needs --rows: {OF_COMPLETION}")
    source = to_bytes(fit_picture(picture, generator.image_size))

    def edit(captions: list[str], seeds: list[int], **options: Any) -> Any:
        sources = source.expand(len(seeds), -1, -1, -1)
        return generator.generate_with_details(captions, seeds, sources=sources, **options)

    return edit, source


def shortened(warnings: list[str]) -> list[str]:
    """The first of many, and how many more there are."""
    more = len(warnings) - WARNINGS_SHOWN
    return warnings[:WARNINGS_SHOWN] + ([f"and {more} more, see results.json"] if more > 0 else [])


def paint_gallery(arguments: argparse.Namespace, prompts: list[str], device: Any) -> None:
    """Load, paint, rank, write."""
    import torch

    from dalle.data.formats import read_picture
    from dalle.sampling.candidates import sample_and_rerank
    from dalle.sampling.gallery import check_folder, write_gallery
    from dalle.sampling.lettering import missing_letters
    from dalle.sampling.progress import PaintingProgress
    from dalle.sampling.rerank import load_reranker
    from dalle.store import load_generator

    names = ("temperature", "top_k", "top_p", "guidance", "truncation", "box")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    options |= own_options(arguments.option)
    check_folder(arguments.out, len(prompts), arguments.keep,
                 with_source=arguments.image is not None and arguments.rows is None)
    picture = torch.from_numpy(read_picture(arguments.image)) if arguments.image is not None else None
    bf16 = arguments.dtype == "bf16" or (arguments.dtype == "auto" and device.type == "cuda")
    say(f"model: {arguments.model}")
    generator = load_generator(arguments.model, device, torch.bfloat16 if bf16 else torch.float32)
    settings = generator.settings(**options)
    paint, source = painter(generator, arguments, picture)
    reranker = None
    if arguments.rerank is not None:
        say(f"reranker: {arguments.rerank}")
        reranker = load_reranker(arguments.rerank, device)
    lost = [warning for reader in (generator, reranker) if reader is not None
            for warning in reader.caption_warnings(prompts)]
    for warning in [*shortened(lost), *missing_letters(prompts)]:
        say(f"warning: {warning}")

    results = sample_and_rerank(
        generator, reranker, prompts, arguments.candidates, arguments.seed,
        {**options, **({"batch_size": arguments.batch_size} if arguments.batch_size else {})}, paint=paint,
        on_progress=PaintingProgress())
    about = {
        "model": generator.identity,
        "reranker": reranker.identity if reranker is not None else None,
        "seed": arguments.seed,
        "dtype": generator.precision,
        "options": {**settings, "rows": arguments.rows,
                    "image": str(arguments.image) if arguments.image else None},
    }
    page = write_gallery(arguments.out, results, arguments.keep, about, source, lost)
    if reranker is None:
        say("unranked: without --rerank the pictures are in the order of their seeds")
    say(f"gallery: {page}")


if __name__ == "__main__":
    run_command(main, save_memory="set --batch-size to less, or --dtype bf16")
