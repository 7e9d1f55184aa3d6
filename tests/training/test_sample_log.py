"""The sample log against what was trained on, through kills, restarts and changed world sizes."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle.training.sample_log import FOLDER, SampleLog, surviving

BATCH = 12


def expected(step: int) -> list[tuple[int, str]]:
    return [(position, f"key{position}") for position in range(step * BATCH, (step + 1) * BATCH)]


def log_steps(run, start: int, end: int, world_size: int, identity: str, ahead: int = 0) -> None:
    """What ``world_size`` ranks log that start at ``start`` and are killed before ``end``; rank 0 is ``ahead``."""
    for rank in range(world_size):
        log = SampleLog(run, rank, world_size)
        log.start(start, identity)
        for step in range(start, end + (ahead if rank == 0 else 0)):
            share = expected(step)[rank::world_size]
            log.add(step, {"position": torch.tensor([position for position, _ in share]),
                           "key": [key for _, key in share]})
        log.close()


def tear(run, rank: int = 0) -> None:
    """Cut the last line, as a kill in the middle of a write would."""
    path = run / FOLDER / f"rank{rank:05d}.jsonl"
    path.write_bytes(path.read_bytes()[:-5])


def test_shares_of_all_ranks_are_merged_in_the_order_of_positions(tmp_path):
    log_steps(tmp_path, 0, 3, world_size=3, identity="a")
    assert surviving(tmp_path) == {step: expected(step) for step in range(3)}


def test_a_restart_makes_void_what_came_after_its_step(tmp_path):
    log_steps(tmp_path, 0, 5, world_size=2, identity="a", ahead=1)
    log_steps(tmp_path, 3, 4, world_size=2, identity="b")
    assert surviving(tmp_path) == {step: expected(step) for step in range(4)}
    log_steps(tmp_path, 2, 2, world_size=2, identity="c")              # killed before its first step
    assert list(surviving(tmp_path)) == [0, 1]


def test_a_line_torn_by_a_kill_spoils_neither_the_rest_nor_the_restart(tmp_path):
    log_steps(tmp_path, 0, 3, world_size=2, identity="a")
    tear(tmp_path, rank=1)
    assert surviving(tmp_path) == {0: expected(0), 1: expected(1), 2: expected(2)[::2]}
    log_steps(tmp_path, 2, 4, world_size=2, identity="b")
    assert surviving(tmp_path) == {step: expected(step) for step in range(4)}


def test_a_restart_with_fewer_processes_does_not_count_the_steps_of_ranks_that_are_gone(tmp_path):
    log_steps(tmp_path, 0, 4, world_size=3, identity="a")
    log_steps(tmp_path, 2, 6, world_size=1, identity="b")
    log_steps(tmp_path, 4, 7, world_size=2, identity="c")
    assert surviving(tmp_path) == {step: expected(step) for step in range(7)}


def test_a_start_that_was_torn_counts_for_nothing(tmp_path):
    log_steps(tmp_path, 0, 3, world_size=1, identity="a")
    log_steps(tmp_path, 1, 1, world_size=1, identity="b")
    tear(tmp_path)                                                     # killed as it wrote its start
    assert list(surviving(tmp_path)) == [0, 1, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([1, 2, 3, 4, 6]), st.booleans()),
                min_size=1, max_size=6))
def test_any_chain_of_kills_leaves_every_step_once(tmp_path_factory, starts):
    """(steps given up, steps done, world size, whether the last line was torn) of each start."""
    run, done = tmp_path_factory.mktemp("run"), 0
    for number, (given_up, steps, world_size, torn) in enumerate(starts):
        first = max(0, done - given_up)
        done = first + steps
        log_steps(run, first, done, world_size, f"start{number}")
        if torn and steps:
            tear(run)
            done -= 1                  # rank 0's share of the last step is lost: a restart is never later than that
    log_steps(run, done, done + 1, 2, "last")
    kept = surviving(run)
    assert kept == {step: expected(step) for step in range(done + 1)}
    positions = list(itertools.chain.from_iterable([position for position, _ in kept[step]] for step in kept))
    assert positions == list(range((done + 1) * BATCH))


def test_batches_without_positions_are_logged_as_steps(tmp_path):
    log = SampleLog(tmp_path, 0, 1)
    log.start(0, "a")
    log.add(0, {"x": torch.zeros(2)})
    log.close()
    assert surviving(tmp_path) == {0: []}
