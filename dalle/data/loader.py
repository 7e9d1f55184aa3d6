"""Batches for one rank: endless for training, one pass for validation.

A batch of b = batch_size / world_size samples is a :class:`dalle.data.batch.Batch`.
Rank r of R gets the positions tB + r, tB + r + R, ... of batch t. In the exact tier a position is a sample, so any R
that divides B sees the same global batches; in the others (:mod:`dalle.data.streaming`) it is a running number.
"""

import atexit
import itertools
import logging
import os
import signal
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import wait
from types import FrameType

import torch
from torch.utils.data import DataLoader

from dalle.data.batch import Batch, BatchSource, Fetched
from dalle.data.codes import CachedCodes
from dalle.data.damage import DAMAGED_SHARD, MISSING_SHARD, REBUILD
from dalle.data.dataset import ShardDataset, ViewDataset
from dalle.data.decode import IN_BAD_SHARD
from dalle.data.index import ShardIndex
from dalle.data.packing import unpacked
from dalle.data.reasons import Tally, remedy
from dalle.data.settings import DataConfig
from dalle.data.streaming import StreamDataset
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.workers import death_of, signal_death, start_server, worker_context, worker_start
from dalle.errors import LostProcess, UserError

__all__ = ["Batch", "DataConfig", "Loader", "train_batches", "validation_batches", "view_batches"]

log = logging.getLogger(__name__)

MIN_SEEN = 200               # samples before the fraction of bad ones is judged
SKIPPED_REASONS = (MISSING_SHARD, DAMAGED_SHARD, IN_BAD_SHARD, "truncated_shard")
PREFETCHED_BATCHES = 4       # a worker
SECONDS_TO_DIE = 2           # of a worker, after its connection broke
GO_ON = "start again to go on from the last checkpoint"


class TrainPositions:
    """One rank's positions of the global batches ``start_step``, ``start_step`` + 1, ..., endlessly."""

    def __init__(self, batch_size: int, rank: int, world_size: int, start_step: int):
        self.batch_size, self.rank, self.world_size, self.start_step = batch_size, rank, world_size, start_step

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self.start_step):
            start = step * self.batch_size
            yield list(range(start + self.rank, start + self.batch_size, self.world_size))


class ValidationPositions:
    """One rank's positions of one pass over ``total`` samples; every rank gets the same number of batches, none empty.

    Ranks that ran out one batch early would leave the others waiting in a collective. Where the last global batch has
    too few positions for all, a rank without one splits its last batch in two; with one sample a batch there is nothing
    to split, and the last ``total`` mod R samples are left out.
    """

    def __init__(self, total: int, batch_size: int, rank: int, world_size: int):
        local = batch_size // world_size
        if local == 1 and total % world_size:
            log.warning("validation leaves out its last %d samples: fewer than ranks", total % world_size)
            total -= total % world_size
        mine = list(range(rank, total, world_size))
        self.batches = [mine[start:start + local] for start in range(0, len(mine), local)]
        if len(self.batches) < -(-total // batch_size):
            last = self.batches.pop()
            self.batches += [last[:len(last) // 2], last[len(last) // 2:]]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader(BatchSource):
    """Iterate for batches; ``skipped`` counts this rank's bad samples (replaced, or passed over in a stream) and
    bad shards by reason, so far; ``partly_used`` the samples of which a part is not used: a caption longer than
    data.text_length, words that the tokenizer lacks, a damaged JSON. ``identity`` is what must be the same data at a
    resume. The process that ``speaks`` says at once what is used in part.

    ``positions``: what to fetch from a map of positions; None for a :class:`StreamDataset`, which makes batches itself.
    """

    def __init__(self, dataset: ShardDataset | ViewDataset | StreamDataset,
                 positions: Iterable[list[int]] | None = None, *, finite: bool = False, speaks: bool = False):
        config = dataset.config
        self.index: ShardIndex | None = dataset.index
        self.tokenizer: CaptionTokenizer | None = dataset.tokenizer
        self.codes: CachedCodes | None = dataset.codes
        self.samples_per_epoch: int | None = dataset.order.samples_per_epoch if self.index else None
        self.identity = {"fingerprint": self.index.fingerprint if self.index else dataset.fingerprint}
        if self.tokenizer is not None:
            self.identity["tokenizer"] = self.tokenizer.digest
        self._left_out, self._lessened, self._speaks = Tally(), Tally(), speaks
        self._seen = 0
        self._place = self.index.shards[0].folder if self.index else dataset.place
        self._max_bad_fraction = config.max_bad_fraction
        # whether to go on without a shard, or what is lost of it, is data.bad_shards' to say
        self._chosen = SKIPPED_REASONS if config.bad_shards == "skip" else (MISSING_SHARD,)
        self._positions = positions
        self._finite = finite
        workers = min(config.workers, len(positions)) if finite else config.workers
        if workers:
            # the library warns at forks unless told; a worker encodes one caption at a time anyway
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        fetched = {"batch_size": None} if positions is None else {"batch_sampler": positions}
        self._loader = DataLoader(
            dataset, **fetched, num_workers=workers, collate_fn=_as_fetched,
            multiprocessing_context=worker_context() if workers else None,
            worker_init_fn=worker_start() if workers else None,
            persistent_workers=workers > 0, prefetch_factor=PREFETCHED_BATCHES if workers else None,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(0))     # otherwise each pass would draw from the global generator
        if workers:
            atexit.register(_close, weakref.ref(self))
        self._waiting = False        # for a batch: the only time when a worker's death may be raised

    @property
    def left_out(self) -> Tally:
        """:attr:`skipped`, with an example of each reason."""
        return self._left_out

    @property
    def skipped(self) -> Counter[str]:
        return self._left_out.counts

    @property
    def partly_used(self) -> Counter[str]:
        return self._lessened.counts

    def add_bad_shards(self, index: ShardIndex) -> None:
        """Count what was found before the first batch."""
        self._left_out.update(index.bad)

    def report(self) -> list[str]:
        """A line for each reason why this rank's samples were left out or used in part so far."""
        return [*(f"left out: {line}" for line in self._left_out.sentences()),
                *(f"used in part: {line}" for line in self._lessened.sentences())]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._fetched():
            if "error" in batch:
                raise UserError(batch["error"])
            self._account(batch)
            yield batch
        if self._finite:
            self._judge()

    def _fetched(self) -> Iterator[Fetched]:
        """What the workers make. One that died is named, whatever its end did to the connection."""
        batches = self._begun()
        while True:
            self._waiting = True
            try:
                self._check_workers()
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError):
                self._check_workers(SECONDS_TO_DIE)
                raise
            finally:
                self._waiting = False
            if batch is None:
                return
            yield unpacked(batch)

    def _begun(self) -> Iterator[Fetched]:
        if not self._loader.num_workers:
            return iter(self._loader)
        try:
            start_server()                       # again, where it was lost since
            batches = iter(self._loader)
        except (OSError, EOFError) as error:
            raise LostProcess(f"no loader worker could be started ({type(error).__name__}: {error}); {GO_ON}") from None
        if self not in _WATCHED and threading.current_thread() is threading.main_thread():
            _WATCHED.add(self)
            signal.signal(signal.SIGCHLD, _on_worker_end)
            signal_death([worker.sentinel for worker in batches._workers])
        return batches

    def _check_workers(self, seconds: float = 0) -> None:
        """Raise :class:`LostProcess` when a worker is dead, or is within ``seconds``."""
        workers = getattr(self._loader._iterator, "_workers", [])
        ended = wait([worker.sentinel for worker in workers], seconds) if workers else []
        for number, worker in enumerate(workers):
            if worker.sentinel in ended:
                raise LostProcess(f"{death_of(number, worker.pid, worker.exitcode)}; {GO_ON}")

    def __len__(self) -> int:
        """Batches in a pass; endless loaders have no length."""
        if not self._finite:
            raise TypeError("a training loader is endless")
        return len(self._positions)

    def close(self) -> None:
        """Stop the workers."""
        iterator = self._loader._iterator
        if iterator is not None and self._loader.num_workers:
            iterator._shutdown_workers()      # DataLoader offers no public way
            self._loader._iterator = None
        _WATCHED.discard(self)

    def _account(self, batch: Fetched) -> None:
        self._left_out.update(batch.pop("skipped"))
        lessened = batch.pop("partly_used", None)
        if lessened is not None and lessened.counts:
            self._say_news(lessened)
            self._lessened.update(lessened)
        self._seen += batch.pop("read", len(batch["position"]))
        if self._seen >= MIN_SEEN:
            self._judge()

    def _judge(self) -> None:
        bad = self.skipped.total() - sum(self.skipped[reason] for reason in self._chosen)
        if bad > self._max_bad_fraction * self._seen:
            reasons = "; ".join(self._left_out.sentences())
            raise UserError(f"{bad} of {self._seen} samples in {self._place} cannot be used, above "
                            f"data.max_bad_fraction={self._max_bad_fraction}: {reasons}")

    def _say_news(self, lessened: Tally) -> None:
        """The first of each reason, at once: a caption that is cut is no error, and nobody would look for it."""
        if self._speaks:
            for reason in lessened.counts.keys() - self.partly_used.keys():
                log.warning("samples are used in part: %s (the first: %s): %s", reason, lessened.examples[reason],
                            remedy(reason))


def train_batches(config: DataConfig, *, seed: int, batch_size: int, rank: int = 0, world_size: int = 1,
                  start_step: int = 0, needs_classes: bool = False) -> Loader:
    """This rank's share of the endless global batches of ``batch_size``, from batch ``start_step`` on.

    ``needs_classes``: a sample whose JSON is damaged cannot be used, as its ``class_id`` is read.
    Raises :class:`UserError` for data that cannot be used, and when ``world_size`` does not divide ``batch_size``.
    """
    check_split(batch_size, world_size)
    if config.tier != "exact":
        return Loader(StreamDataset(config, seed=seed, batch_size=batch_size, rank=rank, world_size=world_size,
                                    start_step=start_step, tokenizer=_tokenizer(config),
                                    needs_classes=needs_classes), speaks=rank == 0)
    index = ShardIndex.load(config.train, config.bad_shards)
    dataset = ShardDataset(config, index, seed=seed, training=True, tokenizer=_tokenizer(config),
                           codes=CachedCodes(config.codes, index) if config.codes else None,
                           needs_classes=needs_classes)
    loader = Loader(dataset, TrainPositions(batch_size, rank, world_size, start_step), speaks=rank == 0)
    if rank == 0:                                  # the ranks' counts are added up
        loader.add_bad_shards(index)
        say_findings(index)
    return loader


def validation_batches(config: DataConfig, *, seed: int, batch_size: int, rank: int = 0, world_size: int = 1,
                       limit: int | None = None, needs_classes: bool = False) -> Loader:
    """This rank's share of one pass over ``config.validation`` (its first ``limit`` samples), in order, unaugmented."""
    if config.validation is None:
        raise UserError("data.validation is not set; name the validation shards")
    if config.codes and not config.validation_codes and not config.images:
        raise UserError("data.codes is set but data.validation_codes is not; make them with tools/cache_codes.py")
    check_split(batch_size, world_size)
    index = ShardIndex.load(config.validation, config.bad_shards)
    there = int(index.counts_there.sum())
    total = there if limit is None else min(limit, there)
    if total < world_size:
        raise UserError(f"validation has {total} samples, fewer than the {world_size} processes; use more samples "
                        "or fewer processes")
    dataset = ShardDataset(config, index, seed=seed, training=False, tokenizer=_tokenizer(config),
                           codes=CachedCodes(config.validation_codes, index) if config.validation_codes else None,
                           needs_classes=needs_classes)
    return Loader(dataset, ValidationPositions(total, batch_size, rank, world_size), finite=True)


def view_batches(config: DataConfig, *, seed: int, batch_size: int, views: int = 1, index: ShardIndex | None = None,
                 shards: Sequence[int] | None = None) -> Loader:
    """Every sample of ``config.train`` once, in order, as ``views`` crops: ``image`` uint8 [b, views, 3, S, S].

    A picture that cannot be decoded is black and its ``valid`` (bool [b]) False, so that rows and samples stay aligned.
    ``index``: of ``config.train``, where it is loaded already. ``shards``: of these alone, by their numbers, and no
    batch spans two of them.
    """
    index = ShardIndex.load(config.train, config.bad_shards) if index is None else index
    dataset = ViewDataset(config, index, seed=seed, views=views)
    if shards is None:
        return Loader(dataset, ValidationPositions(index.num_samples, batch_size, 0, 1), finite=True)
    ends = index.counts.cumsum().tolist()
    samples = [range(ends[shard] - int(index.counts[shard]), ends[shard]) for shard in shards]
    return Loader(dataset, [list(of_shard[first:first + batch_size]) for of_shard in samples
                            for first in range(0, len(of_shard), batch_size)], finite=True)


def say_findings(index: ShardIndex) -> None:
    """A line for each reason why members or samples were not indexed."""
    for line in index.findings.sentences():
        log.warning("in the shards of %s: %s", index.shards[0].folder, line)
    older = next((shard.folder for shard in index.shards if shard.problems and not shard.examples), None)
    if older is not None:
        log.warning("the index of %s is of an older version, which did not join the members of a sample that lie "
                    "apart; for a new run, %s", older, REBUILD.format(folder=older))


def check_split(batch_size: int, world_size: int) -> None:
    """Refuse a global batch that the processes cannot share equally."""
    if batch_size < 1:
        raise UserError(f"the global batch size is {batch_size}; it must be at least 1")
    if batch_size % world_size:
        legal = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
        raise UserError(f"the global batch of {batch_size} samples cannot be shared by {world_size} processes; "
                        f"use one of {', '.join(map(str, legal))} processes, or a batch that {world_size} divides")


def _tokenizer(config: DataConfig) -> CaptionTokenizer | None:
    return CaptionTokenizer.load(config.tokenizer) if config.tokenizer else None


def _as_fetched(batch: Fetched) -> Fetched:
    return batch


_WATCHED: "weakref.WeakSet[Loader]" = weakref.WeakSet()


def _on_worker_end(number: int, frame: FrameType | None) -> None:
    """A worker that died while it sent a batch leaves half of one, for whose rest the library would wait for ever."""
    for loader in list(_WATCHED):
        if loader._waiting:
            loader._check_workers()


def _close(reference: "weakref.ref[Loader]") -> None:
    loader = reference()
    if loader is not None:
        loader.close()
