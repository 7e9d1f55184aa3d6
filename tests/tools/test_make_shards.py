"""The command: what it writes, what it leaves alone, how it refuses."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dalle.data.index import ShardIndex
from dalle.errors import UserError, run_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools" / "make_shards.py"


@pytest.fixture(scope="module")
def command():
    specification = importlib.util.spec_from_file_location("make_shards", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.main


def shapes(out: Path, *more: str) -> list[str]:
    return ["shapes", "--out", str(out), "--count", "12", "--validation", "3", "--size", "32", "--workers", "1",
            "--samples-per-shard", "5", *more]


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_both_splits_with_their_indexes(command, tmp_path, capsys):
    command(shapes(tmp_path / "set"))
    assert "12 train, 3 validation" in capsys.readouterr().out
    train, validation = (ShardIndex.load(str(tmp_path / "set" / split)) for split in ("train", "validation"))
    assert train.counts.tolist() == [5, 5, 2] and validation.counts.tolist() == [3]
    assert (tmp_path / "set/train/index/index.json").is_file()


def test_again_does_nothing_and_other_parameters_are_refused(command, tmp_path, capsys):
    out = tmp_path / "set"
    command(shapes(out))
    before = stamps(out)
    command(shapes(out))
    assert "already made" in capsys.readouterr().out and stamps(out) == before
    with pytest.raises(UserError, match=r"seed 0 -> 1.*another --out, or --force"):
        command(shapes(out, "--seed", "1"))
    assert stamps(out) == before
    command(shapes(out, "--seed", "1", "--force"))
    assert stamps(out) != before


def test_a_folder_of_other_files_is_never_replaced(command, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/thesis.txt").write_text("years of work")
    for more in ([], ["--force"]):
        with pytest.raises(UserError, match="another --out"):
            command(shapes(tmp_path / "set", *more))
    assert (tmp_path / "set/thesis.txt").read_text() == "years of work"


def test_force_deletes_only_what_the_command_wrote(command, tmp_path):
    out = tmp_path / "set"
    command(shapes(out))
    for name in ("tokenizer/tokenizer.json", "notes.txt", "train/index/mine.txt"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    command(shapes(out, "--count", "6", "--validation", "0", "--force"))
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()) == [
        "dataset.json", "notes.txt", "tokenizer/tokenizer.json", "train/00000.tar", "train/00001.tar",
        "train/index/00000.npy", "train/index/00001.npy", "train/index/index.json", "train/index/mine.txt"]
    assert ShardIndex.load(str(out / "train")).num_samples == 6 and not (out / "validation").exists()
    (out / "train/00002.tar").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="00002.tar was not made by this command"):
        command(shapes(out, "--force"))
    assert (out / "train/00002.tar").read_bytes() == b"somebody's"


@pytest.mark.parametrize("name", ["../mine.txt", "train/../../mine.txt", "tokenizer/tokenizer.json", "/etc/passwd"])
def test_a_record_from_elsewhere_deletes_nothing(command, tmp_path, name):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/dataset.json").write_text(json.dumps({"recipe": {"kind": "other"}, "files": [name]}))
    with pytest.raises(UserError, match="no dataset.json that says what they are"):
        command(shapes(tmp_path / "set", "--force"))
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_replacing_that_was_interrupted_is_said_and_done_again(command, tmp_path, monkeypatch):
    out = tmp_path / "set"
    command(shapes(out))
    with monkeypatch.context() as patch:
        patch.setattr("dalle.data.building.shutil.move", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            command(shapes(out, "--seed", "1", "--force"))
    with pytest.raises(UserError, match="was interrupted; give --force"):
        command(shapes(out))
    command(shapes(out, "--force"))
    assert ShardIndex.load(str(out / "train")).num_samples == 12


def test_a_folder_where_the_set_is_written_first_is_not_emptied(command, tmp_path):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds thesis.txt; move it away"):
        command(shapes(tmp_path / "set"))
    assert (tmp_path / "set.partial/thesis.txt").is_file()


def test_an_interrupted_run_leaves_no_set_and_the_next_one_succeeds(command, tmp_path, monkeypatch):
    import dalle.data.shapes.making

    original, calls = dalle.data.shapes.making.make_sample, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(dalle.data.shapes.making, "make_sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        command(shapes(tmp_path / "set"))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "set.partial").mkdir()          # as a killed run leaves it
    command(shapes(tmp_path / "set"))
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_edits_and_folder(command, tmp_path):
    command(["shapes-edits", *shapes(tmp_path / "edits")[1:]])
    assert ShardIndex.load(str(tmp_path / "edits/train")).num_samples == 12
    command(shapes(tmp_path / "set"))
    with tarfile.open(tmp_path / "set/train/00000.tar") as tar:
        tar.extractall(tmp_path / "mine", filter="data")
    command(["folder", str(tmp_path / "mine"), "--out", str(tmp_path / "again"), "--validation-fraction", "0",
             "--workers", "1"])
    assert ShardIndex.load(str(tmp_path / "again/train")).num_samples == 5


def test_mistakes_are_one_line_and_status_2(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    no_font = ["emoji", "--out", str(tmp_path / "e"), "--font", "/none.ttf"]
    for arguments, words in ((shapes(tmp_path / "file" / "set"), "cannot write"),
                             (shapes(tmp_path / "file"), "is a file"),
                             (no_font, "fonts-noto-color-emoji")):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True,
                              env=environment)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert words in done.stderr


def test_a_name_that_the_terminal_cannot_show_ends_no_command(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: print("caf\xe9 \udcff", flush=True))
    assert ended.value.code == 0 and shown.getvalue() == b"caf\\xe9 \\udcff\n"
