#!/usr/bin/env python
"""Train one config as a SLURM job: writes a batch script that can be read, checks it and submits it.

    python launch/submit.py CONFIG train.steps=100000 --nodes 4 --gpus-per-node 8 --time 24:00:00 --dry-run
    python launch/submit.py CONFIG --nodes 4 --gpus-per-node 8 --time 24:00:00 --partition gpu --engine zero1
    python launch/submit.py CONFIG --nodes 2 --gpus-per-node 8 --time 04:00:00 --array 1-10%1     # no right to requeue
    python launch/submit.py CONFIG --sweep sweep.txt --nodes 1 --gpus-per-node 8 --time 04:00:00  # a job a line
    python launch/submit.py CONFIG --nodes 2 --gpus-per-node 0 --tasks-per-node 4 --time 01:00:00 # CPU cores

A job that is pre-empted or runs out of time saves a checkpoint and requeues itself; one that fails is tried again
--requeue times, counted from its newest checkpoint on; one that was given something wrong (status 2) is not.

Exit status: 0 the job is submitted (or, with --dry-run, shown), 2 something in what was given is wrong.
"""

import argparse
import sys
from pathlib import Path

import gans
from dalle.errors import run_command
from slurm.environment import CHOICES
from slurm.options import check_options, natural, positive, readings, refuse_unprintable
from slurm.runs import common_folder, plan_runs
from slurm.script import check_syntax, render
from slurm.submitting import submit, write_script


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, such as configs/quickstart/transformer.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="changes on top of the file")

    size = parser.add_argument_group("size")
    size.add_argument("--nodes", type=positive, required=True, metavar="N")
    size.add_argument("--gpus-per-node", type=natural, required=True, metavar="G", help="0: CPU cores")
    size.add_argument("--tasks-per-node", type=positive, metavar="T", help="processes a node without GPUs (default 1)")
    size.add_argument("--cpus-per-task", type=positive, metavar="C", help="a process (default: data.workers + 1)")
    size.add_argument("--mem", metavar="N[K|M|G|T]", help="memory a node, such as 200G; without a unit megabytes")
    size.add_argument("--time", required=True, metavar="[D-]HH:MM:SS", help="the limit of one start of the job, in any "
                      "of SLURM's forms: MM, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS, UNLIMITED")

    queue = parser.add_argument_group("queue")
    queue.add_argument("--partition")
    queue.add_argument("--account")
    queue.add_argument("--qos")
    queue.add_argument("--array", metavar="SPEC", help="1-10%%1: a chain of ten jobs that go on from one another")
    queue.add_argument("--sweep", type=Path, metavar="FILE", help="a file with the overrides of one run a line")
    queue.add_argument("--requeue", type=natural, default=3, metavar="N",
                       help="failures in a row without a newer checkpoint after which it is over (default 3)")
    queue.add_argument("--signal", default="USR2@300", metavar="NAME@SECONDS",
                       help="the warning before the time limit (default USR2@300)")
    queue.add_argument("--job-name", help="default: the run's name")
    queue.add_argument("--log-folder", type=Path, help="default: slurm in the run's folder")
    queue.add_argument("--sbatch-option", action="append", default=[], metavar="NAME[=VALUE]",
                       help="any other line for sbatch, such as constraint=a100")

    how = parser.add_argument_group("how it runs")
    how.add_argument("--engine", choices=CHOICES, help="default: ddp, or cpu without GPUs")
    how.add_argument("--launcher", choices=("srun", "accelerate"), default="srun",
                     help="srun: one task a process (default); accelerate: one agent a node")
    how.add_argument("--python", help="default: this one; in a container: python3")
    how.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="environment of the tasks")
    how.add_argument("--container", metavar="IMAGE")
    how.add_argument("--container-mounts", metavar="FROM:TO[,...]", help="besides this project and this folder")
    how.add_argument("--container-runtime", choices=("pyxis", "apptainer"), default="pyxis")
    parser.add_argument("--dry-run", action="store_true", help="print the script and submit nothing")
    return parser.parse_intermixed_args()


def main() -> int:
    arguments = parse_arguments()
    refuse_unprintable(arguments)
    check_options(arguments)
    for line in readings(arguments):
        print(line, file=sys.stderr)
    gans.register()
    runs = plan_runs(arguments)
    logs = (arguments.log_folder or common_folder(runs, arguments) / "slurm").absolute()
    script = render(arguments, runs, logs)
    check_syntax(script)
    if arguments.dry_run:
        print(script, end="")
        return 0
    logs.mkdir(parents=True, exist_ok=True)     # SLURM starts no job whose log it cannot open
    path = write_script(script, common_folder(runs, arguments) / "slurm")
    print(f"job {submit(path)}: {path}")
    return 0


if __name__ == "__main__":
    run_command(main)
