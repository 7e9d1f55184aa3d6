"""Pictures and captions of every kind of source, and what is left out of them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dalle.data.building import hash_fraction
from dalle.data.folder import FolderConfig, encode, make_folder
from dalle.errors import UserError


def picture(width: int = 20, height: int = 16, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(kind: str, width: int = 20, height: int = 16) -> bytes:
    buffer = io.BytesIO()
    picture(width, height).save(buffer, format=kind)
    return buffer.getvalue()


def make(source: Path, out: Path, **options) -> dict:
    lines = []
    config = FolderConfig(**{"validation_fraction": 0.0, **options})
    record = make_folder(config, source, out, report=lines.append)
    return {**record, "lines": lines}


def read_set(folder: Path) -> dict[str, tuple[str, bytes, str]]:
    """path -> extension, picture bytes, text."""
    found = {}
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name, data in members.items():
            key, extension = name.split(".")
            if extension not in ("txt", "json"):
                found[json.loads(members[f"{key}.json"])["path"]] = (extension, data, members[f"{key}.txt"].decode())
    return found


def test_a_folder_with_text_files(tmp_path):
    source = tmp_path / "mine"
    (source / "sub").mkdir(parents=True)
    (source / ".hidden").mkdir()
    for name, kind in (("b.jpg", "JPEG"), ("sub/a.PNG", "PNG"), ("c.webp", "WEBP"), ("d.gif", "GIF"),
                       ("lonely.jpg", "JPEG"), (".hidden/x.jpg", "JPEG"), ("empty.png", "PNG"), ("latin.png", "PNG")):
        (source / name).write_bytes(encoded(kind))
        (source / name).with_suffix(".txt").write_text("a first line\n\n a second \n", encoding="utf-8")
    (source / "lonely.txt").unlink()
    (source / "empty.txt").write_text("\n \n")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    (source / "cut.jpg").write_bytes(encoded("JPEG", 200, 200)[:2000])
    (source / "cut.txt").write_text("cut")
    (source / "text.jpg").write_bytes(b"hello")
    (source / "text.txt").write_text("text")
    (source / "notes.md").write_text("not a picture")
    record = make(source, tmp_path / "out")
    assert record["counts"] == {"train": 4, "validation": 0}
    assert record["left_out"] == {"no .txt beside it": 1, "empty_caption": 1, "caption_encoding": 1,
                                  "truncated_image": 1, "not_an_image": 1}
    assert any("no .txt beside it" in line and " 1 " in line for line in record["lines"])
    found = read_set(tmp_path / "out")
    assert list(found) == ["b.jpg", "c.webp", "d.gif", "sub/a.PNG"]
    for name, extension in (("b.jpg", "jpg"), ("c.webp", "webp"), ("sub/a.PNG", "png")):
        assert found[name] == (extension, (source / name).read_bytes(), "a first line\na second")
    assert found["d.gif"][0] == "png"


def test_the_bytes_decide_the_extension_not_the_name():
    assert encode(encoded("PNG"), FolderConfig())[1] == "png"
    data, extension = encode(encoded("BMP"), FolderConfig())
    assert extension == "png"
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), np.asarray(picture()))


@pytest.mark.parametrize("options, expected", [
    ({"resize": 8}, (10, 8)), ({"max_size": 8}, (10, 8)), ({"resize": 4, "max_size": 15}, (5, 4)),
    ({"resize": 4, "max_size": 16}, (20, 16)), ({"resize": 64}, (20, 16)), ({}, (20, 16)),
])
def test_sizes(options, expected):
    for kind, extension in (("JPEG", "jpg"), ("PNG", "png")):
        original = encoded(kind)
        data, stored = encode(original, FolderConfig(**options))
        assert stored == extension and Image.open(io.BytesIO(data)).size == expected
        assert (data == original) == (expected == (20, 16))


def write_table(kind: str, path: Path, rows: list[dict]) -> Path:
    path = path.with_suffix(f".{kind}")
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        lines = [separator.join(rows[0])] + [separator.join(f'"{value}"' for value in row.values()) for row in rows]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(encoded("PNG"))
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    return folder


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(kind, pictures, tmp_path):
    table = write_table(kind, pictures / "table", [
        {"number": 1, "File": "a.png", "text": "one, two"}, {"number": 2, "File": "./b.png", "text": "three"},
        {"number": 3, "File": "a.png", "text": "again"}, {"number": 4, "File": "gone.png", "text": "four"},
        {"number": 5, "File": "../secret.png", "text": "five"},
        {"number": 6, "File": "sub/../../secret.png", "text": "six"},
        {"number": 7, "File": str(tmp_path / "secret.png"), "text": "seven"},
        {"number": 8, "File": "https://example.org/a.png", "text": "eight"}, {"number": 9, "File": "", "text": "nine"}])
    record = make(table, tmp_path / "out")
    assert record["left_out"] == {"no such file": 1, "path leads outside the table's folder": 3, "a URL, not a file": 1,
                                  "damaged row": 1}
    assert {path: text for path, (_, _, text) in read_set(tmp_path / "out").items()} == {
        "a.png": "one, two\nagain", "./b.png": "three"}


def test_absolute_paths_when_allowed(pictures, tmp_path):
    table = write_table("csv", pictures / "table", [{"path": str(tmp_path / "secret.png"), "caption": "mine"},
                                                    {"path": "../secret.png", "caption": "mine too"}])
    assert make(table, tmp_path / "out", absolute_paths=True)["counts"]["train"] == 2


def test_columns_by_name_and_lists_of_captions(pictures, tmp_path):
    table = write_table("jsonl", pictures / "table", [{"where": "a.png", "what": ["one", "two"], "caption": "no"},
                                                      {"where": "b.png", "what": [1]}])
    record = make(table, tmp_path / "out", path_column="where", caption_column="what")
    assert record["left_out"] == {"damaged row": 1}
    assert read_set(tmp_path / "out")["a.png"][2] == "one\ntwo"
    with pytest.raises(UserError, match="no column is called path.*where, what.*--path-column"):
        make(table, tmp_path / "other")
    with pytest.raises(UserError, match="no column 'which'"):
        make(table, tmp_path / "other", path_column="which")


def test_held_out_by_a_hash_of_the_path(tmp_path):
    source = tmp_path / "mine"
    source.mkdir()
    for number in range(40):
        (source / f"{number}.png").write_bytes(encoded("PNG"))
        (source / f"{number}.txt").write_text(f"number {number}")
    record = make(source, tmp_path / "out", validation_fraction=0.3)
    expected = {f"{number}.png" for number in range(40) if hash_fraction(f"{number}.png") < 0.3}
    assert set(read_set(tmp_path / "out/validation")) == expected and 4 < len(expected) < 20
    assert record["counts"] == {"train": 40 - len(expected), "validation": len(expected)}


def test_hash_fraction_is_uniform():
    values = np.sort([hash_fraction(str(number)) for number in range(2000)])
    assert np.abs(values - np.arange(2000) / 2000).max() < 0.04


def test_a_new_picture_or_caption_is_noticed(pictures, tmp_path):
    for name in ("a", "b"):
        (pictures / f"{name}.txt").write_text("caption")
    assert make(pictures, tmp_path / "out")["counts"]["train"] == 2
    assert "already made" in make(pictures, tmp_path / "out")["lines"][0]
    (pictures / "a.txt").write_text("another caption")
    with pytest.raises(UserError, match="listing.*--force"):
        make(pictures, tmp_path / "out")


def test_sources_that_are_nothing(tmp_path, pictures):
    with pytest.raises(UserError, match="no folder or table"):
        make(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no picture"):
        make(tmp_path / "none", tmp_path / "out")
    with pytest.raises(UserError, match="no sample for training.*2 no .txt beside it"):
        make(pictures, tmp_path / "out")
    for name, text, complaint in (("t.txt", "x", "extension must be"), ("t.jsonl", "{}\n[1]\n", "no column"),
                                  ("u.jsonl", '{"path": "a.png", "text": "x"}\n{', "line 2: not a JSON object"),
                                  ("t.parquet", "x", "cannot be read"), ("t.csv", "path,text\n", "no picture")):
        (pictures / name).write_text(text)
        with pytest.raises(UserError, match=complaint):
            make(pictures / name, tmp_path / "out")
    (pictures / "l.csv").write_bytes(b"path,text\na.png,caf\xe9\n")
    with pytest.raises(UserError, match="cannot be read"):
        make(pictures / "l.csv", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("options, complaint", [({"resize": 0}, "--resize 0"),
                                                ({"validation_fraction": 1.0}, "fraction"),
                                                ({"resize": 64, "max_size": 32}, "only shrunk")])
def test_impossible_options(pictures, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        make(pictures, tmp_path / "out", **options)
