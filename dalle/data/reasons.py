"""Why things were left out: counted by reason, each with one example, and one sentence of what to do about it."""

from collections import Counter
from collections.abc import Mapping
from typing import Self

REPAIR = "repair or remove them"
CUT = "fetch the shard again, then run tools/index_shards.py on its folder"
REMEDIES: dict[str, str] = {
    # pictures
    "empty_image": "the files are empty: fetch them again",
    "not_an_image": "the files are not what their names say (a saved web page?): look at one",
    "truncated_image": "the files are cut short: fetch them again",
    "damaged_image": "the files cannot be decoded: fetch them again or convert them to PNG",
    "too_many_pixels": "make the pictures smaller, or (shards) raise data.max_pixels",
    "unsupported_mode": "floating point pixels have no known range: convert them to 8 or 16 bits",
    "no_image": "a sample is KEY.jpg|png|webp with KEY.txt: add the pictures, or leave the captions",
    # captions
    "no_caption": "add the captions beside their pictures (a stream takes no others: `tar --sort=name`), or set "
                  "data.caption=none to train on pictures alone",
    "empty_caption": "fill in the captions, or (shards) set data.caption=none to train on pictures alone",
    "caption_encoding": "write the captions as UTF-8",
    # names and members
    "dot_in_name": "a key ends at the first dot of its name: make the shards again with names without inner dots",
    "duplicate_key": "give every sample of a shard a name of its own; the first one is used",
    "duplicate_member": "give every sample one picture and one .txt; the first of each is used",
    "key_too_long": "give the samples names of at most 255 bytes",
    "member_too_large": "store smaller members",
    "not_a_sample": "nothing, unless these were meant to be pictures or captions: name them KEY.jpg and KEY.txt",
    "other_members": "nothing, unless these were meant to be pictures or captions: name them KEY.jpg and KEY.txt",
    "damaged_json": "write the .json files as JSON objects, `class_id` as a number",
    "no_boxes": "write `boxes` into the .json files, a list of [x, y, width, height] in pixels",
    "no_keypoints": "write `keypoints` into the .json files, a list of [x, y, visible] in pixels",
    "damaged_boxes": "write `boxes` as a list of [x, y, width, height] in pixels that touch the picture",
    "damaged_keypoints": "write `keypoints` as a list of [x, y, visible] in pixels of the picture",
    "members_apart": "a stream reads the members of a sample only side by side: pack with `tar --sort=name`, or set "
                     "data.tier=exact",
    # samples of which a part is not used
    "caption_cut": "the model does not read the ends: raise data.text_length (a new run), or shorten the captions",
    "unknown_word": "the tokenizer lacks words, which are one to the model: train it on these captions",
    # shards
    "missing_shard": "bring the shards back",
    "damaged_shard": "bring the shards back as they were, or fetch them again and run tools/index_shards.py",
    "in_bad_shard": "bring back the shards that are missing or damaged; others stand in for their samples",
    "truncated_member": CUT, "truncated_header": CUT, "damaged_header": CUT,
    "no_end_marker": f"cut between two members, or never finished: {CUT}",
    "data_after_end": "two archives in one file, of which the second is never read: unpack both and pack one",
    "truncated_shard": CUT,
    "no_codes": "repair the pictures and make the codes again with tools/cache_codes.py",
    # what makes shards: folders, tables, emoji
    "a format that is not read": "convert them to JPEG or PNG (raw files of a camera: export them)",
    "no_reader": "pip install 'pillow>=11.3' pillow-heif, or convert them to JPEG or PNG",
    "hidden by a dot": "take the dot off the front of the names, if they are meant to be read",
    "no .txt beside it": "write the captions of x.jpg into x.txt beside it, one a line, or give a table",
    "not in the tables, no .txt beside it": "name them in the metadata, or write their captions into x.txt",
    "caption that is no text": "write texts (or lists of texts), or name another column with --caption-column",
    "a table without a column of captions": "name its column with --caption-column",
    "metadata without file_name": "name its column of paths with --path-column",
    "a link to a folder that holds it": "nothing to do, unless it was meant to lead elsewhere",
    "a link that leads nowhere": "bring back what it leads to",
    "row without a path": "name the pictures, or name another column with --path-column",
    "row without a picture": "the cells are empty: fill them in or remove the rows",
    "path that is no text": "write paths, or name another column with --path-column",
    "class_id that is no whole number": "write class ids as 0, 1, 2, ...",
    "another class_id than before": "give each picture one class_id; rows that say another one are not used",
    "no such file": "a table or a link names what is not there: paths are relative to the table's folder",
    "not a file": "the paths lead to folders or devices: name pictures",
    "unreadable file": "check the permissions of the files and the disk",
    "path leads outside the table's folder": "move the table above its pictures, or allow it with --absolute-paths",
    "a path of a Windows drive": "write the paths relative to the table's folder",
    "a URL, not a file": "fetch the pictures first, with img2dataset for example",
    "same picture as another emoji": "nothing to do: one of those that the font draws alike is kept",
    "more than one glyph": "nothing to do: this font cannot draw them",
    "no glyph in the font": "nothing to do: this font cannot draw them",
    "name is not UTF-8": "rename the files (convmv -f latin1 -t utf8 -r --notest FOLDER does it for a folder)",
}


def remedy(reason: str) -> str:
    """One sentence of what to do about ``reason``."""
    return REMEDIES.get(reason, REPAIR)


def printable(name: str) -> str:
    """``name`` so that any terminal, log or JSON file takes it: control characters and bytes of no text are escaped."""
    return "".join(character if character.isprintable() else _escaped(character) for character in name)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":          # how Python spells the byte of a file name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


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

    def sentences(self) -> list[str]:
        """The same lines, not in columns: "4 empty_image (b.jpg): fetch them again"."""
        return [line.strip().replace("  ", " ", 1) for line in self.lines()]

    def summary(self) -> str:
        """All reasons in one line, such as "24 no such file (a/b.jpg)"."""
        return ", ".join(f"{number} {reason}{self._such_as(reason)}" for reason, number in self.counts.most_common())

    def advice(self) -> str:
        """What to do about the commonest reason."""
        return remedy(self.counts.most_common(1)[0][0]) if self.counts else ""

    def _such_as(self, reason: str) -> str:
        return f" ({self.examples[reason]})" if reason in self.examples else ""
