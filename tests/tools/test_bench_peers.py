"""Each bench against a peer runs its own side, tiny; the peers are not among the tests' needs."""

import re

import pytest
import torch

from tests.conftest import Command


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows_of(out: str) -> list[str]:
    return re.findall(r"^  ((?:peer|ours) \w+) +[\d.]+ ms", out, re.MULTILINE)


def test_our_side_of_llamagen_runs_alone(capsys):
    Command("tools/bench/llamagen.py")("--tiny", "--rounds", 1, "--cpu-time")
    out = capsys.readouterr().out
    assert rows_of(out) == ["ours fp32", "ours bf16"] * 2
    assert out.count("parameters: ours 16,512") == 2 and "peer" not in out


def test_a_folder_without_the_peer_says_what_belongs_there(tmp_path):
    with pytest.raises(SystemExit, match="a clone of LlamaGen"):
        Command("tools/bench/llamagen.py")("--tiny", "--peer", tmp_path)


def test_our_side_of_dalle_pytorch_runs_alone(capsys):
    Command("tools/bench/dalle_pytorch.py")("--tiny", "--rounds", 1, "--cpu-time")
    out = capsys.readouterr().out
    assert rows_of(out) == ["ours fp32", "ours bf16"] * 4          # two patterns, sampling, the codec
    assert "peer" not in out


def test_open_clip_and_ours_are_as_large_and_both_run(capsys):
    Command("tools/bench/against_open_clip.py")("--tiny", "--rounds", 2, "--cpu-time", "--precisions", "fp32")
    out = capsys.readouterr().out
    assert rows_of(out) == ["peer fp32", "ours fp32"]
    sizes = dict(re.findall(r"parameters: (\w+) ([\d,]+)", out))
    assert sizes["peer"] == sizes["ours"]
    assert re.search(r"peer fp32 / ours fp32: [\d.]+x \(half of the rounds [\d.]+ to [\d.]+, fastest", out)
