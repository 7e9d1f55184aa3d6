import importlib.util
from pathlib import Path

import pytest

from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "train_tokenizer.py"


def main(*arguments):
    spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def test_a_tokenizer_is_trained_and_described(tmp_path, capsys):
    with ShardWriter(tmp_path / "d", 5) as writer:
        for _ in range(8):
            writer.write(b"x", "png", ["a red circle", "a red square"])
    main(tmp_path / "d", "--out", tmp_path / "t", "--vocab-size", 400)
    out = capsys.readouterr().out
    tokenizer = CaptionTokenizer.load(tmp_path / "t")
    assert f"{tokenizer.vocab_size} entries" in out and "median 3" in out and "400 were asked for" in out
    assert tokenizer.count("a red circle") == 3


def test_no_captions_and_too_small_a_vocabulary(tmp_path):
    with ShardWriter(tmp_path / "d", 5) as writer:
        writer.write(b"x", "png", [])
    with pytest.raises(UserError, match="no usable caption"):
        main(tmp_path / "d", "--out", tmp_path / "t")
    assert not (tmp_path / "t").exists()
    with pytest.raises(UserError, match="at least 257"):
        main(tmp_path / "d", "--out", tmp_path / "t", "--vocab-size", 9)


def test_a_list_of_whole_words(tmp_path, capsys):
    with ShardWriter(tmp_path / "d", 5) as writer:
        for number in range(8):
            writer.write(b"x", "png", ["A red circle.", f"a red square, number{number}"])
    main(tmp_path / "d", "--out", tmp_path / "t", "--kind", "words", "--min-count", 2)
    out = capsys.readouterr().out
    tokenizer = CaptionTokenizer.load(tmp_path / "t")
    assert tokenizer.kind == "words" and tokenizer.vocab_size == 2 + 4
    assert "6 entries" in out and "longest 4" in out and f"unknown: {8 / 56:.2%} of the words" in out
    with pytest.raises(UserError, match="--min-count is for --kind words"):
        main(tmp_path / "d", "--out", tmp_path / "t", "--min-count", 2)
