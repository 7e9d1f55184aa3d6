"""Many pictures a caption, ranked: what ``launch/sample.py``, the judge and every evaluation call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor

from dalle.sampling.rerank import Reranker, rank
from dalle.store import Generator

PICTURES_AT_ONCE = 512    # painted, ranked and reported together, in whole captions


@dataclass
class Candidate:
    """One picture of a caption: its number (0 first), seed, score (``None`` unranked) and what the generator tells."""

    number: int
    seed: int
    image: Tensor                 # uint8 [3, H, W]
    score: float | None
    details: dict[str, Any]


@dataclass
class PromptResult:
    """A caption and its candidates, the best first; in the order of their numbers when nothing ranked them."""

    caption: str
    candidates: list[Candidate]
    ranked: bool


def candidate_seed(seed: int, prompt: int, candidate: int) -> int:
    """The seed of one picture: 63 bits of ``numpy.random.SeedSequence((seed, prompt, candidate))``.

    It depends on nothing else, so candidate 3 of prompt 0 is the same picture whether 4 or 512 were asked for.
    """
    state = np.random.SeedSequence((seed, prompt, candidate)).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def sample_and_rerank(
    generator: Generator,
    reranker: Reranker | None,
    captions: Sequence[str],
    candidates: int,
    seed: int = 0,
    options: dict[str, Any] | None = None,
    paint: Callable[..., tuple[Tensor, list[dict[str, Any]]]] | None = None,
    on_progress: Callable[[float, int], None] = lambda done, total: None,
) -> list[PromptResult]:
    """``candidates`` pictures for each caption, in the order of the captions, each caption's best first.

    ``options`` go to the generator. ``paint`` replaces ``generator.generate_with_details`` (a completion, say).
    ``on_progress(done, total)`` is told how many pictures' worth of painting is done, and of all that are finished.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, not {candidates}")
    paint = paint or generator.generate_with_details
    prompts_at_once = max(1, PICTURES_AT_ONCE // candidates)
    results: list[PromptResult] = []
    for start in range(0, len(captions), prompts_at_once):
        part = range(start, min(start + prompts_at_once, len(captions)))
        repeated = [captions[prompt] for prompt in part for _ in range(candidates)]
        seeds = [candidate_seed(seed, prompt, number) for prompt in part for number in range(candidates)]
        before, total = len(results) * candidates, len(captions) * candidates
        images, details = paint(repeated, seeds, **(options or {}),
                                on_progress=partial(told_of_all, on_progress, before, total))
        scores = reranker.score(images, repeated).tolist() if reranker is not None else [None] * len(seeds)
        painted = [
            Candidate(index % candidates, seeds[index], images[index], scores[index], details[index])
            for index in range(len(seeds))
        ]
        for offset, prompt in enumerate(part):
            own = painted[offset * candidates : (offset + 1) * candidates]
            results.append(PromptResult(captions[prompt], ordered(own), ranked=reranker is not None))
    on_progress(len(results) * candidates, len(results) * candidates)
    return results


def told_of_all(on_progress: Callable[[float, int], None], before: int, total: int, pictures: float) -> None:
    """Tell of a part's pictures as of those of all captions; that all are painted is told once they are ranked."""
    if before + pictures < total:
        on_progress(before + pictures, total)


def ordered(candidates: list[Candidate]) -> list[Candidate]:
    """The best first; unranked candidates stay in the order of their numbers."""
    if any(candidate.score is None for candidate in candidates):
        return candidates
    order = rank([candidate.score for candidate in candidates], [candidate.seed for candidate in candidates])
    return [candidates[index] for index in order]
