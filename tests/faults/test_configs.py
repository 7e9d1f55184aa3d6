"""Faults of configs: YAML that is unsafe or no config, and what has changed at a resume.

The functions are named after the fault and what is promised; each goes through a command.
"""

import shutil

import pytest
import yaml
from epochs import files_below, one_line
from tiny_shards import write_job, write_shards


def test_unsafe_yaml_is_one_line_and_runs_nothing(tmp_path, run_here):
    marker = tmp_path / "executed"
    job = write_job(tmp_path, write_shards(tmp_path / "shards", counts=(4,)))
    good = job.config.read_text()
    call = f"!!python/object/apply:os.mkdir [{marker}]"
    for text, words in (
        (f"{good}seed: {call}\n", ["python/object/apply", "line"]),
        (f"{good}? {call}\n: 1\n", ["python/object/apply"]),
        (f"{good}seed: !!python/name:os.system\n", ["python/name"]),
        (f"{good}seed: 1\nseed: 2\n", ["'seed' appears twice"]),
        (good.replace("batch_size:", "batch_sise:"), ["train.batch_sise", "did you mean 'batch_size'?"]),
    ):
        job.config.write_text(text)
        one_line(run_here("train", job.config), *words, str(job.config))
    job.config.write_text(good)
    one_line(run_here("train", job.config, f"seed={call}"), "override")
    one_line(run_here("train", job.config, "train.stepps=3"), "did you mean 'steps'?")
    assert not marker.exists() and not job.run.exists()
    yaml.unsafe_load(call)
    assert marker.exists()


@pytest.mark.parametrize("text", [
    "seed: 2024-99-99", "? [a]\n: b", "? {a: b}\n: c", "task: [dvae]", "task: {a: b}", f"seed: {'9' * 5000}",
    f"seed: {'[' * 1200}", "seed: !!int x", "seed: !!bool x", "seed: !!timestamp x", "\0", "seed: 'open", "- a", "",
])
def test_yaml_that_is_no_config_is_one_line(tmp_path, run_here, text):
    config = tmp_path / "job.yaml"
    config.write_text(text)
    one_line(run_here("train", config), str(config))


@pytest.mark.parametrize("value", ["2024-99-99", "{[a]: b}", "[" * 1200, "!!int x", "'open"])
def test_override_that_is_no_yaml_is_one_line(tmp_path, run_here, value):
    job = write_job(tmp_path, tmp_path)
    one_line(run_here("train", job.config, f"seed={value}"), "override")


def test_changed_config_at_resume_is_refused_or_taken_by_its_class(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards")
    job = write_job(tmp_path, shards, settings={"steps": 4})
    assert run_here("train", job.config, "--stop-after", 2).status == 0
    before = files_below(job.run), (job.run / "config.yaml").read_text()
    for change in ("seed=1", "train.batch_size=6", "data.lanes=8", "data.flip=true", "optimizer.name=muon"):
        key, _, value = change.partition("=")
        one_line(run_here("train", job.config, change), f"{key}: ", f"-> {yaml.safe_load(value)!r}")
    other = write_shards(tmp_path / "other", counts=(12,) * 4)
    one_line(run_here("train", job.config, f"data.train={other}"), "fingerprint")
    assert job.steps() == [1, 2]
    assert (files_below(job.run), (job.run / "config.yaml").read_text()) == before          # a refusal changes nothing
    moved = shutil.copytree(shards, tmp_path / "moved")                                     # may change: the same data
    assert run_here("train", job.config, f"data.train={moved}", "data.workers=1", "--stop-after", 3).status == 0
    assert run_here("train", job.config, "train.steps=5", "optimizer.lr=1e-4").status == 0   # free
    assert job.steps() == [1, 2, 3, 4, 5]
