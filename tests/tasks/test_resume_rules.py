"""What a resume may change is declared beside every setting of every task."""

import pytest
from pydantic import BaseModel

import gans
from dalle.config import RESUME, json_schema, models_in, resume_rule
from dalle.tasks import RUNS

gans.register()


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every setting, those of all alternatives of a section included."""
    found = []
    for name, field in model.model_fields.items():
        found.append(prefix + name)
        for inner in models_in(field.annotation):
            found += keys(inner, f"{prefix}{name}.")
    return found


@pytest.mark.parametrize("task", RUNS)
def test_every_setting_says_what_a_resume_does_when_it_changes(task):
    rules = {key: resume_rule(RUNS[task], key) for key in keys(RUNS[task])}
    assert [key for key, rule in rules.items() if rule not in ("fixed", "free")] == []
    fixed = {key for key, rule in rules.items() if rule == "fixed"}
    assert {"task", "seed", "data.image_size", "data.lanes", "data.flip", "train.batch_size"} <= fixed
    assert {key for key in rules if key.endswith("optimizer.name")} <= fixed
    assert not fixed & {"name", "output", "prerequisites", "data.train", "data.workers", "train.steps", "log.wandb",
                        "engine.timeout_minutes", "optimizer.lr", "optimizer.ema"}


@pytest.mark.parametrize(("task", "key", "rule"), [
    ("transformer", "model.depth", "fixed"), ("transformer", "model.checkpointing", "free"),
    ("transformer", "model.attention_backend", "free"), ("transformer", "codec", "free"),      # by its digest
    ("dvae", "model.quantizer.levels", "fixed"), ("dvae", "loss.beta.end", "free"), ("clip", "loss.kind", "fixed"),
    ("attngan", "generator.z_dim", "fixed"), ("attngan", "standardise_text", "fixed"), ("attngan", "damsm", "free"),
    ("attngan", "stabiliser.r1", "free"), ("attngan", "stabiliser.spectral_norm", "fixed"),
    ("attngan", "generator_optimizer.lr", "free"), ("attngan", "discriminator.width", "fixed"),
    ("dvae", "no.such.key", None), ("dvae", "model.nothing", None),
])
def test_the_rule_of_a_setting_is_the_nearest_declaration(task, key, rule):
    assert resume_rule(RUNS[task], key) == rule


def test_the_schema_shows_it():
    definitions = json_schema(RUNS)["$defs"]
    assert definitions["OptimizerConfig"][RESUME] == "free"
    assert definitions["OptimizerConfig"]["properties"]["name"][RESUME] == "fixed"
