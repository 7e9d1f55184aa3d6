"""How well descriptions of pictures agree with captions of them: BLEU-4 and CIDEr, as the COCO challenge scores.

Both are those of ``pycocoevalcap``. Texts are compared by their lower-case words (``\\w+``), where the challenge has a
tokenizer of its own, which needs Java: figures are comparable with one another, and nearly with published ones.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch

from dalle.training.gathering import in_global_order, of_everyone
from dalle.training.task import Mean

WORDS = re.compile(r"\w+")


def words_of(text: str) -> str:
    """The lower-case words of ``text`` with a space between them; a text without any is an empty one."""
    return " ".join(WORDS.findall(text.lower()))


def description_scores(descriptions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Mean]:
    """``bleu4`` (Papineni et al., ACL 2002) in [0, 1] over all N descriptions, each against its references,
    and ``cider`` (CIDEr-D, arXiv 1411.5726), about 0 to 10, whose words weigh by how few of the N pictures' references
    have them; nothing for fewer than two pictures, which leave no word to weigh."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider

    if len(descriptions) < 2:
        return {}
    given = {number: [words_of(text) for text in own] for number, own in enumerate(references)}
    found = {number: [words_of(text)] for number, text in enumerate(descriptions)}
    bleu = Bleu(4).compute_score(given, found, verbose=0)[0][3]
    cider = Cider().compute_score(given, found)[0]
    return {"bleu4": Mean(float(bleu), 1), "cider": Mean(float(cider), 1)}


def texts_of_everyone(texts: Sequence[str], world_size: int) -> list[str]:
    """The texts of all processes, each with its own number of them, in the order of the samples. Every process must
    call it."""
    if world_size == 1:
        return list(texts)
    encoded = [text.encode() for text in texts]
    longest = torch.tensor([max(map(len, encoded), default=0)])
    rows = np.zeros((len(encoded), int(in_global_order(longest, world_size).max())), np.uint8)
    for row, data in zip(rows, encoded, strict=True):
        row[:len(data)] = np.frombuffer(data, np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in of_everyone(torch.from_numpy(rows), world_size).numpy()]
