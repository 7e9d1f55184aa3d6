"""Stand-ins for sbatch, srun, scontrol and the trainer: a batch script runs on this machine, and its end is seen."""

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

# starts the tasks of a step as srun does: own sessions, SLURM_* each, the rest killed when one fails
SRUN = r"""
import json, os, signal, subprocess, sys, time
words = sys.argv[1:]
options = dict(word[2:].partition("=")[::2] for word in words[:next(i for i, w in enumerate(words) if w[:2] != "--")])
command = words[len(options):]
size, per_node = int(options["ntasks"]), int(options["ntasks-per-node"])
nodes = int(options["nodes"])
tasks = []
for rank in range(size):
    output = options["output"].replace("%x", "job").replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", str(rank))
    own = dict(os.environ, SLURM_STEP_ID="0", SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % per_node),
               SLURM_NODEID=str(rank // per_node), SLURM_STEP_NUM_TASKS=str(size),
               SLURM_STEP_TASKS_PER_NODE=f"{per_node}(x{nodes})", SLURM_STEP_NODELIST="node[1-2]")
    tasks.append(subprocess.Popen(command, env=own, start_new_session=True, stdout=open(output, "a"), stderr=2))
folder = os.environ["STANDIN"]
with open(folder + "/tasks.tmp", "w") as file:
    json.dump([task.pid for task in tasks], file)
os.rename(folder + "/tasks.tmp", folder + "/tasks.json")
with open(folder + "/srun.jsonl", "a") as file:
    file.write(json.dumps(sys.argv) + "\n")
while any(task.poll() is None for task in tasks):
    if any(task.poll() for task in tasks):
        for task in tasks:
            if task.poll() is None:
                os.killpg(task.pid, signal.SIGKILL)
    time.sleep(0.01)
codes = [task.returncode if task.returncode >= 0 else 128 - task.returncode for task in tasks]
sys.exit(max(codes))
"""
SCONTROL = r"""
import os, sys
with open(os.environ["STANDIN"] + "/scontrol.txt", "a") as file:
    file.write(" ".join(sys.argv[1:]) + "\n")
if sys.argv[1:3] == ["show", "hostnames"]:
    if os.environ.get("SCONTROL_FAILS"):
        sys.exit(1)
    print("node1\nnode2")
elif sys.argv[1:3] == ["show", "job"]:
    print("JobId=" + sys.argv[3] + " JobState=" + os.environ.get("JOB_STATE", "RUNNING") + " Reason=None")
"""
SBATCH = r"""
import json, os, sys
with open(os.environ["STANDIN"] + "/sbatch.txt", "a") as file:
    file.write(json.dumps([sys.argv[1:], sorted(name for name in os.environ if name.startswith("SLURM_"))]) + "\n")
if os.environ.get("SBATCH_FAILS"):
    sys.exit("sbatch: error: Invalid account")
print("4242;cluster")
"""
# a trainer, and the agent that starts it, which ends with 1 whatever its tasks end with
TRAINER = r"""
import json, os, signal, subprocess, sys, time
from pathlib import Path
words = sys.argv[1:]
folder = Path(os.environ["STANDIN"])
if words[:2] == ["-m", "accelerate.commands.launch"]:
    with (folder / "agents.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    task = words[words.index("--no_python") + 1:]
    done = subprocess.run(task, env=dict(os.environ, RANK=words[words.index("--machine_rank") + 1]))
    sys.exit(1 if done.returncode else 0)
sys.path.insert(0, os.environ["PYTHONPATH"].split(":")[0])
from dalle.training.engines.slurm import adopt_slurm
adopt_slurm()
rank = int(os.environ.get("RANK", "0"))
stopped = []
for name in (signal.SIGTERM, signal.SIGUSR2):
    signal.signal(name, lambda *_: stopped.append(1))
seen = {name: os.environ.get(name) for name in (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONFAULTHANDLER", "NOTE",
    "ACCELERATE_USE_CPU", "ACCELERATE_USE_FSDP", "DS_ACCELERATOR", "SLURM_RESTART_COUNT")}
with (folder / f"rank{rank}.jsonl").open("a") as file:
    file.write(json.dumps({"argv": words, "environment": seen}) + "\n")
plan = json.loads((folder / "plan.json").read_text())
run = Path(plan["run"])
if plan["wait"]:
    (folder / f"ready{rank}").touch()
    while not stopped and not (run / "stop").exists():
        time.sleep(0.01)
    time.sleep(0.1)
if rank == 0 and plan["step"] is not None:
    (run / f"checkpoints/step_{plan['step']:08d}").mkdir(parents=True, exist_ok=True)
if rank == 0 and plan["finished"] is not None:
    (run / "finished").write_text(json.dumps({"step": plan["finished"]}))
together = folder / f"start{plan['start']}"
together.touch() if rank == 0 else None
while not together.exists():        # as ranks do that agree on how they end
    time.sleep(0.01)
sys.exit(plan["exit"][rank])
"""


@dataclass
class Cluster:
    """A folder with stand-ins on its PATH, in which `submit` is called and its script is started."""

    folder: Path
    submit: object
    name: str = "toy"
    starts: int = 0

    @property
    def run(self) -> Path:
        return self.folder / "runs" / self.name

    def config(self) -> str:
        tree = {"task": "dvae", "name": self.name, "model": {"preset": "tiny"},
                "data": {"train": "data", "workers": 3, "caption": "none", "image_size": 16},
                "train": {"steps": 100, "batch_size": 16}}
        (self.folder / "toy.yaml").write_text(yaml.safe_dump(tree))
        return "toy.yaml"

    def script(self, *options: str) -> str:
        """The script of a two-task CPU job, written and handed to sbatch."""
        arguments = [self.config(), "--nodes", "2", "--gpus-per-node", "0", "--time", "1:00:00", "--python",
                     str(self.folder / "bin" / "trainer"), *options]
        assert self.submit(*arguments) == 0
        (_, path), _ = json.loads(self.calls("sbatch")[-1])
        self.path = Path(path)
        return self.path.read_text()

    def begin(self, restart: int = 0, exit: tuple = (0, 0), step: int | None = None, finished: int | None = None,
              wait: bool = False, **variables: str) -> subprocess.Popen:
        """One start of the written script, whose tasks do as said."""
        self.starts += 1
        plan = {"start": self.starts, "run": str(self.run), "exit": exit, "step": step, "finished": finished,
                "wait": wait}
        (self.folder / "plan.json").write_text(json.dumps(plan))
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        slurm = {"SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_CPUS_PER_TASK": "1",
                 "SLURM_RESTART_COUNT": str(restart)}
        return subprocess.Popen(["bash", str(self.path)], env={**clean, **slurm, **variables}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def start(self, **how) -> int:
        job = self.begin(**how)
        self.output, _ = job.communicate(timeout=60)
        return job.returncode

    def wait_until_training(self) -> None:
        limit = time.monotonic() + 60
        while not all((self.folder / f"ready{rank}").exists() for rank in (0, 1)):
            assert time.monotonic() < limit, "the tasks did not start"
            time.sleep(0.02)

    def calls(self, command: str) -> list[str]:
        path = self.folder / f"{command}.txt"
        return path.read_text().splitlines() if path.exists() else []

    def requeues(self) -> list[str]:
        return [call.split()[1] for call in self.calls("scontrol") if call.startswith("requeue")]

    def tasks(self, rank: int = 0) -> list[dict]:
        path = self.folder / f"rank{rank}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


GPUS = ("--gpus-per-node", "8", "--time", "24:00:00")


def directives(script: str) -> list[str]:
    """The #SBATCH lines; none may come after the first command, where sbatch would not read it."""
    lines = script.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert lines[0] == "#!/bin/bash" and all(line.startswith("#") for line in lines[:last])
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
