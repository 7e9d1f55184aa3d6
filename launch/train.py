#!/usr/bin/env python
"""Train one model from one config.

    python launch/train.py configs/quickstart/transformer.yaml train.steps=500 model.depth=4
    python launch/train.py configs/gans/attngan_shapes.yaml --with-prerequisites
    accelerate launch --num_processes 8 launch/train.py configs/quickstart/transformer.yaml

Exit status: 0 the run is finished, 2 something in what was given is wrong (a line says what), 75 stopped by a signal,
by the file `stop` in the run's folder or by train.minutes, after a checkpoint (start it again to go on), 76 a process
of the job was lost or hung (starting again may help).
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import gans
from dalle.config import load_config, to_yaml
from dalle.errors import UserError, run_command

ENGINES = ("single", "ddp", "zero1", "zero2", "zero3", "fsdp2")
SAVE_MEMORY = ("set train.micro_batch_size to less, model.checkpointing=true for a transformer, a smaller model, or "
               "share the weights of several processes with an engine that splits them (launch/engines: fsdp2, zero3)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/quickstart/transformer.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes on top of the file")
    parser.add_argument("--resume", default="auto", metavar="auto|none|PATH",
                        help="auto: go on from the newest good checkpoint (default); none: start over; or a checkpoint")
    parser.add_argument("--stop-after", type=int, metavar="STEP",
                        help="end, with a checkpoint, once so many steps are done")
    parser.add_argument("--with-prerequisites", action="store_true", help="first train the runs that this one reads "
                        "(`prerequisites` of the config), where they are missing or unfinished. Changes that say where "
                        "the data is and how it is read hold for them, too (data.train, data.validation, "
                        "data.tokenizer, data.workers, ...); those of the model, of `output` and of all else do not")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    parser.add_argument("--dry-run", action="store_true", help="build everything, print sizes and the plan, and stop")
    parser.add_argument("--devices", type=int, metavar="N", help="with --dry-run: the memory on so many devices, "
                        "whatever is here; needs neither data nor companions")
    parser.add_argument("--engine", choices=ENGINES, help="with --devices: fsdp2 if the config has "
                        "engine.shard_size, else ddp")
    parser.add_argument("--device-gb", type=float, metavar="GB", help="with --dry-run: what one device has, in 1e9 "
                        "bytes; status 1 where it is too small")
    parser.add_argument("--node-devices", type=int, default=8, metavar="N", help="devices of a node")
    arguments = parser.parse_intermixed_args()
    if arguments.devices and not arguments.dry_run:
        parser.error("--devices goes with --dry-run")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    gans.register()
    from dalle.tasks import RUNS, TASKS

    config = load_config(arguments.config, arguments.overrides, RUNS)
    if arguments.print_config:
        print(to_yaml(config), end="")
        return 0

    from dalle.tasks.memory_plan import memory_elsewhere, memory_of_task, memory_report

    if arguments.devices:
        report = memory_report(memory_elsewhere(config, layout_asked(config, arguments)), arguments.device_gb)
        print(json.dumps(report, indent=2))
        return 0 if report.get("fits", True) else 1

    import torch

    from dalle.data.loader import train_batches, validation_batches
    from dalle.data.workers import start_server
    from dalle.training.allocator import keep_freed_memory
    from dalle.training.deferred import players_built
    from dalle.training.engines.launching import create_engine
    from dalle.training.loop import Trainer
    from dalle.training.memory import Layout
    from dalle.training.prerequisites import check_data, missing_runs_explained, prerequisites
    from dalle.training.run_folder import finished_steps

    ends_at_once = arguments.resume == "auto" and finished_steps(config.folder) >= config.train.steps
    if not ends_at_once or arguments.dry_run:
        check_data(config.data)
    needed = partial(prerequisites, arguments.config, config, RUNS, arguments.overrides)
    if arguments.with_prerequisites:
        status = make_prerequisites(needed(), arguments.dry_run)
        if status is not None:
            return status
    engine = create_engine(config)
    if config.data.workers and not arguments.dry_run:
        start_server()                         # its imports run beside the building of the networks
    if engine.device.type == "cpu":
        keep_freed_memory()
    share = {"seed": config.seed, "rank": engine.rank, "world_size": engine.world_size}

    def validation_loader():
        return validation_batches(config.data, batch_size=config.train.batch_size,
                                  limit=config.train.validation_samples, **share)

    if config.data.validation and config.train.validate_every and not (ends_at_once or arguments.dry_run):
        validation_loader().close()            # what the first validation would refuse, hours later
    torch.manual_seed(config.seed)             # the same first weights on every rank and at every start
    evaluate = None
    how = "shapes" if arguments.dry_run else "deferred" if engine.defers_weights else "plain"
    with missing_runs_explained(arguments.config, needed), players_built(how):
        task = TASKS[config.task](config)
        if config.train.evaluate_every and not arguments.dry_run:
            evaluate = small_evaluation(task, config, engine.device)
    if arguments.dry_run:
        layout = Layout(engine.kind, engine.world_size, config.engine.shard_size or engine.world_size,
                        arguments.node_devices)
        report = memory_report(memory_of_task(config, task, layout), arguments.device_gb)
        if engine.is_rank0:
            print_plan(task, config, needed(), report)
        return 0 if report.get("fits", True) else 1
    share["needs_classes"] = task.needs_classes

    def train_loader(start_step: int):
        return train_batches(config.data, batch_size=config.train.batch_size, start_step=start_step, **share)

    trainer = Trainer(task, config, engine, train_loader,
                      validation_loader if config.data.validation else None,
                      resume=arguments.resume, stop_after=arguments.stop_after,
                      evaluate=evaluate)
    return engine.leave(trainer.run().exit_status)


def make_prerequisites(needed, dry_run: bool) -> int | None:
    """Train what is not finished; the status to end with at once, or None to go on."""
    from dalle.training.engines.slurm import adopt_slurm
    from dalle.training.prerequisites import say, train_prerequisites

    adopt_slurm()
    is_rank0 = os.environ.get("RANK", "0") == "0"
    if not dry_run:
        return train_prerequisites(needed, [sys.executable, __file__], is_rank0, say) or None
    if all(one.state == "finished" for one in needed):
        return None
    if is_rank0:      # the task cannot be built before they are there
        print(json.dumps({"prerequisites": [one.describe() for one in needed]}, indent=2))
    return 0


def small_evaluation(task, config, device):
    """What the loop calls every ``train.evaluate_every`` steps: the pictures of the task's generator, measured."""
    if not task.paints:
        raise UserError(f"train.evaluate_every: a {config.task} run paints no captions; use train.validate_every")
    from dalle.evaluation.small import SmallEvaluation

    evaluation = SmallEvaluation(config.evaluation, config.data.validation, config.seed, device,
                                 config.data.bad_shards)
    return lambda networks, came_forward: evaluation(task.generator(networks), came_forward)


def layout_asked(config, arguments):
    from dalle.training.memory import Layout

    engine = arguments.engine or ("fsdp2" if config.engine.shard_size else "ddp")
    return Layout(engine, arguments.devices, config.engine.shard_size or arguments.devices, arguments.node_devices)


def print_plan(task, config, needed, memory) -> None:
    """What a run would do: networks with parameter counts, steps, samples, what it reads and where it writes."""
    from dalle.training.task import parameter_count

    plan = {
        "task": config.task,
        "folder": str(Path(config.output) / config.name),
        "players": {name: parameter_count(player.module) for name, player in task.players.items()},
        "frozen": {name: parameter_count(module) for name, module in task.frozen.items()},
        "steps": config.train.steps,
        "samples": config.train.steps * config.train.batch_size,
        "training_teraflops": round(1e-12 * task.flops_per_sample * config.train.steps * config.train.batch_size, 1),
        **memory,
    }
    if needed:
        plan["prerequisites"] = [one.describe() for one in needed]
    print(json.dumps(plan, indent=2))


if __name__ == "__main__":
    run_command(main, save_memory=SAVE_MEMORY)
