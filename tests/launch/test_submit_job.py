"""What a batch script does with how its tasks end: requeued, retried, given up, gone on with."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from slurm_standins import directives

ROOT = Path(__file__).resolve().parents[2]


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
