"""Schedules as pure functions of the step, so that a resumed run needs no schedule state."""

import math


def cosine(step: int, start: float, end: float, steps: int) -> float:
    """From ``start`` to ``end`` over ``steps`` along half a cosine, constant after.

    v(t) = end + (start - end) (1 + cos(pi min(t, N) / N)) / 2, the ramp of every dVAE schedule (arXiv 2102.12092, A.2).
    """
    progress = min(step, steps) / steps if steps > 0 else 1.0
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From ``start`` to ``end`` over ``steps`` along a line, constant after."""
    progress = min(step, steps) / steps if steps > 0 else 1.0
    return start + (end - start) * progress


def constant(step: int, start: float, end: float, steps: int) -> float:
    """``start`` for ever; takes the other arguments so that it stands in the table beside its neighbours."""
    return start


def staircase(step: int, every: int, factor: float) -> float:
    """1, multiplied by ``factor`` once for every ``every`` whole steps before ``step``."""
    return factor ** (step // every)


DECAYS = {"constant": constant, "linear": linear, "cosine": cosine}


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str, final_fraction: float,
                         step_every: int | None = None, step_factor: float = 0.5) -> float:
    """What the peak learning rate is multiplied by at ``step`` (0 is the first of ``steps``).

    The warm-up rises by 1/``warmup`` a step and reaches 1 on its last step, so the first step already moves the
    weights; the decay then runs over the remaining steps down to ``final_fraction``. The schedule ``step`` multiplies
    by ``step_factor`` every ``step_every`` steps after the warm-up instead, whatever ``steps`` is.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "step":
        return staircase(step - warmup, step_every, step_factor)
    return DECAYS[schedule](step - warmup, 1.0, final_fraction, steps - warmup)
