import json
import re

import pytest
import torch

from tests.conftest import ROOT, Command

gpu = Command("tools/bench/gpu.py")
FULL = ("--only", "xl full bf16", "--small", "--device", "cpu")


@pytest.fixture
def rows():
    import sys

    sys.path.insert(0, str(ROOT / "tools/bench"))
    from gpu_parts import rows

    yield rows
    sys.path.remove(str(ROOT / "tools/bench"))


@pytest.mark.parametrize(("value", "more", "verdict"), [
    (0.61, True, "goal"), (0.56, True, "bar"), (0.54, True, "missed"),
    (0.54, False, "goal"), (0.58, False, "bar"), (0.61, False, "missed")])
def test_a_row_says_which_of_bar_and_goal_it_reaches(rows, value, more, verdict):
    bar, goal = (0.55, 0.60) if more else (0.60, 0.55)
    assert rows.Row("what", value, "of peak", bar=bar, goal=goal, more_is_better=more).verdict() == verdict
    assert rows.Row("what", value, "of peak").verdict() == ""


def test_rows_come_as_they_are_measured_and_a_part_that_fails_costs_no_other(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "rows.jsonl"
    assert gpu("limits", "training", "decoding", *FULL, "--out", out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["part"] for line in lines] == ["limits"] * 2 + ["training"] * 3
    assert all(line["value"] > 0 and line["verdict"] == "" for line in lines)
    assert all(line["what"].startswith("xl full bf16") for line in lines[2:])
    assert re.search(r"^== decoding: \d+ s$", capfd.readouterr().out, re.MULTILINE)


def test_a_part_that_takes_too_long_is_killed_and_said(capfd, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gpu("limits", "decoding", "--minutes", 10.5 / 60, *FULL[2:]) == 1
    said = capfd.readouterr().out
    assert "decoding: not run" in said or "its time" in said
    assert torch.__version__ in said.splitlines()[0]
