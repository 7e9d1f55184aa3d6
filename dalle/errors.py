"""How a command ends: what a user did wrong, said in one line without a traceback, and the exit statuses.

    0    finished
    2    something in what was given is wrong: starting again will not help
    75   stopped by a signal, the file ``stop`` or ``train.minutes``, with a checkpoint: start again to go on
    76   a process of the job was lost or hung: starting again may help
    130  Ctrl-C where there was nothing to save, or a second one; anything else: an unexpected failure
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable

USER_ERROR_STATUS = 2
EXIT_STOPPED_BY_SIGNAL = 75      # EX_TEMPFAIL
EXIT_LOST_PROCESS = 76
EXIT_INTERRUPTED = 130           # 128 + SIGINT, as a shell has it


# what is wrong with the place that a file should be written to or read from, and what to do about it
OF_THE_PLACE = {
    errno.EACCES: "give a place that you may read and write",
    errno.EPERM: "give a place that you may read and write",
    errno.EROFS: "give a place that can be written",
    errno.ENOSPC: "make room, or give another place",
    errno.EDQUOT: "make room, or give another place",
    errno.ENOTDIR: "a file is where a folder is needed",
    errno.EISDIR: "a folder is where a file is needed",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EMFILE: "allow more open files (ulimit -n)",
    errno.ENFILE: "allow more open files (ulimit -n)",
}


class UserError(Exception):
    """A mistake in what the user gave (a path, a key, a value): the message says what, where and what to do."""


class MissingModel(UserError):
    """A run or model folder that was named and does not exist, or holds no model (yet)."""

    def __init__(self, message: str, path: str | os.PathLike[str]):
        super().__init__(message)
        self.path = path


class LostProcess(Exception):
    """Another process of the job (a rank, a loader worker) died or does not answer."""


def exit_status(error: Exception) -> int:
    """What a command ends with after ``error``, a :class:`UserError` or :class:`LostProcess`."""
    return EXIT_LOST_PROCESS if isinstance(error, LostProcess) else USER_ERROR_STATUS


def say_error(error: Exception) -> None:
    """One line on stderr; with the rank where there are several and the line does not name it."""
    rank = f" (rank {os.environ.get('RANK')})" if has_ranks() and isinstance(error, UserError) else ""
    print(f"error{rank}: {error}", file=sys.stderr, flush=True)


def has_ranks() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def not_the_programs(error: Exception, save_memory: str) -> Exception | None:
    """``error`` as one line where the disk, a permission or the memory is behind it; None for what may be a fault of
    the program: a file that is not there among it, because a command looks for what it was given."""
    if isinstance(error, OSError) and error.errno in OF_THE_PLACE:
        place = f"{error.filename}: " if error.filename is not None else ""
        return UserError(f"{place}{error.strerror}; {OF_THE_PLACE[error.errno]}")
    if is_out_of_memory(error):
        first = (str(error).strip() or "there is not enough memory").splitlines()[0]
        return UserError(f"out of memory: {first}" + (f"; {save_memory}" if save_memory else ""))
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Of Python and numpy, of a GPU, or of torch's allocator on the CPU; torch itself is not imported for it."""
    named = type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch")
    return isinstance(error, MemoryError) or named or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error))


def run_command(main: Callable[[], int | None], save_memory: str = "") -> None:
    """Run a command's ``main`` and exit: with what it returns (None is 0), or as the list above says, with one line.

    ``save_memory`` is what the command's user can do where it runs out of memory.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):       # a name that the terminal cannot show must not end a command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = main()
    except (UserError, LostProcess, OSError, MemoryError, RuntimeError) as raised:
        told = isinstance(raised, (UserError, LostProcess))
        error = raised if told else not_the_programs(raised, save_memory)
        if error is None:
            raise
        say_error(error)
        status = exit_status(error)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)      # another one would only spoil the ending
        print("interrupted", file=sys.stderr, flush=True)
        status = EXIT_INTERRUPTED
    end_at_once_among_ranks(status or 0)
    sys.exit(status or 0)


def end_at_once_among_ranks(status: int) -> None:
    """An ordinary exit waits for threads of a process group that has lost a member, and is now and then aborted by
    those that gloo leaves behind in one that has not."""
    if has_ranks():
        sys.stdout.flush()
        os._exit(status)
