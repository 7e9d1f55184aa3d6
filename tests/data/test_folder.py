"""Pictures and captions of every kind of source, and what is left out of them."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from dalle.data.building import hash_fraction
from dalle.data.folder.entries import FolderConfig
from dalle.data.folder.making import make_folder
from dalle.data.folder.pictures import encode
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


def put(file: Path, kind: str = "PNG", text: str | None = "a caption") -> bytes:
    """A picture at ``file`` with the .txt beside it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    data = encoded(kind)
    file.write_bytes(data)
    if text is not None:
        file.with_suffix(".txt").write_text(text)
    return data


def read_meta(folder: Path) -> dict[str, dict]:
    """path -> the sample's JSON."""
    found = []
    for path in sorted(folder.rglob("*.tar")):
        with tarfile.open(path) as tar:
            found += [json.loads(tar.extractfile(name).read()) for name in tar.getnames() if name.endswith(".json")]
    return {meta["path"]: meta for meta in found}


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
                                  "row without a path": 1}
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
    assert record["left_out"] == {"caption that is no text": 1}
    assert record["examples"] == {"caption that is no text": "table.jsonl, line 2"}
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
    for name, text, complaint in (("t.txt", "x", "extension must be"), ("t.jsonl", "{}\n{}\n", "no column"),
                                  ("u.jsonl", '{"path": "a.png", "text": "x"}\n{', "line 2: not a JSON object"),
                                  ("t.csv", "path,text\n", "no picture")):
        (pictures / name).write_text(text)
        with pytest.raises(UserError, match=complaint):
            make(pictures / name, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("options, complaint", [({"resize": 0}, "--resize 0"),
                                                ({"validation_fraction": 1.0}, "fraction"),
                                                ({"resize": 64, "max_size": 32}, "only shrunk")])
def test_impossible_options(pictures, tmp_path, options, complaint):
    with pytest.raises(UserError, match=complaint):
        make(pictures, tmp_path / "out", **options)


def test_every_file_that_looks_like_a_picture_is_read_or_counted(tmp_path):
    source = tmp_path / "mine"
    put(source / "a.jfif", "JPEG")
    put(source / "b.avif", "AVIF")
    put(source / "c.jp2", "JPEG2000")
    put(source / "no_extension", "WEBP")
    put(source / "d.JPG", "JPEG", text=None)
    (source / "d.TXT").write_text("as a camera names them")
    put(source / "e.jpg", "JPEG", text=None)
    (source / "e.jpg.txt").write_text("after the whole name")
    for name in ("f.psd", "g.CR2", "h.jxl", "i.svg", "._e.jpg", "notes.md"):
        (source / name).write_bytes(b"something else")
    (source / "avif.jpg").write_bytes(encoded("AVIF")[:60])
    (source / "avif.txt").write_text("cut short, and not what its name says")
    put(source / ".hidden.png")
    record = make(source, tmp_path / "out")
    assert record["left_out"] == {"a format that is not read": 4, "hidden by a dot": 1, "damaged_image": 1}
    assert record["examples"]["a format that is not read"] == "f.psd"
    assert any("4  a format that is not read (f.psd): convert them" in line for line in record["lines"])
    found = read_set(tmp_path / "out")
    assert {name: extension for name, (extension, _, _) in found.items()} == {
        "a.jfif": "jpg", "b.avif": "jpg", "c.jp2": "jpg", "d.JPG": "jpg", "e.jpg": "jpg", "no_extension": "webp"}
    assert found["e.jpg"][2] == "after the whole name" and found["a.jfif"][1] == (source / "a.jfif").read_bytes()


def test_names_that_are_not_utf8_links_and_pipes_are_counted(tmp_path):
    source = tmp_path / "mine"
    put(source / "good.png")
    put(tmp_path / "elsewhere/linked.png")
    for link, target in (("link", tmp_path / "elsewhere"), ("again", tmp_path / "elsewhere"), ("back", tmp_path),
                         ("broken.png", tmp_path / "gone.png")):
        (source / link).symlink_to(target)
    for extension, data in ((b".png", encoded("PNG")), (b".txt", b"a caption")):
        with open(os.fsencode(source) + b"/caf\xe9" + extension, "wb") as file:
            file.write(data)
    os.mkfifo(source / "pipe.png")
    (source / "pipe.txt").write_text("would wait for ever")
    record = make(source, tmp_path / "out")
    assert record["left_out"] == {"name is not UTF-8": 1, "a link to a folder that holds it": 1, "not a file": 1,
                                  "a link that leads nowhere": 1}
    assert record["examples"]["name is not UTF-8"] == "caf\\xe9.png"
    assert sorted(read_set(tmp_path / "out")) == ["again/linked.png", "good.png"]


def test_a_table_from_windows(pictures, tmp_path):
    put(pictures / "sub/c.png")
    table = write_table("jsonl", pictures / "table", [
        {"path": "sub\\c.png", "text": "c", "class_id": 2}, {"path": "C:\\pictures\\a.png", "text": "a"},
        {"path": "..\\secret.png", "text": "s"}, {"path": "b.png", "text": "b", "class_id": "bird"},
        {"path": "a.png", "text": "a", "class_id": "3"}, {"path": "a.png", "text": "again", "class_id": 4},
        {"path": "\ud800.png", "text": "half a character"}, {"path": "sub/c.png", "text": "half \ud800"},
        {"path": "b.png", "text": None}])
    record = make(table, tmp_path / "out")
    assert record["left_out"] == {
        "a path of a Windows drive": 1, "path leads outside the table's folder": 1,
        "class_id that is no whole number": 1, "another class_id than before": 1, "name is not UTF-8": 1,
        "caption_encoding": 1, "empty_caption": 1}
    assert record["examples"]["class_id that is no whole number"] == "table.jsonl, line 4"
    classes = {path: meta["class_id"] for path, meta in read_meta(tmp_path / "out").items()}
    assert classes == {"sub/c.png": 2, "a.png": 3}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_folder_with_metadata_keeps_its_splits(kind, tmp_path):
    source = tmp_path / "mine"
    for split in ("train", "test"):
        for name in ("a.png", "sub/b.png"):
            put(source / split / name, text=None)
        write_table(kind, source / split / "metadata",
                    [{"file_name": name, "text": f"{split}, {name}"} for name in ("a.png", "sub/b.png")])
    put(source / "train/stray.png", text=None)
    record = make(source, tmp_path / "out", validation_fraction=None)
    assert any("held out: what the source has" in line for line in record["lines"])
    assert record["left_out"] == {"not in the tables, no .txt beside it": 1}
    assert {name: text for name, (_, _, text) in read_set(tmp_path / "out/train").items()} == {
        "train/a.png": "train, a.png", "train/sub/b.png": "train, sub/b.png"}
    assert set(read_set(tmp_path / "out/validation")) == {"test/a.png", "test/sub/b.png"}


def test_a_parquet_file_that_holds_the_pictures(tmp_path):
    folder = tmp_path / "mine/data"
    put(folder / "file.png", text=None)
    cells = [{"bytes": encoded("JPEG"), "path": "x.jpg"}, {"bytes": None, "path": "file.png"}, None,
             {"bytes": encoded("PNG"), "path": None}, {"bytes": b"", "path": "../secret.png"}]
    captions = [["one", "two"], ["three"], ["four"], None, ["five"]]
    rows = {"image": cells, "caption": captions, "class_id": [5, 0, 1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "train-00000-of-00001.parquet")
    record = make(tmp_path / "mine", tmp_path / "out")
    name = "data/train-00000-of-00001.parquet"
    assert record["left_out"] == {"row without a picture": 1, "empty_caption": 1, "empty_image": 1}
    assert {path: (extension, text) for path, (extension, _, text) in read_set(tmp_path / "out").items()} == {
        f"{name}/0": ("jpg", "one\ntwo"), f"{name}/1": ("png", "three")}
    assert read_meta(tmp_path / "out")[f"{name}/0"]["class_id"] == 5
    table = pyarrow.table({"picture": [encoded("PNG")], "text": ["bytes alone"]})
    pyarrow.parquet.write_table(table, tmp_path / "bytes.parquet")
    assert make(tmp_path / "bytes.parquet", tmp_path / "bytes")["counts"]["train"] == 1


def test_sub_folders_are_classes(tmp_path):
    for name in ("dog/1.png", "cat/old/1.png", "top.png"):
        put(tmp_path / "mine" / name)
    record = make(tmp_path / "mine", tmp_path / "out")
    assert record["classes"] == ["cat", "dog"] and "class_id by sub-folder: 0 cat, 1 dog" in record["lines"][-1]
    assert {path: meta.get("class_id") for path, meta in read_meta(tmp_path / "out").items()} == {
        "cat/old/1.png": 0, "dog/1.png": 1, "top.png": None}
    for split in ("train", "val"):
        put(tmp_path / "split" / split / "dog/1.png")
    assert "classes" not in make(tmp_path / "split", tmp_path / "one class")


def test_something_is_held_out_or_it_is_said(tmp_path):
    names = sorted((f"{number}.png" for number in range(8)), key=hash_fraction)
    for name in names:
        put(tmp_path / "mine" / name)
    (tmp_path / "mine" / names[0]).write_bytes(b"damaged")
    record = make(tmp_path / "mine", tmp_path / "out", validation_fraction=0.001)
    assert set(read_set(tmp_path / "out/validation")) == {names[1]} and record["counts"]["train"] == 6
    record = make(tmp_path / "mine", tmp_path / "none")
    assert record["counts"]["validation"] == 0 and any("data.validation=null" in line for line in record["lines"])
    put(tmp_path / "single/1.png")
    record = make(tmp_path / "single", tmp_path / "one", validation_fraction=0.99)
    assert record["counts"] == {"train": 1, "validation": 0}
