import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dalle.data.index import ShardIndex
from dalle.data.writer import ShardWriter
from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "index_shards.py"


def load():
    spec = importlib.util.spec_from_file_location("index_shards", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def shards(tmp_path):
    with ShardWriter(tmp_path / "d", 2) as writer:
        for number in range(5):
            writer.write(b"%d" % number, "png", ["a caption"])
    return tmp_path / "d"


def test_counts_are_printed_and_the_index_written(shards, capsys):
    for file in (shards / "index").iterdir():
        file.unlink()
    assert load().main([str(shards), "--workers", "1"]) == 0
    assert f"{shards}: 3 shards, 5 samples" in capsys.readouterr().out
    assert ShardIndex.load(str(shards)).counts.tolist() == [2, 2, 1]


def test_check_tells_sound_from_damaged(shards, capsys):
    main = load().main
    assert main([str(shards), "--check", "--workers", "1"]) == 0
    os.truncate(shards / "00001.tar", 1024 + 3)
    assert main([str(shards), "--check", "--workers", "1"]) == 1
    out = capsys.readouterr().out
    assert "does not fit: 00001.tar" in out and "truncated_header 1" in out
    assert main([f"{shards}/*.tar", "--workers", "2"]) == 0            # indexed as it is; damage is shown, not hidden
    out = capsys.readouterr().out
    assert "truncated_header 1" in out and "the new index makes another data set" in out
    (shards / "00002.tar").unlink()
    assert main([f"{shards}/{{00000..00001}}.tar", "--check", "--workers", "1"]) == 1
    assert "00002.tar (missing)" in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["absent", "absent/*.tar", "{0..3}.tar", "."])
def test_nothing_there(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"there is no|holds no \.tar"):
        load().main([spec])


def test_as_a_command_from_another_folder(shards, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, SCRIPT, "d", "--workers", "1"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "3 shards, 5 samples" in done.stdout
    failed = subprocess.run([sys.executable, SCRIPT, "nowhere"], cwd=tmp_path, env=environment, text=True,
                            capture_output=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1
    assert failed.stderr.startswith("error: there is no nowhere")
