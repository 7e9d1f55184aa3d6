import pytest
import torch
from torch import nn

from dalle.training.ema import Average


def zero_module() -> nn.Linear:
    module = nn.Linear(2, 2)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize("every", [1, 3])
def test_k_updates_with_a_constant_weight_give_its_geometric_share(every):
    module = zero_module()
    average = Average(module, decay=0.9, every=every)
    nn.init.constant_(module.weight, 2.0)
    for step in range(1, 7):
        average.update(step)
    torch.testing.assert_close(average.state_dict()["weight"], torch.full((2, 2), 2.0 * (1 - 0.9**6)))


def test_applied_lends_the_average_and_gives_the_live_weights_back():
    module = zero_module()
    average = Average(module, decay=0.5)
    nn.init.constant_(module.weight, 1.0)
    live = module.weight.detach().clone()
    average.update(1)
    with average.applied():
        assert torch.equal(module.weight, torch.full((2, 2), 0.5))
    assert torch.equal(module.weight, live)


def test_split_over_two_owners_it_is_the_same_average():
    module = zero_module()
    parts = [Average(module, 0.5, rank=rank, owners=2) for rank in (0, 1)]
    nn.init.constant_(module.weight, 1.0)
    for part in parts:
        part.update(1)
    assert [list(part.state_dict()) for part in parts] == [["weight"], ["bias"]]
    assert torch.equal(parts[0].state_dict()["weight"], torch.full((2, 2), 0.5))


def test_a_state_of_other_names_is_refused():
    with pytest.raises(ValueError, match="other"):
        Average(zero_module(), 0.5).load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(2),
                                                     "other": torch.zeros(1)})
