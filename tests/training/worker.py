"""One process of several: trains toys one after the other, each in its own folder, for a test to compare.

    worker.py JOBS    a JSON list of {"kind", "task", "out", "optimizer", "options", "settings"}
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
import toys

from dalle.errors import UserError
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.optimizers import OptimizerConfig


def train(job: dict) -> dict:
    """What the run logged last, or the line it was refused with."""
    out = Path(job["out"])
    if job["kind"].startswith("zero"):
        os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = job["kind"][-1]
    config = toys.toy_run(out, **job["settings"])
    engine = create_engine(config)
    engine.close = engine.barrier              # the next job uses the same process group
    optimizer = OptimizerConfig(**job["optimizer"]) if job["optimizer"] else None
    task = getattr(toys, job["task"])(optimizer)
    try:
        summary = Trainer(task, config, engine, lambda start: toys.ToyLoader(start, engine.rank, engine.world_size),
                          lambda: toys.ToyLoader(0, engine.rank, engine.world_size, steps=3), **job["options"]).run()
    except UserError as error:
        return {"error": str(error)}
    return {"kind": engine.kind, "world_size": engine.world_size, "status": summary.status, **summary.last}


def main() -> None:
    torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        result = train(job)
        Path(job["out"]).mkdir(parents=True, exist_ok=True)
        (Path(job["out"]) / f"{job['name']}.rank{rank}.json").write_text(json.dumps(result))
    sys.stderr.flush()
    os._exit(0)     # as `Engine.leave` does: the threads that gloo leaves behind abort some ordinary exits


if __name__ == "__main__":
    main()
