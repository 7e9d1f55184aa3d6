"""What a run's config already decides is refused before anything starts, not in its first step."""

from pathlib import Path

import pytest
from published import Published, published

import gans
from dalle.config import load_config
from dalle.errors import UserError
from dalle.tasks import RUNS
from gans import SYSTEMS
from gans.task import GANRun, StabiliserConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

gans.register()


def refusal(name: str, *overrides: str) -> str:
    """The line that the small config with ``overrides`` is refused with; empty where it is not."""
    path = CONFIGS / "gans" / f"{name}_shapes.yaml" if name in SYSTEMS else CONFIGS / "quickstart" / f"{name}.yaml"
    try:
        load_config(path, overrides, RUNS)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", [*SYSTEMS, "transformer", "clip"])
def test_several_captions_are_averaged_or_refused(name):
    said = refusal(name, "data.num_captions=4")
    if name in SYSTEMS and not published(name).one_caption:
        assert said == ""
    else:
        assert f"data.num_captions is 4, but a {name} run reads one caption of each sample: leave it out" in said


def test_captions_that_are_compared_are_several():
    assert refusal("ds_sje", "loss.pairs=captions", "model.trunk=null", "data.num_captions=2") == ""
    assert "set data.num_captions to 2" in refusal("ds_sje", "loss.pairs=captions", "model.trunk=null")


@pytest.mark.parametrize("name", [*SYSTEMS, "clip"])
def test_a_batch_of_one_is_refused_where_samples_are_compared(name):
    known = published(name) if name in SYSTEMS else Published()
    said = refusal(name, "train.batch_size=1", *known.unpaired)
    assert "set train.batch_size to 2 or more" in said if known.compares else said == ""


def test_a_batch_of_one_is_a_batch_where_nothing_is_compared():
    assert refusal("gan_int_cls", "train.batch_size=1", "loss.mismatched=0", "loss.interpolated=0") == ""
    assert refusal("stackgan_v2", "train.batch_size=1", "generator.conditional=false", "text_encoder=null") == ""


@pytest.mark.parametrize("name", [name for name, system in SYSTEMS.items() if system.paints])
def test_what_reads_captions_and_pictures_is_given_both(name):
    assert f"a {name} run reads captions, but data.caption is none" in refusal(name, "data.caption=none",
                                                                                                "data.num_captions=1")
    assert "trained on pictures" in refusal(name, "data.images=false", "data.codes=somewhere")


def test_systems_without_a_text_need_no_captions():
    classes = ["text_encoder=null", "data.caption=none", "preview.captions=['class:1']", "standardise_text=false"]
    assert refusal("acgan", *classes) == ""
    assert refusal("stackgan_v2", "generator.conditional=false", "text_encoder=null", "data.caption=none") == ""
    assert "reads one caption" in refusal("stackgan_v2", "generator.conditional=false", "text_encoder=null",
                                          "data.num_captions=4")


def test_an_odd_batch_cannot_be_paired():
    assert "train.batch_size 31 must be even" in refusal("gan_int_cls", "train.batch_size=31")
    assert refusal("gan_int_cls", "train.batch_size=31", "loss.interpolated=0") == ""


def test_a_preview_of_a_class_that_the_model_does_not_have():
    assert "preview.captions: class:48 is out of range" in refusal("acgan", "preview.captions=['class:48']")
    assert refusal("acgan", "preview.captions=['class:47']") == ""


OWN = "folder_"         # configs for own pictures begin so


@pytest.mark.parametrize("path", sorted(path for path in (CONFIGS / "gans").glob("*.yaml")
                                        if not path.stem.endswith(("_shapes", "_emoji"))
                                        and not path.stem.startswith(OWN)), ids=lambda path: path.stem)
def test_the_papers_configs_have_nothing_that_the_papers_have_not(path):
    config = load_config(path, [], RUNS)
    if isinstance(config, GANRun):
        assert config.stabiliser == StabiliserConfig() and not config.standardise_text
        assert not getattr(config.generator, "halves", False)       # Skip-Thought's: no encoder here gives them
