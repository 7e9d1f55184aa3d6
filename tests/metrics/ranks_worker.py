"""One of several processes that measure one set of pictures together: ``ranks_worker.py RANK WORLD FOLDER``."""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from dalle.metrics.distributions import (
    extract,
    frechet_distance,
    inception_score,
    reference_statistics,
)

COUNT = 37      # odd, so that two processes have shares of different sizes


class Projection:
    """A fixed random network with classes, small enough to be nothing but arithmetic."""

    name, digest, resize, dim, classes = "projection", "0" * 16, "none", 6, 4

    def __call__(self, images):
        weights = torch.randn(3 * 4 * 4, self.dim + self.classes, generator=torch.Generator().manual_seed(5))
        out = (images.flatten(1).float() / 255) @ weights
        return out[:, : self.dim], out[:, self.dim :]


def pictures(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (COUNT, 3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def batches(images: torch.Tensor, rank: int, world: int):
    for places in torch.arange(rank, len(images), world).split(5):
        yield places, images[places]


def measure(rank: int, world: int, cache: Path) -> dict:
    key = {"data": "pictures 0"}
    reference = reference_statistics(Projection(), batches(pictures(0), rank, world), key, cache)
    again = reference_statistics(Projection(), iter_of_nothing(), key, cache)
    generated = extract(Projection(), batches(pictures(1), rank, world))
    merged = generated.moments.over_ranks()
    generated = generated.over_ranks()
    return {
        "fid": frechet_distance(reference.moments, generated.moments),
        "fid of merged moments": frechet_distance(again.moments, merged),
        "is": inception_score(generated.logits, splits=3),
        "places": generated.places.tolist(),
        "features": [again.features.tolist(), generated.features.tolist()],      # for KID; torchmetrics loads slowly
    }


def iter_of_nothing():
    raise AssertionError("the reference was cached: its pictures must not be read again")
    yield


if __name__ == "__main__":
    rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
                            timeout=timedelta(seconds=120))
    (folder / f"rank{rank}.json").write_text(json.dumps(measure(rank, world, folder / "cache")))
    dist.destroy_process_group()
    os._exit(0)     # as `Engine.leave` does
