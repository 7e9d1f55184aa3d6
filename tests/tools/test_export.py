import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dalle.errors import UserError
from dalle.store import load_generator
from dalle.training.checkpoint import CheckpointStore, SavedPlayer


@pytest.fixture(scope="module")
def run(workshop, commands, tmp_path_factory):
    runs = tmp_path_factory.mktemp("export")
    assert commands["train"](workshop.config("transformer", runs)) == 0
    return runs / "transformer"


def test_the_folder_holds_averaged_weights_tokenizer_codec_and_card_and_samples(run, commands, tmp_path):
    assert commands["export"](run, "--out", tmp_path / "release") == 0
    release = tmp_path / "release"
    assert {"config.json", "model.safetensors", "tokenizer", "codec", "README.md"} <= {
        path.name for path in release.iterdir()}
    exported, kept = load_file(release / "model.safetensors"), load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(exported[name], kept[name]) for name in kept)
    _, front, body = (release / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["pipeline_tag"] == "text-to-image"
    assert "| steps | 4 |" in body and "averaged (EMA)" in body and "validation/image_ce" in body
    pictures = load_generator(str(release)).generate(["a red circle"], [0])
    assert pictures.shape == (1, 3, 16, 16) and pictures.dtype == torch.uint8


def test_raw_weights_of_an_earlier_step(run, commands, tmp_path):
    assert commands["export"](run, "--checkpoint", 2, "--raw", "--out", tmp_path / "raw") == 0
    saved = SavedPlayer(CheckpointStore(run / "checkpoints", 2).path(2) / "transformer")
    exported = load_file(tmp_path / "raw" / "model.safetensors")
    assert all(torch.equal(exported[name], saved.tensor("weights", name)) for name in saved.keys("weights"))
    assert any(not torch.equal(exported[name], saved.tensor("average", name)) for name in saved.keys("average"))
    assert "| weights | raw |" in (tmp_path / "raw" / "README.md").read_text()


def test_a_gan_is_exported_with_its_text_encoder_and_the_average_of_its_generator(workshop, commands, tmp_path):
    assert commands["train"](workshop.config("clip", tmp_path, train={"steps": 1, "batch_size": 8}),
                             "data.validation=null") == 0
    data = workshop.folder / "data"
    tree = {"task": "acgan", "name": "acgan", "output": str(tmp_path), "text_encoder": str(tmp_path / "clip"),
            "data": {"train": str(data / "train"), "image_size": 16, "workers": 0},
            "generator": {"num_classes": 48, "noise_dim": 4, "channels": [8, 8]}, "generator_optimizer": {"ema": 0.9},
            "discriminator": {"channels": [4, 4, 8, 8, 8, 8]}, "train": {"steps": 2, "batch_size": 8}}
    (tmp_path / "acgan.yaml").write_text(yaml.safe_dump(tree))
    assert commands["train"](tmp_path / "acgan.yaml") == 0
    assert commands["export"](tmp_path / "acgan", "--out", tmp_path / "release") == 0
    assert "| weights | averaged (EMA) |" in (tmp_path / "release/README.md").read_text()
    assert json.loads((tmp_path / "release/source.json").read_text()) == {"step": 2, "averaged": True}
    (tmp_path / "clip").rename(tmp_path / "gone")        # all that sampling needs is in the folder
    pictures = [load_generator(folder).generate(["a red circle"], [3])
                for folder in (tmp_path / "release", tmp_path / "acgan")]
    assert pictures[0].shape == (1, 3, 16, 16) and torch.equal(*pictures)


def test_refusals_are_one_line(run, commands, tmp_path):
    for arguments, message in [((run, "--checkpoint", 7), "not a checkpoint"), ((tmp_path,), "no checkpoint"),
                               ((run, "--out", tmp_path), "exists"),
                               ((run, "--out", tmp_path / "x", "codec=nowhere"), "nowhere")]:
        with pytest.raises(UserError, match=message):
            commands["export"](*arguments)
    assert not list(tmp_path.glob(".*")) and not list(run.glob(".*"))        # nothing is left behind


def test_a_place_that_cannot_be_written_is_one_line(run, commands, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"release cannot be written: Not a directory; give another --out"):
        commands["export"](run, "--out", tmp_path / "file" / "release")
