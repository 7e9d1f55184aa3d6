"""The processes of one evaluation: who is who, and the few words that they exchange (gloo, small objects only)."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from dalle.errors import UserError

Result = TypeVar("Result")
PATIENCE = timedelta(days=2)      # of a rank that waits for another's last block; a launcher ends a job with a dead one


class Processes:
    """``rank`` of ``size``. Pictures and features never travel: they lie in files, and rank 0 reads them together."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @classmethod
    def from_environment(cls) -> "Processes":
        """What torchrun, ``accelerate launch`` or SLURM started; one process where nothing did."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if size > 1:
            dist.init_process_group("gloo", timeout=PATIENCE)
        return cls(rank, size)

    @property
    def is_rank0(self) -> bool:
        return self.rank == 0

    def from_main(self, action: Callable[[], Result]) -> Result:
        """What ``action`` returns on rank 0; a :class:`UserError` that it raises there is raised everywhere."""
        if self.size == 1:
            return action()
        said: list = [None, None]
        if self.is_rank0:
            try:
                said[0] = action()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0)
        if said[1] is not None:
            raise UserError(said[1])
        return said[0]

    def wait(self) -> None:
        """Until all are here."""
        if self.size > 1:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
