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
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gans
from dalle.config import load_config, read_yaml
from dalle.errors import UserError, run_command
from dalle.text_file import read_text_file

ROOT = Path(__file__).resolve().parent.parent
ENGINES = ROOT / "launch" / "engines"
SLURM = ROOT / "launch" / "slurm"
CHOICES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2", "cpu")

# `#SBATCH` lines are not read by a shell: sbatch has its own rules for blanks, quotes, backslashes and #
DIRECTIVE_VALUE = re.compile(r"[A-Za-z0-9_./:=@+,%&|()*\[\]^~-]+")
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f\u0085\u2028\u2029]")
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
MEMORY = re.compile(r"(\d+)([KMGT]?)", re.ASCII | re.IGNORECASE)
UNLIMITED = ("UNLIMITED", "INFINITE")
LONGEST_WARNING = 65535      # seconds, of sbatch's --signal
SET_BY_LAUNCHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
SET_HERE = {
    "job-name", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gpus-per-node", "time", "partition", "account",
    "qos", "mem", "array", "output", "error", "open-mode", "signal", "requeue", "no-requeue", "wrap", "chdir"}

SRUN_STEP = """\
step=({srun}
      {container}env "${{environment[@]}}" {task} "${{train[@]}}")
"""
# one agent a node; which node it is on is known only inside the step. Left to itself, c10d guesses from the name
# whether it is the one to be met, and all wait for another where the name is not what the node calls itself
ACCELERATE_STEP = """\
agent='exec "$0" -m accelerate.commands.launch --machine_rank "$SLURM_NODEID" \\
    --rdzv_conf "is_host=$((SLURM_NODEID == 0))" "$@"'
step=({srun}
      {container}env "${{environment[@]}}"
      bash -c "$agent" {python} --config_file {file} --num_machines {nodes} --num_processes {processes}
      --rdzv_backend {rendezvous} --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT"
      --no_python {task} "${{train[@]}}")
"""


@dataclass(frozen=True)
class PlannedRun:
    """One training: its folder, its number of steps, and the overrides that make it."""

    name: str
    folder: Path
    steps: int
    workers: int
    overrides: list[str]


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


# -- what was given


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
        raise UserError(f"--signal {arguments.signal} comes {duration(seconds)} before the end, but --time "
                        f"{arguments.time} is {duration(limit)}, not longer than that")
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
    lines = [f"time limit {duration(parse_time(arguments.time))}{other_reading(arguments.time)}"]
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


def duration(seconds: int | None) -> str:
    """``seconds`` in words: 1 day 2 hours; None is no limit."""
    if seconds is None:
        return "none"
    return in_words(seconds // 86400, seconds // 3600 % 24, seconds // 60 % 60, seconds % 60)


def in_words(*parts: int) -> str:
    """Days, hours, minutes and seconds, those that are not 0."""
    words = [f"{number} {unit}{'s' if number != 1 else ''}"
             for number, unit in zip(parts, ("day", "hour", "minute", "second"), strict=True) if number]
    return " ".join(words) or "0 seconds"


def plan_runs(arguments: argparse.Namespace) -> list[PlannedRun]:
    """The run that the config describes, or one for each line of --sweep; all validated."""
    overrides = [*offload_overrides(arguments.engine), *arguments.overrides]
    if arguments.sweep is None:
        return [plan_run(arguments, overrides)]
    runs = []
    for number, line in enumerate(sweep_lines(arguments.sweep), start=1):
        name = plan_run(arguments, overrides + line).name
        runs.append(plan_run(arguments, [*overrides, *line, f"name={json.dumps(f'{name}/{number:03d}')}"]))
    return runs


def plan_run(arguments: argparse.Namespace, overrides: list[str]) -> PlannedRun:
    from dalle.tasks import RUNS
    from dalle.training.settings import split_batch

    config = load_config(arguments.config, overrides, RUNS)
    if UNPRINTABLE.search(str(config.folder)):
        raise UserError(f"the run's folder {str(config.folder)!r} holds a line break or a control character: change "
                        "`name` or `output`")
    split_batch(config.train.batch_size, config.train.micro_batch_size, processes(arguments))
    name, _ = parse_signal(arguments.signal)
    if f"SIG{name}" not in config.train.stop_signals:
        raise UserError(f"--signal {arguments.signal}: the run stops on {', '.join(config.train.stop_signals)} "
                        "(train.stop_signals) and would die of another signal")
    return PlannedRun(config.name, Path.cwd() / config.folder, config.train.steps, config.data.workers, overrides)


def sweep_lines(path: Path) -> list[list[str]]:
    """The overrides on each line; blank lines and comments do not count."""
    try:
        lines = enumerate(read_text_file(path).splitlines(), start=1)
    except UserError as error:
        raise UserError(f"--sweep {error}") from error
    words = [line for line in (sweep_words(path, number, text) for number, text in lines) if line]
    if not words:
        raise UserError(f"--sweep {path} holds no line of overrides")
    for line in words:
        if UNPRINTABLE.search("".join(line)):
            raise UserError(f"--sweep {path}: {line} holds a control character, which a batch script cannot carry")
    return words


def sweep_words(path: Path, number: int, line: str) -> list[str]:
    """The overrides of one line, split as a shell would."""
    try:
        return shlex.split(line, comments=True)
    except ValueError as error:
        raise UserError(f"--sweep {path}, line {number}: {str(error).lower()}") from None


def offload_overrides(engine: str | None) -> list[str]:
    return ["engine.offload_optimizer=true", "engine.offload_parameters=true"] if engine == "zero3_offload" else []


def processes_per_node(arguments: argparse.Namespace) -> int:
    return arguments.gpus_per_node or arguments.tasks_per_node or 1


def processes(arguments: argparse.Namespace) -> int:
    return arguments.nodes * processes_per_node(arguments)


def common_folder(runs: list[PlannedRun], arguments: argparse.Namespace) -> Path:
    return runs[0].folder.parent if arguments.sweep else runs[0].folder


# -- the script


def render(arguments: argparse.Namespace, runs: list[PlannedRun], logs: Path) -> str:
    """The batch script: launch/slurm/job.sh with its places filled, everything given quoted."""
    parts = {
        "DIRECTIVES": "\n".join(directives(arguments, runs, logs)),
        "COMMAND": shlex.join(["python", "launch/submit.py", *sys.argv[1:]]),
        "SETTINGS": settings(arguments, runs),
        "STEP": step(arguments, logs),
        "SIGNAL": parse_signal(arguments.signal)[0],
    }
    template = (SLURM / "job.sh").read_text(encoding="utf-8")
    return re.sub(r"@@([A-Z]+)@@", lambda match: parts[match[1]].rstrip("\n"), template)


def directives(arguments: argparse.Namespace, runs: list[PlannedRun], logs: Path) -> list[str]:
    """The #SBATCH lines; :class:`UserError` for a value that sbatch would read as something else."""
    agents = arguments.launcher == "accelerate"
    per_node = processes_per_node(arguments)
    name, seconds = parse_signal(arguments.signal)
    options = {
        "job-name": arguments.job_name or readable_name(runs, arguments),
        "nodes": arguments.nodes,
        "ntasks-per-node": 1 if agents else per_node,
        "cpus-per-task": cores(arguments, runs) * (per_node if agents else 1),
        "gpus-per-node": arguments.gpus_per_node or None,
        "mem": arguments.mem,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "qos": arguments.qos,
        "array": f"1-{len(runs)}" if arguments.sweep else arguments.array,
        "output": logs / "%x-%j.out",
        "open-mode": "append",
        # without B: all tasks get the signal and the shell does not; an agent would die of it, so there it is the shell
        "signal": f"{'B:' if agents else ''}{name}@{seconds}",
    }
    if re.search(r"[/%]", arguments.job_name or ""):
        raise UserError(f"--job-name {arguments.job_name!r} becomes part of a file's name: leave out / and %")
    if "%" in str(logs):
        raise UserError(f"the log folder {logs} holds a %, which SLURM reads as a place to fill: give --log-folder")
    lines = [f"#SBATCH --{option}={directive_value(option, value)}"
             for option, value in options.items() if value is not None]
    lines.append("#SBATCH --no-requeue" if arguments.array else "#SBATCH --requeue")
    for option in arguments.sbatch_option:
        name, equals, value = option.partition("=")
        lines.append(f"#SBATCH --{name}{equals}{directive_value(name, value) if equals else ''}")
    return lines


def directive_value(option: str, value: object) -> str:
    if DIRECTIVE_VALUE.fullmatch(str(value)):
        return str(value)
    where = "the log folder" if option == "output" else f"--{option}"
    advice = "give --log-folder a plainer path" if option == "output" else "use letters, digits and ._-"
    raise UserError(f"{where} {str(value)!r} cannot stand in an #SBATCH line (blanks, quotes, $, # and backslashes "
                    f"cannot): {advice}")


def readable_name(runs: list[PlannedRun], arguments: argparse.Namespace) -> str:
    name = str(Path(runs[0].name).parent) if arguments.sweep else runs[0].name
    return re.sub(r"[^A-Za-z0-9_.+-]+", ".", name).strip(".")[:100] or "train"


def cores(arguments: argparse.Namespace, runs: list[PlannedRun]) -> int:
    return arguments.cpus_per_task or max(run.workers for run in runs) + 1


def settings(arguments: argparse.Namespace, runs: list[PlannedRun]) -> str:
    """What the job's shell knows of the run, as quoted assignments."""
    quote = shlex.quote
    train = shlex.join([python(arguments), "-u", str(ROOT / "launch" / "train.py"), arguments.config])
    lines = [f"work={quote(str(Path.cwd()))}        # relative paths in the config start here",
             f"repository={quote(str(ROOT))}",
             f"budget={arguments.requeue}        # failures in a row without a newer checkpoint",
             f"chain={'true' if arguments.array else 'false'}",
             f"train=({train})",
             *run_settings(arguments, runs),
             'environment=("PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH}"']
    lines += [f"    {quote(f'{key}={value}')}" for key, value in environment(arguments, runs).items()]
    return "\n".join(lines) + ")"


def run_settings(arguments: argparse.Namespace, runs: list[PlannedRun]) -> list[str]:
    def assignments(run: PlannedRun) -> list[str]:
        return [f"run={shlex.quote(str(run.folder))}", f"steps={run.steps}", f"train+=({shlex.join(run.overrides)})"]

    if not arguments.sweep:
        return assignments(runs[0])
    lines = ['case "${SLURM_ARRAY_TASK_ID:-}" in']
    for number, run in enumerate(runs, start=1):
        lines += [f"    {number})", *(f"        {line}" for line in assignments(run)), "        ;;"]
    return [*lines, f'    *) echo "this script is an array of jobs, 1-{len(runs)}" >&2; exit 2 ;;', "esac"]


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


def step(arguments: argparse.Namespace, logs: Path) -> str:
    """The command that starts all tasks, as an array of the job's shell."""
    agents = arguments.launcher == "accelerate"
    per_node = 1 if agents else processes_per_node(arguments)
    srun = ["srun", "--kill-on-bad-exit=1", "--export=ALL", f"--nodes={arguments.nodes}",
            f"--ntasks={arguments.nodes * per_node}", f"--ntasks-per-node={per_node}"]
    prefix = []
    mounts = [f"{folder}:{folder}" for folder in dict.fromkeys((str(ROOT), str(Path.cwd())))]
    mounts += arguments.container_mounts.split(",") if arguments.container_mounts else []
    if arguments.container and arguments.container_runtime == "pyxis":
        srun += [f"--container-image={arguments.container}", f"--container-mounts={','.join(mounts)}",
                 f"--container-workdir={Path.cwd()}"]
    elif arguments.container:
        prefix = ["apptainer", "exec", *(["--nv"] if arguments.gpus_per_node else []),
                  "--bind", ",".join(mounts), "--pwd", str(Path.cwd()), arguments.container]
    signal, _ = parse_signal(arguments.signal)
    srun_words = " ".join([
        shlex.join(srun), '--cpus-per-task="$SLURM_CPUS_PER_TASK"',     # srun does not inherit it
        "--open-mode=append", shlex.quote(f"--output={logs}/%x-%j-%t.out")])
    return (ACCELERATE_STEP if agents else SRUN_STEP).format(
        srun=srun_words, container=shlex.join(prefix) + " " if prefix else "",
        task=f'bash "$repository/launch/slurm/task.sh" "$statuses" "$run/stop" {signal}',
        python=shlex.quote(python(arguments)), nodes=arguments.nodes, processes=processes(arguments),
        file=f'"$repository/launch/engines/{agent_file(engine(arguments))}"',
        rendezvous="c10d" if arguments.nodes > 1 else "static")


def agent_file(engine: str) -> str:
    return "ddp.yaml" if engine == "cpu" else f"{engine}.yaml"     # cpu.yaml is for one process without a launcher


def python(arguments: argparse.Namespace) -> str:
    return arguments.python or ("python3" if arguments.container else sys.executable)


def check_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the script is not valid bash: {done.stderr}")


# -- submitting


def write_script(script: str, folder: Path) -> Path:
    """The script in the first free ``job-NNN.sh``."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        path = folder / f"job-{number:03d}.sh"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(script)
            return path
        except FileExistsError:
            number += 1


def submit(path: Path) -> str:
    """Hand the script to sbatch; the job's id."""
    # of an allocation that this shell may be in, nothing but the cluster's own settings belongs to the new job
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_") or key == "SLURM_CONF"}
    try:
        done = subprocess.run(["sbatch", "--parsable", str(path)], env=clean, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError(f"there is no sbatch here: run `sbatch {shlex.quote(str(path))}` on the cluster") from None
    if done.returncode:
        raise UserError(f"sbatch refuses {path}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().partition(";")[0]


if __name__ == "__main__":
    run_command(main)
