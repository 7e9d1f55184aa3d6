import math

import pytest

from dalle.training.schedules import cosine, learning_rate_factor, linear


@pytest.mark.parametrize(("step", "arguments", "expected"), [
    (75_000, (1.0, 1 / 16, 150_000), 0.53125),          # the paper's temperature, half way
    (2_500, (0.0, 6.6, 5_000), 3.3),                    # its KL weight
    (600_000, (1e-4, 1.25e-6, 1_200_000), 5.0625e-5),   # its step size
    (9_000, (0.0, 6.6, 5_000), 6.6),                    # constant after the end
    (0, (2.0, 1.0, 10), 2.0),
    (0, (2.0, 1.0, 0), 1.0),
])
def test_cosine_goes_through_the_points_of_the_paper(step, arguments, expected):
    assert cosine(step, *arguments) == pytest.approx(expected)


def test_linear_is_half_way_at_half_time():
    assert linear(5, 1.0, 0.0, 10) == 0.5 and linear(20, 1.0, 0.0, 10) == 0.0


def test_warmup_reaches_the_peak_on_its_last_step_and_moves_on_its_first():
    assert [learning_rate_factor(step, 100, 4, "constant", 0.0) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_decay_starts_after_the_warmup_and_ends_at_the_final_fraction():
    half = learning_rate_factor(4 + 48, 100, 4, "cosine", 0.1)
    assert half == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    assert learning_rate_factor(100, 100, 4, "cosine", 0.1) == pytest.approx(0.1)
    assert learning_rate_factor(52, 100, 4, "linear", 0.0) == pytest.approx(0.5)


def test_the_step_schedule_halves_after_every_so_many_steps_whatever_the_length_of_the_run():
    factors = [learning_rate_factor(step, 7, 0, "step", 0.0, step_every=3) for step in range(8)]
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert factors == [learning_rate_factor(step, 1_000_000, 0, "step", 0.0, step_every=3) for step in range(8)]


def test_the_step_schedule_counts_from_the_end_of_the_warmup():
    factors = [learning_rate_factor(step, 100, 2, "step", 0.0, step_every=2, step_factor=0.1) for step in range(6)]
    assert factors == pytest.approx([0.5, 1, 1, 1, 0.1, 0.1])
