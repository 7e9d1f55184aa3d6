"""Members of a tar to the parts of samples, by their names: which key, which part, and what belongs to no sample."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from operator import itemgetter
from typing import TypeVar

from dalle.data.reasons import Tally

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
PARTS = ("image", "text", "json")
PART_OF = {**dict.fromkeys(IMAGE_EXTENSIONS, "image"), "txt": "text", "json": "json"}      # by the name's extension
LONGEST_KEY = 255
Part = TypeVar("Part")
Parts = dict[str, tuple[str, Part]]      # of one key: part -> (extension, member)


def why_no_sample(key: bytes, parts: Mapping[str, object]) -> str | None:
    """The reason why the ``parts`` of ``key`` make no sample, or None."""
    if len(key) > LONGEST_KEY:
        return "key_too_long"
    return None if "image" in parts else "no_image"


def member_runs(members: Iterable[tuple[bytes, Part]], problems: Tally) -> Iterator[tuple[bytes, Parts[Part]]]:
    """(key, its parts) of the (name, member) that follow one another; what belongs to no sample may lie between them.

    A run is complete when it is given: where reading it raises, nothing of it was given.
    """
    for key, run in groupby(_useful(members, problems), key=itemgetter(0)):
        parts: Parts[Part] = {}
        for _, part, extension, member in run:
            if part in parts:
                problems.add("duplicate_member", f"{key_text(key)}.{extension}")
            else:
                parts[part] = (extension, member)
        yield key, parts


def _useful(members: Iterable[tuple[bytes, Part]], problems: Tally) -> Iterator[tuple[bytes, str, str, Part]]:
    """(key, part, extension, member) of all that can belong to a sample; the others are counted."""
    for name, member in members:
        key, extension = split_name(name)
        part = PART_OF.get(extension)
        if key is not None and part is not None:
            yield key, part, extension, member
        else:
            problems.add(_why_of_no_use(key, extension), key_text(name))


def _why_of_no_use(key: bytes | None, extension: str) -> str:
    if key is None:
        return "not_a_sample"
    # webdataset cuts a name at its first dot, so img.v1.jpg and img.v2.jpg would both belong to a sample "img"
    _, dot, last = extension.rpartition(".")
    return "dot_in_name" if dot and PART_OF.get(last) in ("image", "text") else "other_members"


def split_name(name: bytes) -> tuple[bytes | None, str]:
    """A member's (key, lower-case extension), cut at the first dot of its base name; (None, "") if it has no such dot.

    Names that begin with a dot (the ``._`` files that macOS adds) have no key.
    """
    folder, slash, base = name.rpartition(b"/")
    stem, dot, extension = base.partition(b".")
    if not stem or not dot:
        return None, ""
    return folder + slash + stem, extension.decode("ascii", "replace").lower()


def key_text(key: bytes) -> str:
    """A key as printable text for logs and batches; it is data from the shard, never part of a path."""
    text = key.decode("utf-8", "backslashreplace")
    return text if text.isprintable() else "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)
