"""The command on the tiny job: a generator and a codec, one process and two, a comparison, and each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def runs(workshop, commands, tmp_path_factory) -> Path:
    """A transformer, a CLIP that ranks and another that judges, each after one step."""
    folder = tmp_path_factory.mktemp("evaluated")
    for task, name, seed in (("transformer", "transformer", 0), ("clip", "clip", 0), ("clip", "judge", 1)):
        config = workshop.config(task, folder, name=name, seed=seed,
                                 train={"steps": 1, "batch_size": 8, "log_every": 1})
        assert commands["train"](config, "data.validation=null") == 0
    return folder


def arguments(workshop, runs: Path, out: Path) -> list[str]:
    return ["--model", runs / "transformer", "--data", workshop.folder / "data/validation", "--samples", 130,
            "--metrics", "fid,kid,clip,rprecision,psnr,judge", "--rerank", runs / "clip", "--candidates", "1,2",
            "--judge-clip", runs / "judge", "--blur", "0,2", "--temperature", "0.9", "--device", "cpu",
            "--out", out, "--cache", out / "cache"]


@pytest.fixture(scope="module")
def evaluated(workshop, commands, runs) -> Path:
    out = runs / "one"
    assert commands["evaluate"](*arguments(workshop, runs, out)) == 0
    return out


def rows(out: Path) -> dict[tuple, dict]:
    return {(row["metric"], row["blur"], row["candidates"]): row
            for row in json.loads((out / "results.json").read_text())["rows"]}


def test_json_table_and_plots_are_written(evaluated):
    found = rows(evaluated)
    row = found["fid-clip:judge", 2.0, 2]
    assert row["samples"] == 130 and row["references"] == 24 and row["ranker"] == "clip:clip"
    assert row["step"] == 1 and row["weights"] == "EMA" and row["precision"] == "fp32" and row["few_samples"] is False
    assert len(row["extractor_digest"]) == 16 and "temperature 0.9" in row["settings"]
    assert found["r-precision-clip:judge", None, 1]["value"] < 0.5
    table = (evaluated / "results.md").read_text()
    assert "| fid-clip:judge | 2 |" in table and "best of 2 by clip:clip" in table and "Left out: psnr" in table
    for name in ("blur.png", "best_of_n.png", "judge_best_of_1.png", "judge_best_of_2.png"):
        assert min(Image.open(evaluated / name).size) > 300, name


def test_two_processes_find_the_same(workshop, runs, evaluated):
    out = runs / "two"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "launch/evaluate.py",
         *map(str, arguments(workshop, runs, out))], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = rows(evaluated), rows(out)
    assert one.keys() == two.keys() and len(list(out.glob("pictures-*/block_*.npz"))) == 3
    for place, row in one.items():
        assert two[place]["value"] == pytest.approx(row["value"], rel=1e-6, abs=1e-9), place
        if row["error"] is not None:
            assert two[place]["error"] == pytest.approx(row["error"], rel=1e-6, abs=1e-9, nan_ok=True), place
    assert done.stdout.count("| metric") == 1


def test_a_codec_is_measured_by_its_reconstructions(workshop, commands, tmp_path, runs, capsys):
    model = workshop.folder / "runs" / "dvae"
    commands["evaluate"]("--model", model, "--data", workshop.folder / "data/validation", "--samples", 24, "--metrics",
                         "psnr,ssim,fid,clip", "--extractor", f"clip:{runs / 'clip'}", "--out", tmp_path, "--cache",
                         tmp_path / "cache", "--device", "cpu")
    found = {row["family"]: row for row in rows(tmp_path).values()}
    assert found.keys() == {"psnr", "ssim", "rfid"}
    assert 3 < found["psnr"]["value"] < 40 and found["rfid"]["value"] > 0
    assert found["rfid"]["samples"] == found["rfid"]["references"] == 24 and found["rfid"]["candidates"] is None
    assert "left out: clip" in capsys.readouterr().err


def test_comparing_says_what_cannot_be_compared(evaluated, commands, tmp_path, capsys):
    tree = json.loads((evaluated / "results.json").read_text())
    for row in tree["rows"]:
        row["temperature"] = 1.0
        row["settings"] = "temperature 1.0"
        if row["family"] == "fid":
            row["samples"] = 999
    del tree["rows"][0]["temperature"]
    other = tmp_path / "results.json"
    other.write_text(json.dumps(tree))
    commands["evaluate"]("--compare", evaluated / "results.json", other)
    lines = capsys.readouterr().out.splitlines()
    fid = [line for line in lines if line.startswith("| fid-clip:judge")]
    assert len(fid) == 4 and all("NO: " in line and "sample count: 130 against 999" in line for line in fid)
    assert all(line.endswith("| yes |") for line in lines if line.startswith("| kid-clip:judge"))
    assert any("temperature 1.0" in line for line in lines)


@pytest.mark.parametrize(("given", "message"), [
    ([], "--model is missing"),
    (["--model", "RUNS/transformer"], "--data is missing"),
    (["--model", "RUNS/clip", "--data", "DATA"], "sampling needs a generator"),
    (["--model", "RUNS/none", "--data", "DATA"], "does not exist; models near it"),
    (["--model", "RUNS/transformer", "--data", "DATA"], "holds 2.. different captions, --samples 30000"),
    (["--model", "RUNS/transformer", "--data", "DATA", "--samples", "20"], "need --extractor"),
    (["--model", "RUNS/transformer", "--data", "DATA", "--samples", "20", "--extractor", "inception:none.pth"],
     r"pt_inception-2015-12-05-6726825d.pth, published at .*clip:RUN"),
    (["--model", "RUNS/transformer", "--data", "DATA", "--samples", "12", "--extractor", "clip:RUNS/clip"],
     r"at least 17 pictures .*--allow-few"),
    (["--model", "RUNS/transformer", "--data", "DATA", "--samples", "40", "--extractor", "clip:RUNS/clip",
      "--temperature", "-1"], "temperature"),
    (["--compare", "RUNS/one/results.json"], "at least two"),
    (["--compare", "RUNS/clip.yaml", "RUNS/clip.yaml"], "is not a results.json"),
])
def test_mistakes_are_one_line(workshop, runs, commands, tmp_path, given, message):
    places = {"RUNS": str(runs), "DATA": str(workshop.folder / "data/validation")}
    for name, place in places.items():
        given = [part.replace(name, place) for part in given]
    with pytest.raises(UserError, match=message) as caught:
        commands["evaluate"](*given, *([] if "--compare" in given or not given else ["--out", tmp_path]))
    assert "\n" not in str(caught.value)
