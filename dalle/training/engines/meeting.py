"""Where the processes of a job first meet: each writes its rank into rank 0's store, so that all know who is missing.

torch itself waits in silence, deaf to Ctrl-C, and after its timeout names nobody. The store is the one that
``init_process_group`` then uses (``multi_tenant``: a second server on its port, in its process, is the same).
"""

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence

from torch.distributed import DistError, TCPStore

from dalle.errors import LostProcess, UserError

SECONDS_IN_SILENCE = 5.0
SECONDS_BETWEEN_LINES = 60.0
SECONDS_BETWEEN_LOOKS = 0.05


def meet(rank: int, size: int, seconds: float, say: Callable[[str], None] = lambda line: print(line, flush=True)) \
        -> TCPStore | None:
    """Return once all ``size`` processes are there; raises :class:`LostProcess` naming those that did not come.

    Where torchrun started this one it has met the others already, and None is returned. The store must be kept until
    the process group is there.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" or "MASTER_ADDR" not in os.environ:
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ.get("MASTER_PORT", "29500"))
    clock = Patience(seconds, say)
    store = serve(host, port, size) if rank == 0 else join(host, port, rank, size, clock)
    try:
        store.set(name_of(rank), socket.gethostname())
        missing = list(range(size))
        while missing := [other for other in missing if not store.check([name_of(other)])]:
            clock.wait(f"{named(missing)} of {size} at {host}:{port}")
    except DistError:
        raise LostProcess(f"rank {rank}: rank 0 at {host}:{port} ended while the job was starting; its own output says "
                          "why") from None
    return store


def name_of(rank: int) -> str:
    return f"tessera/rank{rank}"


def named(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def serve(host: str, port: int, size: int) -> TCPStore:
    try:
        return TCPStore(host, port, size, is_master=True, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        raise UserError(f"MASTER_ADDR={host} MASTER_PORT={port}: rank 0 cannot listen there "
                        f"({str(error).splitlines()[0][:160]}); set a port that is free") from None


def join(host: str, port: int, rank: int, size: int, clock: "Patience") -> TCPStore:
    while reason := unreachable(host, port):
        clock.wait(f"rank 0 of {size} at {host}:{port} ({reason})")
    return TCPStore(host, port, size, is_master=False, wait_for_workers=False)


def unreachable(host: str, port: int) -> str:
    """Why nobody answers there, or "". torch's own client says it a line a second, on stderr."""
    try:
        socket.create_connection((host, port), timeout=2).close()
    except OSError as error:
        return error.strerror or errno.errorcode.get(error.errno or 0, type(error).__name__)
    return ""


class Patience:
    """Waits, says what for when it takes long, and gives up after ``seconds``."""

    def __init__(self, seconds: float, say: Callable[[str], None]):
        self._seconds, self._say = seconds, say
        self._began = time.monotonic()
        self._next_line = SECONDS_IN_SILENCE

    def wait(self, whom: str) -> None:
        passed = time.monotonic() - self._began
        if passed >= self._seconds:
            raise LostProcess(f"{whom} did not come within {self._seconds / 60:.3g} minutes "
                              "(engine.timeout_minutes): start all processes of the job, with the same MASTER_ADDR, "
                              "MASTER_PORT and WORLD_SIZE, or one alone without RANK and WORLD_SIZE")
        if passed >= self._next_line:
            self._say(f"waiting for {whom}")
            self._next_line = passed + SECONDS_BETWEEN_LINES
        time.sleep(SECONDS_BETWEEN_LOOKS)
