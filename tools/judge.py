#!/usr/bin/env python
"""Sample held-out captions of the shapes set, rank the pictures by CLIP and let the judge read them back.

    python tools/judge.py --model runs/quickstart/transformer --rerank runs/quickstart/clip \\
        --data data/shapes/validation --captions 200 --candidates 16 --out runs/quickstart/judge.json

A picture is right when the multiset of (colour, shape) that the judge reads equals the caption's. "unranked" is the
mean over all pictures, "best by CLIP" over each caption's highest-ranked one, "oracle" asks whether any is right.
"""

import argparse
import json
from pathlib import Path

import numpy as np

import gans
from dalle.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the run folder or export of a model that paints captions")
    parser.add_argument("--rerank", required=True, help="a CLIP's run folder or export")
    parser.add_argument("--data", required=True, help="the held-out shards of the shapes set")
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    parser.add_argument("--out", required=True, type=Path, help="the JSON file to write")
    return parser.parse_args()


def held_out_captions(spec: str, count: int) -> list[str]:
    """The first caption of the first ``count`` pictures of the shards, each caption once."""
    from dalle.data.loader import validation_batches
    from dalle.data.settings import DataConfig

    data = DataConfig(train=spec, validation=spec, images=False)
    captions: dict[str, None] = {}
    for batch in validation_batches(data, seed=0, batch_size=64, rank=0, world_size=1):
        captions.update(dict.fromkeys(batch["caption"]))
        if len(captions) >= count:
            return list(captions)[:count]
    raise UserError(f"{spec} holds {len(captions)} different captions, --captions {count} asks for more")


def summarise(right: np.ndarray) -> dict[str, float]:
    """Shares of right pictures; ``right`` is bool [captions, candidates], each caption's best-ranked picture first."""
    return {
        "unranked": float(right.mean()),
        "best_by_clip": float(right[:, 0].mean()),
        "oracle": float(right.any(axis=1).mean()),
    }


def main() -> None:
    arguments = parse_arguments()
    gans.register()

    import torch

    from dalle.data.shapes.grammar import parse_caption
    from dalle.metrics.shapes_judge import colour_shape_right
    from dalle.sampling.candidates import sample_and_rerank
    from dalle.sampling.progress import PaintingProgress
    from dalle.sampling.rerank import load_reranker
    from dalle.store import load_generator

    captions = held_out_captions(arguments.data, arguments.captions)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    generator = load_generator(arguments.model, device)
    if generator.edits:
        raise UserError(f"{arguments.model} changes pictures instead of painting captions: measure it with "
                        "launch/evaluate.py --metrics judge")
    options = {name: getattr(arguments, name) for name in ("temperature", "guidance")
               if getattr(arguments, name) is not None}
    settings = generator.settings(**options)
    reranker = load_reranker(arguments.rerank, device)
    results = sample_and_rerank(
        generator, reranker, captions, arguments.candidates, arguments.seed, options,
        on_progress=PaintingProgress())
    right = np.stack([
        colour_shape_right(torch.stack([candidate.image for candidate in result.candidates]),
                           [result.caption] * len(result.candidates))
        for result in results])
    objects = np.array([len(parse_caption(caption).mentions) for caption in captions])
    record = {
        "captions": len(captions), "candidates": arguments.candidates, "seed": arguments.seed,
        **settings,
        **summarise(right),
        "by_objects": {str(count): summarise(right[objects == count]) for count in np.unique(objects)},
        "model": generator.identity, "reranker": reranker.identity,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=2) + "\n")
    print(f"every colour and shape right: {record['unranked']:.1%} unranked, {record['best_by_clip']:.1%} best of "
          f"{arguments.candidates} by CLIP, {record['oracle']:.1%} oracle ({len(captions)} captions)")


if __name__ == "__main__":
    run_command(main)
