"""The batch script: what it holds, that nothing given can break out of it, and what it does with how its tasks end.

Stand-ins for sbatch, srun and scontrol run it on this machine; the real ones do in tests/cluster.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.fixture
def cluster(tmp_path, monkeypatch, commands) -> Cluster:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, source in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "trainer": TRAINER}.items():
        (programs / name).write_text(f"#!{sys.executable} -S\n{source}")
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("STANDIN", str(tmp_path))
    return Cluster(tmp_path, commands["submit"])


@pytest.fixture
def render(cluster, capsys):
    """The script that --dry-run prints."""

    def rendered(*arguments: str) -> str:
        capsys.readouterr()
        assert cluster.submit(cluster.config(), *arguments, "--dry-run") == 0
        script = capsys.readouterr().out
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert not cluster.calls("sbatch") and not (cluster.folder / "runs").exists()
        return script

    return rendered


GPUS = ("--gpus-per-node", "8", "--time", "24:00:00")


def directives(script: str) -> list[str]:
    """The #SBATCH lines; none may come after the first command, where sbatch would not read it."""
    lines = script.splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert lines[0] == "#!/bin/bash" and all(line.startswith("#") for line in lines[:last])
    return [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]


# -- the script


def test_one_node(render, cluster):
    script = render("--nodes", "1", *GPUS, "--partition", "gpu", "--account", "proj", "--qos", "long", "--mem", "200G",
                    "--sbatch-option", "constraint=a100|h100", "--sbatch-option", "exclusive")
    logs = cluster.run / "slurm"
    assert directives(script) == [
        "--job-name=toy", "--nodes=1", "--ntasks-per-node=8", "--cpus-per-task=4", "--gpus-per-node=8", "--mem=200G",
        "--time=24:00:00", "--partition=gpu", "--account=proj", "--qos=long", f"--output={logs}/%x-%j.out",
        "--open-mode=append", "--signal=USR2@300", "--requeue", "--constraint=a100|h100", "--exclusive"]
    assert "set -euo pipefail" in script and "PYTHONFAULTHANDLER=1" in script
    assert "srun --kill-on-bad-exit=1" in script and "--ntasks=8 --ntasks-per-node=8" in script
    assert f"--output={logs}/%x-%j-%t.out" in script and "--open-mode=append" in script
    assert f"train=({sys.executable} -u {ROOT}/launch/train.py toy.yaml)" in script


def test_several_nodes(render):
    script = render("train.steps=7", "--nodes", "2", *GPUS, "--cpus-per-task", "12")
    assert {"--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=12"} <= set(directives(script))
    assert "--nodes=2 --ntasks=16 --ntasks-per-node=8" in script
    assert 'scontrol show hostnames "$SLURM_JOB_NODELIST"' in script and "localhost" not in script
    assert "train+=(train.steps=7)" in script and "\nsteps=7\n" in script


@pytest.mark.parametrize("runtime, words", [
    ("pyxis", "'--container-image=registry#team/image:1' --container-mounts={root}:{root},{here}:{here},/data:/data "
              "--container-workdir={here}"),
    ("apptainer", "apptainer exec --nv --bind {root}:{root},{here}:{here},/data:/data --pwd {here} "
                  "'registry#team/image:1' env"),
])
def test_container(render, cluster, runtime, words):
    script = render("--nodes", "1", *GPUS, "--container", "registry#team/image:1", "--container-mounts", "/data:/data",
                    "--container-runtime", runtime)
    step = script[script.index("step=("):]
    assert words.format(root=ROOT, here=cluster.folder) in step
    assert "train=(python3 -u " in script
    assert "scontrol" not in step[:step.index("\n\n")] and "scontrol show hostnames" in script


def test_chain_of_jobs(render):
    script = render("--nodes", "1", *GPUS, "--array", "1-10%1")
    assert {"--array=1-10%1", "--no-requeue"} <= set(directives(script)) and "--requeue" not in directives(script)


def test_agents(render):
    script = render("--nodes", "2", *GPUS, "--launcher", "accelerate", "--engine", "zero2")
    assert {"--ntasks-per-node=1", "--cpus-per-task=32", "--signal=B:USR2@300"} <= set(directives(script))
    quoted = script[script.index("agent='"):script.index("step=(")]
    assert '--machine_rank "$SLURM_NODEID"' in quoted and "is_host=$((SLURM_NODEID == 0))" in quoted
    assert quoted.count("'") == 2           # the step's shell reads these variables, not the batch shell
    step = script[script.index("step=("):]
    assert "--num_machines 2 --num_processes 16" in step and "--rdzv_backend c10d" in step
    assert "launch/engines/zero2.yaml" in step and "--ntasks=2 --ntasks-per-node=1" in step


@pytest.mark.parametrize("options, expected", [
    ((), {}),
    (("--engine", "zero1"), {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}),
    (("--engine", "zero3_offload"), {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                                     "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}),
    (("--engine", "fsdp2"), {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
])
def test_the_engine_travels_in_the_environment(render, options, expected):
    script = render("--nodes", "1", *GPUS, *options)
    assert all(f"    {name}={value}" in script for name, value in expected.items())
    assert ("ACCELERATE_USE_DEEPSPEED=" in script) == ("zero" in " ".join(options))
    assert ("engine.offload_parameters=true" in script) == ("zero3_offload" in options)
    assert "ACCELERATE_USE_CPU=" not in script


def test_zero_on_cpu_cores(render):
    script = render("--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "2", "--time", "60", "--engine",
                    "zero1")
    assert "    ACCELERATE_USE_CPU=true" in script and "    DS_ACCELERATOR=cpu" in script
    assert not any("gpus" in line for line in directives(script)) and "--ntasks=2" in script


@pytest.mark.parametrize("options, message", [
    (("--nodes", "3", *GPUS), "does not divide over 24 processes; it does over 1, 2, 4, 8, 16"),
    (("--nodes", "1", *GPUS, "--array", "1-10"), "ends in %1"),
    (("--nodes", "1", *GPUS, "--tasks-per-node", "2"), "without GPUs"),
    (("--nodes", "1", *GPUS, "--engine", "cpu"), "--gpus-per-node 0"),
    (("--nodes", "1", "--gpus-per-node", "8", "--time", "5:00"),
     "comes 5 minutes before the end, but --time 5:00 is 5 minutes, not longer"),
    (("--nodes", "1", *GPUS, "--signal", "USR2@70000"), "SLURM takes at most 65535 seconds"),
    (("--nodes", "1", *GPUS, "--mem", "200GB"), "'200GB' is not of the form N[K|M|G|T], such as 200G"),
    (("--nodes", "1", "--gpus-per-node", "8", "--time", "a day"), "HH:MM:SS"),
    (("--nodes", "1", *GPUS, "--signal", "KILL@60"), "USR2@300"),
    (("--nodes", "1", *GPUS, "--signal", "USR1@60"), "train.stop_signals"),
    (("--nodes", "1", *GPUS, "--env", "WANDB_API_KEY=abc"), "credential"),
    (("--nodes", "1", *GPUS, "--env", "RANK=0"), "leave it out"),
    (("--nodes", "1", *GPUS, "--env", "a b=1"), "KEY=VALUE"),
    (("--nodes", "1", *GPUS, "--sbatch-option", "nodes=4"), "its own options"),
    (("--nodes", "1", *GPUS, "--sbatch-option", "NODES=4"), "NAME=VALUE"),
    (("--nodes", "1", *GPUS, "--container-mounts", "/a:/b"), "--container IMAGE"),
    (("--nodes", "1", *GPUS, "--sweep", "absent.txt"), "cannot be read"),
    (("modle.depth=3", "--nodes", "1", *GPUS), "unknown key modle; did you mean 'model'?"),
])
def test_what_cannot_work_is_refused_in_one_line(cluster, options, message):
    with pytest.raises(UserError) as refusal:
        cluster.submit(cluster.config(), *options, "--dry-run")
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(("given", "said"), [
    (("--time", "24:00"), "time limit 24 minutes (24:00 is minutes:seconds to SLURM); 24 hours is 24:00:00\n"),
    (("--time", "1:30"), "time limit 1 minute 30 seconds (1:30 is minutes:seconds to SLURM); 1 hour 30 minutes is "
                         "1:30:00\n"),
    (("--time", "90"), "time limit 1 hour 30 minutes (90 is minutes to SLURM); 90 hours is 90:00:00\n"),
    (("--time", "24:00:00"), "time limit 1 day\n"),
    (("--time", "1-12"), "time limit 1 day 12 hours\n"),
    (("--time", "2-0:30"), "time limit 2 days 30 minutes\n"),
    (("--time", "1-2:3:4"), "time limit 1 day 2 hours 3 minutes 4 seconds\n"),
    (("--time", "UNLIMITED"), "time limit none\n"),
    (("--time", "0"), "time limit none\n"),
    (("--time", "1:0:0", "--mem", "200"),
     "time limit 1 hour\nmemory 200 MB a node (200 is megabytes to SLURM; 200 GB is 200G)\n"),
    (("--time", "1:0:0", "--mem", "0"), "time limit 1 hour\nmemory: all that a node has (0 to SLURM)\n"),
    (("--time", "1:0:0", "--mem", "64g"), "time limit 1 hour\n"),
])
def test_how_slurm_reads_the_sizes_is_said(cluster, capsys, given, said):
    capsys.readouterr()
    cluster.submit(cluster.config(), "--nodes", "1", "--gpus-per-node", "1", "--signal", "USR2@10", *given, "--dry-run")
    printed = capsys.readouterr()
    assert printed.err == said and f"#SBATCH --time={given[1]}" in printed.out


def test_a_sweep_file_of_a_windows_editor(cluster, capsys):
    (cluster.folder / "sweep.txt").write_bytes("# größe\r\nseed=1\r\nseed=2\r\n".encode("utf-8-sig"))
    cluster.submit(cluster.config(), "--nodes", "1", *GPUS, "--sweep", "sweep.txt", "--dry-run")
    assert "#SBATCH --array=1-2" in capsys.readouterr().out
    (cluster.folder / "sweep.txt").write_text("seed=1\nname='a\n")
    with pytest.raises(UserError, match=r"^--sweep sweep.txt, line 2: no closing quotation$"):
        cluster.submit(cluster.config(), "--nodes", "1", *GPUS, "--sweep", "sweep.txt", "--dry-run")


def test_the_script_and_the_trainer_speak_of_the_same_things():
    """Bash cannot import the names."""
    from dalle import errors
    from dalle.training import run_folder

    job = (ROOT / "launch/slurm/job.sh").read_text()
    assert f"for code in {errors.EXIT_STOPPED_BY_SIGNAL} {errors.USER_ERROR_STATUS}; do" in job
    assert f"(( status == {errors.USER_ERROR_STATUS} ))" in job
    assert f"status != {errors.EXIT_STOPPED_BY_SIGNAL}" in job
    assert f'"$run/{run_folder.FINISHED_FILE}"' in job and f'"$run/{run_folder.STOP_FILE}"' in job
    assert '"$run"/checkpoints/step_' in job


# -- hostile values

ATTACK = """a"b'c $(touch MARK) `touch MARK` ; touch MARK # \\ & | > MARK"""


@pytest.mark.parametrize("option, advice", [
    ("--job-name", "letters, digits"), ("--partition", "letters, digits"), ("--account", "letters, digits"),
    ("--qos", "letters, digits"), ("--mem", "such as 200G"), ("--log-folder", "plainer path"),
])
@pytest.mark.parametrize("value", ["a b", "a#b", "$(touch MARK)", "a'b", 'a"b', "a\\b", "`id`"])
def test_a_directive_takes_only_plain_values(cluster, option, advice, value):
    with pytest.raises(UserError, match=advice):
        cluster.submit(cluster.config(), "--nodes", "1", *GPUS, option, value, "--dry-run")


@pytest.mark.parametrize("arguments", [
    ("train.steps=1\n#SBATCH --nodes=9",), ("--job-name", "a\nb"), ("--env", "NOTE=a\nb"), ("--python", "py\nthon"),
    ("--container", "image\r"), ("--sbatch-option", "comment=a\nb"), ("name=\"a\\nb\"",), ("--partition", "gpu\u2028"),
])
def test_line_breaks_are_refused(cluster, arguments):
    with pytest.raises(UserError, match="line break"):
        cluster.submit(cluster.config(), *arguments, "--nodes", "1", *GPUS, "--dry-run")


def test_a_run_name_that_cannot_stand_in_a_directive_needs_its_own_log_folder(cluster):
    cluster.name = ATTACK
    with pytest.raises(UserError, match="--log-folder"):
        cluster.submit(cluster.config(), "--nodes", "1", *GPUS, "--dry-run")


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_hostile_names_and_values_arrive_as_they_are(cluster, launcher):
    cluster.name = ATTACK
    script = cluster.script(f"output={json.dumps('runs')}", f"data.train={json.dumps(ATTACK)}", "--env",
                            f"NOTE={ATTACK}", "--log-folder", "logs", "--launcher", launcher, "--container-runtime",
                            "apptainer")
    assert directives(script)[0].startswith("--job-name=a.b.c.touch.MARK")
    assert cluster.start(exit=(0, 0), finished=100) == 0
    task = cluster.tasks()[0]
    assert task["argv"][-1] == f"data.train={json.dumps(ATTACK)}" and task["environment"]["NOTE"] == ATTACK
    assert (cluster.run / "finished").is_file()
    assert not list(cluster.folder.rglob("MARK"))


def test_a_counter_that_somebody_wrote_code_into_is_not_run(cluster):
    cluster.script()
    (cluster.run / "slurm" / "retries").write_text("a[$(touch MARK)]")
    assert cluster.start(exit=(1, 1)) == 1
    assert not list(cluster.folder.rglob("MARK")) and (cluster.run / "slurm" / "retries").read_text() == "1\n"


# -- a submission


def test_the_script_is_kept_and_submitted(cluster, monkeypatch, capsys):
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "7")       # of an allocation that this shell is in
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    cluster.script()
    script = cluster.run / "slurm" / "job-001.sh"
    assert cluster.calls("sbatch") == [json.dumps([["--parsable", str(script)], ["SLURM_CONF"]])]
    assert capsys.readouterr().out == f"job 4242: {script}\n"


def test_a_second_submission_does_not_overwrite_the_first(cluster):
    cluster.script()
    cluster.script()
    assert sorted(path.name for path in (cluster.run / "slurm").glob("*.sh")) == ["job-001.sh", "job-002.sh"]


def test_what_sbatch_says_is_passed_on(cluster, monkeypatch):
    monkeypatch.setenv("SBATCH_FAILS", "1")
    with pytest.raises(UserError, match="Invalid account"):
        cluster.script()


def test_without_sbatch_the_script_stays(cluster, monkeypatch):
    (cluster.folder / "bin" / "sbatch").unlink()
    (cluster.folder / "tools").mkdir()
    (cluster.folder / "tools" / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(cluster.folder / "tools"))
    with pytest.raises(UserError, match="no sbatch here"):
        cluster.script()
    assert (cluster.run / "slurm" / "job-001.sh").is_file()


# -- how a job ends


def test_every_task_learns_its_rank_and_the_meeting_point(cluster, monkeypatch):
    monkeypatch.setenv("RANK", "9")                     # left over in the shell that submits
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    cluster.script("--env", "NOTE=two words")
    assert cluster.start(finished=100) == 0
    for rank in (0, 1):
        assert cluster.tasks(rank)[0]["environment"] == {
            "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "node1", "MASTER_PORT": "10007",
            "PYTHONFAULTHANDLER": "1", "NOTE": "two words", "ACCELERATE_USE_CPU": "true", "ACCELERATE_USE_FSDP": None,
            "DS_ACCELERATOR": None, "SLURM_RESTART_COUNT": "0"}
    assert "command: srun" in cluster.output and not cluster.requeues()


def test_a_job_whose_scontrol_fails_does_not_start(cluster):
    cluster.script()
    assert cluster.start(SCONTROL_FAILS="1") != 0
    assert not cluster.tasks()


def test_a_finished_run_is_not_started_again(cluster):
    cluster.script()
    (cluster.run / "finished").write_text('{"step": 100}')
    assert cluster.start() == 0
    assert not cluster.tasks()


def test_a_finished_run_that_was_given_more_steps_goes_on(cluster):
    cluster.script("train.steps=200")
    (cluster.run / "finished").write_text('{"step": 100}')
    assert cluster.start(finished=200) == 0
    assert len(cluster.tasks()) == 1


def test_a_run_that_finished_and_then_stumbled_is_finished(cluster):
    cluster.script()
    assert cluster.start(exit=(134, 0), finished=100) == 0
    assert not cluster.requeues()


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_a_signal_saves_and_requeues_and_the_next_start_goes_on(cluster, launcher):
    cluster.script("--launcher", launcher)
    job = cluster.begin(exit=(75, 75), step=40, wait=True)
    cluster.wait_until_training()
    if launcher == "srun":      # scancel --signal=USR2 JOB: every process of every task, not the shell
        for task in json.loads((cluster.folder / "tasks.json").read_text()):
            os.killpg(task, signal.SIGUSR2)
    else:                       # scancel --signal=USR2 --batch JOB
        job.send_signal(signal.SIGUSR2)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 75, output
    assert cluster.requeues() == ["20007"]
    assert "failures in a row: 0" in output
    assert cluster.start(restart=1, finished=100) == 0
    assert [task["environment"]["SLURM_RESTART_COUNT"] for task in cluster.tasks()] == ["0", "1"]
    assert cluster.tasks()[1]["environment"]["MASTER_PORT"] == ("10014")
    assert not (cluster.run / "stop").exists()


def test_a_signal_before_the_trainer_can_take_it_reaches_it_as_the_stop_file(cluster):
    task = ["bash", str(ROOT / "launch/slurm/task.sh"), str(cluster.folder), str(cluster.folder / "stop"), "USR2",
            "bash", "-c", "touch begun; sleep 0.5; test -e stop && exit 75"]
    process = subprocess.Popen(task, start_new_session=True, env={**os.environ, "SLURM_PROCID": "0"})
    while not (cluster.folder / "begun").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGUSR2)
    assert process.wait(timeout=60) == 75
    assert (cluster.folder / "75").exists()


def test_a_stop_without_a_newer_checkpoint_counts(cluster):
    cluster.script("--requeue", "1")
    assert cluster.start(exit=(75, 75), step=40) == 75
    assert cluster.start(exit=(75, 75), step=40, restart=1) == 75
    assert len(cluster.requeues()) == 2
    assert cluster.start(exit=(75, 75), step=40, restart=2) == 75
    assert len(cluster.requeues()) == 2 and "giving up" in cluster.output


def test_failures_are_retried_until_the_budget_is_spent(cluster):
    cluster.script("--requeue", "2")
    assert [cluster.start(exit=(1, 0), restart=restart) for restart in range(3)] == [1, 1, 1]
    assert len(cluster.requeues()) == 2 and "more than 2 failures without a newer checkpoint" in cluster.output


def test_a_newer_checkpoint_gives_the_budget_back(cluster):
    cluster.script("--requeue", "1")
    for restart, step in enumerate([None, 10, 20, 30]):
        assert cluster.start(exit=(76, 76), step=step, restart=restart) == 76
    assert len(cluster.requeues()) == 4
    assert cluster.start(exit=(76, 76), step=30, restart=4) == 76
    assert len(cluster.requeues()) == 4 and "giving up" in cluster.output


@pytest.mark.parametrize("launcher", ["srun", "accelerate"])
def test_a_mistake_of_the_user_is_never_retried(cluster, launcher):
    cluster.script("--launcher", launcher)
    assert cluster.start(exit=(2, 2)) == 2
    assert not cluster.requeues() and "giving up with status 2" in cluster.output


def test_the_slower_task_that_srun_kills_does_not_hide_the_status(cluster):
    slow = (cluster.folder / "bin" / "trainer").read_text().replace(
        'sys.exit(plan["exit"][rank])', 'time.sleep(30 * rank)\nsys.exit(plan["exit"][rank])')
    (cluster.folder / "bin" / "trainer").write_text(slow)
    cluster.script()
    began = time.monotonic()
    assert cluster.start(exit=(75, 75), step=10) == 75
    assert time.monotonic() - began < 25 and cluster.requeues() == ["20007"]
    assert cluster.start(exit=(2, 2), restart=1) == 2
    assert cluster.requeues() == ["20007"]


def test_a_job_that_slurm_is_ending_is_not_requeued(cluster):
    cluster.script()
    assert cluster.start(exit=(75, 75), step=10, JOB_STATE="COMPLETING") == 75
    assert not cluster.requeues() and "SLURM is ending this job itself" in cluster.output


def test_the_elements_of_a_chain_go_on_from_one_another(cluster):
    cluster.script("--array", "1-4%1")
    element = {"SLURM_ARRAY_JOB_ID": "20000"}
    assert cluster.start(exit=(75, 75), step=40, SLURM_ARRAY_TASK_ID="1", **element) == 75
    assert cluster.start(exit=(1, 1), step=40, SLURM_ARRAY_TASK_ID="2", **element) == 1
    assert cluster.start(finished=100, SLURM_ARRAY_TASK_ID="3", **element) == 0
    assert cluster.start(SLURM_ARRAY_TASK_ID="4", **element) == 0
    assert len(cluster.tasks()) == 3 and not cluster.requeues()


def test_a_chain_ends_with_the_first_mistake(cluster):
    cluster.script("--array", "1-4%1")
    element = {"SLURM_ARRAY_JOB_ID": "20000"}
    assert cluster.start(exit=(2, 2), SLURM_ARRAY_TASK_ID="1", **element) == 2
    assert cluster.start(SLURM_ARRAY_TASK_ID="2", **element) == 2
    assert len(cluster.tasks()) == 1
    assert cluster.start(finished=100, SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_JOB_ID="30000") == 0


def test_a_sweep_trains_a_run_for_each_line(cluster):
    (cluster.folder / "sweep.txt").write_text("train.steps=7 seed=1\n\n# a comment\n'name=a b' seed=2\n")
    script = cluster.script("--sweep", "sweep.txt")
    assert "--array=1-2" in directives(script) and "--requeue" in directives(script)
    element = {"SLURM_ARRAY_JOB_ID": "20007", "SLURM_ARRAY_TASK_ID": "2"}
    cluster.name = "a b/002"
    assert cluster.start(exit=(75, 75), step=40, **element) == 75
    assert cluster.requeues() == ["20007_2"]          # 20007 alone would be the whole array
    assert cluster.tasks()[0]["argv"][-3:] == ["name=a b", "seed=2", 'name="a b/002"']
    assert (cluster.run / "checkpoints").is_dir()
    assert cluster.start() == 2
