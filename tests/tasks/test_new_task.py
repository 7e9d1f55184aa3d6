"""A new model is three files: the task's, its line in the table, its config. All else finds it there."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dalle.models.base import read_description
from dalle.tasks import RUNS, TASKS, add_tasks

FILE = '''
"""The mean colour of a picture, learned by a layer of three numbers."""

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from dalle.models.base import ModelConfig, PretrainedModel
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.task import Loss, Mean, Phase, Player, Task


class ColourConfig(ModelConfig):
    start: float = Field(default=0.0, description="first value of each channel, in [0, 1]")


class ColourModel(PretrainedModel):
    model_type = "mean_colour"
    Config = ColourConfig

    def __init__(self, config):
        super().__init__(config)
        self.colour = nn.Parameter(torch.full((3,), config.start))

    def forward(self, images):
        return (images - self.colour[:, None, None]).square().mean()


class ColourRun(RunConfig):
    task: Literal["mean_colour"] = "mean_colour"
    model: ColourConfig = Field(default=ColourConfig(), description="what is learned")
    optimizer: OptimizerConfig = Field(default=OptimizerConfig(), description="how it moves")


class ColourTask(Task):
    def __init__(self, config):
        self.model = ColourModel(config.model)
        self.players = {"colour": Player(self.model, config.optimizer)}
        self.frozen = {}
        self.phases = [Phase("fit", "colour", self.fit)]

    def fit(self, networks, batch, step):
        return Loss(networks["colour"](batch["image"].float() / 255))

    def validate(self, networks, batches):
        mean = Mean()
        for batch in batches:
            mean.add(networks.bare("colour")(batch["image"].float() / 255), len(batch["image"]))
        return {"error": mean}

    def preview(self, networks, step):
        colour = networks.bare("colour").colour.detach().clamp(0, 1) * 255
        return {"colour": colour.to(torch.uint8)[:, None, None].expand(3, 4, 4)}

    def export(self, folder, states):
        self.model.save_pretrained(folder, states["colour"])
'''


@pytest.fixture
def config(workshop, monkeypatch, tmp_path):
    """The file, the line, the config."""
    (tmp_path / "mean_colour.py").write_text(FILE)
    monkeypatch.syspath_prepend(tmp_path)
    for table in (RUNS, TASKS):
        monkeypatch.setattr(table, "_places", dict(table._places))
    add_tasks({"mean_colour": ("mean_colour", "ColourRun", "ColourTask")})

    def write(name):
        path = workshop.config("dvae", tmp_path / name, name="colour")
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"task": "mean_colour",
                                                                           "model": {"start": 0.1}}))
        return path

    return write


def weights(run):
    newest = max((run / "checkpoints").glob("step_*"))
    return {str(path.relative_to(newest)): load_file(path) for path in sorted(newest.rglob("*.safetensors"))}


def test_a_new_task_trains_resumes_validates_previews_and_exports_from_its_own_config(config, commands, tmp_path):
    assert commands["train"](config("whole")) == 0
    run = tmp_path / "whole" / "colour"
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert any("validation/error" in line for line in lines) and list((run / "samples").glob("*.png"))
    assert read_description(run / "model") == {"model_type": "mean_colour", "start": 0.1}
    assert not torch.equal(load_file(run / "model" / "model.safetensors")["colour"], torch.full((3,), 0.1))

    halves = config("halves")
    assert commands["train"](halves, "--stop-after", 2) == 0 and commands["train"](halves) == 0
    for file, tensors in weights(run).items():
        again = weights(tmp_path / "halves" / "colour")[file]
        assert tensors.keys() == again.keys() and all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_its_settings_are_checked_and_are_in_the_schema(config, commands, capsys, monkeypatch):
    from gans.__main__ import main

    assert commands["train"](config("printed"), "--print-config") == 0
    assert "start: 0.1" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["gans", "schema"])
    main()
    assert "mean_colour" in json.loads(capsys.readouterr().out)["discriminator"]["mapping"]
