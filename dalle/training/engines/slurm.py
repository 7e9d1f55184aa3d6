"""Ranks from SLURM: a task that ``srun`` started by itself, with no launcher in between, learns who it is."""

import os
import re

# of one job all tasks find the same port, of two jobs on a node they differ; below those that the kernel hands out
FIRST_PORT, PORTS = 10_000, 20_000


def adopt_slurm() -> None:
    """Set RANK and its kin from SLURM_* in a step of several tasks, unless a launcher has set them."""
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in os.environ or "SLURM_STEP_ID" not in os.environ or size < 2:
        return
    os.environ["RANK"] = os.environ["SLURM_PROCID"]
    os.environ["WORLD_SIZE"] = str(size)
    os.environ["LOCAL_WORLD_SIZE"] = str(tasks_of_node(os.environ["SLURM_STEP_TASKS_PER_NODE"],
                                                       int(os.environ["SLURM_NODEID"])))
    # a site that binds one GPU to each task shows it as the only one
    bound = len(os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")) == 1 and os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["LOCAL_RANK"] = "0" if bound else os.environ["SLURM_LOCALID"]
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ["SLURM_STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(job_port()))


def tasks_of_node(counts: str, node: int) -> int:
    """The number of tasks on the ``node``-th node in SLURM's ``2(x3),1``."""
    tasks = [int(number) for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts)
             for _ in range(int(times or 1))]
    return tasks[node]


def first_host(nodes: str) -> str:
    """The first name in SLURM's ``node[03-07,9],gpu1``; ``scontrol``, which would say, is absent in containers."""
    head = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes).group()
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", head)


def job_port() -> int:
    job, restart = int(os.environ["SLURM_JOB_ID"]), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return FIRST_PORT + (job + 7 * restart) % PORTS
