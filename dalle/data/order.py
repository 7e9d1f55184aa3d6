"""The order of samples: a pure function position -> (epoch, shard, index) of the seed and the shard sizes.

Epoch e lays the shards, permuted, end to end as a line of N samples and cuts it into C lanes of q + 1 or q samples.
Inside a lane, K consecutive shard pieces form a window whose samples are permuted jointly. Position p of the epoch is
lane p mod C, offset p div C; the longer lanes come first, so this is an exact bijection: no padding, repeat or drop.
Ranks and workers only choose positions. C sets how many shards mix in a batch, K how far a sample can travel.

Permutations are stable argsorts of raw Philox output, whose stream numpy keeps fixed between versions (it does not
promise that for ``Generator.permutation``): an order can be resumed under another numpy.
"""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np

POSITIONS_MASK = (1 << 64) - 1


def sample_rng(seed: int, position: int) -> np.random.Generator:
    """The randomness of one position: crop, caption choice, BPE dropout. Independent of ranks, workers and history."""
    return np.random.Generator(np.random.Philox(key=(seed & POSITIONS_MASK) | (position << 64)))


class PositionRandom:
    """:func:`sample_rng` of one position after another, several times faster: one generator that begins anew."""

    def __init__(self):
        self._bits = np.random.Philox(key=0)
        self._generator = np.random.Generator(self._bits)
        self._fresh = self._bits.state

    def at(self, seed: int, position: int) -> np.random.Generator:
        """The randomness of ``position``, until the next call."""
        key = np.array([seed & POSITIONS_MASK, position], dtype=np.uint64)
        self._bits.state = {**self._fresh, "state": {**self._fresh["state"], "key": key}}
        return self._generator


def _permutation(length: int, *key: int) -> np.ndarray:
    """int64 or int32 [length]: the permutation of ``key``, the same on every machine."""
    order = stable_argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(length))
    return order.astype(np.int32) if length < 2**31 else order


def stable_argsort(values: np.ndarray) -> np.ndarray:
    """``np.argsort(values, kind="stable")`` of uint64 random numbers, several times faster.

    Sorts the upper bits with each number's place in the lower ones; where upper bits coincide, numpy's own decides.
    """
    places = np.uint64((1 << len(values).bit_length()) - 1)
    packed = (values & ~places) | np.arange(len(values), dtype=np.uint64)
    packed.sort()
    upper = packed & ~places
    if (upper[1:] == upper[:-1]).any():
        return np.argsort(values, kind="stable")
    return (packed & places).astype(np.int64)


class _Epoch(NamedTuple):
    shards: np.ndarray     # int64 [S]: the non-empty shards in this epoch's order
    ends: np.ndarray       # int64 [S]: where each ends on the line


class Order:
    """The training order over ``counts`` samples a shard, endlessly: epoch after epoch, each a new permutation."""

    def __init__(self, counts: np.ndarray, seed: int, lanes: int = 64, window: int = 16):
        counts = np.asarray(counts, dtype=np.int64)
        self.samples_per_epoch = int(counts.sum())
        if self.samples_per_epoch < 1:
            raise ValueError("there is no sample to order")
        if lanes < 1 or window < 1 or seed < 0:
            raise ValueError(f"lanes ({lanes}) and window ({window}) must be positive, the seed ({seed}) not negative")
        self.counts = counts
        self.seed = seed
        self.lanes = min(lanes, self.samples_per_epoch)    # a lane holds at least one sample
        self.window = window
        self._filled = np.flatnonzero(counts)
        self._short, self._longer = divmod(self.samples_per_epoch, self.lanes)
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int, int], tuple[int, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_epochs": OrderedDict(), "_windows": OrderedDict()}

    @property
    def shards_at_once(self) -> int:
        """How many shards the windows of all lanes mix: what a reader should keep open, and a quarter more, so that it
        is the shards of windows already left that it closes first."""
        return min(len(self._filled), self.lanes * self.window * 5 // 4)

    def __call__(self, position: int) -> tuple[int, int, int]:
        """(epoch, shard number, index in the shard) of one position."""
        epoch, shard, index = self.locate(np.array([position]))
        return int(epoch[0]), int(shard[0]), int(index[0])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """int64 [n] positions -> (epoch, shard number, index in the shard), each int64 [n]."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, within = np.divmod(positions, self.samples_per_epoch)
        shards, indices = np.empty_like(positions), np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            shards[chosen], indices[chosen] = self._locate_in(int(epoch), within[chosen])
        return epochs, shards, indices

    def _locate_in(self, epoch: int, within: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shards, ends = self._epoch(epoch)
        lanes, offsets = within % self.lanes, within // self.lanes
        starts = self._lane_start(lanes)
        line = starts + offsets
        first_pieces = np.searchsorted(ends, starts, side="right")
        windows = (np.searchsorted(ends, line, side="right") - first_pieces) // self.window
        grouped = np.lexsort((windows, lanes))
        changes = np.flatnonzero(np.diff(lanes[grouped]) | np.diff(windows[grouped])) + 1
        for group in np.split(grouped, changes):
            if len(group):
                one = group[0]
                lane, window, first_piece = int(lanes[one]), int(windows[one]), int(first_pieces[one])
                start, permutation = self._window(epoch, lane, window, first_piece, ends)
                line[group] = start + permutation[line[group] - start]
        slots = np.searchsorted(ends, line, side="right")
        filled = shards[slots]
        return filled, line - (ends[slots] - self.counts[filled])

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch not in self._epochs:
            shards = self._filled[_permutation(len(self._filled), self.seed, epoch)]
            self._epochs[epoch] = _Epoch(shards, np.cumsum(self.counts[shards]))
            if len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _lane_start(self, lane):
        return lane * self._short + np.minimum(lane, self._longer)

    def _window(self, epoch: int, lane: int, window: int, first_piece: int, ends: np.ndarray) -> tuple[int, np.ndarray]:
        """Where the window begins on the line, and the joint permutation of its samples."""
        key = (epoch, lane, window)
        known = self._windows.get(key)
        if known is not None:
            self._windows.move_to_end(key)
            return known
        before = first_piece + window * self.window - 1       # the last piece ahead of the window
        last = min(first_piece + (window + 1) * self.window, len(ends)) - 1
        start, end = int(self._lane_start(lane)), int(self._lane_start(lane + 1))
        if before >= 0:
            start = max(start, int(ends[before]))
        end = min(end, int(ends[last]))
        entry = self._windows[key] = (start, _permutation(end - start, self.seed, epoch, lane, window))
        if len(self._windows) > self.lanes + 16:              # every lane has one window in use
            self._windows.popitem(last=False)
        return entry


class SequentialOrder:
    """The samples as they lie in the shards, for validation: position p of an epoch is the p-th sample."""

    def __init__(self, counts: np.ndarray):
        self.counts = np.asarray(counts, dtype=np.int64)
        self.samples_per_epoch = int(self.counts.sum())
        self._ends = np.cumsum(self.counts)
        self.shards_at_once = 2       # as one ends another begins

    def __call__(self, position: int) -> tuple[int, int, int]:
        epoch, shard, index = self.locate(np.array([position]))
        return int(epoch[0]), int(shard[0]), int(index[0])

    def locate(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        epochs, within = np.divmod(np.asarray(positions, dtype=np.int64), self.samples_per_epoch)
        shards = np.searchsorted(self._ends, within, side="right")
        return epochs, shards, within - (self._ends[shards] - self.counts[shards])
