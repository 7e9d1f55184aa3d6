"""Edits by a word: painted with one noise, measured as drawn pictures say, whatever the model."""

import json

import numpy as np
import pytest
import torch

from dalle.data.shapes.grammar import canonical_caption, parse_caption
from dalle.data.shapes.render import render
from dalle.data.shapes.scene import Scene, SceneObject, layout
from dalle.errors import UserError
from gans.varying import KINDS, Request

RED, BLUE = "a red circle", "a blue circle"


class Draughtsman:
    """Draws what a caption says, around a place that follows from the seed; it is no GAN."""

    image_size, edits, completes, precision = 64, False, False, "fp32"
    identity = {"kind": "draughtsman"}

    def __init__(self, deaf: bool = False):
        self.deaf, self.asked = deaf, []

    def generate_with_details(self, captions, seeds):
        self.asked.append(list(zip(captions, seeds, strict=True)))
        return torch.stack([self.drawn(*one) for one in zip(captions, seeds, strict=True)]), [{} for _ in seeds]

    def drawn(self, caption: str, seed: int) -> torch.Tensor:
        said = parse_caption(caption)
        places = layout(said.place or "center", ()) if len(said.mentions) == 1 else layout(None, said.relations)
        shift = np.random.default_rng(seed).uniform(-0.02, 0.02, 2)
        objects = tuple(SceneObject("green" if self.deaf else one.colour, one.shape, one.size or "large",
                                    tuple(np.add(place, shift)), 0.2 if one.size == "large" else 0.13)
                        for one, place in zip(said.mentions, places, strict=True))
        picture = render(Scene(objects, said.ground or "white", said.place, said.relations), 64)
        return torch.from_numpy(picture).permute(2, 0, 1)

    def caption_warnings(self, captions):
        return []

    def settings(self, **options):
        return options


def request(generator, edits=((RED, BLUE),), **changes) -> Request:
    return Request(generator, [], rows=2, edits=edits, **{"edit_seeds": 3, "edit_pairs": 5, "seed": 7, **changes})


def test_both_captions_of_an_edit_get_the_same_seed():
    painter = Draughtsman()
    sheet = KINDS["edits"].make(request(painter))
    before, after, pairs_before, pairs_after = painter.asked
    assert before == [(RED, seed) for seed in (7, 8, 9)] and after == [(BLUE, seed) for seed in (7, 8, 9)]
    assert [seed for _, seed in pairs_before] == [seed for _, seed in pairs_after] == [7, 8, 9, 10, 11]
    assert sheet.columns == ["before", "after", "difference"] and len(sheet.rows) == 4
    assert sheet.rows[0] == "seed 7, red → blue: a red circle"
    assert len(sheet.images) == len(sheet.made_of) == 12
    assert torch.equal(sheet.images[0], painter.drawn(RED, 7)) and torch.equal(sheet.images[4], painter.drawn(BLUE, 8))
    gap = (sheet.images[0].int() - sheet.images[1].int()).abs().amax(dim=0)
    assert torch.equal(sheet.images[2], gap.to(torch.uint8).expand(3, -1, -1))


def test_who_changes_the_object_alone_changes_nothing_outside():
    figures = KINDS["edits"].make(request(Draughtsman())).figures
    for group, pairs in (("", 3), ("grammar_", 5)):
        assert figures[f"{group}pairs"] == figures[f"{group}outside_pairs"] == pairs
        assert figures[f"{group}changed_outside"] == 0 and figures[f"{group}colour_changed"] == 1
        assert 0.03 < figures[f"{group}changed"] < 0.2


def test_who_hears_no_colours_changes_nothing_at_all():
    figures = KINDS["edits"].make(request(Draughtsman(deaf=True))).figures
    assert figures["changed"] == figures["l2"] == figures["changed_outside"] == 0
    assert figures["colour_changed"] == figures["grammar_colour_changed"] == 0


def test_without_a_judge_whole_pictures_are_compared_and_the_sheet_says_so():
    sheet = KINDS["edits"].make(request(Draughtsman(), edits=((RED, BLUE), (RED, "a red square"))))
    assert "No judge" in sheet.about and sheet.rows[2] == "seed 7, a red circle → a red square"
    assert not any(name.startswith("grammar_") for name in sheet.figures)
    assert sheet.figures["pairs"] == 6 and 0 < sheet.figures["changed"] < 1
    alone = KINDS["edits"].make(request(Draughtsman(), edit_pairs=0)).figures
    assert "colour_changed" in alone and not any(name.startswith("grammar_") for name in alone)


def test_only_edits_are_made_of_what_is_no_gan():
    assert KINDS["edits"].hindrance(request(Draughtsman())) is None
    assert "--edit" in KINDS["edits"].hindrance(request(Draughtsman(), edits=()))
    assert "no GAN" in KINDS["style"].hindrance(request(Draughtsman()))


@pytest.fixture
def vary(commands, monkeypatch, tmp_path):
    monkeypatch.setattr("dalle.store.load_generator", lambda *given: Draughtsman())
    return lambda *arguments: commands["vary"]("--model", "a/model", "--out", tmp_path, *arguments)


def test_the_command_writes_pictures_and_figures(vary, tmp_path, capsys):
    vary("--edit", RED, BLUE, "--edit-seeds", 3, "--edit-pairs", 2, "--rows", 1)
    told = json.loads((tmp_path / "results.json").read_text())["varied"]
    assert list(told) == ["edits"] and told["edits"]["figures"]["colour_changed"] == 1
    assert told["edits"]["pictures"][:2] == [{"caption": RED, "seed": 0}, {"caption": BLUE, "seed": 0}]
    assert (tmp_path / "edits.png").is_file() and "red → blue" in (tmp_path / "index.html").read_text()
    assert "grammar_changed_outside: 0" in capsys.readouterr().err


def test_what_is_no_gan_and_has_no_edit_is_refused(vary):
    with pytest.raises(UserError, match="no GAN"):
        vary("--prompt", RED)


def test_the_pairs_of_the_grammar_say_all_of_their_scene():
    painter = Draughtsman()
    KINDS["edits"].make(request(painter))
    for caption, _ in painter.asked[2]:
        said = parse_caption(caption)
        assert said.ground and all(one.size for one in said.mentions) and (said.place or said.relations)
        scene = Scene(said.mentions, said.ground, said.place, said.relations)
        assert canonical_caption(scene) == caption
