"""What the tasks of a job find in their environment, the engine of launch/engines among it."""

import argparse

from dalle.config import read_yaml
from slurm.options import ROOT, processes
from slurm.runs import PlannedRun

ENGINES = ROOT / "launch" / "engines"
CHOICES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "hsdp", "cpu")


def environment(arguments: argparse.Namespace, runs: list[PlannedRun]) -> dict[str, str]:
    """What the tasks find in their environment besides the meeting point."""
    values = {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": str(cores(arguments, runs)),
              **engine_environment(engine(arguments), on_gpus=arguments.gpus_per_node > 0)}
    if processes(arguments) == 1:
        values |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}     # DeepSpeed would look for MPI
    return values | dict(pair.split("=", 1) for pair in arguments.env)


def engine(arguments: argparse.Namespace) -> str:
    return arguments.engine or ("ddp" if arguments.gpus_per_node else "cpu")


def engine_environment(name: str, on_gpus: bool) -> dict[str, str]:
    """What ``accelerate launch --config_file launch/engines/NAME.yaml`` would tell the processes."""
    tree = read_yaml(ENGINES / f"{name}.yaml")
    values = {} if on_gpus else {"ACCELERATE_USE_CPU": "true"}
    if tree["distributed_type"] == "DEEPSPEED":
        section = tree["deepspeed_config"]
        values |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(section["zero_stage"])}
        values |= {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(section[key]).lower()
                   for key in ("offload_optimizer_device", "offload_param_device") if key in section}
        values |= {} if on_gpus else {"DS_ACCELERATOR": "cpu"}
    elif tree["distributed_type"] == "FSDP":
        values |= {"ACCELERATE_USE_FSDP": "true"}
        values |= {key.upper(): str(value).lower() if isinstance(value, bool) else str(value)
                   for key, value in tree["fsdp_config"].items()}
    return values


def agent_file(engine: str) -> str:
    return "ddp.yaml" if engine == "cpu" else f"{engine}.yaml"     # cpu.yaml is for one process without a launcher


def cores(arguments: argparse.Namespace, runs: list[PlannedRun]) -> int:
    return arguments.cpus_per_task or max(run.workers for run in runs) + 1
