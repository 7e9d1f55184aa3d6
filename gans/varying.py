"""One thing of what pictures are made of changes, the rest is kept: rows and columns that say what each of them does.

The pictures of FusedGAN (arXiv 1801.05551), of any generator of the family: a posture over many captions, a caption
over many draws of its conditioning augmentation, and points between two noises or two texts; and those of ControlGAN
(arXiv 1909.07083): a caption and the same with a word changed, of any model that paints captions. Each is a line of
``KINDS``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dalle.metrics.edits import THRESHOLD, colour_swaps, differences, edit_figures, swap_of
from dalle.store import Generator
from gans.generator import GANGenerator, Noise
from gans.text import Text

DETAIL_NOISE, POSTURE_NOISE = "eps", "z"     # of the conditioning augmentation; of the picture itself
WITHOUT_CAPTION = "unconditional"            # a picture of the same noise, where the model shows one
LEAST_ANGLE = 1e-4                           # below it a great circle is a straight line


@dataclass(frozen=True)
class Sheet:
    """Pictures uint8 [rows * columns, 3, S, S], row after row, and what each row and each column stands for.

    ``made_of``: for every picture what it can be painted again from. ``figures``: what was measured of them.
    """

    title: str
    about: str                      # what is kept, and what changes, in a sentence
    rows: list[str]
    columns: list[str]
    images: Tensor
    made_of: list[dict[str, Any]]
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What is to be varied: ``rows`` and ``columns`` where a kind may choose how many; ``seed`` counts on from there.

    ``options`` are those of every call of the generator; ``source`` uint8 [3, H, W] is what a network that edits
    changes. ``edits``: captions before and after; ``edit_seeds``: of each, what is measured; ``edit_pairs``: so many
    are measured of the language of `shapes`, where they are of it.
    """

    generator: GANGenerator | Generator
    prompts: list[str]
    rows: int = 4
    columns: int = 8
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    source: Tensor | None = None
    edits: Sequence[tuple[str, str]] = ()
    edit_seeds: int = 64
    edit_pairs: int = 256

    def paint(self, captions: list[str], seeds: list[int], noise: Noise | None = None,
              text: Text | None = None) -> tuple[Tensor, list[dict[str, Any]]]:
        sources = None if self.source is None else self.source.expand(len(seeds), -1, -1, -1)
        given = {"noise": noise, "text": text, "sources": sources}
        return self.generator.generate_with_details(
            captions, seeds, **{name: value for name, value in given.items() if value is not None}, **self.options)

    def noise(self, seeds: Sequence[int]) -> Noise:
        """What these seeds draw, as the options have it."""
        return self.generator.noise(seeds, self.options.get("truncation", 1.0))


def style(request: Request) -> Sheet:
    """A row a posture, a column a caption; first without one, where the model shows that."""
    seeds = [request.seed + row for row in range(request.rows)]
    made_of = [{"caption": prompt, "seed": seed} for seed in seeds for prompt in request.prompts]
    images, details = request.paint(*told(made_of))
    columns, alone = list(request.prompts), []
    if all(WITHOUT_CAPTION in detail.get("pictures", {}) for detail in details):
        alone = [details[row * len(columns)]["pictures"][WITHOUT_CAPTION] for row in range(request.rows)]
        images = torch.cat([torch.stack(alone)[:, None], images.unflatten(0, (request.rows, -1))], dim=1).flatten(0, 1)
        made_of = [cell for row, seed in enumerate(seeds) for cell in (
            {"caption": None, "seed": seed}, *made_of[row * len(columns):(row + 1) * len(columns)])]
        columns.insert(0, "without a caption")
    return sheet("Style", "Each row keeps its noise, each column its caption.", [f"seed {seed}" for seed in seeds],
                 columns, images, made_of)


def detail(request: Request) -> Sheet:
    """A row a caption, a column a draw of the conditioning augmentation around it; one posture throughout."""
    drawn = [request.seed + column for column in range(request.columns)]
    made_of = [{"caption": prompt, "seed": seed} for prompt in request.prompts for seed in drawn]
    kept = {name: values.expand(len(made_of), -1) for name, values in request.noise([request.seed]).items()
            if name != DETAIL_NOISE}
    images, _ = request.paint(*told(made_of), noise=kept)
    about = (f"The noise is that of seed {request.seed} throughout; each row keeps its caption, each column draws the "
             "conditioning augmentation anew.")
    return sheet("Detail", about, request.prompts, [f"draw {seed}" for seed in drawn], images,
                 [{**cell, "noise_seed": request.seed} for cell in made_of])


def between_noises(request: Request) -> Sheet:
    """A row a caption, from the posture of one seed to that of the next."""
    ends, shares = (request.seed, request.seed + 1), shares_of(request)
    noise = request.noise(ends)
    path = between(noise[POSTURE_NOISE], shares, request.generator.network.noise_law)
    count = len(request.prompts)
    made_of = [{"caption": prompt, "seed": ends[0], "to_seed": ends[1], "share": share}
               for prompt in request.prompts for share in shares]
    images, _ = request.paint(*told(made_of), noise={POSTURE_NOISE: path.repeat(count, 1)})
    about = f"Each row keeps its caption; z goes from that of seed {ends[0]} to that of seed {ends[1]}."
    return sheet("Between two noises", about, request.prompts, percentages(shares), images, made_of)


def between_texts(request: Request) -> Sheet:
    """A row two captions, one after the other, and the way between them; one posture and one draw throughout."""
    shares, pairs = shares_of(request), list(zip(request.prompts, request.prompts[1:], strict=False))
    made_of = [{"caption": one if share < 0.5 else other, "from": one, "to": other, "share": share,
                "seed": request.seed} for one, other in pairs for share in shares]
    first, last = (request.generator.text([cell[end] for cell in made_of]) for end in ("from", "to"))
    text = between_text(first, last, torch.tensor([cell["share"] for cell in made_of]))
    images, _ = request.paint(*told(made_of), text=text)
    return sheet("Between two texts", f"The noise is that of seed {request.seed} throughout; the text goes from one "
                 "caption to the next.", [f"{one} → {other}" for one, other in pairs], percentages(shares), images,
                 made_of)


class Edit(NamedTuple):
    """Two captions, painted with the noise of one seed."""

    before: str
    after: str
    seed: int


def edits(request: Request) -> Sheet:
    """A row an edit and a seed: before, after, and where they differ. Measured over more than is shown."""
    seeds = [request.seed + number for number in range(request.edit_seeds)]
    groups = {"": [Edit(*edit, seed) for edit in request.edits for seed in seeds]}
    judged = all(swap_of(*edit) for edit in request.edits)
    if judged and request.edit_pairs:
        swaps = colour_swaps(request.edit_pairs, request.seed)
        groups["grammar_"] = [Edit(swap.before, swap.after, request.seed + number) for number, swap in enumerate(swaps)]
    shown, images, figures = [], [], {}
    for name, group in groups.items():
        before, after = (request.paint([edit[end] for edit in group], [edit.seed for edit in group])[0]
                         for end in (0, 1))
        measured = edit_figures(before, after, [swap_of(edit.before, edit.after) for edit in group])
        figures |= {f"{name}{figure}": value for figure, value in measured.items()}
        places = [place for place, edit in enumerate(group) if edit.seed < request.seed + request.rows]
        shown += [group[place] for place in places]
        images.append(with_difference(before[places], after[places]))
    made_of = [cell for edit in shown for cell in (
        {"caption": edit.before, "seed": edit.seed}, {"caption": edit.after, "seed": edit.seed},
        {"difference_of": [edit.before, edit.after], "seed": edit.seed})]
    where = ("The object is where the judge of shapes reads it in the first picture." if judged else
             "No judge knows where the object is: the shares are of whole pictures.")
    about = ("Each row keeps its seed, hence all its noise, and changes its caption. A pixel has changed that differs "
             f"by more than {THRESHOLD} of 255 in a channel; the third picture has the largest difference. {where}")
    return Sheet("Edits", about, [label(edit) for edit in shown], ["before", "after", "difference"], torch.cat(images),
                 made_of, figures)


def label(edit: Edit) -> str:
    """Of one colour word, its two colours first: a long caption is cut where it is drawn."""
    swap = swap_of(edit.before, edit.after)
    told = f"{edit.before} → {edit.after}" if swap is None else f"{' → '.join(swap.colours)}: {edit.before}"
    return f"seed {edit.seed}, {told}"


def with_difference(before: Tensor, after: Tensor) -> Tensor:
    """uint8 [N, 3, S, S] each -> [3 N, 3, S, S]: before, after and, in grey, by how much each pixel differs."""
    grey = torch.from_numpy(differences(before, after)).to(torch.uint8)[:, None].expand_as(before)
    return torch.stack([before, after, grey], dim=1).flatten(0, 1)


@dataclass(frozen=True)
class Kind:
    """What makes a sheet, and what a model must have for it: noises by name, a text that it reads."""

    make: Callable[[Request], Sheet]
    noises: tuple[str, ...] = ()
    reads: bool = False
    prompts: int = 1
    edits: int = 0
    any_model: bool = False     # also one that is no GAN: its seed is all that is kept

    def hindrance(self, request: Request) -> str | None:
        """Why it cannot be made of this request; None where it can."""
        if len(request.edits) < self.edits:
            return "it needs an edit: give --edit BEFORE AFTER"
        if not isinstance(request.generator, GANGenerator):
            return None if self.any_model else "the model is no GAN: it has no noise to keep"
        network = request.generator.network
        missing = [name for name in self.noises if name not in network.noise_dims]
        if missing:
            return f"a {network.model_type} model draws no {missing[0]}, only {', '.join(network.noise_dims)}"
        if self.reads and request.generator.text_encoder is None:
            return f"this {network.model_type} model reads no captions"
        if len(request.prompts) < self.prompts:
            return f"it needs {self.prompts} prompts: give another --prompt"
        return None


# name -> what makes it. A further kind is a function from a request to a sheet and a line here.
KINDS: dict[str, Kind] = {
    "style": Kind(style),
    "detail": Kind(detail, noises=(DETAIL_NOISE,)),
    "noises": Kind(between_noises, noises=(POSTURE_NOISE,)),
    "texts": Kind(between_texts, reads=True, prompts=2),
    "edits": Kind(edits, prompts=0, edits=1, any_model=True),
}


# -- parts

def told(made_of: list[dict[str, Any]]) -> tuple[list[str], list[int]]:
    """The captions and the seeds of all pictures."""
    return [cell["caption"] for cell in made_of], [cell["seed"] for cell in made_of]


def shares_of(request: Request) -> list[float]:
    return torch.linspace(0, 1, max(request.columns, 2), dtype=torch.float64).tolist()


def percentages(shares: Sequence[float]) -> list[str]:
    return [f"{share:.0%}" for share in shares]


def between(ends: Tensor, shares: Sequence[float], law: str) -> Tensor:
    """[2, Z] -> [len(shares), Z]: from the first to the second, so that what lies between is as likely as they are.

    Normal noise lies near a sphere: along a great circle. Uniform noise fills a cube: straight.
    """
    first, last = ends.double()
    share = torch.tensor(shares, dtype=torch.float64)[:, None]
    cosine = (first @ last / (first.norm() * last.norm()).clamp(min=torch.finfo(torch.float64).tiny)).clamp(-1, 1)
    angle = cosine.acos()
    if law != "normal" or angle < LEAST_ANGLE or torch.pi - angle < LEAST_ANGLE:
        return ((1 - share) * first + share * last).float()
    return (((1 - share) * angle).sin() * first + (share * angle).sin() * last).div(angle.sin()).float()


def between_text(first: Text, last: Text, share: Tensor) -> Text:
    """Row i lies ``share[i]`` of the way from that of ``first`` to that of ``last``; between them, the words of both
    are there."""
    share = share.to(first.sentence)

    def straight(one: Tensor, other: Tensor) -> Tensor:
        rows = share.view(-1, *[1] * (one.ndim - 1))
        return (1 - rows) * one + rows * other

    mask = (first.mask & (share < 1)[:, None]) | (last.mask & (share > 0)[:, None])
    return Text(straight(first.sentence, last.sentence), straight(first.words, last.words), mask)


def sheet(title: str, about: str, rows: list[str], columns: list[str], images: Tensor,
          made_of: list[dict[str, Any]]) -> Sheet:
    """With how much neighbouring pictures differ, the mean over their pixels of 0 to 255."""
    pixels = images.float().unflatten(0, (len(rows), len(columns)))
    figures = {}
    if len(columns) > 1:
        figures["difference_along_rows"] = float((pixels[:, 1:] - pixels[:, :-1]).abs().mean())
    if len(rows) > 1:
        figures["difference_along_columns"] = float((pixels[1:] - pixels[:-1]).abs().mean())
    return Sheet(title, about, rows, columns, images, made_of, figures)
