"""The command: a whole run on random models, and one line with status 2 for each mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.clip import ClipConfig, ClipModel
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.store import GENERATORS
from launch import sample

ROOT = Path(__file__).resolve().parents[2]
CODEC = {
    "image_size": 32,
    "likelihood": "gaussian",
    "network": {"kind": "compact", "patch": 4, "widths": [8, 16], "blocks": 1, "tail": 8},
    "quantizer": {"kind": "fsq", "levels": [4, 4]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`painter`, `judge` (a CLIP) and `misfit` (a transformer beside another's codec), all with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = CaptionTokenizer.train(["a red star above a blue circle"] * 3, vocab_size=280)
    codec = DiscreteVAE(DVAEConfig(**CODEC))
    for name, grid in (("painter", (4, 4)), ("misfit", (2, 2))):
        export = folder / name / "model"
        config = TransformerConfig(dim=16, depth=1, heads=2, text_length=6, num_text_tokens=300, grid=grid,
                                   num_codes=16)
        TextToImageTransformer(config).save_pretrained(export)
        codec.save_pretrained(export / "codec")
        tokenizer.save(export / "tokenizer")
    judge = folder / "judge" / "model"
    ClipModel(ClipConfig(
        vision={"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
        text={"layers": 1, "width": 16, "heads": 2}, embed_dim=8, text_length=6, num_text_tokens=300,
    )).save_pretrained(judge)
    tokenizer.save(judge / "tokenizer")
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    return folder


def command(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / "launch" / "sample.py"), *arguments], env=environment,
                          capture_output=True, text=True, timeout=120)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    sample.main()


def test_a_prompt_becomes_a_ranked_gallery(runs, tmp_path):
    done = command("--model", str(runs / "painter"), "--rerank", str(runs / "judge"), "--prompt", "a red star",
                   "--candidates", "5", "--keep", "2", "--out", str(tmp_path), "--temperature", "0.7",
                   "--guidance", "1.5", "--top-k", "8", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "painted 5 of 5 pictures" in done.stderr and "index.html" in done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    scores = [candidate["score"] for candidate in found["prompts"][0]["candidates"]]
    assert scores == sorted(scores, reverse=True) and len(scores) == 5
    assert found["options"]["top_k"] == 8 and found["reranker"]["kind"] == "clip"
    assert len(list((tmp_path / "kept").glob("*.png"))) == 2 and (tmp_path / "grid.png").is_file()


def test_more_candidates_and_another_batch_leave_the_first_as_they_were(runs, tmp_path, monkeypatch, capsys):
    def codes(folder):
        candidates = json.loads((folder / "results.json").read_text())["prompts"][1]["candidates"]
        return [candidate["codes"] for candidate in candidates]

    lines = "# two of them\r\na red star\r\n\r\n  a blue circle \r\n"
    (tmp_path / "prompts.txt").write_bytes(lines.encode("utf-8-sig"))       # as a Windows editor does
    prompts = ("--model", runs / "painter", "--prompts", tmp_path / "prompts.txt", "--device", "cpu")
    run(monkeypatch, *prompts, "--candidates", 2, "--out", tmp_path / "few")
    run(monkeypatch, *prompts, "--candidates", 5, "--batch-size", 3, "--out", tmp_path / "many")
    assert codes(tmp_path / "few") == codes(tmp_path / "many")[:2]
    assert "unranked" in capsys.readouterr().err


def test_completion_keeps_the_rows_of_the_picture(runs, tmp_path, monkeypatch):
    run(monkeypatch, "--model", runs / "painter", "--prompt", "a star", "--candidates", 3, "--out", tmp_path,
        "--image", runs / "picture.png", "--rows", 3, "--device", "cpu")
    candidates = json.loads((tmp_path / "results.json").read_text())["prompts"][0]["candidates"]
    assert len({tuple(candidate["codes"][:12]) for candidate in candidates}) == 1
    assert len({tuple(candidate["codes"]) for candidate in candidates}) > 1


class Editor:
    """Mixes the picture that it is given with one colour a seed; its only option is ``truncation``."""

    edits, completes, image_size, identity, precision = True, False, 16, {"kind": "editor"}, "fp32"

    def caption_warnings(self, captions):
        return []

    def settings(self, **options):
        if options.keys() - {"truncation"}:
            raise UserError(f"--{next(iter(options))} is no option of an editor")
        return {"truncation": 1.0, **options}

    def generate_with_details(self, captions, seeds, *, sources, on_progress, **options):
        colours = torch.tensor([seed % 100 for seed in seeds], dtype=torch.uint8)[:, None, None, None]
        return sources // 2 + colours, [{"option": options} for _ in seeds]


@pytest.fixture
def editor(tmp_path, monkeypatch) -> Path:
    """A model folder that ``Editor`` reads."""
    family = ModuleType("family")
    family.load = lambda folder, device, dtype: Editor()
    monkeypatch.setitem(sys.modules, "family", family)
    monkeypatch.setattr(GENERATORS, "_places", {**GENERATORS._places, "editor": ("family", "load")})
    folder = tmp_path / "editor"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "editor"}')
    return folder


def test_a_model_that_edits_changes_the_picture_and_shows_it(runs, editor, tmp_path, monkeypatch):
    run(monkeypatch, "--model", editor, "--prompt", "a blue star", "--candidates", 3, "--truncation", 0.5, "--out",
        tmp_path / "out", "--image", runs / "picture.png", "--device", "cpu")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["options"] == {"truncation": 0.5, "rows": None, "image": str(runs / "picture.png")}
    assert found["source"] == "source.png" and found["dtype"] == "fp32"
    source = np.array(Image.open(tmp_path / "out/source.png"))
    assert source.shape == (16, 16, 3) and (abs(source.astype(int) - [200, 30, 30]) <= 1).all()     # cropped, resized
    for candidate in found["prompts"][0]["candidates"]:
        assert candidate["option"] == {"truncation": 0.5}      # no batch size, unless it is asked for
        kept = np.array(Image.open(tmp_path / "out" / candidate["kept"]))
        assert (kept == source // 2 + candidate["seed"] % 100).all()
    run(monkeypatch, "--model", editor, "--prompt", "a star", "--candidates", 1, "--batch-size", 2, "--out",
        tmp_path / "out", "--image", runs / "picture.png", "--device", "cpu")
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found["prompts"][0]["candidates"][0]["option"] == {"batch_size": 2}


@pytest.mark.parametrize(("arguments", "words"), [
    ([], "changes pictures: give it one with --image FILE"),
    (["--image", "{runs}/picture.png", "--rows", "2"], "cannot complete pictures; only a transformer can; it edits the "
     "whole of --image, leave --rows out"),
    (["--image", "{runs}/picture.png", "--temperature", "0.5"], "--temperature is no option of an editor"),
])
def test_mistakes_with_a_model_that_edits(runs, editor, tmp_path, monkeypatch, arguments, words):
    arguments = [argument.format(runs=runs) for argument in arguments]
    with pytest.raises(UserError) as raised:
        run(monkeypatch, "--model", editor, "--prompt", "a star", "--out", tmp_path / "out", "--device", "cpu",
            *arguments)
    assert words in str(raised.value) and "\n" not in str(raised.value)


def test_a_long_prompt_is_truncated_with_a_warning(runs, tmp_path, monkeypatch, capsys):
    run(monkeypatch, "--model", runs / "painter", "--prompt", "a red star above a blue circle " * 3,
        "--candidates", 1, "--out", tmp_path, "--device", "cpu")
    line = "the prompt \"a red star above a blue circle a red star above a "
    assert f"warning: {line}" in capsys.readouterr().err
    assert json.loads((tmp_path / "results.json").read_text())["warnings"][0].startswith(line)
    assert "this model reads 6: the first 6 are kept</p>" in (tmp_path / "index.html").read_text()


MISTAKES = {
    "keep above candidates": (["--candidates", "2", "--keep", "3"], "--keep 3 is more than --candidates 2"),
    "an empty prompt": (["--prompt", " "], "--prompt is empty"),
    "no prompt": (["--no-prompt"], "nothing to paint"),
    "no file of prompts": (["--prompts", "{runs}/none.txt"], "cannot be read"),
    "a file without prompts": (["--prompts", "{runs}/empty.txt"], "holds no prompt"),
    "prompts in UTF-16": (["--prompts", "{runs}/utf16.txt"], "utf16.txt cannot be read: it is UTF-16, not UTF-8; save"),
    "a missing model": (["--model", "{runs}/paintre"], "does not exist; models near it"),
    "a model of another task": (["--model", "{runs}/judge"], "holds a 'clip' model"),
    "a codec that does not fit": (["--model", "{runs}/misfit"], "4 x 4 codes, the transformer writes 2 x 2"),
    "a reranker of another task": (["--rerank", "{runs}/painter"], "--rerank needs a 'clip'"),
    "rows without a picture": (["--rows", "2"], "--rows needs --image"),
    "a picture without rows": (["--image", "{runs}/picture.png"], "--image needs --rows"),
    "rows out of range": (["--image", "{runs}/picture.png", "--rows", "4"], "4 rows of codes"),
    "an unreadable picture": (["--image", "{runs}/empty.txt", "--rows", "2"], "not a picture"),
    "a missing picture": (["--image", "{runs}/none.png", "--rows", "2"], "cannot read the picture"),
    "an option out of range": (["--top-p", "2"], "--top-p"),
    "an option of another kind of model": (["--truncation", "0.5"], "--truncation"),
    "no number": (["--candidates", "many"], "'many' is not a whole number of at least 1"),
    "a device that is not there": (["--device", "cuda:99"], "--device cuda:99"),
    "an output that is a file": (["--out", "{runs}/empty.txt"], "cannot write into --out"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_line(runs, tmp_path, monkeypatch, mistake):
    arguments, words = MISTAKES[mistake]
    (runs / "empty.txt").write_text("# nothing\n\n")
    (runs / "utf16.txt").write_text("a red star", encoding="utf-16")
    arguments = [argument.format(runs=runs) for argument in arguments]
    usual = ["--prompt", "a red star"] if mistake not in ("no prompt", "a file without prompts") else []
    arguments = [argument for argument in arguments if argument != "--no-prompt"]
    with pytest.raises(UserError) as raised:
        run(monkeypatch, "--model", runs / "painter", "--out", tmp_path / "out", "--device", "cpu", *usual, *arguments)
    assert words in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("arguments", [[], ["--candidates", "0"], ["--nonsense"]])
def test_the_exit_status_of_a_mistake_is_two(arguments):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
