"""Figures of shares against those of the whole, and the meter between two lines."""

import math

import pytest
import torch

from dalle.training.figures import Max, Mean, Perplexity, Used, joined_values, numbers_of
from dalle.training.meter import Meter


def test_a_mean_weighs_its_shares():
    one, other = Mean(), Mean()
    one.add(2.0, count=3)
    other.add(torch.tensor(6.0))
    assert joined_values([{"error": one}, {"error": other}, {}]) == {"error": 3.0}
    assert math.isnan(joined_values([{"error": Mean()}])["error"])


def test_shares_of_a_histogram_are_added_before_anything_is_made_of_them():
    """Two ranks with four codes each of which two are the same: 6 used, not 4; entropy by hand."""
    shares = [torch.tensor([1, 1, 1, 1, 0, 0, 0]), torch.tensor([0, 0, 1, 1, 1, 1, 0])]
    values = joined_values([{"used": Used(counts), "perplexity": Perplexity(counts)} for counts in shares])
    entropy = 4 / 8 * math.log(8) + 4 / 8 * math.log(4)
    assert values == {"used": 6, "perplexity": pytest.approx(math.exp(entropy))}
    assert Perplexity(torch.zeros(3, dtype=torch.int64)).value == 0


def test_the_largest_of_all_shares():
    assert joined_values([{"logit": Max(3.0)}, {"logit": Max()}, {"logit": Max(7.0)}]) == {"logit": 7.0}
    assert math.isnan(Max().value)


def test_the_meter_averages_or_takes_the_largest_of_what_is_finite_and_starts_over():
    meter = Meter()
    for loss, logit in ((1.0, 5.0), (2.0, 9.0), (float("nan"), float("inf")), (6.0, 8.0)):
        meter.add("loss", torch.tensor(loss))
        meter.add("logit", Max(torch.tensor(logit)))
    figures, _, _ = meter.read()
    assert joined_values([figures]) == {"loss": 3.0, "logit": 9.0}
    meter.add("logit", Max(torch.tensor(1.0)))
    assert joined_values([meter.read()[0]]) == {"logit": 1.0}


class Elsewhere(torch.Tensor):
    """On another device."""

    is_cpu = False


def test_numbers_of_several_devices_come_in_their_order():
    here, there = torch.tensor(1.0), torch.tensor([2.0]).as_subclass(Elsewhere)
    assert numbers_of([here, there, torch.tensor(3, dtype=torch.int32), there + 2]) == [1.0, 2.0, 3.0, 4.0]
    assert numbers_of([]) == []
