"""Samples to batches: what is read, how a sample is made, and the exact tier, which fetches positions of the order.

A position always gives the same sample with the same randomness, whichever rank or worker asks: its random numbers come
from :func:`dalle.data.order.sample_rng`, and a bad sample is replaced by the next good one behind it in its shard.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dalle.data.batch import Fetched
from dalle.data.codes import CachedCodes
from dalle.data.decode import (
    IN_BAD_SHARD,
    BadSample,
    class_id,
    decode_meta,
    decode_pixels,
    read_member,
    sample_captions,
)
from dalle.data.index import ShardIndex
from dalle.data.members import key_text
from dalle.data.order import Order, PositionRandom, SequentialOrder
from dalle.data.packing import with_images
from dalle.data.places import Places, moved, read_places, stacked
from dalle.data.reader import ShardReader
from dalle.data.reasons import Tally, remedy
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.data.transforms import Crop, Picture, cut_square, needed_sides, size_of, to_square
from dalle.errors import UserError

log = logging.getLogger(__name__)

MOST_RECORDS = 32_768            # parsed captions a worker keeps: some 40 MB with ten captions a picture
MOST_REPLACEMENTS_TRIED = 1000
GONE_WITH_SHARD = ("truncated_shard", IN_BAD_SHARD)
LOG_EVERY = 1000                 # of the bad samples of one reason, the first is logged and then every so many


class Record(NamedTuple):
    """The small parts of one sample, kept between epochs."""

    key: str
    captions: list[str]          # empty when captions are not read
    class_id: int
    meta: dict[str, Any] | None  # kept in validation only
    lost: tuple[str, ...] = ()   # reasons: what could not be read of it and was not needed
    places: Places | None = None


class Sample(NamedTuple):
    """One element of a batch; None for what is not configured."""

    record: Record
    caption: str | None
    text: np.ndarray | None      # int [<= T] ids without padding; empty for a dropped caption
    codes: np.ndarray | None
    image: np.ndarray | None     # uint8 [S, S, 3]
    captions: list[str] | None = None      # num_captions of them
    lost: tuple[str, ...] = ()             # reasons: what of it is not used
    places: np.ndarray | None = None       # float32 [n, 4 or 3] in shares of the image


class SampleMaker:
    """Captions, codes and pictures to samples and batches, the same way in every tier."""

    index: ShardIndex | None = None        # a stream has none

    def __init__(self, config: DataConfig, *, seed: int, training: bool, tokenizer: CaptionTokenizer | None,
                 codes: CachedCodes | None, needs_classes: bool = False):
        self.config, self.seed, self.training = config, seed, training
        self.tokenizer, self.codes, self.needs_classes = tokenizer, codes, needs_classes
        self._crop: Crop = config.crop if training or config.crop == "none" else "center"
        self._crop_from = config.crop_from if training else 1.0
        self._bpe_dropout = config.bpe_dropout if training else 0.0
        self._caption_dropout = config.caption_dropout if training else 0.0
        self._ids: dict[tuple[int, int, int], tuple[np.ndarray, tuple[str, ...]]] = {}
        self._unknown_id = None if tokenizer is None else tokenizer.unknown_id
        self._logged: Counter[str] = Counter()
        self._random = PositionRandom()
        if config.places is not None and not config.images:
            raise UserError(f"data.places reads {config.places} in pictures, but data.images is false: leave one of "
                            "them out")
        if self._bpe_dropout and tokenizer is not None and tokenizer.kind == "words":
            raise UserError(f"data.bpe_dropout is {config.bpe_dropout}, but {config.tokenizer} holds whole words, "
                            "which have no merges to skip: set data.bpe_dropout to 0")

    def _make(self, position: int, record: Record, place: tuple[int, int] | None,
              picture: Callable[[], bytes]) -> Sample:
        """One sample with the randomness of ``position``. The order of the draws is part of what a seed means.

        ``place``: (shard, index), by which ids are remembered and codes found; None where there is no index.
        """
        rng = self._random.at(self.seed, position) if self.training else None
        number = 0
        if self.training and self.config.caption == "random" and len(record.captions) > 1:
            number = int(rng.integers(len(record.captions)))
        text, lost = None, record.lost
        if self.tokenizer is not None:
            text = np.empty(0, np.int64)
            if not (self._caption_dropout > 0 and rng.random() < self._caption_dropout):
                text, of_caption = self._encode(record.captions[number], rng, place and (*place, number))
                lost += of_caption
        codes = None
        if self.codes is not None:
            view = int(rng.integers(self.codes.views)) if self.training and self.codes.views > 1 else 0
            codes = self.codes.row(*place, view)
        image, places = self._square(picture(), rng, record.places) if self.config.images else (None, None)
        captions = self._several(record.captions, rng) if self.config.num_captions > 1 else None
        return Sample(record, record.captions[number] if record.captions else None, text, codes, image, captions, lost,
                      places)

    def _several(self, captions: list[str], rng: np.random.Generator | None) -> list[str]:
        """``num_captions`` of them: drawn, each from all, or in validation the first, from the start again if needed.

        The last draw of a sample, so that a seed means the same with and without it.
        """
        count = self.config.num_captions
        places = rng.integers(len(captions), size=count) if rng is not None else np.arange(count) % len(captions)
        return [captions[place] for place in places]

    def _encode(self, caption: str, rng: np.random.Generator | None,
                remember: tuple[int, int, int] | None) -> tuple[np.ndarray, tuple[str, ...]]:
        """The caption's ids, at most T of them, and what is lost of it; remembered where no dropout makes them differ
        from time to time."""
        if self._bpe_dropout:
            return self._fitted(self.tokenizer.token_ids(caption, self._bpe_dropout, rng), np.int64)
        known = self._ids.get(remember) if remember else None
        if known is None:
            known = self._fitted(self.tokenizer.token_ids(caption), np.int32)
            if remember:
                self._ids[remember] = known
        return known

    def _fitted(self, ids: list[int], dtype: type) -> tuple[np.ndarray, tuple[str, ...]]:
        length = self.config.text_length
        lost = ("caption_cut",) if len(ids) > length else ()
        if self._unknown_id is not None and self._unknown_id in ids:
            lost += ("unknown_word",)
        return np.array(ids[:length], dtype=dtype), lost

    def _square(self, data: bytes, rng: np.random.Generator | None, places: Places | None
                ) -> tuple[np.ndarray, np.ndarray | None]:
        """The square, and ``places`` in it."""
        config = self.config
        image = decode_picture(data, config, self._crop, whole=places is not None)
        square, cut = cut_square(image, config.image_size, self._crop, config.flip and self.training, rng,
                                 self._crop_from)
        return square, None if places is None else moved(places, config.places, size_of(image), cut)

    def _note(self, what: str, bad: BadSample, key: bytes, place: str) -> None:
        if self._logged[bad.reason] % LOG_EVERY == 0:
            log.warning("%s: %s, key %s, %s (%d such so far)", what, bad, key_text(key), place,
                        self._logged[bad.reason] + 1)
        self._logged[bad.reason] += 1

    def _collate(self, positions: Sequence[int], samples: list[Sample], skipped: Tally) -> Fetched:
        batch: Fetched = {
            "key": [sample.record.key for sample in samples],
            "position": torch.tensor(positions, dtype=torch.int64),
            "class_id": torch.tensor([sample.record.class_id for sample in samples], dtype=torch.int64),
            "skipped": skipped,
            "partly_used": self._partly_used(samples),
        }
        if self.config.caption != "none":
            batch["caption"] = [sample.caption for sample in samples]
        if self.config.num_captions > 1:
            batch["captions"] = [sample.captions for sample in samples]
        if self.tokenizer is not None:
            text = np.zeros((len(samples), self.config.text_length), dtype=np.int64)
            for row, sample in zip(text, samples, strict=True):
                row[:len(sample.text)] = sample.text
            batch["text"] = torch.from_numpy(text)
        if self.codes is not None:
            batch["codes"] = torch.from_numpy(np.stack([sample.codes for sample in samples]).astype(np.int64))
        if self.config.places is not None:
            batch[self.config.places] = torch.from_numpy(stacked([sample.places for sample in samples]))
        if not self.training:
            batch["meta"] = [sample.record.meta for sample in samples]
        return with_images(batch, [sample.image for sample in samples] if self.config.images else None)

    @staticmethod
    def _partly_used(samples: list[Sample]) -> Tally:
        tally = Tally()
        for sample in samples:
            for reason in sample.lost:
                tally.add(reason, sample.record.key)
        return tally

    def _record_of(self, key: bytes, json_data: bytes | None,
                   captions: Callable[[dict[str, Any]], list[str]]) -> Record:
        """The record of a sample by its JSON, and ``captions`` of what that holds.

        A damaged JSON costs the sample only where something is read from it: the caption, places, or a class that is
        needed.
        """
        meta, number, lost, damage = {}, -1, (), None
        try:
            meta = decode_meta(json_data) if json_data is not None else {}
            number = class_id(meta)
        except BadSample as bad:
            if self.needs_classes or self.config.places is not None:
                raise
            lost, damage = (bad.reason,), bad
        try:
            texts = captions(meta) if self.config.caption != "none" else []
        except BadSample as bad:
            raise damage if damage is not None and bad.reason == "no_caption" else bad from None
        places = read_places(meta, self.config.places) if self.config.places is not None else None
        return Record(key_text(key), texts, number, None if self.training else meta, lost, places)


class ShardDataset(SampleMaker, Dataset):
    """A map from positions to samples; :meth:`__getitems__` makes a whole batch where the worker is."""

    def __init__(self, config: DataConfig, index: ShardIndex, *, seed: int, training: bool,
                 tokenizer: CaptionTokenizer | None = None, codes: CachedCodes | None = None,
                 needs_classes: bool = False):
        super().__init__(config, seed=seed, training=training, tokenizer=tokenizer, codes=codes,
                         needs_classes=needs_classes)
        self.index = index
        # a position of training means the same sample whatever is gone since; validation measures what is there
        self.order: Order | SequentialOrder = (
            Order(index.counts, seed, config.lanes, config.window) if training else SequentialOrder(index.counts_there))
        self._reader = ShardReader(index, self.order.shards_at_once)
        if codes is not None:
            codes.max_open = self.order.shards_at_once
        self._records: dict[tuple[int, int], Record] = {}
        self._bad: dict[tuple[int, int], tuple[str, str]] = {}     # reason and detail, so that none is decoded twice

    def __getitem__(self, position: int) -> Fetched:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int]) -> Fetched:
        """The batch of these positions. A :class:`UserError` travels as the key ``error``: raised in a worker, it would
        reach the user wrapped in that worker's traceback."""
        try:
            return self.fetch(positions)
        except UserError as error:
            return {"error": str(error)}

    def fetch(self, positions: Sequence[int]) -> Fetched:
        """The batch, as :mod:`dalle.data.loader` describes it, with ``skipped``: a tally of replaced positions."""
        _, shards, indices = self.order.locate(np.asarray(positions))
        skipped = Tally()
        samples = [self._sample(position, shard, index, skipped)
                   for position, shard, index in zip(positions, shards.tolist(), indices.tolist(), strict=True)]
        return self._collate(positions, samples, skipped)

    def _sample(self, position: int, shard: int, index: int, skipped: Tally) -> Sample:
        """The sample at (shard, index), or the first good one behind it, or one of another shard if this one's is gone.
        """
        try:
            return self._draw(position, shard, index)
        except BadSample as bad:
            key = bytes(self._reader.row(shard, index)["key"])
            self._note("bad sample replaced", bad, key, f"sample {index} of {self.index.shards[shard].path}")
            skipped.add(bad.reason, f"{key_text(key)} in {self.index.shards[shard].name}")
            first = bad
        behind = self._elsewhere if first.reason in GONE_WITH_SHARD else self._behind
        for replacement in behind(shard, index):
            try:
                return self._draw(position, *replacement)
            except BadSample:
                continue
        raise UserError(f"no usable sample among {MOST_REPLACEMENTS_TRIED} behind a bad one in "
                        f"{self.index.shards[shard].path} ({first}); {remedy(first.reason)}")

    def _behind(self, shard: int, index: int) -> Iterator[tuple[int, int]]:
        """The rest of the shard, around its end, then the following shards."""
        tried = 0
        for step in range(len(self.index.shards)):
            place = (shard + step) % len(self.index.shards)
            count = int(self.index.counts[place])
            for offset in range(1, count) if step == 0 else range(count):
                yield place, (index + offset) % count if step == 0 else offset
                tried += 1
                if tried == MOST_REPLACEMENTS_TRIED:
                    return

    def _elsewhere(self, shard: int, index: int) -> Iterator[tuple[int, int]]:
        """Places in the other shards that begin at the same ``index``, so that many lost samples are not all replaced
        by one."""
        tried = 0
        for step in range(1, len(self.index.shards)):
            place = (shard + step) % len(self.index.shards)
            gone = self.index.gone.get(place)
            if gone is not None and gone.all():
                continue
            count = int(self.index.counts[place])
            for offset in range(count):
                yield place, (index + offset) % count
                tried += 1
                if tried == MOST_REPLACEMENTS_TRIED:
                    return
        yield from self._behind(shard, index)

    def _draw(self, position: int, shard: int, index: int) -> Sample:
        known = self._bad.get((shard, index))
        if known is not None:
            raise BadSample(*known)
        try:
            return self._make(position, self._record(shard, index), (shard, index),
                              lambda: image_bytes(self._reader, shard, index))
        except BadSample as bad:
            self._bad[shard, index] = (bad.reason, bad.detail)
            raise

    def _record(self, shard: int, index: int) -> Record:
        record = self._records.get((shard, index))
        if record is not None:
            return record
        row = self._reader.row(shard, index)
        record = self._record_of(bytes(row["key"]), read_member(self._reader, shard, row, "json"),
                                 lambda meta: sample_captions(self._reader, shard, row, meta))
        if len(self._records) >= MOST_RECORDS:
            self._records.clear()
            self._ids.clear()
        self._records[shard, index] = record
        return record


class ViewDataset(Dataset):
    """Every sample in order, ``views`` crops of each, for a codec to encode. Bad samples are marked, not replaced."""

    def __init__(self, config: DataConfig, index: ShardIndex, *, seed: int, views: int):
        self.config, self.index, self.seed, self.views = config, index, seed, views
        self.tokenizer, self.codes = None, None
        self.order = SequentialOrder(index.counts)
        self._reader = ShardReader(index)
        self._random = PositionRandom()

    def __getitems__(self, positions: Sequence[int]) -> Fetched:
        """``image`` uint8 [b, views, 3, S, S] (black where not ``valid``), ``valid`` bool [b], ``position`` [b]."""
        try:
            _, shards, indices = self.order.locate(np.asarray(positions))
            skipped = Tally()
            valid, squares, size = [], [], self.config.image_size
            for position, shard, index in zip(positions, shards.tolist(), indices.tolist(), strict=True):
                views = self._views(position, shard, index, skipped)
                valid.append(views is not None)
                squares += views or [np.zeros((size, size, 3), np.uint8)] * self.views
        except UserError as error:
            return {"error": str(error)}
        return with_images({"valid": torch.tensor(valid), "position": torch.tensor(positions, dtype=torch.int64),
                            "skipped": skipped}, squares, self.views)

    def _views(self, position: int, shard: int, index: int, skipped: Tally) -> list[np.ndarray] | None:
        config = self.config
        try:
            image = decode_picture(image_bytes(self._reader, shard, index), config, config.crop)
        except BadSample as bad:
            key = key_text(bytes(self._reader.row(shard, index)["key"]))
            log.warning("no codes for a bad sample: %s, key %s, sample %d of %s", bad, key, index,
                        self.index.shards[shard].path)
            skipped.add(bad.reason, f"{key} in {self.index.shards[shard].name}")
            return None
        return [to_square(image, config.image_size, config.crop, config.flip,
                          self._random.at(self.seed, position * self.views + view), config.crop_from)
                for view in range(self.views)]


def image_bytes(reader: ShardReader, shard: int, index: int) -> bytes:
    """The picture of a sample as it is stored."""
    return read_member(reader, shard, reader.row(shard, index), "image")


def decode_picture(data: bytes, config: DataConfig, crop: Crop, whole: bool = False) -> Picture:
    """The decoded picture (RGB), by the configured limits; ``whole``: in the size that it is stored in."""
    sides = needed_sides(config.image_size, crop, config.crop_from) if config.jpeg_draft and not whole else None
    return decode_pixels(data, config.max_pixels, sides)
