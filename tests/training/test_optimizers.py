import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from toys import Block, seeded

from dalle.errors import UserError
from dalle.training.muon import Muon
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


SHAPES = [(16, 16), (16, 16), (16, 48), (16, 48), (64, 16), (64, 16), (64, 16), (24, 16)]


def matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("stacked", [2**26, 1600])      # in the second case three (64, 16) are two stacks
def test_muon_over_stacks_is_torchs_over_matrices(scaling, stacked, monkeypatch):
    monkeypatch.setattr("dalle.training.muon.STACKED", stacked)
    ours, theirs = matrices(), matrices()
    optimizer = Muon(ours, lr=0.02, weight_decay=0.1, scaling=scaling)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn=scaling)
    for step in range(4):
        for parameters, part in ((ours, optimizer), (theirs, reference)):
            give_gradients(parameters, step)
            part.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        assert optimizer.state[left].keys() == reference.state[right].keys()
        torch.testing.assert_close(optimizer.state[left]["momentum_buffer"],
                                   reference.state[right]["momentum_buffer"])


def test_muon_divides_by_the_scale_and_reads_its_rate_from_a_tensor():
    ours, theirs = matrices(), matrices()
    optimizer, reference = Muon(ours, lr=torch.tensor(0.02)), Muon(theirs, lr=0.01)
    optimizer.param_groups[0]["lr"].fill_(0.01)
    for step in range(3):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        for parameter in theirs:
            parameter.grad /= 4
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
        optimizer.step()
        reference.step()
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-7)


def moved_by(rank: int) -> list[torch.Tensor]:
    """The matrices after three steps; ``rank`` 0 and 1 share the work, -1 is alone."""
    from dalle.training.engines.group import GroupEngine

    parameters = matrices()
    share = {}
    if rank >= 0:
        engine = GroupEngine.__new__(GroupEngine)
        engine.rank, engine.world_size = rank, 2
        share = {"share": engine.share_rows}
    optimizer = Muon(parameters, lr=0.02, **share)
    for step in range(3):
        give_gradients(parameters, step)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_two_processes_share_muons_work_and_get_what_one_gets(two_ranks):
    alone = moved_by(-1)
    for found in two_ranks(moved_by):
        assert all(torch.equal(left, right) for left, right in zip(found, alone, strict=True))


def test_an_average_moves_seldom_only_where_the_model_is_large():
    assert [OptimizerConfig().of(size).ema_every for size in (10**6, 99_999_999, 10**8)] == [1, 1, 10]
    assert OptimizerConfig(ema_every=3).of(10**9).ema_every == 3


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
