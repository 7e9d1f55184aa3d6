"""Tables are read strictly: what does not fit is refused with its line, and encodings and separators are found out."""

import pytest

from dalle.data.folder.tables import delimiter_of, open_table
from dalle.errors import UserError


def rows(path, data: bytes, *columns: str) -> list[tuple]:
    path.write_bytes(data)
    return [(row.where, *(row.cells.get(name) for name in columns)) for row in open_table(path).rows(columns)]


@pytest.mark.parametrize("name, data, complaint", [
    ("t.csv", b"path,text\na.png,a cat\nb.png,a dog, sitting\n", r"line 3: 3 cells where the header has 2.*in quotes"),
    ("t.csv", b"path,text\n\n\na.png\n", "line 4: 1 cells where the header has 2"),
    ("t.csv", b'path,text\na.png,"two\nlines"\nb.png,"a dog\nc.png,a bird\n', "line 4: a quote.*is not closed"),
    ("t.csv", b'path,text\na.png,"a dog\nb.png,"a bird"\n', "line 2: a quote"),
    ("t.tsv", b"path\ttext\na.png\ta\tb\n", r"line 2: 3 cells.*'\\t'"),
    ("t.csv", b"path,text,text\na.png,a,b\n", "'text' twice"),
    ("t.csv", b"path,text\na.png,cat\nb.png,caf\xe9\n", "line 3: the bytes are not UTF-8; save the table as UTF-8"),
    ("t.csv", b"\xff\xfep", "not UTF-16"),
    ("t.jsonl", b'{"path": "a"}\n[1]\n', "line 2: not a JSON object"),
    ("t.jsonl", b'{"path": "a"}\n\n{"path": \n', "line 3: not a JSON object"),
    ("t.jsonl", b'{"path": "a"}\n{"path": "\xe9"}\n', "line 2: the bytes are not UTF-8"),
    ("t.parquet", b"PAR1", "cannot be read"), ("t.xlsx", b"", "extension must be one of .csv"),
])
def test_what_does_not_fit_is_refused_with_its_line(tmp_path, name, data, complaint):
    with pytest.raises(UserError, match=complaint):
        rows(tmp_path / name, data)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
def test_encodings_and_separators(tmp_path, encoding, separator):
    text = f'path{separator}text\r\na.png{separator} "caf\u00e9{separator} ""old"""\r\n\r\nb.png{separator}tea\r\n'
    found = rows(tmp_path / "t.csv", text.encode(encoding), "text", "path")
    assert found == [("line 2", f'caf\u00e9{separator} "old"', "a.png"), ("line 4", "tea", "b.png")]


def test_the_separator_is_looked_for_outside_of_quotes():
    assert delimiter_of('"a, b, c";text') == ";" and delimiter_of("path") == ","


def test_columns_of_json_lines_are_those_of_all_lines(tmp_path):
    data = '{"path": "a"}\n{"path": "b", "text": "x"}\n'.encode("utf-16")
    assert rows(tmp_path / "t.jsonl", data, "path", "text") == [("line 1", "a", None), ("line 2", "b", "x")]
    assert open_table(tmp_path / "t.jsonl").columns == ["path", "text"]


def test_a_zero_byte_does_not_make_it_utf16(tmp_path):
    assert rows(tmp_path / "t.csv", b"path,text\na\0.png,a cat\n", "path") == [("line 2", "a\0.png")]
