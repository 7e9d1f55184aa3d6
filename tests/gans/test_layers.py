"""The shared blocks against what they stand for, written out; batch normalisation over processes against one."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gans.layers import (
    ConditioningAugmentation,
    SynchronisedBatchNorm,
    bottleneck,
    dcgan_init,
    down,
    join,
    orthogonal_init,
    residual_glu,
    residual_relu,
    same,
    spectrally_normalised,
    synchronised,
    tile,
    up,
    up_glu,
)


def test_blocks_change_sizes_as_they_say():
    x = torch.randn(2, 8, 6, 6)
    assert down(8, 5)(x).shape == (2, 5, 3, 3)
    assert same(8, 5)(x).shape == (2, 5, 6, 6)
    assert up(8, 5)(x).shape == up_glu(8, 5)(x).shape == (2, 5, 12, 12)
    assert residual_relu(8)(x).shape == residual_glu(8)(x).shape == x.shape
    assert bottleneck(8, 2, nn.ReLU)(x).shape == x.shape


def test_down_without_normalisation_is_one_convolution_and_its_activation():
    kinds = [type(layer).__name__ for layer in down(3, 4, norm=False)]
    assert kinds == ["Conv2d", "LeakyReLU"]
    assert [type(layer).__name__ for layer in down(3, 4, activation=None)] == ["Conv2d", "BatchNorm2d"]
    assert down(3, 4)[0].bias is None


def test_the_gated_half_opens_the_other():
    layer = up_glu(2, 3).eval()
    x = torch.randn(1, 2, 2, 2)
    wide = layer[2](layer[1](layer[0](x)))
    torch.testing.assert_close(layer(x), wide[:, :3] * torch.sigmoid(wide[:, 3:]))


def test_residuals_add_their_input():
    x = torch.randn(2, 4, 3, 3)
    for block in (residual_glu(4), bottleneck(4, 2, nn.ReLU)):
        last = block.body[-1]
        nn.init.zeros_(last.weight)
        torch.testing.assert_close(block(x), x)
    block = residual_relu(4)
    nn.init.zeros_(block.body[-1].weight)
    torch.testing.assert_close(block(x), x.relu())


def test_joining_puts_the_vector_at_every_place():
    features, vector = torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    joined = join(features, vector)
    assert joined.shape == (2, 8, 4, 4)
    assert (joined[:, 3:] == vector[:, :, None, None]).all()
    assert tile(vector, 2).shape == (2, 5, 2, 2)


@pytest.mark.parametrize("law", ["lrelu", "relu", "glu"])
def test_the_condition_is_the_mean_where_there_is_no_noise(law):
    layer = ConditioningAugmentation(6, 4, law)
    sentence, eps = torch.randn(3, 6), torch.randn(3, 4)
    still = layer(sentence, torch.zeros(3, 4))
    assert torch.equal(still.condition, still.mean)
    moved = layer(sentence, eps)
    sigma = moved.spread.exp() if law == "lrelu" else (moved.spread / 2).exp()
    torch.testing.assert_close(moved.condition, moved.mean + sigma * eps)


def test_the_rectified_condition_is_never_negative_and_the_gated_one_may_be():
    sentence = torch.randn(200, 6)
    assert ConditioningAugmentation(6, 4, "relu")(sentence, torch.zeros(200, 4)).mean.min() >= 0
    assert ConditioningAugmentation(6, 4, "glu")(sentence, torch.zeros(200, 4)).mean.min() < 0


def test_the_divergence_is_that_of_torch_distributions():
    for law in ("lrelu", "relu"):
        layer = ConditioningAugmentation(6, 4, law)
        drawn = layer(torch.randn(5, 6), torch.zeros(5, 4))
        sigma = drawn.spread.exp() if law == "lrelu" else (drawn.spread / 2).exp()
        expected = torch.distributions.kl_divergence(torch.distributions.Normal(drawn.mean, sigma),
                                                     torch.distributions.Normal(0.0, 1.0)).mean()
        torch.testing.assert_close(layer.kl(drawn), expected)


def test_first_weights_have_the_papers_laws():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 128, 4), nn.BatchNorm2d(128), nn.Linear(64, 64))
    linear = net[2].weight.clone()
    dcgan_init(net)
    assert float(net[0].weight.std()) == pytest.approx(0.02, rel=0.02)
    assert float(net[1].weight.mean()) == pytest.approx(1, abs=0.01)
    assert torch.equal(net[2].weight, linear)
    dcgan_init(net, linear=True)
    assert float(net[2].weight.std()) == pytest.approx(0.02, rel=0.05)
    orthogonal_init(net)
    flat = net[0].weight.flatten(1)
    torch.testing.assert_close(flat @ flat.T, torch.eye(128), atol=1e-4, rtol=0)


def test_spectral_norm_holds_the_largest_singular_value_at_one():
    torch.manual_seed(0)
    net = spectrally_normalised(nn.Sequential(nn.Linear(20, 30), nn.Conv2d(3, 4, 3)))
    for _ in range(100):
        net[0](torch.randn(2, 20)), net[1](torch.randn(2, 3, 5, 5))
    for layer in net:
        assert float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) == pytest.approx(1, abs=1e-3)


# -- batch normalisation over processes

def test_synchronising_keeps_names_weights_and_what_one_process_computes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.Sequential(nn.BatchNorm1d(5)))
    state = net.state_dict()
    x = torch.randn(4, 3, 6, 6)
    expected = net[1](net[0](x))
    net.load_state_dict(state)
    changed = synchronised(net)
    assert isinstance(changed[1], SynchronisedBatchNorm) and changed[1].eps == 1e-3
    assert isinstance(changed[2][0], SynchronisedBatchNorm)
    assert changed.state_dict().keys() == state.keys()
    torch.testing.assert_close(changed[1](changed[0](x)), expected)


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.LeakyReLU(0.2), nn.Conv2d(3, 2, 2),
                         nn.BatchNorm2d(2)).double()


def pictures() -> torch.Tensor:
    return torch.randn(6, 2, 5, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def loss_of(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (net(x) * torch.linspace(-1, 1, 2)[None, :, None, None]).square().mean() + net(x).sin().mean()


def one_of_two(rank: int) -> dict[str, dict[str, torch.Tensor]]:
    net = synchronised(network())
    loss_of(net, pictures()[rank::2]).backward()
    for parameter in net.parameters():
        dist.all_reduce(parameter.grad)
    return {"gradients": {name: parameter.grad / 2 for name, parameter in net.named_parameters()},
            "buffers": dict(net.named_buffers())}


def test_two_processes_normalise_as_one(two_ranks):
    net = network()
    loss_of(net, pictures()).backward()
    for found in two_ranks(one_of_two):
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(found["gradients"][name], parameter.grad, atol=1e-6, rtol=1e-5)
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(found["buffers"][name], buffer, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_synchronising_keeps_a_frozen_normalisation_frozen(training):
    net = nn.Sequential(nn.BatchNorm2d(3).requires_grad_(False), nn.BatchNorm2d(3)).train(training)
    changed = synchronised(net)
    assert [parameter.requires_grad for parameter in changed.parameters()] == [False, False, True, True]
    assert [part.training for part in changed] == [training, training]


def test_bad_shape_is_refused():
    layer = SynchronisedBatchNorm(3)
    with pytest.raises(ValueError, match=r"\[B, C, \.\.\.\]"):
        layer(torch.randn(3))

