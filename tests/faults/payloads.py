"""Payloads: each makes a folder when it is unpickled, or built by a YAML tag, the ordinary way."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import torch


class Payload:
    """Makes the folder ``marker`` when it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def as_pickle(marker: Path) -> bytes:
    return pickle.dumps(Payload(marker))


def as_torch(marker: Path) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": Payload(marker)}, file)
    return file.getvalue()


def as_numpy(marker: Path) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([Payload(marker)], dtype=object), allow_pickle=True)
    return file.getvalue()


def as_yaml(marker: Path) -> bytes:
    return f"!!python/object/apply:os.mkdir ['{marker}']\n".encode()


def as_nested(marker: Path) -> bytes:
    return b"[" * 100_000


def as_nothing(marker: Path) -> bytes:
    return b""


PAYLOADS = {function.__name__.removeprefix("as_"): function
            for function in (as_pickle, as_torch, as_numpy, as_yaml, as_nested, as_nothing)}
TEXT = {".json", ".jsonl", ".yaml", ".txt", ".csv", ".tsv", ".xml"}


def payloads_for(path: Path) -> list[str]:
    """Those that the reader of such a file might take; the others end where a file of zeros would."""
    return ["pickle", "yaml", "nested"] if path.suffix in TEXT else ["pickle", "torch", "numpy", "nothing"]
