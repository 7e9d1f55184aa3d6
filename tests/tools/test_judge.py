"""The judge command: its shares by hand, and the whole command on the tiny models."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from dalle.errors import UserError

PATH = Path(__file__).resolve().parents[2] / "tools/judge.py"


@pytest.fixture(scope="module")
def judge():
    spec = importlib.util.spec_from_file_location("judge_command", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shares_of_three_captions(judge):
    right = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=bool)
    assert judge.summarise(right) == {"unranked": 3 / 12, "best_by_clip": 1 / 3, "oracle": 2 / 3}


def test_held_out_captions_are_different_and_few_is_an_error(judge, workshop):
    spec = str(workshop.folder / "data/validation")
    captions = judge.held_out_captions(spec, 10)
    assert len(set(captions)) == 10
    with pytest.raises(UserError, match="asks for more"):
        judge.held_out_captions(spec, 1000)


def test_the_command_writes_its_record(workshop, commands, tmp_path):
    for task in ("transformer", "clip"):
        assert commands["train"](workshop.config(task, tmp_path, train={"steps": 1, "batch_size": 8, "log_every": 1}),
                                 "data.validation=null") == 0
    out = tmp_path / "judge.json"
    commands["judge"]("--model", tmp_path / "transformer", "--rerank", tmp_path / "clip", "--data",
                      workshop.folder / "data/validation", "--captions", 4, "--candidates", 3, "--out", out)
    record = json.loads(out.read_text())
    assert record["captions"] == 4 and record["candidates"] == 3
    assert 0 <= record["unranked"] <= record["oracle"] <= 1
    assert record["model"]["kind"] == "text_to_image_transformer"
    assert record["temperature"] == record["guidance"] == 1.0
