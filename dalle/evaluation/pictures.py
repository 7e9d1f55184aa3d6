"""The pictures that are measured: painted for captions, the best of N by a ranker, or put through a codec."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dalle.evaluation.blocks import Arrays, BlockStore, fill
from dalle.evaluation.captions import Drawn
from dalle.evaluation.processes import Processes
from dalle.evaluation.protocol import digest
from dalle.evaluation.references import References, read_pictures
from dalle.evaluation.sources import Sources
from dalle.metrics.images import psnr, ssim
from dalle.models.codec import Codec
from dalle.pictures import to_bytes, to_unit
from dalle.sampling.candidates import candidate_seed
from dalle.sampling.rerank import Reranker, rank
from dalle.store import Generator

BLOCK_PICTURES = 256     # painted together, in whole captions: what a stop can lose
BLOCK_CAPTIONS = 64      # at most
CODEC_BATCH = 16         # always filled up, so that no reconstruction depends on its company


class PaintedCaptions:
    """A picture for each caption and each N of ``candidates``: the best of the caption's first N by the ranker.

    ``max(candidates)`` are painted once and every N takes its prefix. Only the pictures that are the best of some N are
    kept. With the candidate seeds of :mod:`dalle.sampling.candidates` caption i of the list is its prompt i.
    ``sources``: what a generator that edits changes; all candidates of a caption change the same picture.
    """

    def __init__(self, folder: Path, drawn: Sequence[Drawn], candidates: Sequence[int], generator: Generator,
                 reranker: Reranker | None, seed: int, options: dict[str, Any], manifest: dict[str, Any],
                 sources: Sources | None = None):
        self.captions = [one.caption for one in drawn]
        self.candidates, self.sources = tuple(candidates), sources
        self.generator, self.reranker, self.seed, self.options = generator, reranker, seed, options
        self.size = min(BLOCK_CAPTIONS, max(1, BLOCK_PICTURES // max(candidates)))
        whole = {**manifest, "captions": digest({"captions": self.captions}), "candidates": list(self.candidates),
                 "seed": seed, "options": options, "captions_a_block": self.size,
                 **({"sources": sources.digest} if sources is not None else {})}
        self.digest = digest(whole)
        self.store = BlockStore(folder / f"pictures-{self.digest}", -(-len(drawn) // self.size), whole)

    def paint(self, processes: Processes) -> None:
        """Make what is missing."""
        fill(self.store, self._block, processes, f"painting {len(self.captions)} captions, "
                                                 f"{max(self.candidates)} candidates")

    def captions_of(self, block: int) -> list[str]:
        return self.captions[block * self.size:(block + 1) * self.size]

    def images(self, block: int) -> Tensor:
        """uint8 [u, 3, H, W]: the different pictures of a block, which :meth:`slots` refers to."""
        return torch.from_numpy(self.store.read(block)["images"])

    def owners(self, block: int) -> list[str]:
        """The caption of each of :meth:`images`."""
        captions = self.captions_of(block)
        return [captions[place] for place in self.store.read(block)["owners"].tolist()]

    def slots(self, column: int) -> list[np.ndarray]:
        """For each block the rows of :meth:`images` that are the best of ``candidates[column]``, caption by caption."""
        return [arrays["slots"][:, column] for arrays in self.store.blocks()]

    def _block(self, block: int) -> Arrays:
        captions, most = self.captions_of(block), max(self.candidates)
        first = block * self.size
        seeds = [candidate_seed(self.seed, first + prompt, number)
                 for prompt in range(len(captions)) for number in range(most)]
        repeated = [caption for caption in captions for _ in range(most)]
        given = {}
        if self.sources is not None:
            pictures = self.sources.pictures(range(first, first + len(captions)), self.generator.image_size)
            given["sources"] = pictures.repeat_interleave(most, dim=0)
        images = self.generator.generate(repeated, seeds, **given, **self.options)
        scores = self.reranker.score(images, repeated).tolist() if self.reranker is not None else [0.0] * len(seeds)
        winners = np.array([best_of_prefixes(scores[start:start + most], seeds[start:start + most], self.candidates)
                            for start in range(0, len(seeds), most)])                 # [captions, columns]
        kept, slots = np.unique(winners + most * np.arange(len(captions))[:, None], return_inverse=True)
        return {"images": images[torch.from_numpy(kept)].cpu().numpy(), "owners": kept // most,
                "slots": slots.reshape(winners.shape), "winners": winners,
                "scores": np.array(scores, np.float32).reshape(len(captions), most)}


def best_of_prefixes(scores: Sequence[float], seeds: Sequence[int], candidates: Sequence[int]) -> list[int]:
    """The number of the best of the first N candidates, for each N; an unranked one (N = 1) is the first."""
    return [rank(scores[:count], seeds[:count])[0] for count in candidates]


class Reconstructed:
    """Pictures of the references after a codec, with their PSNR and SSIM against the originals, in 8 bits both."""

    def __init__(self, folder: Path, references: References, numbers: Sequence[int], codec: Codec,
                 manifest: dict[str, Any]):
        self.references, self.numbers, self.codec = references, list(numbers), codec
        whole = {**manifest, "fingerprint": references.fingerprint, "numbers": digest({"numbers": self.numbers})}
        self.digest = digest(whole)
        blocks = -(-len(self.numbers) // BLOCK_CAPTIONS)
        self.store = BlockStore(folder / f"reconstructions-{self.digest}", blocks, whole)

    def paint(self, processes: Processes) -> None:
        fill(self.store, self._block, processes, f"reconstructing {len(self.numbers)} pictures")

    def images(self, block: int) -> Tensor:
        return torch.from_numpy(self.store.read(block)["images"])

    def originals(self, block: int) -> Tensor:
        """The pictures that a block was made from, read again."""
        good = self.store.read(block)["numbers"].tolist()
        return read_pictures(self.references, good, self.codec.config.image_size)[0]

    @torch.no_grad()
    def _block(self, block: int) -> Arrays:
        numbers = self.numbers[block * BLOCK_CAPTIONS:(block + 1) * BLOCK_CAPTIONS]
        originals, good, left_out = read_pictures(self.references, numbers, self.codec.config.image_size)
        images = torch.empty_like(originals)
        device = next(self.codec.parameters()).device
        for start in range(0, len(originals), CODEC_BATCH):
            part = originals[start:start + CODEC_BATCH]
            filled = torch.cat([part, part[-1:].expand(CODEC_BATCH - len(part), -1, -1, -1)]).to(device)
            rebuilt = self.codec.decode(self.codec.encode(to_unit(filled)))
            images[start:start + len(part)] = to_bytes(rebuilt)[:len(part)].cpu()
        pairs = (to_unit(images), to_unit(originals))
        empty = torch.empty(0)
        return {"images": images.numpy(), "numbers": np.array(good, np.int64), "left_out": np.array(left_out, np.str_),
                "psnr": (psnr(*pairs) if good else empty).numpy(), "ssim": (ssim(*pairs) if good else empty).numpy()}
