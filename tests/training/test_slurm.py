"""Ranks from SLURM's variables, for tasks that srun started by itself."""

import os

import pytest

from dalle.training.engines.slurm import adopt_slurm, first_host, tasks_of_node

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def step(monkeypatch):
    """The environment of the last task of a step of 2 + 2 + 1 tasks, and nothing from a launcher."""
    for name in [*LAUNCHED, "CUDA_VISIBLE_DEVICES", *[name for name in os.environ if name.startswith("SLURM_")]]:
        monkeypatch.setenv(name, "")        # so that what the call sets is taken back too
        monkeypatch.delenv(name)
    variables = {"JOB_ID": "20007", "STEP_ID": "0", "STEP_NUM_TASKS": "5", "STEP_TASKS_PER_NODE": "2(x2),1",
                 "STEP_NODELIST": "gpu[03-04,11]", "PROCID": "3", "NODEID": "1", "LOCALID": "1",
                 "LAUNCH_NODE_IPADDR": "10.0.0.1"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def launched() -> dict[str, str]:
    return {name: os.environ[name] for name in LAUNCHED if name in os.environ}


def test_a_task_of_several_learns_who_it_is(step):
    adopt_slurm()
    assert launched() == {"RANK": "3", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
                          "MASTER_ADDR": "gpu03", "MASTER_PORT": "10007"}


def test_the_meeting_point_of_the_job_script_stays(step, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "gpu03-ib")
    monkeypatch.setenv("MASTER_PORT", "12345")
    adopt_slurm()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu03-ib", "12345")


def test_a_requeued_job_meets_at_another_port(step, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    adopt_slurm()
    assert os.environ["MASTER_PORT"] == "10014"


def test_a_launchers_word_counts(step, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    adopt_slurm()
    assert launched() == {"RANK": "0"}


@pytest.mark.parametrize("absent", ["SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"])
def test_the_batch_shell_is_no_task(step, monkeypatch, absent):
    monkeypatch.delenv(absent)
    adopt_slurm()
    assert launched() == {}


def test_one_task_stays_alone(step, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    adopt_slurm()
    assert launched() == {}


@pytest.mark.parametrize("visible, device", [("0,1,2,3", "1"), ("3", "0"), ("", "1")])
def test_the_only_gpu_that_a_site_shows_a_task_is_its_own(step, monkeypatch, visible, device):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    adopt_slurm()
    assert os.environ["LOCAL_RANK"] == device


@pytest.mark.parametrize("nodes, first", [
    ("gpu1", "gpu1"), ("gpu1,gpu2", "gpu1"), ("gpu[1-3]", "gpu1"), ("gpu[007,9-11],cpu1", "gpu007"),
    ("rack[2-3]-node[05,07]-ib,login", "rack2-node05-ib")])
def test_the_first_host_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("counts, node, tasks", [("4", 0, 4), ("4(x3)", 2, 4), ("4(x2),1", 2, 1), ("1,3(x2)", 1, 3)])
def test_the_tasks_of_a_node(counts, node, tasks):
    assert tasks_of_node(counts, node) == tasks
