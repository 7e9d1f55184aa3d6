"""The global batch on every process: its order, and gradients equal to those of one process."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from dalle.tasks.clip import pooled_recalls
from dalle.training.figures import joined_values
from dalle.training.gathering import in_global_order, in_global_order_with_gradient, interleaved, of_everyone

BATCH, WORLD = 6, 2


def samples() -> torch.Tensor:
    return torch.randn(BATCH, 3, generator=torch.Generator().manual_seed(3))


def weight() -> torch.Tensor:
    return torch.linspace(-1, 1, 12).view(3, 4).requires_grad_(True)


def coupled(features: torch.Tensor) -> torch.Tensor:
    """A loss in which every sample meets every other, and which depends on their order."""
    return ((features @ features.T).sigmoid() * torch.arange(BATCH * BATCH).view(BATCH, BATCH)).sum()


def coupled_on_its_side(features: torch.Tensor) -> torch.Tensor:
    """The same, but its gradient comes back as a transposed view: not in plain order."""
    return coupled(features.T.contiguous().T)


def gradient_on(rank: int, world_size: int, loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Of one process's loss over the global batch."""
    matrix = weight()
    loss(in_global_order_with_gradient(samples()[rank::world_size] @ matrix, world_size)).backward()
    return matrix.grad


def gathered_on(rank: int) -> list[torch.Tensor]:
    mine = samples()[rank::WORLD]
    everyone = in_global_order(mine, WORLD)
    mask = in_global_order(mine > 0, WORLD)
    numbers = in_global_order(torch.arange(rank, BATCH, WORLD), WORLD)
    gradients = torch.stack([gradient_on(rank, WORLD, loss) for loss in LOSSES])
    dist.all_reduce(gradients)
    return [everyone, mask, numbers, *ragged_on(rank), gradients / WORLD]


def ragged_on(rank: int) -> list[torch.Tensor]:
    """Gathered rows of which rank 0 has one more, and the recalls of pairs of which neither has a pool of its own."""
    rows = of_everyone(torch.arange(3.0 - rank) + 10 * rank, WORLD)
    share = [tuple(side[rank::WORLD] for side in pairs())]
    recalls = joined_values([pooled_recalls(share, WORLD)])
    assert list(recalls) == list(RECALLS)
    return [rows, of_everyone(rows[:3 - rank] > 5, WORLD), torch.tensor(list(recalls.values()))]


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """65 pictures and captions that half recall one another: a whole pool, and one more."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(65, 4, generator=generator)
    return images, images + 0.5 * torch.randn(65, 4, generator=generator)


RECALLS = joined_values([pooled_recalls([pairs()])])


LOSSES = [coupled, coupled_on_its_side]


@pytest.fixture(scope="module")
def ranks(two_ranks) -> list[list[torch.Tensor]]:
    """What each of two processes has gathered, and the mean of their gradients for each loss."""
    return two_ranks(gathered_on)


def test_samples_lie_in_the_order_of_the_global_batch(ranks):
    for everyone, mask, numbers, *_ in ranks:
        assert not everyone.requires_grad
        assert numbers.tolist() == list(range(BATCH))
        assert torch.equal(everyone, samples()) and torch.equal(mask, samples() > 0)


def test_ragged_shares_lie_in_order_too(ranks):
    for _, _, _, rows, mask, *_ in ranks:
        assert rows.tolist() == [0, 10, 1, 11, 2]
        assert mask.tolist() == [False, False, True, True, False]


def test_recall_in_pools_is_that_of_one_process(ranks):
    assert 0 < RECALLS["recall@1_in_64"] < RECALLS["recall@5_in_64"] < 1
    for *_, recalls, _ in ranks:
        assert recalls.tolist() == pytest.approx(list(RECALLS.values()))


@pytest.mark.parametrize("number", range(len(LOSSES)))
def test_the_gradient_of_two_processes_is_that_of_one(ranks, number):
    expected = gradient_on(0, 1, LOSSES[number])
    assert expected.abs().max() > 1
    for *_, gradients in ranks:
        torch.testing.assert_close(gradients[number], expected)


def test_the_second_loss_asks_for_its_gradient_in_another_order():
    features = torch.zeros(BATCH, 4, requires_grad=True)
    layouts = []
    features.register_hook(lambda gradient: layouts.append(gradient.is_contiguous()))
    coupled_on_its_side(features).backward()
    assert layouts == [False]


def test_one_process_has_the_batch_already():
    tensor = torch.ones(2, 3, requires_grad=True)
    assert in_global_order_with_gradient(tensor, 1) is tensor
    assert torch.equal(in_global_order(tensor, 1), tensor) and not in_global_order(tensor, 1).requires_grad


def test_shares_interleave_sample_by_sample():
    assert interleaved([torch.tensor([0, 3]), torch.tensor([1, 4]), torch.tensor([2, 5])]).tolist() == list(range(6))
