"""The config tree: what is refused, and whether the line says what to do."""

from typing import Literal

import pytest
import yaml

from dalle.config import Section, apply_override, json_schema, load_config, read_yaml, to_yaml
from dalle.errors import UserError


class Model(Section):
    depth: int = 2
    kind: Literal["small", "large"] = "small"


class Train(Section):
    steps: int = 10
    lr: float = 1e-3
    batch_size: int = 8


class ARun(Section):
    task: Literal["a"]
    name: str = "a"
    model: Model = Model()
    train: Train = Train()
    extra: Model | None = None


class BRun(Section):
    task: Literal["b"]
    width: int


RUNS = {"a": ARun, "b": BRun}


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def refused(path, *overrides) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, RUNS)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_overrides_win_over_the_file_and_defaults_fill_the_rest(write):
    config = load_config(write("task: a\ntrain: {steps: 5}\n"), ["train.lr=1e-4", "model.depth=4"], RUNS)
    assert (config.train.steps, config.train.lr, config.model.depth, config.train.batch_size) == (5, 1e-4, 4, 8)


def test_the_resolved_config_reads_back_equal(write):
    config = load_config(write("task: a\ntrain: {lr: 3e-5}\n"), [], RUNS)
    assert load_config(write(to_yaml(config)), [], RUNS) == config


def test_unknown_key_names_key_file_and_nearest_name(write):
    path = write("task: a\ntrain: {step: 5}\n")
    message = refused(path)
    assert "train.step" in message and str(path) in message and "did you mean 'steps'?" in message


def test_unknown_key_in_an_optional_section_lists_that_sections_names(write):
    message = refused(write("task: a\nextra: {dept: 5}\n"))
    assert "did you mean 'depth'?" in message and "batch_size" not in message


def test_wrong_type_says_what_was_expected_and_what_came(write):
    message = refused(write("task: a\n"), "train.steps=many")
    assert "train.steps" in message and "integer" in message and "'many'" in message


@pytest.mark.parametrize("text, part", [
    ("task: a\ntask: b\n", "appears twice"),
    ("task: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ("- task\n", "must hold a mapping"),
    ("name: x\n", "'task' is missing"),
    ("task: c\n", "known: a, b"),
    ("task: b\n", "the key width is missing"),
])
def test_bad_files_are_refused_in_one_line(write, text, part):
    assert part in refused(write(text))


def test_missing_file(tmp_path):
    assert "no config file" in refused(tmp_path / "none.yaml")


@pytest.mark.parametrize("override", ["train.steps", "=3", "train..steps=3", "task.sub=3", "train.steps=[1"])
def test_malformed_overrides(write, override):
    assert override.split("=")[0] in refused(write("task: a\n"), override)


def test_override_values_are_yaml():
    tree = {}
    apply_override(tree, "a.b=[1, 2]")
    apply_override(tree, "a.c=null")
    assert tree == {"a": {"b": [1, 2], "c": None}}


def test_schema_lists_every_task_and_forbids_unknown_keys():
    schema = json_schema(RUNS)
    assert set(schema["discriminator"]["mapping"]) == {"a", "b"}
    assert schema["$defs"]["Train"]["additionalProperties"] is False


def test_read_yaml_is_plain_data(write):
    assert read_yaml(write("a: 1\nb: [x, y]\n")) == yaml.safe_load("{a: 1, b: [x, y]}")
