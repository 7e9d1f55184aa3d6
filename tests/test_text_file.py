"""Text files as editors write them: with a mark in front, in another encoding, as bytes of something else."""

import codecs

import pytest

from dalle.config import read_yaml
from dalle.data.decode import BadSample, decode_captions
from dalle.errors import UserError
from dalle.text_file import read_text_file

TEXT = "name: größe 🐢\n"


@pytest.mark.parametrize("data", [TEXT.encode(), TEXT.encode("utf-8-sig")])
def test_the_mark_of_utf_8_is_no_part_of_the_text(tmp_path, data):
    path = tmp_path / "file.yaml"
    path.write_bytes(data)
    assert read_text_file(path) == TEXT
    assert read_yaml(path) == {"name": "größe 🐢"}
    assert decode_captions(data) == [TEXT.strip()]


@pytest.mark.parametrize(("data", "words"), [
    (TEXT.encode("utf-16"), "it is UTF-16, not UTF-8; save it as UTF-8 (iconv -f UTF-16 -t UTF-8 "),
    (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "it is UTF-16, not UTF-8; save it as"),
    (TEXT.encode("utf-32"), "it is UTF-32, not UTF-8; save it as UTF-8 (iconv -f UTF-32 -t UTF-8 "),
    ("name: größe".encode("latin-1"), "it is not UTF-8: byte 0xf6 at 8; save it as UTF-8 (iconv -f ITS_ENCODING"),
    ("name: a".encode("utf-16-le"), "it holds zero bytes, as UTF-16 does; save it as UTF-8"),
])
def test_another_encoding_is_named_with_the_remedy(tmp_path, data, words):
    path = tmp_path / "file"
    path.write_bytes(data)
    for read in (read_text_file, read_yaml):
        with pytest.raises(UserError) as refused:
            read(path)
        assert str(refused.value).startswith(f"{path} cannot be read: {words}") and "\n" not in str(refused.value)


def test_a_caption_in_another_encoding_says_which():
    with pytest.raises(BadSample, match="it is UTF-16, not UTF-8") as bad:
        decode_captions("a cat".encode("utf-16"))
    assert bad.value.reason == "caption_encoding"


def test_a_file_that_is_a_folder_is_one_line(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} cannot be read: Is a directory"):
        read_text_file(tmp_path)
