#!/usr/bin/env python
"""Encode every picture of a set of shards once, so that the transformer does not run the codec every epoch.

    python tools/cache_codes.py --codec runs/quickstart/dvae --data data/shapes/train --out data/shapes/codes/train
"""

import argparse
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from dalle.data.codes import DESCRIPTION_FILE, CachedCodes, CodesWriter
from dalle.data.index import ShardIndex
from dalle.data.loader import view_batches
from dalle.data.settings import DataConfig
from dalle.errors import UserError, run_command
from dalle.models.codec import Codec
from dalle.pictures import to_unit
from dalle.store import codec_digests, load_codec, model_folder
from dalle.training.lock import FolderLock

SECONDS_BETWEEN_LINES = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", required=True, help="a codec's run folder, or the folder it was exported to")
    parser.add_argument("--data", required=True, help="shards: a folder, a glob or a brace range")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--views", type=int, default=1, help="random crops of each picture to encode (default 1)")
    parser.add_argument("--crop", default="center", choices=["none", "center", "random", "dvae", "transformer"])
    parser.add_argument("--seed", type=int, default=0, help="seed of the random crops")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bad-shards", choices=("refuse", "skip"), default="refuse", help="missing or damaged ones: "
                        "stop (default), or go on without what is lost")
    return parser.parse_args()


def already_cached(out: Path, index: ShardIndex, digests: tuple[str, str], views: int) -> bool:
    """Whether ``out`` holds these codes; a :class:`UserError` when it holds others."""
    if not (out / DESCRIPTION_FILE).is_file():
        return False
    cached = CachedCodes(out, index)
    if cached.codec_digest in digests and cached.views == views:
        return True
    raise UserError(f"{out} holds the codes of another codec or another number of views; "
                    "give another --out or delete it")


def main() -> None:
    arguments = parse_arguments()
    folder = model_folder(arguments.codec)
    codec = load_codec(folder, arguments.device)
    digests = codec_digests(codec, folder)
    index = ShardIndex.load(arguments.data, arguments.bad_shards)
    if already_cached(arguments.out, index, digests, arguments.views):
        print(f"{arguments.out}: already made with this codec")
        return
    with ExitStack() as closing:
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            closing.enter_context(FolderLock(arguments.out))
        except OSError as error:
            raise UserError(f"the codes cannot be written into {arguments.out}: {error.strerror}; check the path") \
                from None
        cache(arguments, codec, index, digests[0])


def cache(arguments: argparse.Namespace, codec: Codec, index: ShardIndex, digest: str) -> None:
    """Write the codes of every picture of ``index`` into the folder."""
    data = DataConfig(train=arguments.data, image_size=codec.config.image_size, crop=arguments.crop, workers=0,
                      bad_shards=arguments.bad_shards)
    loader = view_batches(data, seed=arguments.seed, batch_size=max(1, arguments.batch_size // arguments.views),
                          views=arguments.views)
    started = spoken = time.monotonic()
    done = 0
    with CodesWriter(arguments.out, index, codec_digest=digest, num_codes=codec.num_codes, grid=codec.grid,
                     views=arguments.views) as writer:
        for batch in loader:
            images = to_unit(batch["image"].flatten(0, 1).to(arguments.device))     # [b * views, 3, S, S]
            codes = codec.encode(images).view(len(batch["valid"]), arguments.views, -1)
            writer.write(codes.cpu().numpy(), batch["valid"].numpy())
            done += len(codes)
            if time.monotonic() - spoken > SECONDS_BETWEEN_LINES:
                spoken = time.monotonic()
                print(f"encoded {done} of {index.num_samples} pictures", flush=True)
    seconds = time.monotonic() - started
    print(f"{arguments.out}: {done} pictures x {arguments.views} views, {codec.grid[0]}x{codec.grid[1]} codes of "
          f"{codec.num_codes}, in {seconds:.1f} s; pictures without codes: {loader.skipped.total() or 'none'}")
    for line in loader.report():
        print(line)


if __name__ == "__main__":
    run_command(main, save_memory="set --batch-size to less")
