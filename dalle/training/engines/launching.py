"""From a launcher's environment to an engine."""

import os
import sys
from typing import Any, NoReturn

import psutil
import torch
import torch.distributed as dist

from dalle.errors import UserError
from dalle.training.engines.base import Engine
from dalle.training.engines.environment import asked_for_more_processes, is_set, launched_size, wants_cpu
from dalle.training.engines.launcher_settings import check_launcher
from dalle.training.engines.meeting import meet
from dalle.training.engines.slurm import adopt_slurm
from dalle.training.run import RunConfig
from dalle.training.settings import split_batch


def relaunch() -> NoReturn:
    """Become torchrun with as many processes as ``accelerate launch`` was asked for; its command line says how many."""
    asked = asked_processes(psutil.Process().parent().cmdline())
    if asked is None:
        raise UserError("accelerate launch started one process where several were asked for: on CPU cores give it "
                        "--config_file launch/engines/ddp.yaml --num_processes N")
    print(f"accelerate launch starts one process where there is no GPU; starting {asked} with torchrun", flush=True)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)      # torchrun finds a free port of its own
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                              str(asked), *sys.argv])


def asked_processes(command: list[str]) -> int | None:
    """The value of ``--num_processes`` in a launcher's command line."""
    for word, following in zip(command, [*command[1:], ""], strict=True):
        option, equals, value = word.replace("-", "_").partition("=")
        if option == "__num_processes":
            number = value if equals else following
            return int(number) if number.isdecimal() else None
    return None


def create_engine(config: "RunConfig") -> Engine:
    """The engine that the launcher's environment asks for; before loaders and networks, since it knows the rank."""
    adopt_slurm()
    if launched_size() > 1:      # refused here, before the processes wait for one another
        split_batch(config.train.batch_size, config.train.micro_batch_size, launched_size())
    check_launcher(config, launched_size())
    meeting_point = meet_others(config)
    engine = start_engine(config)
    del meeting_point      # kept open until the process group was there
    return engine


def meet_others(config: "RunConfig") -> Any:
    """Wait for all processes of the job; what is returned keeps the place open where they meet."""
    if launched_size() == 1 or dist.is_initialized():
        return None
    return meet(int(os.environ["RANK"]), launched_size(), 60 * config.engine.timeout_minutes)


def start_engine(config: "RunConfig") -> Engine:
    if is_set("ACCELERATE_USE_DEEPSPEED"):
        from dalle.training.engines.zero import DeepSpeedEngine

        return DeepSpeedEngine.start(config)
    if asked_for_more_processes():
        relaunch()
    if is_set("ACCELERATE_USE_FSDP"):
        from dalle.training.engines.fsdp import FSDPEngine

        return FSDPEngine.start(config)
    if launched_size() > 1:
        from dalle.training.engines.ddp import DistributedEngine

        return DistributedEngine.start(config)
    return Engine(config, torch.device("cpu") if wants_cpu() else torch.device("cuda", 0))
