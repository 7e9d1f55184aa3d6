"""``train.evaluate_every``: what a run logs is what the command measures afterwards."""

import json

import pytest

from dalle.errors import UserError


def test_figures_of_a_run_are_those_of_the_command(workshop, commands, tmp_path):
    clip = workshop.config("clip", tmp_path, train={"steps": 1, "batch_size": 8, "log_every": 1})
    assert commands["train"](clip, "data.validation=null") == 0
    config = workshop.config("transformer", tmp_path, train={"steps": 4, "batch_size": 8, "log_every": 1,
                                                            "evaluate_every": 2},
                             evaluation={"samples": 20, "metrics": ["fid", "kid", "judge"],
                                         "extractor": f"clip:{tmp_path / 'clip'}"})
    assert commands["train"](config) == 0
    lines = [json.loads(line) for line in (tmp_path / "transformer" / "log.jsonl").read_text().splitlines()]
    found = {line["step"]: line for line in lines if "evaluation/samples" in line}
    assert found.keys() == {2, 4} and all(line["evaluation/samples"] == 20 for line in found.values())
    assert found[2]["evaluation/fid-clip:clip"] > 0 and "evaluation/judge/colour_shape" in found[2]
    out = tmp_path / "evaluation"
    commands["evaluate"]("--model", tmp_path / "transformer", "--data", workshop.folder / "data/validation",
                         "--samples", 20, "--metrics", "fid", "--extractor", f"clip:{tmp_path / 'clip'}", "--out", out,
                         "--cache", out, "--device", "cpu")
    row = json.loads((out / "results.json").read_text())["rows"][0]
    assert row["value"] == pytest.approx(found[4]["evaluation/fid-clip:clip"], rel=1e-5)
    assert row["step"] == 4 and row["weights"] == "EMA"
    assert row["settings"] == "temperature 1.0, top-k off, top-p off, guidance 1.0"
    assert (tmp_path / "transformer/model/source.json").is_file()


def test_a_codec_run_has_no_captions_to_paint(workshop, commands, tmp_path):
    with pytest.raises(UserError, match="a dvae run paints no captions; use train.validate_every"):
        commands["train"](workshop.config("dvae", tmp_path), "train.evaluate_every=1")
