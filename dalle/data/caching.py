"""A codec's codes of whole shards, made by any number of processes that share nothing but the folder.

A shard's codes are one file, there whole or not at all, so that a run that was stopped goes on behind the shards that
are there. Until all are, ``partial/`` holds what they belong to (``state.json``: codec, crops, shards) and, for a shard
with pictures that have no codes, why (``SHARD.json``); ``codes.json``, which readers look for, comes last.

The codes of a shard depend on nothing but the shard and the batch size: batches never span two shards, and the last
one of each is filled up with black, for a codec may round otherwise for another number of pictures at once.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dalle.data.batch import Batch
from dalle.data.codes import DESCRIPTION_FILE, CachedCodes, file_names, read_description, stored_rows, write_rows
from dalle.data.index import ShardIndex
from dalle.data.loader import Loader, view_batches
from dalle.data.reasons import Tally
from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.files import json_text, read_json, replacing

PARTIAL_FOLDER, STATE_FILE = "partial", "state.json"
SECONDS_BETWEEN_LINES = 10
KINDS = {"codec_digest": "another codec", "views": "another number of views", "crop": "another --crop",
         "seed": "another --seed", "dtype": "another --dtype", "batch_size": "another --batch-size",
         "fingerprint": "other shards", "num_codes": "another codec", "grid": "another codec"}
Encode = Callable[[Tensor], Tensor]        # uint8 [B, 3, S, S] -> int [B, N], on the codec's device


class CodesFolder:
    """``folder`` while its codes are made. ``description``: what they are, as ``codes.json`` has it in the end.

    ``known_digests``: of the codec, all that its codes may be filed under.
    """

    def __init__(self, folder: str | Path, index: ShardIndex, description: dict[str, Any],
                 known_digests: Sequence[str] = ()):
        self.folder, self.index = Path(folder), index
        self.description = {**description, "fingerprint": index.fingerprint}
        self._known = {*known_digests, description["codec_digest"]}
        self._names = file_names(index)
        self._partial = self.folder / PARTIAL_FOLDER
        self._state = self._partial / STATE_FILE

    def is_complete(self) -> bool:
        """Whether all is done. :class:`UserError` where the folder holds other codes, all or a part of them."""
        if (self.folder / DESCRIPTION_FILE).is_file():
            CachedCodes(self.folder, self.index)                       # refuses damage, and other shards
            self._refuse_others({**read_description(self.folder), "batch_size": self.description["batch_size"]},
                                "the codes")
            return True
        if self._state.is_file() and len(self._pending()) < len(self._names):
            self._refuse_others(read_json(self._state) or {}, "a part of the codes")
        return False

    def begin(self) -> list[int]:
        """The shards without codes, by number; to be called by one process alone, before any writes."""
        try:
            if not self._state.is_file():
                for name in self._names:                               # of whom, nobody can tell
                    (self.folder / name).unlink(missing_ok=True)
            for left in (left for folder in (self.folder, self._partial) for left in folder.glob(".*.tmp")):
                left.unlink(missing_ok=True)                           # by a process that was killed
            self._partial.mkdir(exist_ok=True)
            with replacing(self._state) as file:
                file.write(json_text(self.description).encode())
        except OSError as error:
            raise self._unwritable(error) from None
        return self._pending()

    def write(self, shard: int, codes: np.ndarray, valid: np.ndarray, left_out: Tally) -> None:
        """All codes of a shard: int [count, views, N], bool [count], and why those that are not valid are not."""
        rows = stored_rows(codes, valid, self.description["num_codes"])
        reasons = self._reasons(shard)
        try:
            if left_out.counts:
                with replacing(reasons) as file:
                    file.write(json_text({"counts": left_out.counts, "examples": left_out.examples}).encode())
            else:
                reasons.unlink(missing_ok=True)
            write_rows(self.folder / self._names[shard], rows)
        except OSError as error:
            raise self._unwritable(error) from None

    def finish(self) -> Tally:
        """Write ``codes.json`` and return why pictures have no codes; one process, when all others are done."""
        missing = self._pending()
        if missing:
            raise UserError(f"{len(missing)} of {len(self._names)} shards have no codes in {self.folder} (such as "
                            f"{self._names[missing[0]]}); start again to make them")
        left_out = Tally()
        for shard in range(len(self._names)):
            found = read_json(self._reasons(shard)) or {}
            left_out.update(Tally(found.get("counts"), found.get("examples")))
        try:
            with replacing(self.folder / DESCRIPTION_FILE) as file:
                file.write(json_text(self.description).encode())
            shutil.rmtree(self._partial, ignore_errors=True)
        except OSError as error:
            raise self._unwritable(error) from None
        return left_out

    def _pending(self) -> list[int]:
        return [number for number, name in enumerate(self._names) if not (self.folder / name).is_file()]

    def _reasons(self, shard: int) -> Path:
        return self._partial / f"{Path(self._names[shard]).stem}.reasons.json"

    def _refuse_others(self, found: dict[str, Any], what: str) -> None:
        """What an older description does not say is no difference."""
        others = [kind for key, kind in KINDS.items() if key in found and found[key] != self.description[key]
                  and not (key == "codec_digest" and found[key] in self._known)]
        if others or not found:
            kinds = " and ".join(dict.fromkeys(others)) or "something that cannot be read"
            raise UserError(f"{self.folder} holds {what} of {kinds}; give another --out or delete it")

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"the codes cannot be written into {self.folder}: {error.strerror}; check the path")


def share(shards: Sequence[int], counts: np.ndarray, rank: int, size: int) -> list[int]:
    """The ``shards`` of process ``rank`` of ``size``: the largest first, each to whoever has the fewest samples."""
    loads, shares = np.zeros(size, dtype=np.int64), [[] for _ in range(size)]
    for shard in sorted(shards, key=lambda shard: (-counts[shard], shard)):
        least = int(loads.argmin())
        loads[least] += counts[shard]
        shares[least].append(shard)
    return sorted(shares[rank])


def rows_at_once(index: ShardIndex, batch_size: int, views: int) -> int:
    """Samples of a batch: as many as ``batch_size`` crops are of, and no more than a shard has."""
    return max(1, min(batch_size // views, int(index.counts.max(initial=1))))


def cache_shards(folder: CodesFolder, shards: Sequence[int], config: DataConfig, encode: Encode, *, rows: int,
                 say: Callable[[str], None]) -> int:
    """Write the codes of these shards, one after the other; the number of pictures. ``rows``: samples of a batch."""
    index, views, seed = folder.index, folder.description["views"], folder.description["seed"]
    columns = folder.description["grid"][0] * folder.description["grid"][1]
    loader = view_batches(config, seed=seed, batch_size=rows, views=views, index=index, shards=shards)
    made = encoded(loader, encode, rows)
    done, total, spoken = 0, int(index.counts[list(shards)].sum()), time.monotonic()
    try:
        for shard in shards:
            count = int(index.counts[shard])
            codes, valid = np.empty((count, views, columns), dtype=np.int64), np.empty(count, dtype=bool)
            left_out, filled = Tally(), 0
            while filled < count:
                part = next(made)
                here = slice(filled, filled + len(part.valid))
                codes[here], valid[here], filled = part.codes, part.valid, here.stop
                left_out.update(part.left_out)
                if time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                    spoken = time.monotonic()
                    say(f"encoded {done + filled} of {total} pictures")
            folder.write(shard, codes, valid, left_out)
            done += count
        for _ in made:                                 # the loader's last word on what cannot be used
            raise RuntimeError("a loader gave more pictures than the shards have")
    finally:
        loader.close()
    return done


class Encoded(NamedTuple):
    """A batch of b samples; of those that are not ``valid``, ``left_out`` says why."""

    codes: np.ndarray        # int [b, views, N]
    valid: np.ndarray        # bool [b]
    left_out: Tally


def encoded(loader: Loader, encode: Encode, rows: int) -> Iterator[Encoded]:
    """The codes of each batch; the next batch is fetched while a device encodes this one."""
    waiting: tuple[Tensor, Batch, Tally] | None = None
    before: Counter[str] = Counter()
    for batch in loader:
        if waiting is not None:
            yield _collected(*waiting)
        left_out = _since(before, loader.left_out)
        before = loader.skipped.copy()
        waiting = encode(_filled_up(batch["image"], rows)), batch, left_out
    if waiting is not None:
        yield _collected(*waiting)


def _filled_up(images: Tensor, rows: int) -> Tensor:
    """uint8 [b, views, 3, S, S] -> [rows * views, 3, S, S], black behind the last."""
    missing = rows - len(images)
    if missing:
        images = torch.cat([images, images.new_zeros(missing, *images.shape[1:])])
    return images.flatten(0, 1)


def _collected(codes: Tensor, batch: Batch, left_out: Tally) -> Encoded:
    count, views = batch["image"].shape[:2]
    return Encoded(codes.view(-1, views, codes.shape[-1])[:count].cpu().numpy(), batch["valid"].numpy(), left_out)


def _since(before: Mapping[str, int], tally: Tally) -> Tally:
    """What came to ``tally`` since its counts were ``before``."""
    counts = {reason: number - before.get(reason, 0) for reason, number in tally.counts.items()
              if number > before.get(reason, 0)}
    return Tally(counts, {reason: tally.examples[reason] for reason in counts if reason in tally.examples})
