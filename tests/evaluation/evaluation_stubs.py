"""A generator, a ranker and a feature extractor without networks, whose answers are known."""

import hashlib
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dalle.evaluation.job import Job

SIZE = 16


def png(size=(SIZE, SIZE), colour=(200, 30, 30)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, "PNG")
    return data.getvalue()


class StubGenerator:
    """Paints one colour: a pure function of caption and seed."""

    image_size, precision, edits, completes = SIZE, "fp32", False, False
    identity = {"kind": "stub", "path": "nowhere", "digest": "00"}

    def __init__(self):
        self.painted: list[tuple[str, int]] = []

    def generate(self, captions: list[str], seeds: list[int], **options) -> Tensor:
        self.painted += zip(captions, seeds, strict=True)
        return torch.stack([torch.from_numpy(colour(caption, seed))[:, None, None].expand(3, SIZE, SIZE)
                            for caption, seed in zip(captions, seeds, strict=True)])

    def settings(self, **options):
        return {"temperature": 1.0, **options}

    def caption_warnings(self, captions: list[str]) -> list[str]:
        return [f"{caption} is long" for caption in captions if len(caption) > 1000]


class StubEditor(StubGenerator):
    """Adds what a stub paints to half of the picture that it is given."""

    edits = True

    def __init__(self):
        super().__init__()
        self.sources: list[Tensor] = []

    def generate(self, captions: list[str], seeds: list[int], *, sources: Tensor, **options) -> Tensor:
        assert sources.shape == (len(captions), 3, SIZE, SIZE) and sources.dtype == torch.uint8
        self.sources += list(sources)
        return super().generate(captions, seeds, **options) // 2 + sources // 2


def colour(caption: str, seed: int) -> np.ndarray:
    digest = hashlib.sha256(f"{caption} {seed}".encode()).digest()
    return np.frombuffer(digest[:3], np.uint8).copy()


class Redness:
    """Ranks by how red a picture is, whatever its caption."""

    identity = {"kind": "clip", "path": "redness", "digest": "11"}

    def score(self, images: Tensor, captions: list[str]) -> Tensor:
        return images[:, 0].float().mean(dim=(1, 2)) / 255

    def caption_warnings(self, captions: list[str]) -> list[str]:
        return []


class MeanColour:
    """Three features: the mean of each channel; four classes by brightness."""

    name, digest, resize, dim = "mean-colour", "22", "none", 3

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.float().mean(dim=(2, 3)) / 255
        return features, features @ torch.arange(12.0).view(3, 4)


def stub_job(split: str, out, cache) -> Job:
    return Job(model="stub", data=split, out=out, cache=cache, metrics=("fid", "kid", "is"), samples=20,
               candidates=(1, 3), rerank="redness", extractor="mean-colour")
