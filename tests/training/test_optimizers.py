import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from toys import Block, seeded

from dalle.errors import UserError
from dalle.training.optimizers import MuonWithAdamW, OptimizerConfig, build_optimizer, set_learning_rate


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.norm = nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_only_matrices_that_are_no_embeddings_decay():
    module = Mixed()
    decayed, plain = build_optimizer(module, OptimizerConfig(weight_decay=0.1)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert [id(parameter) for parameter in decayed["params"]] == [id(module.linear.weight)]
    assert {id(parameter) for parameter in plain["params"]} == {
        id(module.embedding.weight), id(module.linear.bias), id(module.norm.weight), id(module.norm.bias)}


def both():
    ours = seeded(Block)
    return ours, copy.deepcopy(ours)


def fill(module: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_moves_its_matrices_and_adamw_the_rest():
    ours, theirs = both()
    config = OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
    optimizer = build_optimizer(ours, config)
    rest = [parameter for name, parameter in theirs.named_parameters() if name != "second.weight"]
    muon = torch.optim.Muon([theirs.second.weight], lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW([{"params": [p for p in rest if p.ndim == 2], "weight_decay": 0.1},
                               {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0}],
                              lr=1e-3, betas=config.betas, foreach=False)
    for step in range(3):
        fill(ours, step)
        fill(theirs, step)
        for part in (optimizer, muon, adamw):
            part.step()
    for left, right in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_found_inf_leaves_weights_and_moments_alone(name):
    module, untouched = both()
    optimizer = build_optimizer(module, OptimizerConfig(name=name))
    fill(module, 0)
    module.first.weight.grad.fill_(float("nan"))
    module.second.weight.grad.fill_(float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    for left, right in zip(module.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(left, right)
    optimizer.found_inf = torch.tensor(0.0)
    fill(module, 1)
    optimizer.step()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert not torch.equal(module.first.weight, untouched.first.weight)


def test_learning_rates_follow_one_factor_and_survive_a_reload():
    module = seeded(Block)
    optimizer = build_optimizer(module, OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02))
    assert isinstance(optimizer, MuonWithAdamW)
    fill(module, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_learning_rate(optimizer, 0.5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [5e-4, 0.01]
    assert {group["lr"] for group in optimizer.muon.param_groups} == {0.01}


def test_muon_without_matrices_says_what_is_missing():
    with pytest.raises(UserError, match="matrix_parameters"):
        build_optimizer(Mixed(), OptimizerConfig(name="muon"))


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match="no trainable"):
        build_optimizer(nn.Linear(2, 2).requires_grad_(False), OptimizerConfig())


def test_the_schedule_step_needs_its_length_and_no_other_takes_it():
    config = OptimizerConfig(schedule="step", step_every=10, step_factor=0.25)
    assert [config.factor(step, 1000) for step in (0, 9, 10, 19, 20)] == [1, 1, 0.25, 0.25, 0.0625]
    with pytest.raises(ValueError, match="schedule step needs step_every"):
        OptimizerConfig(schedule="step")
    with pytest.raises(ValueError, match="step_every is for schedule step, not cosine"):
        OptimizerConfig(step_every=10)
