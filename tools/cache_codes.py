#!/usr/bin/env python
"""Encode every picture of a set of shards once, so that the transformer does not run the codec every epoch.

    python tools/cache_codes.py --codec runs/quickstart/dvae --data data/shapes/train --out data/shapes/codes/train
    accelerate launch --num_processes 8 tools/cache_codes.py --codec ... --data ... --out ... --workers 8

Several processes (accelerate launch, torchrun, srun; on several nodes where all see --out) share the shards. A shard's
codes are written whole or not at all: the same command goes on behind the shards that are there, whatever the number of
processes then, and the codes are the same.
"""

import argparse
import os
import time
from contextlib import ExitStack
from pathlib import Path

import torch

from dalle.data.caching import CodesFolder, cache_shards, rows_at_once, share
from dalle.data.index import ShardIndex
from dalle.data.settings import DataConfig
from dalle.errors import LostProcess, UserError, run_command
from dalle.evaluation.processes import Processes
from dalle.models.codec import Codec
from dalle.pictures import to_unit
from dalle.store import codec_digests, load_codec, model_folder
from dalle.training.engines.environment import asked_for_more_processes, wants_cpu
from dalle.training.engines.slurm import adopt_slurm
from dalle.training.lock import FolderLock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", required=True, help="a codec's run folder, or the folder it was exported to")
    parser.add_argument("--data", required=True, help="shards: a folder, a glob or a brace range")
    parser.add_argument("--out", required=True, type=Path, help="the folder to write")
    parser.add_argument("--views", type=int, default=1, help="random crops of each picture to encode (default 1)")
    parser.add_argument("--crop", default="center", choices=["none", "center", "random", "dvae", "transformer"])
    parser.add_argument("--seed", type=int, default=0, help="seed of the random crops")
    parser.add_argument("--batch-size", type=int, default=256, help="crops that a process encodes at once (default "
                        "256); another one may tip a code on its edge")
    parser.add_argument("--workers", type=int, help="processes that decode for each process (default: 2 with a GPU, "
                        "else 0)")
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda: each process's own GPU, "
                        "if there is one")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES), help="of the encoder (default fp32); bf16: "
                        "faster on a GPU, other codes here and there")
    parser.add_argument("--bad-shards", choices=("refuse", "skip"), default="refuse", help="missing or damaged ones: "
                        "stop (default), or go on without what is lost")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    adopt_slurm()
    if arguments.device == "cuda" or (arguments.device == "auto" and not wants_cpu()):
        arguments.device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    elif arguments.device == "auto":
        arguments.device = "cpu"
    if arguments.device.startswith("cuda:"):
        torch.cuda.set_device(arguments.device)        # else what pins batches would take memory of the first GPU, too
    if asked_for_more_processes():
        print("accelerate has started one process alone, as it does without GPUs; for more: torchrun "
              "--nproc_per_node N tools/cache_codes.py ...", flush=True)
    codec_folder = model_folder(arguments.codec)
    codec = load_codec(codec_folder, arguments.device)
    digests = codec_digests(codec, codec_folder)
    index = ShardIndex.load(arguments.data, arguments.bad_shards)
    rows = rows_at_once(index, arguments.batch_size, arguments.views)
    folder = CodesFolder(arguments.out, index, {
        "codec_digest": digests[0], "num_codes": codec.num_codes, "grid": list(codec.grid), "views": arguments.views,
        "crop": arguments.crop, "seed": arguments.seed, "batch_size": rows * arguments.views,
        "dtype": arguments.dtype}, digests)
    processes = Processes.from_environment()
    with ExitStack() as closing:
        pending = processes.from_main(lambda: begin(folder, closing))
        if pending is not None:
            cache(arguments, codec, folder, rows, pending, processes)
        elif processes.is_rank0:
            print(f"{arguments.out}: already made with this codec")
        processes.close()


def begin(folder: CodesFolder, closing: ExitStack) -> list[int] | None:
    """The shards that have no codes yet; None where all is done. The folder is this job's alone until ``closing``."""
    if folder.is_complete():
        return None
    try:
        folder.folder.mkdir(parents=True, exist_ok=True)
        closing.enter_context(FolderLock(folder.folder))
    except OSError as error:
        raise UserError(f"the codes cannot be written into {folder.folder}: {error.strerror}; check the path") from None
    return None if folder.is_complete() else folder.begin()        # again: another job may just have ended


def cache(arguments: argparse.Namespace, codec: Codec, folder: CodesFolder, rows: int, pending: list[int],
          processes: Processes) -> None:
    """Write the codes of this process's share of the ``pending`` shards; the first process does the last things."""
    workers = arguments.workers
    if workers is None:
        workers = 0 if arguments.device == "cpu" else 2
    data = DataConfig(train=arguments.data, image_size=codec.config.image_size, crop=arguments.crop, workers=workers,
                      bad_shards=arguments.bad_shards)
    device = torch.device(arguments.device)

    def encode(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, DTYPES[arguments.dtype], enabled=arguments.dtype != "fp32"):
            return codec.encode(to_unit(images.to(device, non_blocking=True)))

    def say(line: str) -> None:
        if processes.is_rank0:
            print(f"process 1 of {processes.size}: {line}" if processes.size > 1 else line, flush=True)

    index, started = folder.index, time.monotonic()
    mine = share(pending, index.counts, processes.rank, processes.size)
    cache_shards(folder, mine, data, encode, rows=rows, say=say)
    try:
        processes.wait()
    except RuntimeError:
        raise LostProcess("another process of this job has ended early; start again: the shards that have codes keep "
                          "them") from None
    if not processes.is_rank0:
        return
    left_out = folder.finish()
    done, seconds = int(index.counts[pending].sum()), time.monotonic() - started
    before = f" ({index.num_samples - done} of them before)" if done < index.num_samples else ""
    print(f"{arguments.out}: {index.num_samples} pictures{before} x {arguments.views} views, "
          f"{codec.grid[0]}x{codec.grid[1]} codes of {codec.num_codes}, in {seconds:.1f} s, {done / seconds:.0f} "
          f"pictures a second; pictures without codes: {left_out.total() or 'none'}")
    for line in left_out.sentences():
        print(f"left out: {line}")


if __name__ == "__main__":
    run_command(main, save_memory="set --batch-size to less")
