import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from evaluation_stubs import MeanColour, Redness, StubGenerator, stub_job  # noqa: E402

from dalle.evaluation import measure  # noqa: E402
from dalle.evaluation.job import Job  # noqa: E402
from dalle.evaluation.processes import Processes  # noqa: E402
from dalle.store import Origin  # noqa: E402


@pytest.fixture(scope="session")
def split(tmp_path_factory) -> str:
    """Twenty-four pictures of shapes, 16 pixels, ten captions each."""
    from dalle.data.shapes.making import ShapesConfig, make_shapes

    folder = tmp_path_factory.mktemp("split")
    make_shapes(ShapesConfig(count=4, validation=24, size=16, samples_per_shard=10), folder)
    return str(folder / "validation")


@pytest.fixture
def job(split, tmp_path) -> Job:
    return stub_job(split, tmp_path / "out", tmp_path / "cache")


@pytest.fixture
def evaluate(monkeypatch):
    """``evaluate(job, **changes)`` of a stub generator: its results, and the generator."""
    monkeypatch.setattr(measure, "load_extractor", lambda spec, device: MeanColour())
    monkeypatch.setattr(measure, "name_of", lambda spec, identity: "redness")

    def run(job: Job, generator: StubGenerator | None = None, **changes):
        generator = generator or StubGenerator()
        results = measure.evaluate_generator(replace(job, **changes), generator, Redness(), Origin(7, "EMA"),
                                             Processes(), lambda line: None)
        return results, generator

    return run
