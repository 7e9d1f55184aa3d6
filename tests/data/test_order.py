import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.data.loader import TrainPositions, check_split
from dalle.data.order import Order, PositionRandom, SequentialOrder, sample_rng, stable_argsort
from dalle.errors import UserError

shard_sizes = st.lists(st.integers(0, 9), min_size=1, max_size=25).filter(lambda sizes: sum(sizes) > 0)


def every_sample(counts):
    return [(shard, index) for shard, count in enumerate(counts) for index in range(count)]


def located(order, positions):
    return [tuple(map(int, place)) for place in zip(*order.locate(np.asarray(positions)), strict=True)]


@settings(max_examples=150, deadline=None)
@given(counts=shard_sizes, seed=st.integers(0, 2**32), lanes=st.integers(1, 40), window=st.integers(1, 6))
def test_every_epoch_holds_every_sample_once(counts, seed, lanes, window):
    order = Order(np.array(counts), seed, lanes, window)
    total = sum(counts)
    for epoch in (0, 1, 5):
        places = located(order, range(epoch * total, (epoch + 1) * total))
        assert {place[0] for place in places} == {epoch}
        assert sorted(place[1:] for place in places) == every_sample(counts)


@settings(max_examples=60, deadline=None)
@given(counts=shard_sizes, seed=st.integers(0, 99), lanes=st.integers(1, 12), window=st.integers(1, 4),
       local=st.integers(1, 4), ranks=st.lists(st.integers(1, 4), min_size=2, max_size=4), workers=st.integers(1, 3))
def test_any_split_gives_the_same_global_batches(counts, seed, lanes, window, local, ranks, workers):
    batch_size = local * int(np.lcm.reduce(ranks))
    reference = Order(np.array(counts), seed, lanes, window)
    for step, world in enumerate(ranks):                       # the world changes at each step
        expected = [reference(step * batch_size + offset) for offset in range(batch_size)]
        batch = [None] * batch_size
        for rank in range(world):
            worker_orders = [Order(np.array(counts), seed, lanes, window) for _ in range(workers)]
            mine = list(range(step * batch_size + rank, (step + 1) * batch_size, world))
            for place, position in zip(located(worker_orders[step % workers], mine), mine, strict=True):
                batch[position - step * batch_size] = place
        assert batch == expected


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 7, 2**63, 2**63 + 3, 2**64 - 1]), max_size=40))
def test_the_fast_sort_is_the_stable_sort(values):
    values = np.array(values, dtype=np.uint64)
    np.testing.assert_array_equal(stable_argsort(values), np.argsort(values, kind="stable"))


@st.composite
def stopped_runs(draw):
    """Shard sizes, an order's settings, a batch size, and runs of some steps each on some processes and workers."""
    counts = draw(shard_sizes)
    batch_size = draw(st.integers(1, 24))
    divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
    processes = st.sampled_from(divisors) | st.sampled_from(divisors) | st.integers(1, 26)
    runs = draw(st.lists(st.tuples(processes, st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=7))
    settings = (draw(st.integers(0, 2**40)), draw(st.integers(1, 40)), draw(st.integers(1, 6)))
    return counts, settings, batch_size, runs


@settings(max_examples=120, deadline=None)
@given(stopped_runs())
def test_any_chain_of_stops_and_changes_is_the_uninterrupted_run(case):
    counts, settings, batch_size, runs = case
    step, batches = 0, []
    for processes, workers, steps in runs:
        if batch_size % processes:
            divisors = [size for size in range(1, batch_size + 1) if batch_size % size == 0]
            legal = ", ".join(map(str, divisors))
            with pytest.raises(UserError, match=f"{processes} processes; use one of {legal} processes"):
                check_split(batch_size, processes)
            continue
        check_split(batch_size, processes)
        shares = [one_rank(counts, settings, TrainPositions(batch_size, rank, processes, step), workers, steps)
                  for rank in range(processes)]
        batches += [[place for group in zip(*parts, strict=True) for place in group]
                    for parts in zip(*shares, strict=True)]
        step += steps                                            # all that a checkpoint holds
    reference = Order(np.array(counts), *settings)
    assert batches == [[reference(t * batch_size + place) for place in range(batch_size)] for t in range(step)]
    line = [place for batch in batches for place in batch]
    total = sum(counts)
    for epoch in range(len(line) // total):
        assert sorted(line[epoch * total:(epoch + 1) * total]) == [(epoch, *sample) for sample in every_sample(counts)]
    rest = line[len(line) // total * total:]
    assert len(set(rest)) == len(rest)


def one_rank(counts, settings, positions, workers, steps):
    """The samples of one rank's batches, each found by the worker whose turn it is, as new as after a start."""
    orders = [Order(np.array(counts), *settings) for _ in range(max(1, workers))]
    return [located(orders[number % len(orders)], mine)
            for number, mine in enumerate(itertools.islice(positions, steps))]


def test_against_the_definition_written_out_by_loops():
    counts, seed, lanes, window = [3, 0, 5, 2, 7, 1, 4], 11, 4, 2
    order = Order(np.array(counts), seed, lanes, window)

    def permutation(length, *key):
        return np.argsort(np.random.Philox(np.random.SeedSequence(key)).random_raw(length), kind="stable").tolist()

    filled = [shard for shard, count in enumerate(counts) if count]
    total = sum(counts)
    for epoch in range(2):
        line = [(shard, index) for shard in (filled[slot] for slot in permutation(len(filled), seed, epoch))
                for index in range(counts[shard])]
        cuts = [0]
        for lane in range(lanes):
            cuts.append(cuts[-1] + total // lanes + (1 if lane < total % lanes else 0))
        shuffled_lanes = []
        for lane in range(lanes):
            samples = line[cuts[lane]:cuts[lane + 1]]
            pieces = []
            for sample in samples:                               # consecutive samples of one shard are a piece
                if not pieces or pieces[-1][-1][0] != sample[0]:
                    pieces.append([])
                pieces[-1].append(sample)
            out = []
            for number in range(0, len(pieces), window):
                joint = [sample for piece in pieces[number:number + window] for sample in piece]
                out += [joint[place] for place in permutation(len(joint), seed, epoch, lane, number // window)]
            shuffled_lanes.append(out)
        expected = [(epoch, *shuffled_lanes[p % lanes][p // lanes]) for p in range(total)]
        assert located(order, range(epoch * total, (epoch + 1) * total)) == expected


def test_calls_vector_and_history_agree():
    counts = np.array([4, 9, 1, 6])
    positions = np.random.default_rng(0).integers(0, 200, 300)
    fresh = [Order(counts, 5, 3, 2)(int(position)) for position in positions]
    used = Order(counts, 5, 3, 2)
    assert located(used, positions) == fresh == [used(int(position)) for position in positions]
    assert located(pickle.loads(pickle.dumps(used)), positions) == fresh


def test_seeds_and_epochs_differ_and_far_positions_are_cheap():
    counts = np.full(1000, 1000)
    first, second = Order(counts, 0), Order(counts, 1)
    positions = np.arange(64)
    assert located(first, positions) != located(second, positions)
    next_epoch = located(first, positions + 10**6)
    assert [place[1:] for place in located(first, positions)] != [place[1:] for place in next_epoch]
    assert first(987_654_321)[0] == 987
    assert len({place[1] for place in located(first, np.arange(1024))}) > 400       # shards that mix in a batch


def test_more_lanes_than_samples():
    order = Order(np.array([2, 1]), 0, lanes=64, window=16)
    assert order.lanes == 3 and sorted(place[1:] for place in located(order, range(3))) == [(0, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize("wrong", [{"counts": [0]}, {"seed": -1}, {"lanes": 0}, {"window": 0}])
def test_impossible_orders(wrong):
    with pytest.raises(ValueError, match="no sample|must be positive"):
        Order(**{"counts": [3], "seed": 0, "lanes": 1, "window": 1, **wrong})


def test_sequential_order_is_the_identity():
    order = SequentialOrder(np.array([2, 0, 3]))
    assert located(order, range(6)) == [(0, 0, 0), (0, 0, 1), (0, 2, 0), (0, 2, 1), (0, 2, 2), (1, 0, 0)]
    assert order(7) == (1, 2, 0)


def test_sample_rng_depends_on_seed_and_position_only():
    draw = {(seed, position): sample_rng(seed, position).random() for seed in range(3) for position in (0, 1, 2**40)}
    assert len(set(draw.values())) == 9
    assert sample_rng(2, 2**40).random() == draw[2, 2**40]


@given(st.lists(st.tuples(st.integers(-2**63, 2**64), st.integers(0, 2**63), st.integers(0, 5)), max_size=6))
def test_one_generator_that_begins_anew_draws_as_a_new_one(places):
    again = PositionRandom()
    for seed, position, draws in places:
        rng, expected = again.at(seed, position), sample_rng(seed, position)
        for _ in range(draws):                             # an odd number leaves half of a word behind
            assert rng.integers(1000, dtype=np.int32) == expected.integers(1000, dtype=np.int32)
            assert rng.random() == expected.random()
    assert pickle.loads(pickle.dumps(again)).at(3, 5).random() == sample_rng(3, 5).random()


def test_the_benchmark_runs(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "tools/bench/order.py", "--shards", "9", "--samples", "300", "--folder", str(tmp_path)]
    output = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120, check=True,
                            capture_output=True, text=True).stdout
    lines = output.splitlines()
    assert "9 shards x 300 samples = 2,700" in lines[0] and len(lines) == 8
    assert all(line.endswith("MB") for line in lines[2:])
