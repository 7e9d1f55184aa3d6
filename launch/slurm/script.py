"""The batch script: job.sh with its places filled, everything given quoted or refused."""

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

from dalle.errors import UserError
from slurm.environment import agent_file, cores, engine, environment
from slurm.options import ROOT, parse_signal, processes, processes_per_node
from slurm.runs import PlannedRun

TEMPLATE = ROOT / "launch" / "slurm" / "job.sh"

# `#SBATCH` lines are not read by a shell: sbatch has its own rules for blanks, quotes, backslashes and #
DIRECTIVE_VALUE = re.compile(r"[A-Za-z0-9_./:=@+,%&|()*\[\]^~-]+")

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


def render(arguments: argparse.Namespace, runs: list[PlannedRun], logs: Path) -> str:
    """The batch script: launch/slurm/job.sh with its places filled, everything given quoted."""
    parts = {
        "DIRECTIVES": "\n".join(directives(arguments, runs, logs)),
        "COMMAND": shlex.join(["python", "launch/submit.py", *sys.argv[1:]]),
        "SETTINGS": settings(arguments, runs),
        "STEP": step(arguments, logs),
        "SIGNAL": parse_signal(arguments.signal)[0],
    }
    template = TEMPLATE.read_text(encoding="utf-8")
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


def python(arguments: argparse.Namespace) -> str:
    return arguments.python or ("python3" if arguments.container else sys.executable)


def check_syntax(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the script is not valid bash: {done.stderr}")
