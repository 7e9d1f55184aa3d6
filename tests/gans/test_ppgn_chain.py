"""PPGN's sampler: a chain written out, its terms one by one, its bounds and its noise."""

import math

import pytest
import torch
from test_ppgn import DIM, ENCODER, small_generator
from torch import Tensor

from gans.ppgn_chain import class_log_likelihood, climb, direction_of, noise_of_chains, step_along
from gans.ppgn_encoder import PPGNEncoder, PPGNEncoderConfig

MATRIX = torch.randn(12, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
TARGET = torch.randn(12, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
STEPS, E1, E2, LR, LR_END = 7, 0.3, 0.6, 0.5, 0.1


def linear_chain(code: Tensor, noise=None, **changes) -> list[Tensor]:
    """Pictures are A h, codes of pictures A^T x / 9, and log C is -||x - t||^2 / 2."""
    settings = {"steps": STEPS, "e1": E1, "e2": E2, "e3": 0.0, "lr": LR, "lr_end": LR_END, **changes}
    return list(climb(code, lambda h: h @ MATRIX.T, lambda x: x @ MATRIX / 9,
                      lambda x: -0.5 * (x - TARGET).square().sum(dim=1), noise or (lambda: 0 * code), **settings))


def start(rows: int = 3) -> Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def test_a_chain_written_out():
    h = start()
    found = linear_chain(h)
    assert len(found) == STEPS + 1 and torch.equal(found[0], h)
    for step in range(STEPS):
        rows = []
        for row in h:
            x = MATRIX @ row
            d = E1 * (MATRIX.T @ x / 9 - row) + E2 * (MATRIX.T @ (TARGET - x))
            rate = LR + (LR_END - LR) * step / STEPS
            rows.append((row + rate / d.abs().mean() * d).clamp(0, 30))
        h = torch.stack(rows)
        torch.testing.assert_close(found[step + 1], h)


def test_the_noise_of_a_step_is_what_is_given():
    numbers = [torch.randn(3, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
               for step in range(STEPS)]
    given = iter(numbers)
    found = linear_chain(start(), lambda: next(given), e1=0.0, e2=0.0, e3=0.25)
    for step, noise in enumerate(numbers):
        rate = LR + (LR_END - LR) * step / STEPS
        expected = found[step] + rate * noise / noise.abs().mean(dim=1, keepdim=True)
        torch.testing.assert_close(found[step + 1], expected.clamp(0, 30))


def test_without_any_term_nothing_moves():
    code = start()
    found = linear_chain(code, e1=0.0, e2=0.0, e3=0.0)
    assert all(torch.equal(one, code) for one in found)        # as it is: not even clipped
    assert code.min() < 0


def test_a_sample_without_a_direction_stays_and_the_others_go_on():
    code = start()

    def two(x: Tensor) -> Tensor:
        return torch.stack([x[0].sum(), 0 * x[1].sum(), -x[2].sum()])

    found = list(climb(code, lambda h: h @ MATRIX.T, lambda x: x @ MATRIX, two, lambda: 0 * code, steps=3, e1=0.0,
                       e2=1.0, e3=0.0, lr=0.2, lr_end=0.2))
    assert torch.equal(found[-1][1], code[1])
    assert not torch.equal(found[-1][0], code[0]) and not torch.equal(found[-1][2], code[2])


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1.0, 1e8])
def test_a_step_has_the_mean_size_that_is_asked_for(scale):
    direction = scale * torch.randn(4, 50)
    step = step_along(direction, 0.7)
    torch.testing.assert_close(step.abs().mean(dim=1), torch.full((4,), 0.7))
    torch.testing.assert_close(step / step[:, :1], direction / direction[:, :1], rtol=1e-4, atol=1e-4)
    assert not step_along(torch.zeros(2, 50), 0.7).any()


def test_codes_stay_within_their_bounds():
    found = linear_chain(100 * start(), lr=40.0, lr_end=40.0)
    assert all(one.min() >= 0 and one.max() <= 30 for one in found[1:])
    assert any((one == 30).any() for one in found[1:]) and any((one == 0).any() for one in found[1:])


def test_a_longer_climb_is_likelier():
    found = linear_chain(start().abs(), e1=0.0, e2=1.0, lr=0.2, lr_end=0.0, steps=60)
    likelihood = [float(-0.5 * (one @ MATRIX.T - TARGET).square().sum(dim=1).mean()) for one in found]
    assert likelihood[0] < likelihood[10] < likelihood[-1]


def test_the_direction_is_that_of_differences():
    network = small_generator().double()
    encoder = PPGNEncoder(PPGNEncoderConfig(**ENCODER)).double().eval()
    code = torch.rand(1, DIM, dtype=torch.float64)

    def log_likelihood(h: Tensor) -> Tensor:
        return class_log_likelihood(encoder(network(h)).classes, torch.tensor([1]), alone=False)

    found = direction_of(code, network, lambda x: encoder(x).code,
                         lambda x: class_log_likelihood(encoder(x).classes, torch.tensor([1]), alone=False), 0.5, 2.0)
    with torch.no_grad():
        eye = 1e-6 * torch.eye(DIM, dtype=torch.float64)
        slope = torch.cat([(log_likelihood(code + row) - log_likelihood(code - row)) / 2e-6 for row in eye])
        expected = 0.5 * (encoder(network(code)).code - code) + 2.0 * slope
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    assert all(parameter.grad is None for parameter in network.parameters())


def test_each_chain_has_a_noise_of_its_own():
    numbers = torch.randn(3, 2)
    draw, again = noise_of_chains(numbers, 400), noise_of_chains(numbers[[2]], 400)
    first, second, alone = draw(), draw(), again()
    assert torch.equal(first[2:], alone) and torch.equal(second[2:], again())
    assert not torch.equal(first, second) and not torch.equal(first[0], first[1])
    assert abs(float(first.mean())) < 0.1 and float(first.std()) == pytest.approx(1, abs=0.1)


LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.0, 1.0, 0.0]])


def test_a_class_by_its_own_logit_alone_or_by_all():
    class_id, p = torch.tensor([0, 2]), LOGITS.softmax(dim=1)
    expected = [math.log(p[0, 0]), math.log(p[1, 2])]
    for alone in (True, False):
        logits = LOGITS.clone().requires_grad_()
        found = class_log_likelihood(logits, class_id, alone)
        assert found.tolist() == pytest.approx(expected, rel=1e-6)
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        own = torch.zeros_like(p)
        own[0, 0], own[1, 2] = 1, 1
        torch.testing.assert_close(gradient, own * (1 - p) if alone else own - p)
