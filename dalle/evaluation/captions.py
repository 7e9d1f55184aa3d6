"""The captions that an evaluation asks for: drawn from a split, each text once, the same ones for the same seed."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from dalle.data.decode import BadSample, class_id, decode_meta, read_member, sample_captions
from dalle.data.index import ShardIndex
from dalle.data.order import SequentialOrder, stable_argsort
from dalle.data.reader import ShardReader
from dalle.errors import UserError


class Drawn(NamedTuple):
    """A caption and the sample that it belongs to."""

    caption: str
    position: int      # in the split, in the order of its shards


class CaptionSource:
    """The captions of each sample of a split, read when asked."""

    def __init__(self, index: ShardIndex):
        self.index = index
        self._order = SequentialOrder(index.counts)
        self._reader = ShardReader(index)

    def captions(self, position: int) -> list[str]:
        """Raises :class:`BadSample` for a sample without any."""
        return sample_captions(self._reader, *self._place(position))

    def class_of(self, position: int) -> int:
        """The sample's ``class_id``, -1 without one. Raises :class:`BadSample` for damaged meta data."""
        data = read_member(self._reader, *self._place(position), "json")
        return class_id(decode_meta(data)) if data is not None else -1

    def _place(self, position: int) -> tuple[int, np.void]:
        """The sample's shard and its row of the index."""
        _, shards, indices = self._order.locate(np.array([position]))
        shard = int(shards[0])
        return shard, self._reader.row(shard, int(indices[0]))


def draw_captions(index: ShardIndex, count: int, seed: int) -> tuple[list[Drawn], Counter[str]]:
    """``count`` different captions, and how many samples had none that can be read, by reason.

    One caption of each sample, in a random order, before any sample gives a second one; a text that was drawn before
    (two pictures may have the same caption) is passed over. :class:`UserError` when the split has too few.
    """
    source = CaptionSource(index)
    waiting = shuffled_positions(index.num_samples, seed)
    captions: dict[int, list[str]] = {}
    left_out: Counter[str] = Counter()
    drawn: list[Drawn] = []
    seen: set[str] = set()
    while waiting and len(drawn) < count:
        again = []
        for position in waiting:
            if position not in captions:
                try:
                    own = source.captions(position)
                except BadSample as bad:
                    left_out[bad.reason] += 1
                    continue
                captions[position] = [own[place] for place in shuffled_positions(len(own), seed, position)]
            fresh = next((caption for caption in captions[position] if caption not in seen), None)
            if fresh is None:
                continue
            seen.add(fresh)
            drawn.append(Drawn(fresh, position))
            if len(drawn) == count:
                break
            again.append(position)
        waiting = again
    if len(drawn) < count:
        raise UserError(f"the split holds {len(drawn)} different captions, --samples {count} asks for more; "
                        f"ask for at most {len(drawn)}")
    return drawn, left_out


def shuffled_positions(count: int, *key: int) -> list[int]:
    """0 to ``count`` - 1 in the order of ``key``; raw Philox, because numpy may change what its permutations give."""
    return stable_argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(count)).tolist()
