"""Why things were left out: counted by reason, each with one example, and one sentence of what to do about it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, Self

REPAIR = "repair or remove them"
REMEDIES: dict[str, str] = {
    # pictures
    "empty_image": "the files are empty: fetch them again",
    "not_an_image": "the files are not what their names say (a saved web page?): look at one",
    "truncated_image": "the files are cut short: fetch them again",
    "damaged_image": "the files cannot be decoded: fetch them again or convert them to PNG",
    "too_many_pixels": "make the pictures smaller or raise data.max_pixels",
    "unsupported_mode": "floating point pixels have no known range: convert them to 8 or 16 bits",
    "no_image": "a sample is KEY.jpg|png|webp with KEY.txt: add the pictures, or leave the captions",
    # captions
    "no_caption": "add the captions, or set data.caption=none to train on pictures alone",
    "empty_caption": "fill in the captions, or set data.caption=none to train on pictures alone",
    "caption_encoding": "write the captions as UTF-8",
    # names and members
    "dot_in_name": "a key ends at the first dot of its name: make the shards again with names without inner dots",
    "duplicate_key": "give every sample of a shard a name of its own; the first one is used",
    "duplicate_member": "give every sample one picture and one .txt; the first of each is used",
    "key_too_long": "give the samples names of at most 255 bytes",
    "member_too_large": "store smaller members",
    "not_a_sample": "nothing, unless these were meant to be pictures or captions: name them KEY.jpg and KEY.txt",
    "other_members": "nothing, unless these were meant to be pictures or captions: name them KEY.jpg and KEY.txt",
    "damaged_json": "write the .json files as JSON objects",
    # shards
    "missing_shard": "bring the shards back",
    "truncated_shard": "fetch the shard again, then run tools/index_shards.py on its folder",
    "no_codes": "repair the pictures and make the codes again with tools/cache_codes.py",
}


def remedy(reason: str) -> str:
    """One sentence of what to do about ``reason``."""
    return REMEDIES.get(reason, REPAIR)


def printable(name: str) -> str:
    """``name`` so that any terminal, log or JSON file takes it: control characters and half characters are escaped."""
    return "".join(character if character.isprintable() else character.encode("unicode_escape", "surrogatepass")
                   .decode("ascii") for character in name)


class Tally:
    """How often each reason came, and the first name that it came with."""

    def __init__(self, counts: Mapping[str, int] | None = None, examples: Mapping[str, str] | None = None):
        self.counts: Counter[str] = Counter(counts or {})
        self.examples: dict[str, str] = dict(examples or {})

    def add(self, reason: str, example: str = "", number: int = 1) -> None:
        self.counts[reason] += number
        if example:
            self.examples.setdefault(reason, printable(example))

    def update(self, other: Self) -> None:
        """Add what ``other`` counted; an example that is there stays."""
        self.counts.update(other.counts)
        self.examples = {**other.examples, **self.examples}

    def total(self) -> int:
        return self.counts.total()

    def lines(self) -> list[str]:
        """One line a reason, the commonest first: how many, why, such as what, and what to do."""
        return [f"{number:>7,}  {reason}{self._such_as(reason)}: {remedy(reason)}"
                for reason, number in self.counts.most_common()]

    def summary(self) -> str:
        """All reasons in one line, such as "24 no such file (a/b.jpg)"."""
        return ", ".join(f"{number} {reason}{self._such_as(reason)}" for reason, number in self.counts.most_common())

    def record(self) -> dict[str, Any]:
        """For a JSON file: reason -> how many, an example and what to do."""
        return {reason: {"count": number, "example": self.examples.get(reason, ""), "remedy": remedy(reason)}
                for reason, number in sorted(self.counts.items())}

    def _such_as(self, reason: str) -> str:
        return f" ({self.examples[reason]})" if reason in self.examples else ""
