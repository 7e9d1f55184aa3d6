"""What a person asks of SLURM, by the options of launch/submit.py: checked, and said as SLURM reads it."""

import argparse
import re
from pathlib import Path

from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
MEMORY = re.compile(r"(\d+)([KMGT]?)", re.ASCII | re.IGNORECASE)
UNLIMITED = ("UNLIMITED", "INFINITE")
LONGEST_WARNING = 65535      # seconds, of sbatch's --signal
SET_BY_LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SET_HERE = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "partition", "account",
    "qos", "mem", "array", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "wrap", "chdir"}


def natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


def positive(text: str) -> int:
    number = natural(text)
    if number == 0:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def refuse_unprintable(arguments: argparse.Namespace) -> None:
    """A line break ends a comment and a directive; other control characters hide what a script does."""
    given = {**vars(arguments), "current folder": Path.cwd(), "project's folder": ROOT}
    for name, value in given.items():
        for text in value if isinstance(value, list) else [value]:
            if UNPRINTABLE.search(str(text)):
                raise UserError(f"{name.replace('_', '-')} {str(text)!r} holds a line break or a control character, "
                                "which a batch script cannot carry")


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse combinations of options that cannot work."""
    if arguments.gpus_per_node and arguments.tasks_per_node:
        raise UserError("--tasks-per-node is for nodes without GPUs; with GPUs there is one process for each of them")
    if arguments.gpus_per_node and arguments.engine == "cpu":
        raise UserError("--engine cpu goes with --gpus-per-node 0")
    if arguments.array and arguments.sweep:
        raise UserError("--sweep makes its own --array, one element a line")
    if arguments.array and not arguments.array.endswith("%1"):
        raise UserError(f"--array {arguments.array} would train one run in several jobs at once: a chain of jobs that "
                        "go on from one another ends in %1, such as 1-10%1")
    if arguments.container_mounts and not arguments.container:
        raise UserError("--container-mounts needs --container IMAGE")
    name, seconds = parse_signal(arguments.signal)
    limit = parse_time(arguments.time)
    if limit is not None and seconds >= limit:
        raise UserError(f"--signal {arguments.signal} comes {duration_in_words(seconds)} before the end, but --time "
                        f"{arguments.time} is {duration_in_words(limit)}, not longer than that")
    if arguments.mem is not None and not MEMORY.fullmatch(arguments.mem):
        raise UserError(f"--mem {arguments.mem!r} is not of the form N[K|M|G|T], such as 200G")
    for pair in arguments.env:
        key, equals, _ = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
            raise UserError(f"--env {pair!r} is not of the form KEY=VALUE")
        if SECRET.search(key):
            raise UserError(f"--env {key} looks like a credential, and the script is a file that others can read: "
                            "export it in the shell that submits, SLURM hands it on")
        if key in SET_BY_LAUNCHERS:
            raise UserError(f"--env {key} is what each task learns from SLURM: leave it out")
    for option in arguments.sbatch_option:
        name = option.partition("=")[0]
        if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
            raise UserError(f"--sbatch-option {option!r} is not of the form NAME=VALUE, such as constraint=a100")
        if name in SET_HERE:
            raise UserError(f"--sbatch-option {name} is set by this command itself; see its own options")


def parse_signal(text: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:SIG)?(USR1|USR2|TERM|HUP)@(\d{1,5})", text, re.ASCII)
    if match and int(match[2]) > LONGEST_WARNING:
        raise UserError(f"--signal {text}: SLURM takes at most {LONGEST_WARNING} seconds")
    if not match:
        raise UserError(f"--signal {text!r} is not of the form NAME@SECONDS with USR1, USR2, TERM or HUP: USR2@300")
    return match[1], int(match[2])


def parse_time(text: str) -> int | None:
    """Seconds in SLURM's minutes[:seconds], hours:minutes:seconds, days-hours[:minutes[:seconds]]; None: no limit."""
    if text.upper() in UNLIMITED:
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text, re.ASCII)
    if not match:
        raise UserError(f"--time {text!r} is not of the form [DAYS-]HH:MM:SS")
    days, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] or match[4]:
        return ((days * 24 + first) * 60 + second) * 60 + third
    return first * 60 + second or None      # a limit of zero is none


def readings(arguments: argparse.Namespace) -> list[str]:
    """How SLURM reads the sizes that are easily written wrong."""
    lines = [f"time limit {duration_in_words(parse_time(arguments.time))}{other_reading(arguments.time)}"]
    if arguments.mem is not None and MEMORY.fullmatch(arguments.mem)[2] == "":
        number = int(arguments.mem)
        lines.append(f"memory {number} MB a node ({number} is megabytes to SLURM; {number} GB is {number}G)" if number
                     else "memory: all that a node has (0 to SLURM)")
    return lines


def other_reading(text: str) -> str:
    """Of a time without hours: what it is, and how the hours that may have been meant are written."""
    parts = text.split(":")
    if "-" in text or len(parts) > 2 or parse_time(text) is None:
        return ""
    form = "minutes:seconds" if len(parts) == 2 else "minutes"
    hours, minutes = (*map(int, parts), 0)[:2]
    return f" ({text} is {form} to SLURM); {in_words(0, hours, minutes, 0)} is {hours}:{minutes:02}:00"


def duration_in_words(seconds: int | None) -> str:
    """``seconds`` in words: 1 day 2 hours; None is no limit."""
    if seconds is None:
        return "none"
    return in_words(seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60, seconds % 60)


def in_words(*parts: int) -> str:
    """Days, hours, minutes and seconds, those that are not 0."""
    words = [f"{number} {unit}{'s' if number != 1 else ''}"
             for number, unit in zip(parts, ("day", "hour", "minute", "second"), strict=True) if number]
    return " ".join(words) or "0 seconds"


def processes_per_node(arguments: argparse.Namespace) -> int:
    return arguments.gpus_per_node or arguments.tasks_per_node or 1


def processes(arguments: argparse.Namespace) -> int:
    return arguments.nodes * processes_per_node(arguments)
