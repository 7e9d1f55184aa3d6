"""Which class and which split a picture belongs to, by the folders in its path or by a hash of that."""

import re
from dataclasses import replace
from itertools import islice
from math import inf, nextafter
from pathlib import PurePosixPath

from dalle.data.building import SPLITS, LeftOut, hash_fraction
from dalle.data.folder.entries import Entry, FolderConfig
from dalle.data.folder.pictures import can_be_decoded

SPLIT = re.compile(r"(train|training|validation|valid|val|dev|test)(-\d.*)?", re.IGNORECASE)
VALIDATION_FRACTION = 0.05
ENOUGH_TO_HOLD_OUT = 20       # so many by their hash alone: some of them can be decoded


def with_classes(found: list[Entry | LeftOut]) -> list[Entry | LeftOut]:
    """Each picture in a sub-folder labelled by it; the folders of splits, where all are in one, are no classes."""
    names = [entry.name for entry in found if isinstance(entry, Entry)]
    skipped = 1 if all(map(_own_split, names)) else 0
    return [replace(entry, label=_class_folder(entry.name, skipped)) if isinstance(entry, Entry) else entry
            for entry in found]


def _class_folder(name: str, skipped: int) -> str | None:
    folders = PurePosixPath(name).parts[:-1]
    folders = _below_data(folders)[skipped:] if skipped else folders
    return folders[0] if folders else None


def with_class_ids(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Sub-folders become class ids in the order of their names, which are returned; one alone is no class."""
    names = sorted({entry.label for entry in entries if isinstance(entry.label, str)})
    ids = {name: number for number, name in enumerate(names)} if len(names) > 1 else {}
    return [replace(entry, label=ids.get(entry.label)) if isinstance(entry.label, str) else entry
            for entry in entries], list(ids)


def with_splits(entries: list[Entry], config: FolderConfig) -> list[Entry]:
    """The source's own splits where every picture has one; else by a hash of the path, at least one good picture."""
    if has_own_splits(entries, config):
        return [replace(entry, split=_own_split(entry.name)) for entry in entries]
    fraction = VALIDATION_FRACTION if config.validation_fraction is None else config.validation_fraction
    hashes = [hash_fraction(entry.name) for entry in entries]
    limit = _hash_limit(entries, hashes, fraction, config)
    return [replace(entry, split="validation" if value < limit else "train")
            for entry, value in zip(entries, hashes, strict=True)]


def has_own_splits(entries: list[Entry], config: FolderConfig) -> bool:
    """Whether the source says which pictures are for validation, and was not overruled."""
    return config.validation_fraction is None and {_own_split(entry.name) for entry in entries} == set(SPLITS)


def _hash_limit(entries: list[Entry], hashes: list[float], fraction: float, config: FolderConfig) -> float:
    """``fraction``, or so much more that a picture below it can be decoded (while another is left to train on)."""
    if not fraction or sum(value < fraction for value in hashes) >= ENOUGH_TO_HOLD_OUT:
        return fraction
    ranked = sorted(range(len(entries)), key=hashes.__getitem__)
    good = (hashes[number] for number in ranked if can_be_decoded(entries[number], config))
    first = list(islice(good, 2))
    return max(fraction, nextafter(first[0], inf)) if len(first) == 2 else 0.0


def _own_split(name: str) -> str | None:
    parts = PurePosixPath(name).parts[:-1]
    match = SPLIT.fullmatch(_below_data(parts)[0]) if _below_data(parts) else None
    return match and ("train" if match.group(1).lower().startswith("train") else "validation")


def _below_data(folders: tuple[str, ...]) -> tuple[str, ...]:
    return folders[1:] if folders[:1] == ("data",) and len(folders) > 1 else folders
