"""The tiers without an index: shards read front to back, from disk or over the network, into the same batches.

``resampled``: every lane (one loader worker of one rank) draws shards with replacement, by a pure function of (seed,
first step, rank, worker, draw), and mixes their samples in a buffer. How often a sample comes is a matter of chance,
and so it is after a resume, which goes on with fresh draws. Shards may be fewer than lanes.

``sequential``: the shards in order, again and again, without shuffling. The lanes divide the shards, or the samples
where there are fewer shards than lanes. A resume begins at a shard drawn from its first step, so that a run stopped
often does not see only the first shards.

Bad samples are passed over, not replaced. Nothing is unpacked, unpickled or run: members are bytes for
:mod:`dalle.data.decode`, and webdataset's ``.decode()`` is never used. Its tar reader is not either: it ends without a
word where a shard was cut between two members or inside a header.
"""

import hashlib
import logging
import time
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from dalle.data.batch import Fetched
from dalle.data.damage import MISSING_SHARD, SKIP
from dalle.data.dataset import Record, Sample, SampleMaker
from dalle.data.decode import BadSample, decode_captions, meta_captions
from dalle.data.members import PARTS, key_text, member_runs, why_no_sample
from dalle.data.opening import LostShard, Patience, ShardStream, refuse_absent, scheme_of, shard_urls, shown
from dalle.data.reasons import Tally, remedy
from dalle.data.settings import DataConfig
from dalle.data.tar import (
    BLOCK,
    LONGEST_EXTENSION_HEADER,
    REGULAR,
    WITHOUT_PAYLOAD,
    ZEROS,
    header_name,
    header_number,
    pax_records,
    verify_checksum,
)
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError

log = logging.getLogger(__name__)

SHARD_STREAM, BUFFER_STREAM = 1, 2      # which random numbers of a lane
LARGEST_MEMBER = 1 << 28                # bytes; a header may claim anything, and memory is taken for what it claims
MOST_BAD_IN_A_ROW = 1000
SECONDS_LOST = 600                      # before a shard that gave nothing is tried again
# problems that cost a sample, or a part of one
LEFT_OUT = ("no_image", "duplicate_key", "members_apart", "key_too_long", "member_too_large")


class DamagedShard(Exception):
    """A shard that is not readable to its end: ``reason`` to count by."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class RawSample(NamedTuple):
    """The bytes of one sample as they lie in the shard."""

    key: bytes
    parts: dict[str, bytes]      # "image", "text", "json"
    url: str
    number: int                  # in its shard


def tar_members(stream: ShardStream, problems: Tally) -> Iterator[tuple[bytes, bytes | None]]:
    """(name, bytes) of each regular file, None for one too large; the formats are those of :class:`TarWalk`.

    Raises :class:`DamagedShard` where the archive is cut or no archive.
    """
    long_name, pax = None, {}
    while True:
        place = stream.offset
        header = stream.read(BLOCK)
        if header == ZEROS:
            return
        if len(header) < BLOCK:
            raise DamagedShard("truncated_shard", f"it ends at byte {stream.offset} without an end marker")
        kind = header[156:157]
        try:
            verify_checksum(header)
            size = 0 if kind in WITHOUT_PAYLOAD else pax.get("size", header_number(header[124:136]))
            if kind == b"S" or "sparse" in pax:
                raise ValueError("a sparse member")
            if kind in b"LKxg" and size > LONGEST_EXTENSION_HEADER:
                raise ValueError(f"a name record of {size} bytes")
        except ValueError as error:
            detail = f"{error} at byte {place}" if place else f"no tar ({error}); compressed ones are not read"
            raise DamagedShard("damaged_shard", detail) from None
        name = pax.get("path") or long_name or header_name(header)
        try:
            data = _payload(stream, size)
        except DamagedShard:
            if kind in REGULAR:
                yield name, None                 # so that the sample before is known to be whole
            raise
        if kind == b"L":
            long_name = data.rstrip(b"\0")
        elif kind == b"x":
            pax = pax_records(data)
        elif kind not in b"Kg":
            if kind in REGULAR:
                if data is None:
                    problems.add("member_too_large", key_text(name))
                yield name, data
            long_name, pax = None, {}


def _payload(stream: ShardStream, size: int) -> bytes | None:
    padded = (size + BLOCK - 1) // BLOCK * BLOCK
    if size <= LARGEST_MEMBER:
        data = stream.read(padded)
        complete = len(data) == padded
    else:
        data, complete = None, _passed_over(stream, padded)
    if not complete:
        raise DamagedShard("truncated_shard", f"it ends at byte {stream.offset}, inside a member of {size} bytes")
    return data if data is None else data[:size]


def _passed_over(stream: ShardStream, size: int) -> bool:
    while size:
        data = stream.read(min(size, 1 << 20))
        if not data:
            return False
        size -= len(data)
    return True


def raw_samples(stream: ShardStream, problems: Tally) -> Iterator[RawSample]:
    """The samples of one shard, as :func:`dalle.data.shard.scan_shard` finds them; ``problems`` counts what is not.

    A stream does not wait for what may come: members that lie behind another sample's are not joined to their own, as
    the index does, but counted (``members_apart``).
    Raises :class:`DamagedShard`: what a cut may have halved, the last group before it, is not delivered.
    """
    seen: dict[bytes, frozenset[str]] = {}          # the parts that each key had in its first run
    number = 0
    for key, members in member_runs(tar_members(stream, problems), problems):
        if key in seen:
            problems.add("duplicate_key" if seen[key] & members.keys() else "members_apart", key_text(key))
            continue
        seen[key] = frozenset(members)
        parts = {part: data for part, (_, data) in members.items() if data is not None}
        reason = why_no_sample(key, parts)
        if reason is not None:
            problems.add(reason, key_text(key))
        else:
            yield RawSample(key, {part: parts[part] for part in PARTS if part in parts}, stream.url, number)
            number += 1


def drawn_shard(seed: int, first_step: int, rank: int, worker: int, draw: int, num_shards: int) -> int:
    """The shard of one draw of one lane: a pure function of its arguments."""
    source = np.random.Philox(np.random.SeedSequence((seed, SHARD_STREAM, first_step, rank, worker, draw)))
    return int(source.random_raw() % num_shards)


def shuffled(samples: Iterator[RawSample], size: int, rng: np.random.Generator) -> Iterator[RawSample]:
    """``samples``, each exchanged with a random one of the ``size`` that wait."""
    waiting: list[RawSample] = []
    for sample in samples:
        if len(waiting) < size:
            waiting.append(sample)
            continue
        place = int(rng.integers(size))
        sample, waiting[place] = waiting[place], sample
        yield sample


class StreamDataset(SampleMaker, IterableDataset):
    """One rank's endless batches, iterated in each of W loader workers, which take the steps in turns.

    ``position`` is the running number t * B + place of the batch, by which caption, crop and dropout are drawn too.
    """

    index = None      # what is in the shards shows as they are read

    def __init__(self, config: DataConfig, *, seed: int, batch_size: int, rank: int, world_size: int, start_step: int,
                 tokenizer: CaptionTokenizer | None, needs_classes: bool = False):
        super().__init__(config, seed=seed, training=True, tokenizer=tokenizer, codes=None,
                         needs_classes=needs_classes)
        self.urls = shard_urls(config.train, config.allow_pipe)
        self.batch_size, self.rank, self.world_size, self.start_step = batch_size, rank, world_size, start_step
        self._patience = Patience(config.read_timeout, config.read_retries)
        self._lost: dict[int, float] = {}               # until when a shard is not tried again
        self._left_out = Tally()                        # since the last batch
        self._bad_in_a_row = 0
        self._barren_in_a_row = 0                       # shards that gave nothing
        refuse_absent(config.train, self.urls, config.bad_shards)

    @property
    def place(self) -> str:
        """Where the samples come from, for messages."""
        more = f" and {len(self.urls) - 1} more" if len(self.urls) > 1 else ""
        return f"{shown(self.urls[0])}{more}"

    @property
    def fingerprint(self) -> str:
        """Of the shards' names: what is inside is not known without an index."""
        names = (url if scheme_of(url) == "pipe" else shown(url).rpartition("/")[2] for url in self.urls)
        return hashlib.blake2b("\n".join(names).encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()

    def __iter__(self) -> Iterator[Fetched]:
        """Batches with ``skipped``; a :class:`UserError` travels as ``error``, see :class:`ShardDataset`."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        samples = self._samples(worker, workers)
        try:
            for step in count(self.start_step + worker, workers):
                start = step * self.batch_size
                positions = range(start + self.rank, start + self.batch_size, self.world_size)
                made = [self._next_good(position, samples) for position in positions]
                skipped, self._left_out = self._left_out, Tally()
                yield {**self._collate(positions, made, skipped), "read": len(made) + skipped.total()}
        except UserError as error:
            yield {"error": str(error)}
        finally:
            samples.close()

    def _next_good(self, position: int, samples: Iterator[RawSample]) -> Sample:
        for raw in samples:
            try:
                sample = self._make(position, self._record(raw), None, lambda raw=raw: raw.parts["image"])
            except BadSample as bad:
                self._left_out.add(bad.reason, f"{key_text(raw.key)} in {shown(raw.url)}")
                self._note("bad sample passed over", bad, raw.key, f"sample {raw.number} of {shown(raw.url)}")
                self._bad_in_a_row += 1
                if self._bad_in_a_row == MOST_BAD_IN_A_ROW:
                    raise UserError(f"no usable sample among {MOST_BAD_IN_A_ROW} in a row in {self.place} ({bad}); "
                                    f"{remedy(bad.reason)}") from None
                continue
            self._bad_in_a_row = 0
            return sample
        raise RuntimeError("an endless stream ended")

    def _record(self, raw: RawSample) -> Record:
        return self._record_of(raw.key, raw.parts.get("json"), lambda meta: _captions(raw, meta))

    def _samples(self, worker: int, workers: int) -> Iterator[RawSample]:
        """The lane's samples, endlessly."""
        if self.config.tier == "sequential":
            return self._in_order(self.rank * workers + worker, self.world_size * workers)
        draws = (drawn_shard(self.seed, self.start_step, self.rank, worker, draw, len(self.urls)) for draw in count())
        raw = (sample for shard in draws for sample in self._shard(shard))
        lane = np.random.SeedSequence((self.seed, BUFFER_STREAM, self.start_step, self.rank, worker))
        return shuffled(raw, self.config.shuffle_buffer, np.random.Generator(np.random.Philox(lane)))

    def _in_order(self, lane: int, lanes: int) -> Iterator[RawSample]:
        num_shards = len(self.urls)
        first = drawn_shard(self.seed, self.start_step, 0, 0, 0, num_shards) if self.start_step else 0
        order = [(first + number) % num_shards for number in range(num_shards)]
        whole_shards = num_shards >= lanes
        mine = order[lane::lanes] if whole_shards else order
        number = 0
        while True:
            for shard in mine:
                for sample in self._shard(shard):
                    if whole_shards or number % lanes == lane:
                        yield sample
                    number += 1
            if all(self._is_lost(shard) for shard in mine):
                mine, whole_shards = order, False

    def _shard(self, shard: int) -> Iterator[RawSample]:
        """The samples of one shard as far as they can be had; one that gives none is left alone for a while."""
        if self._is_lost(shard):
            return
        problems = Tally()
        stream, delivered = ShardStream(self.urls[shard], self._patience), 0
        failure = "no sample with a picture is in it"
        try:
            for sample in raw_samples(stream, problems):
                delivered += 1
                yield sample
        except LostShard as lost:
            self._refuse_or_count(str(lost))
            failure, delivered = str(lost), 0
        except DamagedShard as damage:
            failure = damage.detail
            self._left_out.add(damage.reason, shown(stream.url))
            log.warning("the shard %s: %s; %d samples of it were read", shown(stream.url), damage.detail, delivered)
        finally:
            stream.close()
        self._left_out.update(Tally({reason: number for reason, number in problems.counts.items()
                                     if reason in LEFT_OUT}, problems.examples))
        if problems.counts and self._logged[stream.url] == 0:
            self._logged[stream.url] += 1
            for line in problems.sentences():
                log.warning("the shard %s: %s", shown(stream.url), line)
        self._barren_in_a_row = 0 if delivered else self._barren_in_a_row + 1
        if not delivered:
            self._lost[shard] = time.monotonic() + SECONDS_LOST
            if self._barren_in_a_row >= len(self.urls) or all(map(self._is_lost, range(len(self.urls)))):
                raise UserError(f"none of the shards {self.place} can be read ({failure}); check the address")

    def _is_lost(self, shard: int) -> bool:
        return shard in self._lost and time.monotonic() < self._lost[shard]

    def _refuse_or_count(self, what: str) -> None:
        if self.config.bad_shards == "refuse":
            raise UserError(f"the shard {what}; bring it back, or {SKIP}")
        self._left_out.add(MISSING_SHARD, what)
        log.warning("training without the shard %s", what)


def _captions(raw: RawSample, meta: dict) -> list[str]:
    return decode_captions(raw.parts["text"]) if "text" in raw.parts else meta_captions(meta)
