"""The runs that a run reads: their order, how far they are, training them, and the lines about what is missing."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import pytest
import yaml

from dalle.config import load_config, resume_rule
from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import MissingModel, UserError
from dalle.training.prerequisites import (
    OF_THE_MODEL,
    check_data,
    missing_runs_explained,
    passed_on,
    prerequisites,
    train_prerequisites,
)
from dalle.training.run import RunConfig
from dalle.training.signals import run_in_turn, run_to_its_end

RUNS = {"any": RunConfig}


def write(folder: Path, name: str, *needs: str) -> str:
    tree = {"task": "any", "name": name, "output": str(folder / "runs"), "data": {"train": "x", "caption": "none"},
            "train": {"steps": 10}, "prerequisites": [str(folder / f"{need}.yaml") for need in needs]}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return str(path)


def needed_by(path: str):
    return prerequisites(path, RunConfig.model_validate(yaml.safe_load(Path(path).read_text())), RUNS)


def finish(folder: Path, name: str, steps: int = 10) -> None:
    run = folder / "runs" / name
    for part in ("checkpoints", "model"):
        (run / part).mkdir(parents=True, exist_ok=True)
    (run / "model" / "config.json").write_text("{}")
    (run / "finished").write_text(json.dumps({"step": steps}))


@pytest.fixture
def chain(tmp_path) -> str:
    """last needs third and second, which both need first."""
    write(tmp_path, "first")
    write(tmp_path, "second", "first")
    write(tmp_path, "third", "second", "first")
    return write(tmp_path, "last", "third", "second")


def test_each_run_comes_once_and_after_what_it_needs(chain):
    assert [one.config.name for one in needed_by(chain)] == ["first", "second", "third"]


def test_where_the_data_is_holds_for_what_a_run_reads(tmp_path, trainer):
    write(tmp_path, "first")
    write(tmp_path, "second", "first")
    path = write(tmp_path, "last", "second")
    shared = ("data.train=mine", "data.validation=held out", "data.workers=0", "data.max_bad_fraction=0.5")
    own = ("data.image_size=32", "data.codes=c", "data.crop=random", "output=elsewhere", "seed=3", "train.steps=2")
    config = load_config(path, [*shared, *own], RUNS)
    needed = prerequisites(path, config, RUNS, [*own, *shared])
    for one in needed:
        assert one.overrides == shared and one.config.data.train == "mine" and one.config.data.image_size == 256
        assert one.config.output == str(tmp_path / "runs") and one.config.train.steps == 10
        assert one.command.endswith(".yaml data.train=mine 'data.validation=held out' data.workers=0 "
                                    "data.max_bad_fraction=0.5")
    said = []
    assert train_prerequisites(needed, trainer, True, said.append) == 0
    assert f"(python launch/train.py {tmp_path}/first.yaml data.train=mine 'data.validation=held out'" in said[0]
    assert (tmp_path / "given").read_text().splitlines()[0] == str(list(shared))


@pytest.mark.parametrize(("given", "has", "passed"), [
    ("data/mine/tokenizer", "data/shapes/tokenizer", True),
    ("data/mine/tokenizer", None, False),                                            # it reads no captions
    ("runs/quickstart/clip/model/tokenizer", "data/shapes/tokenizer", False),        # the prerequisite's own
])
def test_a_tokenizer_is_passed_on_to_a_run_that_has_one_of_a_data_set(given, has, passed):
    data = {"train": "x", **({"tokenizer": has} if has else {})}
    one = RunConfig.model_validate({"task": "any", "name": "one", "data": data})
    assert passed_on([f"data.tokenizer={given}"], one) == ((f"data.tokenizer={given}",) if passed else ())


def test_the_keys_that_are_not_passed_on_exist():
    assert DataConfig.model_fields.keys() > OF_THE_MODEL


def test_a_circle_and_a_config_that_is_not_there_are_refused(tmp_path):
    path = write(tmp_path, "a", "b")
    with pytest.raises(UserError, match=r"prerequisites of .*a\.yaml: no config file at .*b\.yaml"):
        needed_by(path)
    write(tmp_path, "b", "c")
    write(tmp_path, "c", "a")
    with pytest.raises(UserError, match=r"circle: .*a\.yaml needs .*b\.yaml needs .*c\.yaml needs .*a\.yaml$"):
        needed_by(path)


def test_how_far_a_run_is(chain, tmp_path):
    first = needed_by(chain)[0]
    assert first.state == "missing"
    (tmp_path / "runs/first/checkpoints").mkdir(parents=True)
    assert first.state == "unfinished"
    finish(tmp_path, "first", steps=9)           # the config asks for more steps than it was trained for
    assert first.state == "unfinished"
    finish(tmp_path, "first")
    assert first.state == "finished"
    (tmp_path / "runs/first/finished").write_text("{")
    assert first.state == "unfinished"


def test_a_model_that_was_brought_from_elsewhere_is_finished(chain, tmp_path):
    (tmp_path / "runs/first/model").mkdir(parents=True)
    (tmp_path / "runs/first/model/config.json").write_text("{}")
    assert needed_by(chain)[0].state == "finished"


@pytest.fixture
def trainer(tmp_path) -> list[str]:
    """A stand-in for launch/train.py: notes its config and finishes the run, or fails where a file `fail` says so."""
    script = tmp_path / "trainer.py"
    script.write_text(f"""
import json, os, pathlib, sys, yaml
here = pathlib.Path({str(tmp_path)!r})
name = yaml.safe_load(open(sys.argv[1]))["name"]
with open(here / "done", "a") as file: print(name, os.environ.get("RANK"), file=file)
with open(here / "given", "a") as file: print(sys.argv[2:], file=file)
if (here / "fail").exists() and (here / "fail").read_text() == name: sys.exit(7)
for part in ("checkpoints", "model"): (here / "runs" / name / part).mkdir(parents=True)
(here / "runs" / name / "model" / "config.json").write_text("{{}}")
(here / "runs" / name / "finished").write_text(json.dumps({{"step": 10}}))
""")
    return [sys.executable, str(script)]


def done(folder: Path) -> list[str]:
    path = folder / "done"
    return path.read_text().splitlines() if path.exists() else []


def test_what_is_missing_is_trained_in_order_by_one_process_alone(chain, tmp_path, trainer, monkeypatch):
    finish(tmp_path, "second")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    said = []
    assert train_prerequisites(needed_by(chain), trainer, True, said.append) == 0
    assert done(tmp_path) == ["first None", "third None"]
    assert len(said) == 2 and "runs/first is missing" in said[0] and f"train.py {tmp_path}/first.yaml" in said[0]
    assert train_prerequisites(needed_by(chain), trainer, True, said.append) == 0 and len(said) == 2


def test_the_status_of_the_first_that_fails_ends_it(chain, tmp_path, trainer):
    (tmp_path / "fail").write_text("second")
    said = []
    assert train_prerequisites(needed_by(chain), trainer, True, said.append) == 7
    assert done(tmp_path) == ["first None", "second None"]
    assert "second.yaml ended with status 7" in said[-1]


def test_the_other_processes_wait_until_all_are_finished(chain, tmp_path, trainer, monkeypatch):
    monkeypatch.setattr("dalle.training.prerequisites.SECONDS_BETWEEN_LOOKS", 0.01)
    ended = []
    waiting = threading.Thread(target=lambda: ended.append(
        train_prerequisites(needed_by(chain), trainer, False, ended.append)))
    waiting.start()
    finish(tmp_path, "first")
    finish(tmp_path, "second")
    time.sleep(0.1)
    assert waiting.is_alive() and not ended
    finish(tmp_path, "third")
    waiting.join(10)
    assert ended == [0] and not done(tmp_path)


@contextmanager
def sent_once_up(tmp_path: Path, number: int) -> Iterator[list[str]]:
    """A command that ends with 75 at a SIGTERM or a SIGINT, and a thread that sends this process one once it is up."""
    script = ("import pathlib, signal, sys, time\n"
              "for number in (15, 2): signal.signal(number, lambda *_: sys.exit(75))\n"
              f"pathlib.Path({str(tmp_path / 'up')!r}).touch()\ntime.sleep(60)\n")

    def stop() -> None:
        while not (tmp_path / "up").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    yield [sys.executable, "-c", script]
    thread.join()


@pytest.mark.parametrize("number", [15, 2])
def test_a_signal_to_stop_reaches_the_run_and_its_status_comes_back(tmp_path, number):
    with sent_once_up(tmp_path, number) as command:
        assert run_to_its_end(command) == 75


@pytest.mark.parametrize("number", [15, 2])
def test_after_a_signal_no_other_stage_follows(tmp_path, number):
    with sent_once_up(tmp_path, number) as command, pytest.raises(SystemExit) as ended:
        run_in_turn(command)
    assert ended.value.code == 75


def test_a_run_that_was_killed_has_the_status_of_a_shell():
    assert run_to_its_end([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


def missing(path: Path) -> None:
    try:
        raise MissingModel(f"{path} does not exist", path)
    except UserError as error:
        raise UserError(f"text_encoder: {error}") from error


@pytest.mark.parametrize(("run", "hint"), [
    ("first", "; make it first: python launch/train.py {here}/first.yaml, or add --with-prerequisites"),
    ("first/model", "; make it first: python launch/train.py {here}/first.yaml, or add --with-prerequisites"),
    ("other", "; make it first: python launch/train.py {here}/other.yaml"),
    ("nowhere", ""),
])
def test_the_error_about_a_missing_run_ends_with_how_to_make_it(chain, tmp_path, run, hint):
    write(tmp_path, "other")                 # beside it, but not declared
    (tmp_path / "broken.yaml").write_text("[")
    with pytest.raises(UserError) as caught, missing_runs_explained(chain, partial(needed_by, chain)):
        missing(tmp_path / "runs" / run)
    folder = tmp_path / "runs" / run
    assert str(caught.value) == f"text_encoder: {folder} does not exist{hint.format(here=tmp_path)}"


def test_other_errors_stay_as_they_are(chain):
    with pytest.raises(UserError, match="^too small$"), missing_runs_explained(chain, lambda: []):
        raise UserError("too small")


@pytest.mark.parametrize(("changes", "line"), [
    ({"train": "data/shapes/train"},
     "data.train: data/shapes/train does not exist; make it first: python tools/make_shards.py shapes "
     "--out data/shapes"),
    ({"train": "/there/data/emoji/train/{00..03}.tar"},
     "data.train: /there/data/emoji/train does not exist; make it first: python tools/make_shards.py emoji "
     "--out /there/data/emoji --install"),
    ({"train": "x::data/shapes/validation"}, "data.train: data/shapes/validation does not exist; make it first: python "
     "tools/make_shards.py shapes --out data/shapes"),
    ({"train": "x", "tokenizer": "data/shapes/tokenizer"},
     "data.tokenizer: data/shapes/tokenizer does not exist; make it first: python tools/train_tokenizer.py "
     "data/shapes/train --out data/shapes/tokenizer --vocab-size 512"),
])
def test_data_of_the_project_that_was_not_made_yet(changes, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        check_data(DataConfig(**changes))
    assert str(caught.value) == line


def test_all_that_the_data_names_is_looked_for_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/0.tar", "a/1.tar", "b/0.tar"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")                       # shards are not read
    CaptionTokenizer.train_words(["a"]).save("t")
    Path("c").mkdir()
    Path("c/codes.json").write_text("{}")
    good = {"train": "a/{0..1}.tar::b", "validation": "b", "tokenizer": "t", "codes": "c", "validation_codes": "c"}
    before = sorted(tmp_path.rglob("*"))
    check_data(DataConfig(**good))
    assert sorted(tmp_path.rglob("*")) == before
    for key, value, words in (
        ("train", "a/{0..2}.tar", "a/2.tar does not exist"), ("train", "typo", "there is no folder typo"),
        ("train", "c", r"no \.tar shard there"), ("validation", "typo", "no folder typo.*set data.validation=null"),
        ("tokenizer", "a", "no tokenizer in a"), ("codes", "a", "no cached codes in a"),
        ("validation_codes", "a", "no cached codes in a"),
    ):
        with pytest.raises(UserError, match=rf"^data\.{key}: .*{words}"):
            check_data(DataConfig(**{**good, key: value}))


@pytest.mark.parametrize(("spec", "words"), [
    ("a/{0..1}.tar", None), ("https://host/{0..1}.tar", None), ("a/{0..2}.tar", "a/2.tar does not exist"),
    ("typo/*.tar", "no shard matches"), ("pipe:cat x", "would run a shell command"),
])
def test_the_shards_of_a_stream_are_looked_for_where_they_are_files(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    for name in ("a/0.tar", "a/1.tar"):
        Path(name).write_bytes(b"")
    with pytest.raises(UserError, match=words) if words else nullcontext():
        check_data(DataConfig(train=spec, tier="sequential"))


def test_prerequisites_may_change_at_a_resume():
    assert resume_rule(RunConfig, "prerequisites") == "free" and resume_rule(RunConfig, "seed") == "fixed"
