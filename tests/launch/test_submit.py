"""The batch script: what it holds, what is refused, how SLURM's reading is said, and its submission.

Stand-ins for sbatch, srun and scontrol run it on this machine; the real ones do in tests/cluster.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_standins import GPUS, directives

from dalle.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


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


def test_the_command_starts_in_any_folder(tmp_path):
    """Its parts lie beside it, not where it is called."""
    done = subprocess.run([sys.executable, ROOT / "launch/submit.py", "--help"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"--dry-run" in done.stdout
