"""Generators that edit: which pictures they are given, that a stop or more processes change none, and the protocol."""

from collections import Counter

import pytest
import torch
from evaluation_stubs import StubEditor, StubGenerator, png

from dalle.data.index import ShardIndex
from dalle.data.writer import ShardWriter
from dalle.errors import UserError
from dalle.evaluation import pictures
from dalle.evaluation.captions import Drawn, draw_captions
from dalle.evaluation.protocol import Row, differences
from dalle.evaluation.references import ShardReferences, read_pictures
from dalle.evaluation.small import SmallEvaluation
from dalle.evaluation.small_config import SmallEvaluationConfig
from dalle.evaluation.sources import PROTOCOL, Sources, other_than
from dalle.sampling.candidates import candidate_seed


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(pictures, "BLOCK_CAPTIONS", 2)


def test_another_sample_is_drawn_evenly_and_never_the_own():
    for own in range(5):
        drawn = Counter(other_than(own, 5, seed, 3) for seed in range(800))
        assert drawn.keys() == set(range(5)) - {own}
        assert all(150 < count < 250 for count in drawn.values())
    assert [other_than(2, 9, 7, place) for place in range(20)] == [other_than(2, 9, 7, place) for place in range(20)]


def expected(job) -> torch.Tensor:
    """uint8 [samples, 3, S, S]: the source of each caption, by the rule."""
    index = ShardIndex.load(job.data)
    drawn, references = draw_captions(index, job.samples, job.seed)[0], ShardReferences(job.data, index)
    numbers = [other_than(one.position, len(references), job.seed, place) for place, one in enumerate(drawn)]
    assert all(number != one.position for number, one in zip(numbers, drawn, strict=True)) and len(set(numbers)) > 5
    return torch.cat([read_pictures(references, [number], 16)[0] for number in numbers])


def test_each_caption_changes_its_source_in_all_its_candidates(job, evaluate):
    sources = expected(job)
    results, generator = evaluate(job, StubEditor(), candidates=(1, 3), metrics=("kid",))
    assert torch.equal(torch.stack(generator.sources), sources.repeat_interleave(3, dim=0))
    assert generator.painted[4][1] == candidate_seed(job.seed, 1, 1)
    row = results.rows[0]
    assert row.protocol.sources == PROTOCOL == "edits: pictures of other samples"
    assert PROTOCOL in row.protocol.sentence() and Row.from_flat(row.flat()) == row


def test_what_was_painted_is_kept_and_a_stop_changes_no_source(job, evaluate):
    class Stops(StubEditor):
        def generate(self, captions, seeds, **options):
            if len(self.painted) >= 24:
                raise KeyboardInterrupt
            return super().generate(captions, seeds, **options)

    with pytest.raises(KeyboardInterrupt):
        evaluate(job, Stops(), metrics=("kid",))
    again, generator = evaluate(job, StubEditor(), metrics=("kid",))
    assert len(generator.painted) == 60 - 24
    assert torch.equal(torch.stack(generator.sources), expected(job).repeat_interleave(3, dim=0)[24:])
    _, generator = evaluate(job, StubEditor(), metrics=("kid",))
    assert not generator.painted
    assert again.rows


def test_an_edit_is_not_compared_with_a_picture_painted_from_nothing(job, evaluate):
    painted, _ = evaluate(job, StubGenerator(), metrics=("kid",))
    edited, _ = evaluate(job, StubEditor(), metrics=("kid",))
    assert painted.rows[0].protocol.sources is None
    assert differences(painted.rows[0].protocol, edited.rows[0].protocol) == [
        f"pictures that are edited: None against {PROTOCOL}"]


def test_the_small_evaluation_edits_the_same_pictures_at_every_call(job, split, monkeypatch):
    from dalle.evaluation import small

    monkeypatch.setattr(small, "BATCH", 8)
    config = SmallEvaluationConfig(metrics=("judge",), samples=job.samples)
    measured, generator = SmallEvaluation(config, split, job.seed, "cpu"), StubEditor()
    assert measured(generator) == measured(generator)
    found = torch.stack(generator.sources)
    assert torch.equal(found[:20], expected(job)) and torch.equal(found[20:], expected(job))


def test_pictures_that_cannot_be_read_are_passed_over(tmp_path):
    with ShardWriter(tmp_path / "bad", 4) as writer:
        for number in range(4):
            writer.write(b"no picture" if number != 2 else png(), "png", ["a"])
    references = ShardReferences(str(tmp_path / "bad"))
    sources = Sources(references, [Drawn("a", 0), Drawn("b", 3)], seed=0)
    assert torch.equal(sources.pictures([0, 1], 16), read_pictures(references, [2, 2], 16)[0])
    with pytest.raises(UserError, match="no picture to edit can be read among 3 in a row"):
        Sources(references, [Drawn("a", 2)], seed=0).pictures([0], 16)


def test_a_split_of_one_picture_has_no_other(tmp_path):
    with ShardWriter(tmp_path / "one", 4) as writer:
        writer.write(b"x", "png", ["a"])
    with pytest.raises(UserError, match="holds 1 picture: an edit starts from another sample's"):
        Sources(ShardReferences(str(tmp_path / "one")), [Drawn("a", 0)], seed=0)
