"""What a launcher tells a process by its environment."""

import os

import torch


def launched_size() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() in ("1", "true", "yes")


def wants_cpu() -> bool:
    return is_set("ACCELERATE_USE_CPU") or os.environ.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()


def asked_for_more_processes() -> bool:
    """Whether this is the one process that ``accelerate launch --num_processes N`` starts where there is no GPU.

    Without a GPU and without ``--multi_gpu``, accelerate prepares the environment of N processes, then starts one.
    """
    return ("ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
            and "WORLD_SIZE" not in os.environ)
