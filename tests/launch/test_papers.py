"""The papers' figures beside ours: what is written down, columns by protocol, Kendall's tau by hand, the command."""

import json
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "launch"))

from dalle.errors import UserError
from gans import SYSTEMS
from papers.figures import PUBLISHED, Column, Doubt, Figure
from papers.table import Measured, agreement, figure_text, measured_columns, write_papers


def column(values: dict[str, float], metric: str = "IS", doubt: Doubt = Doubt.NONE) -> Column:
    return Column(metric, "CUB", "some", tuple(Figure(name, value, doubt=doubt) for name, value in values.items()))


def row(system: str, figures: dict[str, float], **protocol) -> tuple:
    known = {"tool": "tool 1", "samples": 1000, "seed": 0, "image_size": 64, "captions": "shapes", **protocol}
    return system, figures, dict.fromkeys(figures, json.dumps(known))


def cells(text: str, start: str) -> list[str]:
    """Of the first line of a table that starts so."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {start} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# -- what is written down

def test_a_column_has_one_figure_of_a_system_and_a_protocol_one_column():
    assert len({column[:3] for column in PUBLISHED}) == len(PUBLISHED)
    for one in PUBLISHED:
        systems = [figure.system for figure in one.figures]
        assert len(set(systems)) == len(systems) and set(systems) <= SYSTEMS.keys()
        assert one.metric in ("IS", "FID", "R-precision", "VS") and one.data in ("CUB", "Oxford-102", "COCO")
        assert one.protocol and all(figure.by for figure in one.figures)
    painting = {name for name, system in SYSTEMS.items() if system.paints}
    without = painting - {figure.system for one in PUBLISHED for figure in one.figures}
    assert len(without) <= 4          # users' rankings, or figures of another kind, is all that these papers have


def figures_of(system: str, metric: str, data: str) -> list[float]:
    return [figure.value for one in PUBLISHED if (one.metric, one.data) == (metric, data)
            for figure in one.figures if figure.system == system]


def test_figures_of_other_protocols_stay_apart():
    """Each of these is in a column of its own."""
    assert figures_of("attngan", "R-precision", "CUB") == [67.82, 53.31]
    assert figures_of("attngan", "R-precision", "COCO") == [85.47, 72.13]
    assert figures_of("attngan", "FID", "CUB") == [23.98, 14.01]
    assert figures_of("dmgan", "FID", "COCO") == [32.64, 26.55, 24.24]      # paper, released, TensorFlow's weights
    assert figures_of("stackgan_v2", "IS", "CUB") == [4.04, 3.82]
    vs = [{figure.system for figure in one.figures} for one in PUBLISHED if one.metric == "VS" and one.data == "CUB"]
    assert vs == [{"stackgan2", "hdgan"}, {"ppan"}]


def test_what_could_not_be_verified_is_marked():
    doubts = {(one.metric, one.data, figure.system, figure.value): figure.doubt
              for one in PUBLISHED for figure in one.figures}
    assert doubts["IS", "CUB", "hdgan", 4.15] is doubts["IS", "COCO", "controlgan", 24.06] is Doubt.VALUE
    assert doubts["IS", "COCO", "sdgan", 35.69] is Doubt.SPREAD and doubts["IS", "CUB", "sdgan", 4.67] is Doubt.VALUE
    assert doubts["IS", "CUB", "mirrorgan", 4.56] is Doubt.NONE
    assert figure_text(Figure("x", 4.1, 0.05), 2) == "4.10 ± 0.05"
    assert figure_text(Figure("x", 4.1, 0.05, Doubt.SPREAD), 2) == "4.10 ± 0.05?"
    assert figure_text(Figure("x", 4.1, 0.05, Doubt.VALUE), 3) == "4.100? ± 0.050?"
    assert figure_text(Figure("x", 4.1, None, Doubt.VALUE), 2) == "4.10?" and figure_text(None, 2) == "-"


# -- agreement

def tau_of(theirs: dict[str, float], ours: dict[str, float], metric: str = "IS", own: str = "judge") -> float | None:
    return agreement(column(theirs, metric), Measured(own, "", ours)).tau


def test_tau_by_hand():
    theirs = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert tau_of(theirs, {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}) == pytest.approx(1)
    # of six pairs only (c, d) is the other way round: (5 - 1) / 6
    assert tau_of(theirs, {"a": 0.1, "b": 0.2, "c": 0.4, "d": 0.3}) == pytest.approx(4 / 6)
    assert tau_of(theirs, {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}) == pytest.approx(-1)
    # what only one of them has plays no part
    assert agreement(column(theirs), Measured("judge", "", {"d": 0.4, "b": 0.2, "z": 0.1})) == (["b", "d"], 1.0, False)


def test_ties_are_tau_b():
    # five pairs told apart by both, none the other way round; one of six is a tie of ours: 5 / sqrt(6 * 5)
    theirs, ours = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}, {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.3}
    assert tau_of(theirs, ours) == pytest.approx(5 / math.sqrt(30))


@pytest.mark.parametrize(("metric", "own", "sign"), [
    ("IS", "r-precision-clip:x", 1), ("IS", "fid-clip:x", -1), ("FID", "kid-clip:x", 1), ("FID", "judge/count", -1),
    ("VS", "ms-ssim", -1)])
def test_orders_are_from_best_to_worst(metric, own, sign):
    assert tau_of({"a": 1.0, "b": 2.0}, {"a": 5.0, "b": 7.0}, metric, own) == sign


@pytest.mark.parametrize("ours", [{}, {"a": 1.0}, {"z": 1.0}, {"a": 1.0, "b": 1.0}])
def test_where_no_order_can_be_compared_there_is_a_dash(ours):
    found = agreement(column({"a": 1.0, "b": 2.0}), Measured("judge", "", ours))
    assert found.tau is None and str(found) == "-"


def test_an_agreement_says_of_how_many_and_whether_a_figure_is_in_doubt():
    ours = Measured("judge", "", {"a": 1.0, "b": 2.0})
    assert str(agreement(column({"a": 1.0, "b": 2.0}), ours)) == "+1.00 (2)"
    assert str(agreement(column({"b": 1.0, "a": 2.0}, doubt=Doubt.VALUE), ours)) == "-1.00? (2)"


# -- ours

def test_ours_of_other_protocols_stay_apart_too():
    columns = measured_columns([row("a", {"fid": 1.0, "kid": 0.1}), row("b", {"fid": 2.0}, image_size=32, step=7),
                                row("c", {"fid": 3.0}, samples=128), ("d", {"fid": 4.0}, {})])
    assert [(one.metric, one.values) for one in columns] == [
        ("fid", {"a": 1.0, "b": 2.0}), ("fid", {"c": 3.0}), ("fid", {"d": 4.0}), ("kid", {"a": 0.1})]
    assert [one.protocol.split(",")[0] for one in columns] == [
        "1", "128 captions of shapes", "not recorded", "1"]


# -- the files

PAPERS = (column({"a": 3.0, "b": 4.0}), Column("FID", "CUB", "old", (Figure("a", 20.0, by="another"),)),
          Column("IS", "COCO", "other", (Figure("b", 8.0, 0.5, Doubt.VALUE),)))


def test_published_and_measured_are_never_in_one_column(tmp_path):
    rows = [row("a", {"judge/x": 0.25}), row("b", {"judge/x": 0.5}), row("c", {"judge/x": 0.75})]
    text = write_papers(rows, ["c", "a"], tmp_path, PAPERS)
    assert text == (tmp_path / "papers.md").read_text()
    assert cells(text, "system") == ["system", "IS [1]", "FID [2]", "ours: judge/x [m1]"]
    assert cells(text, "a") == ["a", "3.00", "20.00", "0.25"] and cells(text, "b") == ["b", "4.00", "-", "0.5"]
    birds, scenes = text.split("## COCO")
    assert "Nothing is known of: c." in birds and cells(scenes, "b") == ["b", "8.00? ± 0.50?", "0.5"]
    assert "- [2] FID: old. Reported: a by another." in text and "- [m1] judge/x: 1,000 captions of shapes" in text
    assert cells(text, "CUB: IS [1]") == ["CUB: IS [1]", "+1.00 (2)"]
    assert "| CUB: FID [2]" not in text                   # one system is no order
    tree = json.loads((tmp_path / "papers.json").read_text())
    assert [one["metric"] for one in tree["published"]] == ["IS", "FID", "IS"]
    assert tree["published"][2]["figures"] == [
        {"system": "b", "value": 8.0, "spread": 0.5, "doubt": "value", "by": "its own paper"}]
    assert tree["measured"][0]["values"] == {"a": 0.25, "b": 0.5, "c": 0.75}
    assert tree["agreement"][0] == {"published": 0, "measured": 0, "systems": ["a", "b"], "tau": 1.0, "in_doubt": False}
    assert tree["agreement"][1]["tau"] is None


def test_a_system_that_nobody_knows_is_left_out_and_named(tmp_path):
    text = write_papers([row("stranger", {"judge/x": 1.0}), row("a", {"judge/x": 0.5})], ["a"], tmp_path, PAPERS)
    assert "Measured, but no system of the family: stranger." in text and "| stranger" not in text
    assert "stranger" not in (tmp_path / "papers.json").read_text()


# -- the command

def test_the_command_puts_the_rows_beside_the_papers(commands, tmp_path, capsys):
    (tmp_path / "rows").mkdir()
    for system, colour in (("stackgan2", 0.5), ("stackgan_v2", 0.25), ("attngan", 0.75)):
        known = {"system": system, "paper": "1", "figures": {"judge/object_colour": colour, "judge/place": 0.1}}
        (tmp_path / "rows" / f"{system}.json").write_text(json.dumps(known))
    assert commands["zoo"]("--table", "papers", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert text.strip() == (tmp_path / "papers.md").read_text().strip()
    assert cells(text, "stackgan_v2")[-1] == "0.25" and "judge/place" not in text
    # stackgan2 < stackgan_v2 < attngan by their papers' IS; ours has the first two exchanged: (2 - 1) / 3
    assert cells(text, "CUB: IS [1]")[1] == "+0.33 (3)" and cells(text, "CUB: FID [6]")[1] == "-"
    assert not (tmp_path / "leaderboard.md").exists()


def test_without_a_row_the_papers_stand_alone(commands, tmp_path, capsys):
    assert commands["zoo"]("--table", "papers", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "Nothing of ours is measured yet" in text and "ours:" not in text and "4.36 ± 0.03" in text
    assert "## Agreement" not in text


def test_the_papers_are_beside_shapes_alone(commands, tmp_path):
    with pytest.raises(UserError, match="--table papers is of shapes alone: leave out --set emoji"):
        commands["zoo"]("--set", "emoji", "--table", "papers", "--out", tmp_path)
    with pytest.raises(SystemExit):
        commands["zoo"]("--table", "paper", "--out", tmp_path)
