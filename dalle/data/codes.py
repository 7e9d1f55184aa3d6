"""Image codes computed once and kept beside the shards, so that a transformer does not run the codec every epoch.

A folder holds ``codes.json`` (which codec, which shards) and ``SHARD.npy``, uint16 or int32 [count, views, N], raster
order. A picture that could not be decoded has the dtype's sentinel in its row (65535, or -1).
"""

import json
from collections import Counter, OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from dalle.data.decode import BadSample
from dalle.data.index import ShardIndex
from dalle.data.reader import most_open
from dalle.errors import UserError
from dalle.files import json_text, replacing

DESCRIPTION_FILE = "codes.json"
SENTINEL = {np.dtype(np.uint16): 65535, np.dtype(np.int32): -1}
MAKE = "make the codes again with tools/cache_codes.py"


def codes_dtype(num_codes: int) -> np.dtype:
    """The smallest dtype that holds the codes and a sentinel."""
    return np.dtype(np.uint16 if num_codes <= 65535 else np.int32)


def file_names(index: ShardIndex) -> list[str]:
    """One file a shard, named after it; numbered where two folders hold shards of one name."""
    times = Counter(shard.stem for shard in index.shards)
    return [f"{shard.stem}.npy" if times[shard.stem] == 1 else f"{number:05d}_{shard.stem}.npy"
            for number, shard in enumerate(index.shards)]


def codes_digest(folder: str | Path) -> str:
    """The digest of the codec that made the codes in ``folder``."""
    return str(read_description(Path(folder)).get("codec_digest"))


def read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION_FILE
    try:
        description = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no cached codes in {folder} ({DESCRIPTION_FILE} is missing); "
                        "make them with tools/cache_codes.py") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {MAKE}") from None
    if not isinstance(description, dict):
        raise UserError(f"{path} is damaged (no JSON object); {MAKE}")
    return description


def stored_rows(codes: np.ndarray, valid: np.ndarray | None, num_codes: int) -> np.ndarray:
    """``codes`` int [b, views, N] as they are kept; rows that are not ``valid`` (bool [b]) become the sentinel."""
    kept = codes if valid is None else codes[np.asarray(valid)]
    if kept.size and (kept.min() < 0 or kept.max() >= num_codes):
        raise ValueError(f"codes reach from {kept.min()} to {kept.max()}, outside 0..{num_codes - 1}")
    stored = codes.astype(codes_dtype(num_codes))
    if valid is not None:
        stored[~np.asarray(valid)] = SENTINEL[stored.dtype]
    return stored


def write_rows(path: Path, rows: np.ndarray) -> None:
    """One shard's file, there whole or not at all, even after the machine has failed."""
    with replacing(path, synced=True) as file:
        np.save(file, rows)


class CachedCodes:
    """The codes in ``folder``, checked to belong to the shards of ``index``; picklable."""

    def __init__(self, folder: str | Path, index: ShardIndex):
        self.folder = Path(folder)
        path = self.folder / DESCRIPTION_FILE
        description = read_description(self.folder)
        try:
            self.codec_digest = str(description["codec_digest"])
            self.num_codes = int(description["num_codes"])
            self.grid: tuple[int, int] = (int(description["grid"][0]), int(description["grid"][1]))
            self.views = int(description["views"])
            fingerprint = str(description["fingerprint"])
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); {MAKE}") from None
        if fingerprint != index.fingerprint:
            raise UserError(f"the codes in {folder} belong to other shards than {index.shards[0].folder} holds now "
                            f"(fingerprint {fingerprint[:8]}, not {index.fingerprint[:8]}); {MAKE}")
        self._names = file_names(index)
        self._counts = index.counts
        self.max_open, self._most = 128, 0         # as of a :class:`dalle.data.reader.ShardReader`
        self._open: OrderedDict[int, np.ndarray] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict(), "_most": 0}

    @property
    def length(self) -> int:
        """N, the codes of one picture."""
        return self.grid[0] * self.grid[1]

    def row(self, shard: int, sample: int, view: int = 0) -> np.ndarray:
        """uint16 or int32 [N]: one picture's codes. Raises :class:`BadSample` ``no_codes`` for a picture without."""
        codes = self._shard(shard)[sample, view]
        if codes[0] == SENTINEL[codes.dtype]:
            raise BadSample("no_codes", "the picture could not be decoded when the codes were made")
        if codes.max() >= self.num_codes:
            raise UserError(f"{self.folder / self._names[shard]} holds the code {codes.max()}, but there are only "
                            f"{self.num_codes}; {MAKE}")
        return codes

    def _shard(self, shard: int) -> np.ndarray:
        codes = self._open.get(shard)
        if codes is not None:
            self._open.move_to_end(shard)
            return codes
        path = self.folder / self._names[shard]
        expected = (int(self._counts[shard]), self.views, self.length)
        try:
            # a plain view: a memmap would pay for its subclass at every row
            codes = np.lib.format.open_memmap(path, mode="r").view(np.ndarray)      # no pickles, no archives
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"the codes {path} cannot be read ({error}); {MAKE}") from None
        if codes.shape != expected or codes.dtype != codes_dtype(self.num_codes):
            raise UserError(f"{path} holds {codes.dtype} {list(codes.shape)} where {codes_dtype(self.num_codes)} "
                            f"{list(expected)} is needed; {MAKE}")
        self._most = self._most or most_open(self.max_open)
        self._open[shard] = codes
        if len(self._open) > self._most:
            self._open.popitem(last=False)
        return codes


class CodesWriter:
    """Write the codes of every sample of ``index``, in the order of its shards; ``codes.json`` comes last.

    The folder is of no use to :class:`CachedCodes` until :meth:`close` has seen every sample.
    """

    def __init__(self, folder: str | Path, index: ShardIndex, *, codec_digest: str, num_codes: int,
                 grid: tuple[int, int], views: int = 1):
        self.folder = Path(folder)
        self._description = {"codec_digest": codec_digest, "num_codes": num_codes, "grid": list(grid),
                             "fingerprint": index.fingerprint, "views": views}
        self._index = index
        self._names = file_names(index)
        self._shape = (views, grid[0] * grid[1])
        self._num_codes = num_codes
        self._dtype = codes_dtype(num_codes)
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._shard = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / DESCRIPTION_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"the codes cannot be written into {folder}: {error.strerror}; check the path") from None
        self._finish_full_shards()

    def write(self, codes: np.ndarray, valid: np.ndarray | None = None) -> None:
        """Add the next samples: int [b, views, N] codes; rows that are not ``valid`` (bool [b]) become the sentinel."""
        codes = np.asarray(codes)
        if codes.shape[1:] != self._shape:
            raise ValueError(f"codes are {list(codes.shape)}; [b, {self._shape[0]}, {self._shape[1]}] is needed")
        self._pending.append(stored_rows(codes, valid, self._num_codes))
        self._num_pending += len(codes)
        self._finish_full_shards()

    def close(self) -> None:
        """Write ``codes.json``. Raises ``ValueError`` when samples are missing or too many."""
        if self._shard < len(self._index.shards) or self._num_pending:
            raise ValueError(f"codes of {len(self._index.shards)} shards expected, {self._shard} are complete and "
                             f"{self._num_pending} rows are left over")
        with replacing(self.folder / DESCRIPTION_FILE) as file:
            file.write(json_text(self._description).encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        if kind is None:
            self.close()

    def _finish_full_shards(self) -> None:
        while self._shard < len(self._index.shards) and self._num_pending >= self._index.shards[self._shard].count:
            count = self._index.shards[self._shard].count
            rows = np.concatenate(self._pending) if self._pending else np.empty((0, *self._shape), self._dtype)
            try:
                write_rows(self.folder / self._names[self._shard], rows[:count])
            except OSError as error:
                raise UserError(f"the codes cannot be written into {self.folder}: {error.strerror}") from None
            self._pending = [rows[count:]]
            self._num_pending = len(rows) - count
            self._shard += 1
