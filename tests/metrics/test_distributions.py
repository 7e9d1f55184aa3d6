import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

sys.path.insert(0, str(Path(__file__).parent))

import ranks_worker
from ranks_worker import Projection, batches, pictures

from dalle.errors import UserError
from dalle.metrics.distributions import (
    Moments,
    extract,
    frechet_distance,
    inception_score,
    kernel_distance,
    reference_statistics,
)

ROOT = Path(__file__).resolve().parents[2]


def features(seed: int, count: int = 400, dim: int = 24, shift: float = 0.0) -> torch.Tensor:
    """Skewed and correlated, as a network's pooled activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=torch.Generator().manual_seed(0))
    return (torch.randn(count, dim, generator=generator) @ mixing).relu() + shift


def gaussian(mean, covariance) -> Moments:
    covariance = torch.tensor(covariance, dtype=torch.float64)
    return Moments(1000, torch.tensor(mean, dtype=torch.float64), covariance * 999)


# ------------------------------------------------------------------------------------------------------------- moments

def test_moments_are_numpys():
    rows = features(1)
    moments = Moments.of(rows)
    np.testing.assert_allclose(moments.mean, rows.double().numpy().mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("cuts", [[200], [1, 399], [0, 10, 200, 400], list(range(1, 400))])
def test_moments_of_parts_merge_to_those_of_the_whole(cuts):
    rows = features(1, shift=1e4)      # sums of squares taken from zero would lose 8 digits here
    parts = [Moments.of(part) for part in torch.tensor_split(rows, cuts)]
    merged, whole = sum(parts[1:], start=parts[0]), Moments.of(rows)
    assert merged.count == whole.count
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=0)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-8, atol=1e-8)


def test_moments_come_back_from_their_file(tmp_path):
    moments = Moments.of(features(1))
    moments.save(tmp_path / "deep" / "moments.npz")
    loaded = Moments.load(tmp_path / "deep" / "moments.npz")
    assert loaded.count == moments.count
    assert torch.equal(loaded.mean, moments.mean) and torch.equal(loaded.scatter, moments.scatter)


def test_files_that_hold_no_moments(tmp_path):
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 and no more")
    np.savez(tmp_path / "other.npz", count=3, mean=np.zeros(2), scatter=np.zeros((3, 3)))
    np.savez(tmp_path / "objects.npz", count=np.array([print], dtype=object), mean=np.zeros(2), scatter=np.zeros(2))
    for name, words in (("torn", "not a readable npz"), ("other", "no moments"), ("objects", "not a readable npz"),
                        ("none", "no file")):
        with pytest.raises(UserError, match=words):
            Moments.load(tmp_path / f"{name}.npz")


# ----------------------------------------------------------------------------------------------------------------- FID

@pytest.mark.parametrize("count, allow_few", [(400, False), (12, True)])      # 12 rows of 24: a singular covariance
def test_fid_of_a_set_with_itself_is_nought(count, allow_few):
    moments = Moments.of(features(1, count))
    distance = frechet_distance(moments, moments, allow_few)
    assert abs(distance) <= 1e-12 * float(moments.covariance.trace())


def test_fid_of_a_set_with_itself_where_most_directions_are_empty():
    """At 100 rows of 512 the roots of the eigenvalues of A B, as others take them, are off by 1e-7 of the trace."""
    moments, shuffled = (Moments.of(rows) for rows in (features(1, 100, 512), features(1, 100, 512).flip(0)))
    assert abs(frechet_distance(moments, shuffled, allow_few=True)) <= 1e-12 * float(moments.covariance.trace())


def test_fid_of_two_gaussians_is_the_closed_form():
    first = gaussian([1.0, 2.0, 3.0], [[4.0, 0, 0], [0, 9, 0], [0, 0, 0]])
    second = gaussian([1.0, 0.0, 3.0], [[1.0, 0, 0], [0, 16, 0], [0, 0, 25]])
    assert frechet_distance(first, second) == pytest.approx(4 + 1 + 1 + 25, abs=1e-9)
    a, b = [[2.0, 1.0], [1.0, 3.0]], [[5.0, -2.0], [-2.0, 1.0]]      # do not commute
    product = np.array(a) @ np.array(b)
    root_trace = math.sqrt(np.trace(product) + 2 * math.sqrt(np.linalg.det(product)))      # of a 2 x 2 matrix
    distance = frechet_distance(gaussian([0.0, 0], a), gaussian([3.0, 4.0], b))
    assert distance == pytest.approx(25 + 5 + 6 - 2 * root_trace, abs=1e-9)


def test_fid_does_not_see_a_joint_rotation():
    first, second = features(1).double(), features(2, shift=0.2).double()
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    straight = frechet_distance(Moments.of(first), Moments.of(second))
    turned = frechet_distance(Moments.of(first @ turn), Moments.of(second @ turn))
    assert turned == pytest.approx(straight, rel=1e-9) and straight > 0.1


def test_fid_is_symmetric_and_a_pure_shift_is_its_square():
    first, second = Moments.of(features(1)), Moments.of(features(2))
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)
    moved = Moments(first.count, first.mean + 2, first.scatter)
    assert frechet_distance(first, moved) == pytest.approx(24 * 4, rel=1e-9)


def test_fid_of_equal_pictures_only():
    flat = Moments.of(torch.ones(30, 24))
    assert frechet_distance(flat, Moments.of(torch.zeros(30, 24))) == pytest.approx(24)


def test_fid_is_torch_fidelitys_and_torchmetrics():
    first, second = features(1), features(2, shift=0.1)
    ours = frechet_distance(Moments.of(first), Moments.of(second))
    statistics = [fid_features_to_statistics(rows) for rows in (first, second)]
    assert ours == pytest.approx(fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"], rel=1e-5)
    through = torch.nn.Identity()
    through.num_features = 24
    metric = FrechetInceptionDistance(feature=through)
    metric.update(first, real=True)
    metric.update(second, real=False)
    assert ours == pytest.approx(float(metric.compute()), rel=1e-5)


def test_fid_refuses_fewer_pictures_than_the_covariance_needs():
    enough, few = Moments.of(features(1, 25)), Moments.of(features(2, 24))
    with pytest.raises(UserError, match="over 24 features needs at least 25 .* the generated set has 24.*--allow-few"):
        frechet_distance(enough, few)
    with pytest.raises(UserError, match="the reference set has 24"):
        frechet_distance(few, enough)
    assert frechet_distance(enough, few, allow_few=True) > 0
    assert frechet_distance(enough, enough) == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="at least 2"):
        frechet_distance(enough, Moments.of(features(2, 1)), allow_few=True)


# ---------------------------------------------------------------------------------------------------------- KID and IS

def test_kid_by_hand():
    first, second = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])

    def kernel(a, b):
        return (float(a @ b) / 2 + 1) ** 3

    crossed = sum(kernel(a, b) for a in first for b in second) / 4
    expected = kernel(first[0], first[1]) + kernel(second[0], second[1]) - 2 * crossed
    mean, spread = kernel_distance(first, second, subsets=3, size=2)
    assert mean == pytest.approx(expected) and spread == pytest.approx(0, abs=1e-9)


def test_kid_is_torch_fidelitys_over_the_same_subsets():
    first, second = features(1), features(2, shift=0.1)
    theirs = kid_features_to_metric(second.double(), first.double(), kid_subsets=20, kid_subset_size=100,
                                    kid_kernel="poly", rng_seed=2020, verbose=False)
    ours = kernel_distance(first, second, subsets=20, size=100)
    assert ours[0] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)
    assert ours[1] == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-9)


def test_kid_refuses_subsets_larger_than_the_sets():
    with pytest.raises(UserError, match="subsets of 1000 needs at least 1000 .* 400 and 400"):
        kernel_distance(features(1), features(2))


def test_inception_score_is_one_for_equal_predictions_and_k_for_k_sure_classes():
    same = torch.tensor([[3.0, -1.0, 0.5]]).repeat(40, 1)
    assert inception_score(same) == pytest.approx((1.0, 0.0), abs=1e-12)
    sure = torch.nn.functional.one_hot(torch.arange(70) % 7).float() * 1e4
    assert inception_score(sure, splits=1) == pytest.approx((7.0, 0.0), abs=1e-9)


def test_inception_score_is_torch_fidelitys_for_any_count():
    for count in (400, 91, 11):
        logits = features(4, count)
        theirs = isc_features_to_metric(logits, splits=10)
        assert inception_score(logits) == pytest.approx(
            (theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-9)


def test_inception_score_is_torchmetrics_where_its_shuffle_does_not_matter():
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(features(4))
    with pytest.warns(UserWarning, match="degrees of freedom"):      # its deviation over one split
        theirs = float(metric.compute()[0])
    assert inception_score(features(4), splits=1)[0] == pytest.approx(theirs, rel=1e-4)


def test_inception_score_needs_a_picture_for_each_split():
    with pytest.raises(UserError, match="at least 10 pictures, not 9"):
        inception_score(features(1, 9))


def test_no_metric_depends_on_the_global_random_state():
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)
        values.append((kernel_distance(features(1), features(2), 5, 50), inception_score(features(4))))
    assert values[0] == values[1]


# ------------------------------------------------------------------------------------------------ processes and caching

def test_two_processes_measure_what_one_does(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    worker = Path(ranks_worker.__file__)
    ranks = [subprocess.Popen([sys.executable, str(worker), str(rank), "2", str(tmp_path)], env=environment,
                              stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    alone = ranks_worker.measure(0, 1, tmp_path / "alone")
    for rank in range(2):
        together = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert together["places"] == alone["places"] == list(range(ranks_worker.COUNT))
        for name in ("fid", "fid of merged moments", "is"):
            assert together[name] == pytest.approx(alone[name], rel=1e-6), name
        kid, kid_alone = (kernel_distance(*map(torch.tensor, measured["features"]), subsets=5, size=20)
                          for measured in (together, alone))
        assert kid == pytest.approx(kid_alone, rel=1e-6)


def test_extracting_keeps_places_and_takes_both_outputs_in_one_pass():
    calls = []

    class Counting(Projection):
        def __call__(self, images):
            calls.append(len(images))
            return super().__call__(images)

    images = pictures(0)
    out = extract(Counting(), batches(images, 1, 2))
    assert out.places.tolist() == list(range(1, len(images), 2)) and sum(calls) == len(out.places)
    torch.testing.assert_close(out.features, Projection()(images[1::2])[0])
    torch.testing.assert_close(out.logits, Projection()(images[1::2])[1])


def test_a_place_that_was_measured_twice_counts_once():
    images = pictures(0)
    twice = [(torch.tensor([4, 1]), images[[4, 1]]), (torch.tensor([1, 0]), images[[1, 0]])]
    out = extract(Projection(), twice).over_ranks()
    assert out.places.tolist() == [0, 1, 4]
    torch.testing.assert_close(out.features, Projection()(images[[0, 1, 4]])[0])


def test_reference_is_cached_under_everything_it_depends_on(tmp_path):
    key = {"data": "abc", "size": 4, "split": "validation", "limit": 37}
    first = reference_statistics(Projection(), batches(pictures(0), 0, 1), key, tmp_path)
    untouched = ranks_worker.iter_of_nothing()
    again = reference_statistics(Projection(), untouched, key, tmp_path)
    assert torch.equal(again.features, first.features) and torch.equal(again.moments.scatter, first.moments.scatter)

    sharper = Projection()
    sharper.digest = "1" * 16
    for extractor, other in ((sharper, key), (Projection(), {**key, "data": "abd"}), (Projection(), {**key, "size": 8}),
                             (Projection(), {**key, "blur": 2})):
        with pytest.raises(AssertionError, match="must not be read again"):
            reference_statistics(extractor, ranks_worker.iter_of_nothing(), other, tmp_path)


def test_reference_without_features_is_measured_again_for_kid(tmp_path):
    only_moments = reference_statistics(Projection(), batches(pictures(0), 0, 1), {}, tmp_path, with_features=False)
    assert only_moments.features is None
    with pytest.raises(AssertionError, match="must not be read again"):
        reference_statistics(Projection(), ranks_worker.iter_of_nothing(), {}, tmp_path)
    whole = reference_statistics(Projection(), batches(pictures(0), 0, 1), {}, tmp_path)
    assert len(whole.features) == 37
    assert reference_statistics(Projection(), ranks_worker.iter_of_nothing(), {}, tmp_path, False).features is None


def test_a_damaged_cache_is_said_and_measured_again(tmp_path, caplog):
    first = reference_statistics(Projection(), batches(pictures(0), 0, 1), {}, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:500])
    again = reference_statistics(Projection(), batches(pictures(0), 0, 1), {}, tmp_path)
    assert torch.equal(again.features, first.features) and "measured again" in caplog.text
    assert reference_statistics(Projection(), ranks_worker.iter_of_nothing(), {}, tmp_path).moments.count == 37
