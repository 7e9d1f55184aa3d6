"""Faults of who and what a run is: started twice, a companion trained again, started over, nothing left to do.

The functions are named after the fault and what is promised; each goes through the commands.
"""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_shards import start_command, wait_until, write_job, write_shards

from dalle.data.tokenizer import CaptionTokenizer
from dalle.training.run_log import read_log


def one_line(ended, *words: str) -> None:
    assert ended.status == 2 and ended.error.startswith("error: ") and ended.error.count("\n") == 1, ended.error
    assert [word for word in words if word not in ended.error] == []


def train_again(model: Path) -> None:
    """Other weights of the same shapes in the model's place."""
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor + 1e-3 if tensor.is_floating_point() else tensor for name, tensor in weights.items()},
              model / "model.safetensors")


def state_of(run: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(run)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(run.rglob("*")) if path.is_file()}


def test_started_twice_is_refused_by_process_and_a_killed_one_is_gone_on_from_at_once(tmp_path, run_here):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), settings={"steps": 10**6, "save_every": 0})
    first = start_command("launch/train.py", job.config)
    try:
        wait_until((job.run / "lock").exists, first, seconds=300)
        owner = json.loads((job.run / "lock").read_text())
        assert owner["pid"] == first.pid
        for arguments in ([], ["--resume", "none"]):
            one_line(run_here("train", job.config, *arguments), f"already running, process {first.pid} on "
                     f"{owner['host']}", "last sign of life", "delete")
        assert run_here("train", job.config, "--dry-run").status == 0
        assert json.loads((job.run / "lock").read_text()) == owner
    finally:
        first.kill()
        first.communicate()
    assert (job.run / "lock").exists()
    ended = run_here("train", job.config, "train.minutes=1e-6")
    assert ended.status == 75 and not (job.run / "lock").exists()


@pytest.fixture(scope="module")
def stopped(workshop, commands, tmp_path_factory) -> Path:
    """A transformer that was stopped after two steps; its codec, its tokenizer and itself in folders of their own."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(workshop.folder / "runs/dvae/model", folder / "codec")
    shutil.copytree(workshop.folder / "data/tokenizer", folder / "tokenizer")
    config = workshop.config("transformer", folder, codec=str(folder / "codec"),
                             data={"tokenizer": str(folder / "tokenizer")})
    assert commands["train"](config, "--stop-after", 2, "train.validate_every=0", "train.preview_every=0") == 0
    return config


@pytest.fixture
def again(stopped, tmp_path) -> Path:
    """The same in a folder of the test's own."""
    shutil.copytree(stopped.parent, tmp_path / "job")
    text = stopped.read_text().replace(str(stopped.parent), str(tmp_path / "job"))
    (tmp_path / "job" / stopped.name).write_text(text)
    return tmp_path / "job" / stopped.name


def test_codec_trained_again_is_refused_at_resume_and_export_and_the_copy_in_the_run_goes_on(again, run_here, tmp_path):
    folder, run = again.parent, again.parent / "transformer"
    train_again(folder / "codec")
    before = state_of(run)
    one_line(run_here("train", again), "was trained with another companion, codec: ",
             f"set codec={run / 'model/codec'}", "--resume none")
    one_line(run_here("export", run, f"codec={folder / 'codec'}", "--out", tmp_path / "release"), "another companion")
    assert state_of(run) == before and not (tmp_path / "release").exists()
    kept = f"codec={run / 'model/codec'}"
    assert run_here("export", run, kept, "--out", tmp_path / "release").status == 0
    assert run_here("train", again, kept, "--stop-after", 3).status == 0


def test_tokenizer_made_again_is_not_packed(again, run_here, tmp_path, workshop):
    from dalle.data.index import ShardIndex

    folder, run = again.parent, again.parent / "transformer"
    shards = ShardIndex.load(str(workshop.folder / "data/validation"))
    CaptionTokenizer.train_from_shards(shards, 300).save(folder / "tokenizer")
    paths = (f"codec={folder / 'codec'}", f"data.tokenizer={folder / 'tokenizer'}")
    one_line(run_here("export", run, *paths, "--out", tmp_path / "release"), "another tokenizer",
             f"set data.tokenizer={run / 'model/tokenizer'}")
    assert run_here("export", run, paths[0], f"data.tokenizer={run / 'model/tokenizer'}",
                    "--out", tmp_path / "release").status == 0


def test_codes_of_the_codec_go_on_where_only_its_folder_has_moved(again, run_here, workshop, tmp_path):
    folder, out = again.parent, tmp_path / "codes"
    arguments = ("--data", workshop.folder / "data/train", "--out", out)
    assert run_here("cache_codes", "--codec", folder / "codec", *arguments).status == 0
    known = json.loads((again.parent / "transformer/checkpoints/step_00000002/state.json").read_text())["companions"]
    assert json.loads((out / "codes.json").read_text())["codec_digest"] == known["codec"]["digest"]
    assert run_here("cache_codes", "--codec", workshop.folder / "runs/dvae", *arguments).status == 0
    train_again(folder / "codec")
    one_line(run_here("cache_codes", "--codec", folder / "codec", *arguments), "another codec")


def test_text_encoder_trained_again_is_refused_at_resume_and_export(workshop, run_here, tmp_path):
    clip = workshop.config("clip", tmp_path, train={"steps": 1, "batch_size": 8, "preview_every": 0,
                                                    "validate_every": 0}, data={"validation": None})
    assert run_here("train", clip).status == 0
    tree = {"task": "acgan", "name": "acgan", "output": str(tmp_path), "text_encoder": str(tmp_path / "clip"),
            "data": {"train": str(workshop.folder / "data/train"), "image_size": 16, "workers": 0},
            "generator": {"num_classes": 48, "noise_dim": 4, "channels": [8, 8]}, "standardise_text": True,
            "discriminator": {"channels": [4, 4, 8, 8, 8, 8]}, "train": {"steps": 3, "batch_size": 8}}
    (tmp_path / "acgan.yaml").write_text(yaml.safe_dump(tree))
    assert run_here("train", tmp_path / "acgan.yaml", "--stop-after", 1).status == 0
    assert run_here("train", tmp_path / "acgan.yaml", "--stop-after", 2).status == 0
    train_again(tmp_path / "clip/model")
    one_line(run_here("train", tmp_path / "acgan.yaml"), "another companion, text: text_encoder=")
    one_line(run_here("export", tmp_path / "acgan", "--out", tmp_path / "release"), "another companion, text: ")


def test_starting_over_begins_a_log_and_a_card_of_its_own(tmp_path, run_here):
    shards = write_shards(tmp_path / "shards")
    job = write_job(tmp_path, shards, settings={"steps": 2, "validate_every": 1}, data={"validation": str(shards)})
    assert run_here("train", job.config).status == 0
    assert run_here("train", job.config, "--resume", "none", "train.validate_every=0").status == 0
    assert [line["step"] for line in read_log(job.run / "log.jsonl") if "loss" in line] == [1, 2]
    assert len((job.run / "log.1.jsonl").read_text().splitlines()) > 2
    assert run_here("export", job.run, "--out", tmp_path / "release").status == 0
    assert "validation/" not in (tmp_path / "release/README.md").read_text().partition("## Configuration")[0]


def test_finished_run_or_fewer_steps_than_are_done_touch_nothing_and_say_so(tmp_path, run_here, capsys):
    job = write_job(tmp_path, write_shards(tmp_path / "shards"), settings={"steps": 3})
    assert run_here("train", job.config).status == 0
    shutil.rmtree(tmp_path / "shards")                               # no data is opened
    before = state_of(job.run)
    capsys.readouterr()
    assert run_here("train", job.config).status == 0
    assert "is finished, 3 of 3 steps are done" in capsys.readouterr().out
    one_line(run_here("train", job.config, "train.steps=2"), "train.steps is 2", "3 steps done")
    assert state_of(job.run) == before


def test_memory_that_ran_out_has_a_way_on(again, run_here):
    assert run_here("train", again, "model.checkpointing=true", "model.attention_backend=sdpa", "--stop-after",
                    3).status == 0


def test_another_optimiser_is_refused_by_name(again, run_here):
    one_line(run_here("train", again, "optimizer.name=muon"), "optimizer.name: 'adamw' -> 'muon'", "--resume none")
