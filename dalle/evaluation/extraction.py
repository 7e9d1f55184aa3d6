"""Features of pictures, block by block and kept, after an optional blur of the pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import ImageFilter
from torch import Tensor

from dalle.evaluation.blocks import Arrays, BlockStore, fill
from dalle.evaluation.captions import shuffled_positions
from dalle.evaluation.pictures import PaintedCaptions
from dalle.evaluation.processes import Processes
from dalle.evaluation.protocol import digest
from dalle.evaluation.references import References, read_pictures
from dalle.metrics.features import FeatureExtractor
from dalle.metrics.vs import VSScorer
from dalle.pictures import to_pillow
from dalle.sampling.rerank import FeatureReranker

REFERENCE_BLOCK = 64
CLIP_BATCH = 64
REFERENCE_STREAM = 0      # the seed of a limited reference's choice: the same pictures for every evaluation


def blurred(images: Tensor, radius: float) -> Tensor:
    """uint8 [N, 3, H, W] under Pillow's Gaussian blur, whose radius is the standard deviation in pixels."""
    if not radius:
        return images
    kernel = ImageFilter.GaussianBlur(radius)
    soft = [np.array(to_pillow(image).filter(kernel)) for image in images]
    return torch.from_numpy(np.stack(soft)).permute(0, 3, 1, 2).contiguous() if soft else images


def features_of(images: Tensor, extractor: FeatureExtractor, blur: float) -> Arrays:
    """``features`` [N, dim] and, where the extractor has classes, ``logits`` [N, K]."""
    if not len(images):
        return {"features": np.empty((0, extractor.dim), np.float32)}
    features, logits = extractor(blurred(images, blur))
    arrays = {"features": features.float().cpu().numpy()}
    return arrays if logits is None else {**arrays, "logits": logits.float().cpu().numpy()}


def extract(folder: Path, source: str, count: int, images: Callable[[int], Tensor], extractor: FeatureExtractor,
            blur: float, processes: Processes, what: str) -> BlockStore:
    """The features of the pictures ``images(block)`` of ``count`` blocks; ``source`` is the digest of the pictures."""
    manifest = {"source": source, "extractor": extractor.name, "digest": extractor.digest, "resize": extractor.resize,
                "blur": blur}
    store = BlockStore(folder / f"features-{digest(manifest)}", count, manifest)
    fill(store, lambda block: features_of(images(block), extractor, blur), processes,
         f"features of {what}" + (f", blur {blur:g}" if blur else ""))
    return store


def extract_reference(cache: Path, references: References, limit: int | None, size: int, extractor: FeatureExtractor,
                      blur: float, processes: Processes) -> BlockStore:
    """The same for real pictures, kept in ``cache`` for every evaluation; ``left_out`` names the unreadable ones."""
    numbers: Sequence[int] = range(len(references))
    if limit is not None and limit < len(references):
        numbers = sorted(shuffled_positions(len(references), REFERENCE_STREAM)[:limit])
    manifest = {"fingerprint": references.fingerprint, "size": size, "pictures": len(numbers),
                "extractor": extractor.name, "digest": extractor.digest, "resize": extractor.resize, "blur": blur}

    def make(block: int) -> Arrays:
        part = list(numbers[block * REFERENCE_BLOCK:(block + 1) * REFERENCE_BLOCK])
        images, _, left_out = read_pictures(references, part, size)
        return {**features_of(images, extractor, blur), "left_out": np.array(left_out, np.str_)}

    store = BlockStore(cache / f"reference-{digest(manifest)}", -(-len(numbers) // REFERENCE_BLOCK), manifest)
    fill(store, make, processes, "features of the real pictures" + (f", blur {blur:g}" if blur else ""))
    return store


def extract_pairs(folder: Path, painted: PaintedCaptions, judge: FeatureReranker, processes: Processes) -> BlockStore:
    """A CLIP's features of the pictures (``images`` [u, E]) and of the captions (``captions`` [k, E]) of each block."""
    identity = {key: value for key, value in judge.identity.items() if key != "path" or "digest" not in judge.identity}
    manifest = {"source": painted.digest, "judge": identity}

    @torch.no_grad()
    def make(block: int) -> Arrays:
        images = [judge.encode_image(part) for part in painted.images(block).split(CLIP_BATCH)]
        captions = judge.encode_captions(painted.captions_of(block))
        return {"images": torch.cat(images).float().cpu().numpy(), "captions": captions.float().cpu().numpy()}

    store = BlockStore(folder / f"clip-{digest(manifest)}", painted.store.count, manifest)
    fill(store, make, processes, "CLIP features")
    return store


def extract_cosines(folder: Path, painted: PaintedCaptions, scorer: VSScorer, weights: str,
                    processes: Processes) -> BlockStore:
    """The VS model's ``cosines`` [u] of each block's pictures and their captions; ``weights`` is its digest."""
    manifest = {"source": painted.digest, "vs": weights}
    store = BlockStore(folder / f"vs-{digest(manifest)}", painted.store.count, manifest)
    fill(store, lambda block: {"cosines": scorer.cosines(painted.images(block), painted.owners(block)).numpy()},
         processes, "VS similarity")
    return store


def chosen(store: BlockStore, name: str, slots: Sequence[np.ndarray]) -> np.ndarray:
    """The rows ``slots[block]`` of each block's array, joined: one row for each caption."""
    return np.concatenate([arrays[name][rows] for arrays, rows in zip(store.blocks(), slots, strict=True)])


def left_out_of(store: BlockStore) -> list[str]:
    """``KEY: reason`` of every picture that could not be read."""
    return [str(line) for arrays in store.blocks() for line in arrays["left_out"]]
