"""A tar file's member list by a raw walk over its 512-byte headers: nothing is extracted, decoded or unpickled.

``tarfile`` builds an object for each member and says nothing of a file that was cut inside a header or between two
members; this walk is several times faster and reports each of these. Formats: ustar with prefix, GNU long names ('L'),
pax records ('x', path and size). Global pax records and links are passed over.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

BLOCK = 512
HEADER_AND_FIRST_BLOCK = 2 * BLOCK
LONGEST_EXTENSION_HEADER = 1 << 20      # a name record above 1 MB is not a name
MOST_DIGITS = 20                        # of a pax size: larger than any file, and int() refuses thousands of digits
TAIL_CHECKED = 1 << 16                  # bytes after the end marker that are searched for a second archive
REGULAR = b"0\x007"
WITHOUT_PAYLOAD = b"123456"             # links, devices, folders and pipes: their size field counts nothing
ZEROS = bytes(BLOCK)


class Member(NamedTuple):
    """One regular file of the archive: its name as stored, where its bytes start, how many there are."""

    name: bytes
    offset: int
    size: int


@dataclass
class TarWalk:
    """Iterate once for the members; ``problems`` and ``digest`` are complete afterwards.

    ``problems`` holds (reason, detail). Reasons: ``truncated_member`` (the file ends inside a payload; that member is
    not delivered), ``truncated_header``, ``damaged_header``, ``no_end_marker`` (readable to its last byte, but perhaps
    cut between two members), ``data_after_end``.
    """

    path: Path
    problems: list[tuple[str, str]] = field(default_factory=list)
    digest: str = ""

    def __iter__(self) -> Iterator[Member]:
        handle = os.open(self.path, os.O_RDONLY)
        try:
            yield from self._members(handle, os.fstat(handle).st_size)
        finally:
            os.close(handle)

    def _members(self, handle: int, file_size: int) -> Iterator[Member]:
        hasher = hashlib.blake2b(digest_size=16)
        position, long_name, pax = 0, None, {}
        while position < file_size:
            chunk = os.pread(handle, HEADER_AND_FIRST_BLOCK, position)
            header = chunk[:BLOCK]
            if header == ZEROS:
                self._check_tail(handle, position + BLOCK)
                break
            if len(header) < BLOCK:
                self._report("truncated_header", f"the file ends inside the header at byte {position}")
                break
            hasher.update(chunk)
            kind = header[156:157]
            try:
                verify_checksum(header)
                size = pax.get("size", header_number(header[124:136]))
                if kind in WITHOUT_PAYLOAD:
                    size = 0
                elif kind == b"S" or "sparse" in pax:
                    raise ValueError("a sparse member")
            except ValueError as error:
                self._report("damaged_header", f"{error} at byte {position}")
                break
            payload = position + BLOCK
            if payload + size > file_size:
                self._report("truncated_member", f"the file ends at byte {file_size}, inside a member of {size} bytes")
                break
            position = payload + (size + BLOCK - 1) // BLOCK * BLOCK
            if kind in b"LKxg":
                if size > LONGEST_EXTENSION_HEADER:
                    self._report("damaged_header", f"a name record of {size} bytes at byte {payload - BLOCK}")
                    break
                if kind == b"L":
                    long_name = os.pread(handle, size, payload).rstrip(b"\0")
                elif kind == b"x":
                    pax = pax_records(os.pread(handle, size, payload))
                continue
            if kind in REGULAR:
                yield Member(pax.get("path") or long_name or header_name(header), payload, size)
            long_name, pax = None, {}
        else:
            self._report("no_end_marker", f"no end marker after the last of {file_size} bytes")
        self.digest = hasher.hexdigest()

    def _check_tail(self, handle: int, position: int) -> None:
        if os.pread(handle, TAIL_CHECKED, position).strip(b"\0"):
            self._report("data_after_end", f"data behind the end marker at byte {position}, which is never read")

    def _report(self, reason: str, detail: str) -> None:
        self.problems.append((reason, detail))


def verify_checksum(header: bytes) -> None:
    """Raise ``ValueError`` for a header whose bytes do not add up to what it says."""
    expected = header_number(header[148:156])
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != expected:
        raise ValueError("a header with a wrong checksum")


def header_number(text: bytes) -> int:
    """An octal field, or GNU's base-256 for what does not fit; never negative."""
    if text[0] == 0x80:
        return int.from_bytes(text[1:], "big")
    digits = text.split(b"\0", 1)[0].strip()
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise ValueError(f"a header with the number {text!r}")
    return number


def header_name(header: bytes) -> bytes:
    """The member's name as the header has it, with ustar's prefix."""
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix:
            return prefix + b"/" + name
    return name


def pax_records(data: bytes) -> dict[str, bytes | int]:
    """``path``, ``size`` and the mark of a sparse file out of 'LENGTH KEY=VALUE\\n' records, and nothing else."""
    records: dict[str, bytes | int] = {}
    position = 0
    while position < len(data):
        length_text, space, _ = data[position:position + 20].partition(b" ")
        if not space or not length_text.isdigit() or int(length_text) < len(length_text) + 3:
            break
        record = data[position + len(length_text) + 1:position + int(length_text) - 1]
        key, _, value = record.partition(b"=")
        if key == b"path":
            records["path"] = value
        elif key == b"size" and value.isdigit():
            records["size"] = int(value.lstrip(b"0")[:MOST_DIGITS] or b"0")
        elif key.startswith(b"GNU.sparse"):
            records["sparse"] = 1
        position += int(length_text)
    return records
