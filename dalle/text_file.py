"""Text files that people write: UTF-8, with or without the mark that Windows editors put in front of it."""

import codecs
from pathlib import Path

from dalle.errors import UserError

# the longer marks first: that of UTF-32 begins like that of UTF-16
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16",
         codecs.BOM_UTF16_BE: "UTF-16"}


def decode_text(data: bytes) -> str:
    """The text of UTF-8 bytes without their mark. ``ValueError``, one line, says what they are instead."""
    for mark, name in MARKS.items():
        if data.startswith(mark):
            raise ValueError(f"it is {name}, not UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8: byte {data[error.start]:#04x} at {error.start}") from None


def read_text_file(path: str | Path) -> str:
    """The text of a file; :class:`UserError` says why it cannot be read and, of another encoding, what to do."""
    try:
        data = Path(path).read_bytes()
        text = decode_text(data)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}; {remedy(path, data)}") from None
    if "\0" in text:
        raise UserError(f"{path} cannot be read: it holds zero bytes, as UTF-16 does; save it as UTF-8")
    return text


def remedy(path: str | Path, data: bytes) -> str:
    """How to make a file of another encoding one that can be read."""
    name = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    return f"save it as UTF-8 (iconv -f {name or 'ITS_ENCODING'} -t UTF-8 {path} > NEW)"
