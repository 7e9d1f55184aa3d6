"""The gallery: what is written, what is escaped, what is folded away."""

import base64
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from dalle.errors import UserError
from dalle.sampling.candidates import Candidate, PromptResult
from dalle.sampling.gallery import check_folder, facts, sheet, wrap_text, write_gallery

HOSTILE = "<script>alert(\"x\")</script> & 'quotes' <img src=x onerror=alert(1)>"
ABOUT = {"model": {"kind": "fake", "digest": "0123"}, "reranker": None, "seed": 0, "options": {"top_k": None}}


def candidate(number: int, score: float | None = None, size: int = 8) -> Candidate:
    image = torch.full((3, size, size), number * 10, dtype=torch.uint8)
    return Candidate(number, 1000 + number, image, score, {"codes": [number, 0]})


def results(count: int = 5, caption: str = "a red star", ranked: bool = True) -> list[PromptResult]:
    order = range(count - 1, -1, -1) if ranked else range(count)
    painted = [candidate(number, number / 10 if ranked else None) for number in order]
    return [PromptResult(caption, painted, ranked), PromptResult("a blue circle", painted, ranked)]


class Page(HTMLParser):
    """Every tag with its attributes, and the pictures inside and outside <details>."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.shown, self.folded, self.depth, self.text = [], [], [], 0, ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.depth += tag == "details"
        if tag == "img":
            (self.folded if self.depth else self.shown).append(dict(attributes))

    def handle_endtag(self, tag):
        self.depth -= tag == "details"

    def handle_data(self, data):
        self.text += data


def test_the_picture_that_is_changed_is_shown_first_for_every_caption(tmp_path):
    source = torch.full((3, 8, 8), 250, dtype=torch.uint8)
    page_file = write_gallery(tmp_path, results(), keep=2, about=ABOUT, source=source)
    assert json.loads((tmp_path / "results.json").read_text())["source"] == "source.png"
    assert np.array(Image.open(tmp_path / "source.png")).tolist() == np.full((8, 8, 3), 250).tolist()
    page = Page(page_file.read_text())
    assert [picture["alt"] for picture in page.shown] == [
        "the picture that is changed", "a red star", "a red star",
        "the picture that is changed", "a blue circle", "a blue circle"]
    row = np.array(sheet(results(), 2, source))
    plain = np.array(sheet(results(), 2))
    assert row.shape[1] > plain.shape[1] and (row == 250).all(axis=2).any() and not (plain == 250).all(axis=2).any()
    write_gallery(tmp_path, results(), keep=2, about=ABOUT)
    assert not (tmp_path / "source.png").exists()


def test_more_pictures_of_a_candidate_are_files_and_stand_below_it(tmp_path):
    (first, second), others = results(2)[0].candidates, results(1)[1:]
    first.details["pictures"] = {"attention": torch.full((3, 4, 12), 77, dtype=torch.uint8)}
    second.details["pictures"] = {"attention": torch.full((3, 4, 12), 78, dtype=torch.uint8)}
    page = Page(write_gallery(tmp_path, [PromptResult("a <star>", [first, second], True), *others], 1,
                              ABOUT).read_text())
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "000-01-attention.png", "000-01.png", "001-01.png"]
    assert Image.open(tmp_path / "kept/000-01-attention.png").size == (12, 4)
    assert [picture["alt"] for picture in page.shown] == ["a <star>", "a <star>: attention", "a blue circle"]
    kept, folded = json.loads((tmp_path / "results.json").read_text())["prompts"][0]["candidates"]
    assert kept["pictures"] == {"attention": "kept/000-01-attention.png"} and kept["codes"] == [1, 0]
    assert "pictures" not in folded and len(page.folded) == 2


def test_kept_pictures_are_files_and_the_rest_is_folded(tmp_path):
    page_file = write_gallery(tmp_path, results(), keep=2, about=ABOUT)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [
        "000-01.png", "000-02.png", "001-01.png", "001-02.png"]
    assert np.array(Image.open(tmp_path / "kept" / "000-01.png"))[0, 0].tolist() == [40, 40, 40]
    page = Page(page_file.read_text())
    assert (len(page.shown), len(page.folded)) == (4, 6)
    assert "0.400" in page.text and "a red star" in page.text
    first = base64.b64decode(page.shown[0]["src"].removeprefix("data:image/png;base64,"))
    assert np.array(Image.open(io.BytesIO(first)))[0, 0].tolist() == [40, 40, 40]


def test_the_page_fetches_and_runs_nothing(tmp_path):
    page = Page(write_gallery(tmp_path, results(), keep=2, about=ABOUT).read_text())
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert all(attributes["src"].startswith("data:") for tag, attributes in page.tags if "src" in attributes)


def test_a_hostile_caption_stays_text(tmp_path):
    text = write_gallery(tmp_path, results(caption=HOSTILE), keep=5, about={"model": HOSTILE}).read_text()
    page = Page(text)
    assert "script" not in {tag for tag, _ in page.tags}
    assert all("onerror" not in attributes for _, attributes in page.tags)
    assert page.shown[0]["alt"] == HOSTILE and page.text.count(HOSTILE) == 2      # the heading and the footer
    assert json.loads((tmp_path / "results.json").read_text())["prompts"][0]["caption"] == HOSTILE


def test_results_say_everything_needed_to_paint_again(tmp_path):
    write_gallery(tmp_path, results(), keep=1, about=ABOUT)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["model"] == ABOUT["model"] and found["seed"] == 0 and "version" in found
    first, second = found["prompts"][0]["candidates"][:2]
    assert first == {"candidate": 4, "seed": 1004, "score": 0.4, "rank": 0, "kept": "kept/000-01.png", "codes": [4, 0]}
    assert second["kept"] is None and second["rank"] == 1


def test_unranked_candidates_say_so(tmp_path):
    text = write_gallery(tmp_path, results(ranked=False), keep=5, about=ABOUT).read_text()
    assert "unranked" in text and "<details>" not in text
    found = json.loads((tmp_path / "results.json").read_text())["prompts"][0]
    assert found["ranked"] is False and found["candidates"][0]["rank"] is None


def test_writing_again_removes_pictures_that_are_no_longer_kept(tmp_path):
    write_gallery(tmp_path, results(), keep=3, about=ABOUT)
    write_gallery(tmp_path, results()[:1], keep=1, about=ABOUT)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["000-01.png"]


def test_files_of_others_stay(tmp_path):
    write_gallery(tmp_path, results(), keep=3, about=ABOUT, source=torch.zeros(3, 8, 8, dtype=torch.uint8))
    (tmp_path / "kept/mine.png").write_bytes(b"mine")
    write_gallery(tmp_path, results()[:1], keep=1, about=ABOUT)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["000-01.png", "mine.png"]
    assert not (tmp_path / "source.png").exists()
    (tmp_path / "source.png").write_bytes(b"mine")
    write_gallery(tmp_path, results()[:1], keep=1, about=ABOUT)
    assert (tmp_path / "source.png").read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["index.html", "grid.png", "results.json", "kept/001-02.png", "source.png"])
def test_a_file_of_the_users_in_the_way_is_refused(tmp_path, name):
    (tmp_path / "kept").mkdir()
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} is not of a gallery and would be overwritten"):
        check_folder(tmp_path, prompts=2, keep=2, with_source=True)
    (tmp_path / name).unlink()
    write_gallery(tmp_path, results(), keep=2, about=ABOUT, source=torch.zeros(3, 8, 8, dtype=torch.uint8))
    check_folder(tmp_path, prompts=2, keep=2, with_source=True)


def test_a_results_file_cannot_name_what_lies_outside(tmp_path):
    write_gallery(tmp_path / "out", results(1), keep=1, about=ABOUT)
    (tmp_path / "mine.png").write_bytes(b"mine")
    text = (tmp_path / "out/results.json").read_text().replace("kept/000-01.png", "../mine.png")
    (tmp_path / "out/results.json").write_text(text)
    write_gallery(tmp_path / "out", results(1), keep=1, about=ABOUT)
    assert (tmp_path / "mine.png").exists()


def test_the_sheet_has_a_row_for_each_caption():
    picture = np.array(sheet(results(), keep=3))
    cell = 8 * 16 + 12                                   # 8 pixels shown 16 times as large, and the gap
    assert picture.shape[1] == 12 + 3 * cell
    assert picture.shape[0] == 12 + 2 * (20 + 6 + cell + 12)
    assert picture[12 + 20 + 6 + 64, 12 + 64].tolist() == [40, 40, 40]
    assert picture[12 + 20 + 6 + 64, 12 + cell + 64].tolist() == [30, 30, 30]


def test_long_captions_are_wrapped_and_cut():
    font = ImageFont.load_default(size=14)
    lines = wrap_text("word " * 200, font, 300)
    assert len(lines) == 3 and lines[-1].endswith("…")
    assert all(font.getlength(line) <= 300 for line in lines)
    assert font.getlength(wrap_text("x" * 500, font, 300)[0]) <= 300


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the gallery"):
        write_gallery(tmp_path / "file", results(), keep=1, about=ABOUT)


def test_facts_are_flat_and_without_what_is_absent():
    assert facts(ABOUT) == [("model.kind", "fake"), ("model.digest", "0123"), ("seed", "0")]
