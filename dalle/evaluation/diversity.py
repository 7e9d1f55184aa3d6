"""How much pictures of one class differ: MS-SSIM over random pairs (arXiv 1610.09585, section 4.2).

Lower is more diverse; pictures of one class that all look alike have a high one. Real pictures set the standard.
"""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from dalle.data.decode import BadSample
from dalle.data.index import ShardIndex
from dalle.evaluation.blocks import BlockStore
from dalle.evaluation.captions import CaptionSource, Drawn, shuffled_positions
from dalle.evaluation.extraction import chosen
from dalle.evaluation.references import References, read_pictures
from dalle.metrics.images import ms_ssim
from dalle.pictures import to_unit

MOST_PAIRS = 2000
BATCH = 64


def classes_of(index: ShardIndex, drawn: Sequence[Drawn]) -> Tensor:
    """int64 [N]: the class of each caption's sample; -1 where none can be read, and for a sample's further captions."""
    source, seen = CaptionSource(index), set()
    classes = torch.full((len(drawn),), -1, dtype=torch.int64)
    for number, one in enumerate(drawn):
        if one.position not in seen:
            seen.add(one.position)
            with suppress(BadSample):
                classes[number] = source.class_of(one.position)
    return classes


def same_class_pairs(classes: Tensor, seed: int, most: int = MOST_PAIRS) -> Tensor:
    """int64 [N] (-1: no class) -> [P, 2], numbers of two samples of one class; the same for the same seed.

    The members of each class stand in a random circle, and neighbours are pairs. A random choice of ``most`` is kept.
    """
    pairs = []
    for number in classes[classes >= 0].unique().tolist():
        members = (classes == number).nonzero().flatten()
        members = members[shuffled_positions(len(members), seed, number)]
        if len(members) > 1:
            circle = torch.stack([members, members.roll(-1)], dim=1)
            pairs.append(circle if len(members) > 2 else circle[:1])
    if not pairs:
        return torch.empty(0, 2, dtype=torch.int64)
    joined = torch.cat(pairs)
    return joined[shuffled_positions(len(joined), seed)[:most]]


def similarity_of_pairs(images: Tensor, pairs: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] and [P, 2] -> the pairs' MS-SSIM, float [P]."""
    if not len(pairs):
        return torch.empty(0)
    return torch.cat([ms_ssim(*(to_unit(images[part[:, side]]) for side in (0, 1)))
                      for part in pairs.split(BATCH)])


def similarity_of_painted(store: BlockStore, slots: Sequence[np.ndarray], pairs: Tensor) -> Tensor:
    """The same for captions: caption i of the list has row ``slots[block]`` of its block's ``images``."""
    wanted, places = pairs.unique(return_inverse=True)
    starts = np.cumsum([0, *map(len, slots)])
    own = [rows[np.isin(np.arange(start, start + len(rows)), wanted.numpy())]
           for start, rows in zip(starts[:-1], slots, strict=True)]
    return similarity_of_pairs(torch.from_numpy(chosen(store, "images", own)), places)


def similarity_of_real(references: References, drawn: Sequence[Drawn], pairs: Tensor, size: int) -> Tensor:
    """The same for the real pictures of the captions; pairs with one that cannot be read are left out."""
    wanted = sorted({drawn[number].position for number in pairs.flatten().tolist()})
    images, readable, _ = read_pictures(references, wanted, size)
    rows = {position: row for row, position in enumerate(readable)}
    kept = [[rows[drawn[number].position] for number in pair] for pair in pairs.tolist()
            if all(drawn[number].position in rows for number in pair)]
    return similarity_of_pairs(images, torch.tensor(kept, dtype=torch.int64).view(-1, 2))
