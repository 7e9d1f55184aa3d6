"""Names and values that would like to run: quoted, or refused in one line."""

import json

import pytest
from slurm_standins import GPUS, directives

from dalle.errors import UserError

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
