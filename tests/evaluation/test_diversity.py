"""MS-SSIM over pairs of one class: which pairs, of what, and what the rows say."""

from collections import Counter

import pytest
import torch

from dalle.data.decode import BadSample
from dalle.data.index import ShardIndex
from dalle.evaluation import measure, pictures
from dalle.evaluation.captions import draw_captions
from dalle.evaluation.diversity import classes_of, same_class_pairs, similarity_of_pairs, similarity_of_real
from dalle.evaluation.references import ShardReferences, read_pictures
from dalle.evaluation.report import to_markdown
from dalle.metrics.images import ms_ssim
from dalle.sampling.candidates import candidate_seed


def test_every_member_of_a_class_stands_in_two_pairs():
    classes = torch.tensor([0] * 7 + [1] * 2 + [2] + [-1] * 5 + [3] * 30)
    pairs = same_class_pairs(classes, seed=4)
    first, second = classes[pairs].T
    assert torch.equal(first, second) and bool((first >= 0).all())
    assert bool((pairs[:, 0] != pairs[:, 1]).all())
    assert len({frozenset(pair) for pair in pairs.tolist()}) == len(pairs) == 7 + 1 + 30
    often = Counter(pairs.flatten().tolist())
    assert all(often[number] == (2 if classes[number] in (0, 3) else 1) for number in often)
    assert torch.equal(pairs, same_class_pairs(classes, seed=4))
    assert not torch.equal(pairs, same_class_pairs(classes, seed=5))
    few = same_class_pairs(classes, seed=4, most=11)
    assert len(few) == 11 and {tuple(pair) for pair in few.tolist()} <= {tuple(pair) for pair in pairs.tolist()}


def test_without_two_of_a_class_there_are_no_pairs():
    assert same_class_pairs(torch.tensor([-1, -1, 0, 1]), seed=0).shape == (0, 2)
    pictures = torch.zeros(4, 3, 16, 16, dtype=torch.uint8)
    assert similarity_of_pairs(pictures, torch.empty(0, 2, dtype=torch.int64)).shape == (0,)


def test_copies_are_not_diverse():
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images[1] = images[0]
    same, different = similarity_of_pairs(images, torch.tensor([[0, 1], [0, 2]])).tolist()
    assert same == pytest.approx(1, abs=1e-5) and different < 0.3


def test_rows_say_how_alike_the_painted_and_the_real_pictures_of_a_class_are(job, evaluate, monkeypatch):
    monkeypatch.setattr(measure, "classes_of", lambda index, drawn: torch.arange(len(drawn)) % 3)
    results, generator = evaluate(job, metrics=("msssim",))
    index = ShardIndex.load(job.data)
    drawn, _ = draw_captions(index, job.samples, job.seed)
    pairs = same_class_pairs(torch.arange(job.samples) % 3, job.seed)
    references = ShardReferences(job.data, index)
    real = torch.stack([ms_ssim(*(read_pictures(references, [drawn[number].position], 16)[0].float() / 255
                                  for number in pair))[0] for pair in pairs.tolist()])
    for count in job.candidates:
        rows = {row.family: row for row in results.rows if row.protocol.candidates == count}
        assert rows["ms-ssim-real"].value == pytest.approx(float(real.mean()), abs=1e-5)
        assert 0 < rows["ms-ssim"].value < 1 and rows["ms-ssim"].error > 0
        assert rows["ms-ssim"].protocol.detail.startswith(f"{job.samples} pairs of one class, 1 scales")
        assert rows["ms-ssim"].protocol.captions == job.data
    report = to_markdown(results)
    assert report.count("| ms-ssim | ") == report.count("| ms-ssim-real | ") == 1 + len(job.candidates)


def test_pairs_of_real_pictures_with_an_unreadable_one_are_left_out(split, monkeypatch):
    index = ShardIndex.load(split)
    drawn, _ = draw_captions(index, 6, 0)
    references, pairs = ShardReferences(split, index), torch.tensor([[0, 1], [2, 3], [4, 5]])
    everything = similarity_of_real(references, drawn, pairs, 16)
    whole = references.picture

    def damaged(number, size):
        if number == drawn[2].position:
            raise BadSample("damaged_image")
        return whole(number, size)

    monkeypatch.setattr(references, "picture", damaged)
    assert torch.equal(similarity_of_real(references, drawn, pairs, 16), everything[[0, 2]])


def test_classes_are_those_of_the_samples_each_once(split):
    index = ShardIndex.load(split)
    drawn, _ = draw_captions(index, 40, 0)       # of 24 samples
    classes = classes_of(index, drawn)
    first = [one.position not in [other.position for other in drawn[:number]] for number, one in enumerate(drawn)]
    assert [number >= 0 for number in classes.tolist()] == first and sum(first) == 24
    assert len(classes.unique()) > 2


def test_only_the_pictures_of_the_pairs_are_taken(job, evaluate, monkeypatch):
    """Whatever the block and the row of a caption's picture are."""
    monkeypatch.setattr(measure, "classes_of", lambda index, drawn: torch.tensor([5, 6] + [-1] * 16 + [6, 5]))
    monkeypatch.setattr(pictures, "BLOCK_CAPTIONS", 6)
    results, generator = evaluate(job, metrics=("msssim",))
    drawn, _ = draw_captions(ShardIndex.load(job.data), job.samples, job.seed)
    flat = [generator.generate([drawn[number].caption], [candidate_seed(job.seed, number, 0)])[0].float() / 255
            for number in (0, 19, 1, 18)]
    expected = ms_ssim(torch.stack(flat[::2]), torch.stack(flat[1::2]))
    row = next(row for row in results.rows if row.family == "ms-ssim" and row.protocol.candidates == 1)
    assert row.value == pytest.approx(float(expected.mean()), abs=1e-5)


def test_data_without_classes_are_left_out_with_the_reason(job, evaluate, monkeypatch):
    monkeypatch.setattr(measure, "classes_of", lambda index, drawn: torch.full((len(drawn),), -1))
    results, _ = evaluate(job, metrics=("msssim", "fid"))
    assert "share no class_id" in results.left_out["msssim"]
    assert not [row for row in results.rows if row.family.startswith("ms-ssim")]
