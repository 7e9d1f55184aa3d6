"""One process of two: trains the runs of several configs one after the other, in one process group.

    worker.py [zero=STAGE] CONFIG...    each trained as launch/train.py does: by DDP, until a stage is named

What a run is refused with is written into CONFIG.refused.
"""

import os
import sys
from pathlib import Path

import torch

import gans
from dalle.config import load_config
from dalle.data.loader import train_batches
from dalle.errors import UserError
from dalle.tasks import RUNS, TASKS
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer


def train(path: str) -> None:
    config = load_config(path, [], RUNS)
    engine = create_engine(config)
    engine.close = engine.barrier              # the next run uses the same process group
    torch.manual_seed(config.seed)
    task = TASKS[config.task](config)
    Trainer(task, config, engine, lambda start: train_batches(
        config.data, seed=config.seed, batch_size=config.train.batch_size, start_step=start, rank=engine.rank,
        world_size=engine.world_size)).run()


def main() -> None:
    torch.set_num_threads(1)
    gans.register()
    for argument in sys.argv[1:]:
        if argument.startswith("zero="):
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu",
                           "ACCELERATE_DEEPSPEED_ZERO_STAGE": argument.removeprefix("zero=")}
            continue
        try:
            train(argument)
        except UserError as error:
            Path(f"{argument}.refused").write_text(str(error))
    sys.stderr.flush()
    os._exit(0)     # as `Engine.leave` does


if __name__ == "__main__":
    main()
