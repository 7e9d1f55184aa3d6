import math
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from counting import LiveBytes

from dalle.training.ema import EMA


def zero_module() -> nn.Linear:
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize("every", [1, 3])
def test_k_updates_with_a_constant_weight_give_its_geometric_share(every):
    module = zero_module()
    average = EMA(module, decay=0.9, every=every, warmup=False)
    nn.init.constant_(module.weight, 2.0)
    for step in range(1, 7):
        average.update(step)
    torch.testing.assert_close(average.state_dict()["weight"], torch.full((2, 2), 2.0 * (1 - 0.9**6)))


def share_of_the_start(decay: float, steps: int, every: int = 1, warmup: bool = True) -> float:
    """What is left of a first weight of 1 after ``steps`` steps at 0."""
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    average = EMA(module, decay, every, warmup=warmup)
    nn.init.zeros_(module.weight)
    for step in range(1, steps + 1):
        average.update(step)
    return float(average.state_dict()["weight"])


@pytest.mark.parametrize("every", [1, 3])
def test_the_first_updates_decay_as_their_number_says(every):
    """(1 + n) / (10 + n) multiplied over n = 1..K is 10! (K + 1)! / (K + 10)!, until the decay itself is smaller."""
    left = share_of_the_start(0.9999, steps=5 * every, every=every)
    assert left == pytest.approx(math.factorial(10) * math.factorial(6) / math.factorial(15), rel=1e-4)
    # 0.5 from the 8th update on: 9/18
    expected = math.prod((1 + n) / (10 + n) for n in range(1, 8)) * 0.5**3
    assert share_of_the_start(0.5, steps=10) == pytest.approx(expected, rel=1e-4)


def test_a_short_run_keeps_nothing_of_its_random_start():
    assert share_of_the_start(0.999, steps=500, warmup=False) == pytest.approx(0.999**500, rel=1e-3)     # 61 %
    assert share_of_the_start(0.999, steps=500) < 1e-6
    assert share_of_the_start(0.999, steps=500, every=25) < 1e-6


def test_a_run_that_goes_on_warms_up_as_if_it_had_not_stopped():
    """What is saved is the average alone: the count follows from the step."""
    module = zero_module()
    straight, first, second = (EMA(module, 0.999) for _ in range(3))
    for step in range(1, 9):
        nn.init.constant_(module.weight, step)
        if step == 5:
            second.load_state_dict(first.state_dict())
        for average in (straight, first if step < 5 else second):
            average.update(step)
    assert torch.equal(second.state_dict()["weight"], straight.state_dict()["weight"])


def test_applied_lends_the_average_and_gives_the_live_weights_back():
    module = zero_module()
    average = EMA(module, decay=0.5, warmup=False)
    nn.init.constant_(module.weight, 1.0)
    live = module.weight.detach().clone()
    average.update(1)
    with average.applied():
        assert torch.equal(module.weight, torch.full((2, 2), 0.5))
    assert torch.equal(module.weight, live)


def test_split_over_two_owners_it_is_the_same_average():
    module = zero_module()
    parts = [EMA(module, 0.5, warmup=False, rank=rank, owners=2) for rank in (0, 1)]
    nn.init.constant_(module.weight, 1.0)
    for part in parts:
        part.update(1)
    assert [list(part.state_dict()) for part in parts] == [["weight"], ["bias"]]
    assert torch.equal(parts[0].state_dict()["weight"], torch.full((2, 2), 0.5))


def test_split_with_a_single_owner_it_goes_through_the_access():
    """ZeRO-3 in one process: outside of it the parameters have no elements."""
    module = zero_module()

    @contextmanager
    def gathered(parameters, owner):
        for parameter in parameters:
            parameter.data = whole[id(parameter)]
        yield
        for parameter in parameters:
            whole[id(parameter)], parameter.data = parameter.data, torch.empty(0)

    whole = {id(parameter): parameter.data for parameter in module.parameters()}
    average = EMA(module, 0.5, warmup=False, access=gathered)
    whole[id(module.weight)] = torch.ones(2, 2)
    average.update(1)
    assert torch.equal(average.state_dict()["weight"], torch.full((2, 2), 0.5))


def test_a_state_of_other_names_is_refused():
    with pytest.raises(ValueError, match="other"):
        EMA(zero_module(), 0.5).load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2),
                                                     "other": torch.zeros(1)})


def test_applied_changes_places_and_holds_no_second_copy():
    module = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(6)])
    average = EMA(module, decay=0.5, warmup=False)
    live = [parameter.detach().clone() for parameter in module.parameters()]
    kept = [id(value) for value in average.state_dict().values()]
    for parameter in module.parameters():
        parameter.data.add_(2.0)
    moved = [parameter.detach().clone() for parameter in module.parameters()]
    counter = LiveBytes()
    with counter, average.applied():
        pass
    ones = [tensor.nbytes for tensor in live]
    assert sum(ones) * 2 <= counter.peak <= sum(ones) * 2 + max(ones)
    with average.applied():
        assert all(torch.equal(*pair) for pair in zip(module.parameters(), live, strict=True))
    assert [id(value) for value in average.state_dict().values()] == kept
    assert all(torch.equal(*pair) for pair in zip(average.state_dict().values(), live, strict=True))
    assert all(torch.equal(*pair) for pair in zip(module.parameters(), moved, strict=True))


def test_nothing_can_be_saved_loaded_or_updated_while_the_average_is_lent():
    average = EMA(zero_module(), decay=0.5)
    state = average.state_dict()
    with average.applied():
        for forbidden in (average.state_dict, lambda: average.load_state_dict(state), lambda: average.update(1)):
            with pytest.raises(RuntimeError, match="in place of the weights"):
                forbidden()
    average.load_state_dict(average.state_dict())


@pytest.mark.parametrize("fails_at", [1, 2])
def test_whatever_fails_meanwhile_the_live_weights_come_back(fails_at):
    """Also in the middle of the exchange itself: the first parameter is then lent, the second is not."""
    module, opened = zero_module(), []

    @contextmanager
    def access(parameters, owner):
        opened.append(parameters)
        if len(opened) - 2 == fails_at:       # after the two of the constructor
            raise MemoryError
        yield

    average = EMA(module, decay=0.5, access=access)
    nn.init.ones_(module.weight)
    with pytest.raises(MemoryError), average.applied():
        raise AssertionError
    assert torch.equal(module.weight, torch.ones(2, 2)) and torch.equal(module.bias, torch.zeros(2))
    assert torch.equal(average.state_dict()["weight"], torch.zeros(2, 2))


def test_weights_of_fewer_bits_cost_the_average_none():
    module = zero_module().bfloat16()
    average = EMA(module, decay=0.5, warmup=False)
    average.load_state_dict({"weight": torch.full((2, 2), 1 / 3), "bias": torch.full((2,), 1 / 7)})
    with average.applied():
        assert torch.equal(module.weight, torch.full((2, 2), 1 / 3).bfloat16())
    assert torch.equal(module.weight, torch.zeros(2, 2).bfloat16())
    assert torch.equal(average.state_dict()["weight"], torch.full((2, 2), 1 / 3))
