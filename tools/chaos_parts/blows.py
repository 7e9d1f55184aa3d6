"""What is done to the run: the ways to stop and to kill it, and how each must end."""

import signal
from dataclasses import dataclass, field

from dalle.errors import EXIT_LOST_PROCESS, EXIT_STOPPED_BY_SIGNAL

LAUNCHER_FAILED = 1                 # what accelerate's launcher ends with, whatever the ranks ended with


@dataclass(frozen=True)
class Kind:
    """One way to stop or kill, and the exit status it leaves: of the one process, and of a launcher of several."""

    what: str
    status: int
    launcher_status: int
    saves: bool = False              # whether the run writes a checkpoint before it ends


KILLED = -signal.SIGKILL
KINDS = {
    "sigterm": Kind("SIGTERM to all processes, as a scheduler sends it", EXIT_STOPPED_BY_SIGNAL, LAUNCHER_FAILED,
                    saves=True),
    "sigterm-rank": Kind("SIGTERM to one rank", EXIT_STOPPED_BY_SIGNAL, LAUNCHER_FAILED, saves=True),
    "stop-file": Kind("the file `stop` in the run's folder", EXIT_STOPPED_BY_SIGNAL, LAUNCHER_FAILED, saves=True),
    "sigkill": Kind("SIGKILL to all processes", KILLED, KILLED),
    "sigkill-rank": Kind("SIGKILL to one rank", KILLED, LAUNCHER_FAILED),
    "sigkill-worker": Kind("SIGKILL to one loader worker", EXIT_LOST_PROCESS, LAUNCHER_FAILED),
    "sigkill-saving": Kind("SIGKILL to all while a checkpoint is being written", KILLED, KILLED),
    "sigkill-starting": Kind("SIGKILL to all before the first step", KILLED, KILLED),
}
RANK_STATUSES = {EXIT_STOPPED_BY_SIGNAL, EXIT_LOST_PROCESS, -signal.SIGKILL, -signal.SIGTERM}    # that may be reported


@dataclass
class Round:
    """One start of the disturbed run, what was done to it and how it ended."""

    number: int
    kind: str                        # of KINDS, or "none": left alone
    processes: int
    after_steps: int = 0             # finished since the start when it was hit
    from_step: int | None = None
    hit: bool = False                # False: left alone, or it ended before
    at_step: int | None = None       # the last step seen before it was hit
    torn_save: bool = False          # whether an unfinished checkpoint was left behind
    newest_checkpoint: int | None = None
    status: int | None = None
    rank_statuses: list[int] = field(default_factory=list)       # as the launcher reported them
    seconds: float = 0.0             # the whole start
    seconds_to_end: float = 0.0      # from the blow until no process was left
    faults: list[str] = field(default_factory=list)


def find_round_faults(one: Round, finished: bool) -> list[str]:
    """What is wrong with how a start ended: its status, its ranks' statuses, its last checkpoint."""
    if one.status == 0 and finished:                   # before the blow could do harm, or left alone
        return []
    if not one.hit:
        return [f"it ended by itself with status {one.status}"]
    faults, kind = [], KINDS[one.kind]
    expected = kind.status if one.processes == 1 else kind.launcher_status
    if one.status != expected:
        faults.append(f"status {one.status} instead of {expected}")
    odd = sorted(set(one.rank_statuses) - RANK_STATUSES)
    if odd:
        faults.append(f"ranks ended with {', '.join(map(str, odd))}")
    if kind.saves and (one.newest_checkpoint or 0) < (one.at_step or 0):
        faults.append(f"it was asked to stop after step {one.at_step}, its newest checkpoint is of "
                      f"{one.newest_checkpoint}")
    return faults
