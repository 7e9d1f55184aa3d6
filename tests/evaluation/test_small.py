"""The small evaluation of a training run finds what the large one finds on the same pictures."""

import pytest
import torch
from evaluation_stubs import MeanColour, StubGenerator
from pydantic import ValidationError

from dalle.errors import UserError
from dalle.evaluation import small
from dalle.evaluation.small import SmallEvaluation
from dalle.evaluation.small_config import SmallEvaluationConfig


@pytest.fixture
def make(split, monkeypatch):
    monkeypatch.setattr(small, "load_extractor", lambda spec, device: MeanColour())

    def build(validation=split, **settings):
        config = SmallEvaluationConfig(**{"samples": 20, "extractor": "stub", **settings})
        return SmallEvaluation(config, validation, seed=0, device="cpu")

    return build


def test_figures_are_those_of_the_large_one(make, job, evaluate):
    large, _ = evaluate(job, candidates=(1,), metrics=("fid", "kid", "is", "judge"))
    found = make(metrics=("fid", "kid", "is", "judge"))(StubGenerator())
    assert found.pop("samples") == 20
    assert found == pytest.approx({row.metric: row.value for row in large.rows}, rel=1e-6, nan_ok=True)


def test_it_is_the_same_at_every_call_and_under_autocast(make):
    measured, generator = make(), StubGenerator()
    first = measured(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert measured(generator) == first
    assert generator.painted[:20] == generator.painted[20:]


def test_what_is_missing_is_named_before_the_training(make):
    for settings, message in (({"validation": None}, "data.validation"),
                              ({"extractor": None}, "needs evaluation.extractor"),
                              ({"metrics": ("clip",)}, "needs evaluation.clip"),
                              ({"metrics": ("is",), "samples": 9}, "samples of 10 or more"),
                              ({"samples": 100000}, "different captions")):
        with pytest.raises(UserError, match=message):
            make(**settings)
    with pytest.raises(ValidationError):
        make(metrics=("psnr",))
