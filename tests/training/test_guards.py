"""The guards against their definitions: which batch a step takes, what a spike is, when skipping must end."""

import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dalle.errors import LostProcess, UserError
from dalle.training.guards import (
    KEYS_SHOWN,
    BatchNumbers,
    SkipCounter,
    SpikeConfig,
    SpikeWatch,
    lost_processes_named,
)
from dalle.training.task import Phase

EXCLUDED = st.lists(st.integers(0, 30), max_size=12)


# -- batch numbers

def by_definition(excluded, steps: int) -> list[int]:
    """The batches of the first ``steps`` steps: all that are not left out, in order."""
    return list(itertools.islice((number for number in itertools.count() if number not in excluded), steps))


@given(EXCLUDED)
def test_step_t_takes_the_t_th_batch_that_is_not_left_out(excluded):
    numbers = BatchNumbers(excluded)
    assert [numbers.of(step) for step in range(40)] == by_definition(excluded, 40)


@given(EXCLUDED, st.lists(st.tuples(st.integers(0, 25), st.integers(1, 4)), max_size=4))
def test_leaving_out_batches_of_steps_changes_no_step_before_them(excluded, rounds):
    numbers, left_out = BatchNumbers(excluded), set(excluded)
    for step, count in rounds:
        before = [numbers.of(one) for one in range(40)]
        gone = numbers.exclude(step, count)
        assert gone == before[step:step + count]
        left_out.update(gone)
        after = [numbers.of(one) for one in range(40)]
        assert after == by_definition(left_out, 40) and after[:step] == before[:step]
        numbers = BatchNumbers(json.loads(json.dumps(numbers.excluded)))        # as a checkpoint keeps it


# -- spikes

def fed(values, **settings) -> SpikeWatch:
    watch = SpikeWatch(SpikeConfig(**{"zscore": 6, "history": 16, **settings}))
    assert [watch.zscore("fit", value) for value in values] == [None] * len(values)
    return watch


NOISY = [1.0, 1.2, 0.9, 1.1, 1.05, 0.95]


def test_a_spike_is_scored_by_mean_and_deviation_of_the_newest_losses():
    assert fed(NOISY).zscore("fit", 5.0) == pytest.approx((5 - np.mean(NOISY)) / np.std(NOISY))
    below, above = np.mean(NOISY) + np.std(NOISY) * np.array([5.9, 6.1])
    assert fed(NOISY).zscore("fit", below) is None and fed(NOISY).zscore("fit", above) is not None
    assert fed(NOISY).zscore("fit", -50.0) is None                     # falling is no fault


def test_only_the_newest_losses_count():
    assert fed([50.0, 60.0, *NOISY[:4], *NOISY[:4]], history=8).zscore("fit", 5.0) is not None
    assert fed([50.0, 60.0, *NOISY[:4]], history=8).zscore("fit", 5.0) is None


def test_a_spike_is_not_taken_into_what_is_usual():
    watch = fed(NOISY)
    assert watch.zscore("fit", 5.0) == watch.zscore("fit", 5.0) is not None


def test_nothing_is_a_spike_before_a_quarter_of_the_history_is_known():
    assert fed([1.0] * 7, history=32).zscore("fit", 1e6) is None
    assert fed([1.0] * 8, history=32).zscore("fit", 1e6) is not None


def test_phases_are_compared_with_themselves():
    watch = fed(NOISY)
    assert watch.zscore("r1", 1000.0) is None and watch.zscore("fit", 1000.0) is not None


def test_a_loss_that_stands_still_does_not_make_a_spike_of_a_thousandth():
    assert fed([2.0] * 10).zscore("fit", 2.004) is None
    assert fed([0.0] * 10).zscore("fit", 1e-3) is not None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_neither_a_spike_nor_remembered(value):
    watch = fed(NOISY)
    assert watch.zscore("fit", value) is None and watch.state() == {"fit": NOISY}


def test_what_is_usual_survives_a_checkpoint():
    watch = fed(NOISY, history=8)
    saved = json.loads(json.dumps(watch.state()))
    again = SpikeWatch(watch.config, saved)
    assert again.zscore("fit", 5.0) == watch.zscore("fit", 5.0)
    for value in [1.0] * 20:
        again.zscore("fit", value)
    assert len(again.state()["fit"]) == 8


# -- skipped steps

def phase(name: str) -> Phase:
    return Phase(name, f"player of {name}", loss=None)


FIT, RARE = phase("fit"), phase("rare")


def outcome(skipped: bool) -> SimpleNamespace:
    return SimpleNamespace(skipped=torch.tensor(float(skipped)))


def add(counter: SkipCounter, step: int, **skipped: bool) -> None:
    phases = {"fit": FIT, "rare": RARE}
    counter.add(step, [f"key{step}"], [(phases[name], outcome(flag)) for name, flag in skipped.items()])


def test_skips_are_counted_for_each_phase_apart():
    counter = SkipCounter(allowed=2)
    for step in range(4):
        add(counter, step, fit=step % 2 == 0, rare=False)
        for entry in counter.read():
            assert (entry.step, entry.phase, entry.keys) == (step, FIT, [f"key{step}"])
            counter.check(entry, entry.keys)               # never two in a row
    assert counter.total == 2 and counter.read() == []
    for step in (4, 8):                                    # a rare phase is not due in between
        add(counter, step, rare=True)
        (entry,) = counter.read()
        if step == 4:
            counter.check(entry, entry.keys)
    with pytest.raises(UserError, match="'player of rare', phase 'rare'.* 2 times in a row up to step 8.* key8"):
        counter.check(entry, entry.keys)


@pytest.mark.parametrize("flags", ["111", "0111", "1110", "10111", "11101"])
def test_read_later_and_all_at_once_they_end_the_run_at_the_same_step(flags):
    """As on an accelerator, where the flags are read when a line is logged."""
    counter = SkipCounter(allowed=3)
    for step, flag in enumerate(flags):
        add(counter, step, fit=flag == "1")
    third = flags.index("111") + 2
    with pytest.raises(UserError, match=f"3 times in a row up to step {third}; .* key{third}$"):
        for entry in counter.read():
            counter.check(entry, entry.keys)


def test_no_more_keys_are_shown_than_fit_on_a_line():
    counter = SkipCounter(allowed=1)
    add(counter, 0, fit=True)
    (entry,) = counter.read()
    with pytest.raises(UserError) as caught:
        counter.check(entry, [f"k{number}" for number in range(KEYS_SHOWN + 5)])
    message = str(caught.value)
    assert f"k{KEYS_SHOWN - 1} and 5 more" in message and f"k{KEYS_SHOWN}," not in message


# -- processes that are gone

WHERE = SimpleNamespace(step=7, what="training")


def raised(error: Exception) -> Exception:
    with pytest.raises(Exception) as caught, lost_processes_named(1, WHERE):        # noqa: B017, PT011 (any: it is the answer)
        raise error
    return caught.value


@pytest.mark.parametrize(("error", "words"), [
    (RuntimeError("[gloo/transport/tcp/pair.cc:547]\n Connection closed by peer"), "rank 1, step 7: lost another rank"),
    (torch.distributed.DistNetworkError("gone"), "lost another rank while training"),
    (RuntimeError("NCCL communicator was aborted"), "lost another rank"),
])
def test_the_end_of_another_process_is_one_line_of_rank_and_step(error, words):
    lost = raised(error)
    assert isinstance(lost, LostProcess) and "\n" not in str(lost)
    assert "rank 1, step 7" in str(lost) and words in str(lost)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("gloo"), UserError("NCCL"),
                                   LostProcess("a loader worker")])
def test_other_errors_stay_what_they_are(error):
    assert raised(error) is error
