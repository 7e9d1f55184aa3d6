#!/usr/bin/env python
"""Train one model from one config.

    python launch/train.py configs/quickstart/transformer.yaml train.steps=500 model.depth=4
    accelerate launch --num_processes 8 launch/train.py configs/quickstart/transformer.yaml

Exit status: 0 the run is finished, 2 something in what was given is wrong (a line says what), 75 stopped by a signal,
by the file `stop` in the run's folder or by train.minutes, after a checkpoint (start it again to go on), 76 a process
of the job was lost or hung (starting again may help).
"""

import argparse
import json
from pathlib import Path

from dalle.config import load_config, to_yaml
from dalle.errors import UserError, run_command


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/quickstart/transformer.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes on top of the file")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH",
                        help="auto: go on from the newest good checkpoint (default); none: start over; or a checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="STEP",
                        help="end, with a checkpoint, once so many steps are done")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and the plan, and stop")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    from dalle.tasks import RUNS, TASKS

    config = load_config(arguments.config, arguments.overrides, RUNS)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0

    import torch

    from dalle.data.loader import train_batches, validation_batches
    from dalle.training.allocator import keep_freed_memory
    from dalle.training.engine import create_engine
    from dalle.training.loop import Trainer

    engine = create_engine(config)
    if engine.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(config.seed)             # the same first weights on every rank and at every start
    task = TASKS[config.task](config)
    if arguments.dry_run:
        if engine.is_main:
            print_plan(task, config)
        return 0
    share = {"seed": config.seed, "rank": engine.rank, "world_size": engine.world_size}

    def train_loader(start_step: int):
        return train_batches(config.data, batch_size=config.train.batch_size, start_step=start_step, **share)

    def validation_loader():
        return validation_batches(config.data, batch_size=config.train.batch_size,
                                  limit=config.train.validation_samples, **share)

    trainer = Trainer(task, config, engine, train_loader,
                      validation_loader if config.data.validation else None,
                      resume=arguments.resume, stop_after=arguments.stop_after,
                      evaluate=small_evaluation(task, config, engine.device) if config.train.evaluate_every else None)
    return engine.leave(trainer.run().exit_status)


def small_evaluation(task, config, device):
    """What the loop calls every ``train.evaluate_every`` steps: the pictures of the task's generator, measured."""
    if not hasattr(task, "generator"):
        raise UserError(f"train.evaluate_every: a {config.task} run paints no captions; use train.validate_every")
    from dalle.evaluation.small import SmallEvaluation

    evaluation = SmallEvaluation(config.evaluation, config.data.validation, config.seed, device)
    return lambda networks: evaluation(task.generator(networks))


def print_plan(task, config) -> None:
    """What a run would do: networks with parameter counts, steps, samples, where it writes."""
    from dalle.training.task import parameter_count

    plan = {
        "task": config.task,
        "folder": str(Path(config.output) / config.name),
        "players": {name: parameter_count(player.module) for name, player in task.players.items()},
        "frozen": {name: parameter_count(module) for name, module in task.frozen.items()},
        "steps": config.train.steps,
        "samples": config.train.steps * config.train.batch_size,
        "training_teraflops": round(1e-12 * task.flops_per_sample * config.train.steps * config.train.batch_size, 1),
    }
    print(json.dumps(plan, indent=2))


if __name__ == "__main__":
    run_command(main)
