"""Boxes as matrices against torch's own sampling, key points as maps by hand, and what is drawn of both."""

import pytest
import torch
import torch.nn.functional as F

from dalle.errors import UserError
from gans.locations import (
    LEAST,
    clipped,
    crop_matrix,
    drawn_places,
    gate,
    inverse_matrix,
    keypoint_maps,
    one_box,
    places_in,
    resampled,
)

FULL = torch.tensor([[0.0, 0.0, 1.0, 1.0]])


def boxes(count: int = 5) -> torch.Tensor:
    source = torch.Generator().manual_seed(0)
    size = 0.1 + 0.5 * torch.rand(count, 2, generator=source, dtype=torch.float64)
    return torch.cat([(1 - size) * torch.rand(count, 2, generator=source, dtype=torch.float64), size], dim=1)


def torchs(matrix: torch.Tensor) -> torch.Tensor:
    """For ``affine_grid``, which has x before y."""
    return matrix[:, [1, 0]][:, :, [1, 0, 2]]


def test_the_whole_picture_is_the_identity():
    identity = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    torch.testing.assert_close(crop_matrix(FULL), identity)
    torch.testing.assert_close(inverse_matrix(crop_matrix(FULL)), identity)
    features = torch.randn(1, 2, 16, 16)
    torch.testing.assert_close(resampled(features, identity), features, rtol=0, atol=1e-5)


def test_a_matrix_by_hand():
    """x from 1/4 to 3/4, y from 0 to 1/4: half as wide, a quarter as high, in the middle across, up by 3/4."""
    box = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    assert crop_matrix(box).tolist() == [[[0.25, 0, -0.75], [0, 0.5, 0]]]
    assert inverse_matrix(crop_matrix(box)).tolist() == [[[4, 0, 3], [0, 2, 0]]]


def test_the_inverse_undoes_the_matrix():
    for matrix, inverse in zip(crop_matrix(boxes()), inverse_matrix(crop_matrix(boxes())), strict=True):
        below = torch.tensor([[0, 0, 1.0]], dtype=torch.float64)
        torch.testing.assert_close(torch.cat([matrix, below]) @ torch.cat([inverse, below]),
                                   torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("turn", [lambda matrix: matrix, inverse_matrix])
def test_resampling_is_what_grid_sample_does(turn):
    matrix = turn(crop_matrix(boxes()))
    features = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    grid = F.affine_grid(torchs(matrix), list(features.shape), align_corners=True)
    expected = F.grid_sample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
    torch.testing.assert_close(resampled(features, matrix), expected)


def test_resampling_can_be_differentiated_twice():
    features = torch.randn(1, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    matrix = crop_matrix(boxes(1))
    assert torch.autograd.gradgradcheck(lambda x: resampled(x, matrix).square(), (features,))


def test_pasting_fills_the_box_and_nothing_else():
    box = torch.tensor([[0.5, 0.25, 0.25, 0.5]])
    pasted = resampled(torch.ones(1, 1, 17, 17), inverse_matrix(crop_matrix(box)))[0, 0]    # cells 1/16 apart
    assert (pasted[4:13, 8:13] == 1).all()
    pasted[3:14, 7:14] = 0                                                                  # soft edges of a cell
    assert not pasted.any()


def test_cropping_reads_the_box():
    features = torch.arange(17.0).expand(1, 1, 17, 17)                # how far to the right
    cropped = resampled(features, crop_matrix(torch.tensor([[0.25, 0.0, 0.5, 1.0]])))
    torch.testing.assert_close(cropped[0, 0, 3], torch.linspace(4, 12, 17))


def test_what_is_the_same_everywhere_stays_so_when_it_is_cropped():
    """So the warped text of the discriminator says nothing of the place."""
    same = torch.tensor([2.0, -1.0])[None, :, None, None].expand(5, -1, 16, 16)
    torch.testing.assert_close(resampled(same, crop_matrix(boxes().float())), same.contiguous())


def test_what_is_narrow_stays_so_and_is_read_in_single_precision():
    features = torch.randn(5, 2, 16, 16)
    out = resampled(features.bfloat16(), crop_matrix(boxes().float()))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), resampled(features, crop_matrix(boxes().float())), atol=0.05, rtol=0.05)


def test_boxes_are_cut_at_the_edges():
    found = clipped(torch.tensor([[-0.25, 0.5, 0.5, 1.0], [0.25, 0.25, 0.5, 0.5], [2.0, -3.0, 1.0, 1.0],
                                  [0.5, 0.5, 0.001, 0.25]]))
    torch.testing.assert_close(found, torch.tensor([
        [0, 0.5, 0.25, 0.5], [0.25, 0.25, 0.5, 0.5], [1 - LEAST, 0, LEAST, LEAST], [0.5, 0.5, LEAST, 0.25]]))


def test_one_box_of_several():
    several = torch.tensor([[[0.1, 0.2, 0.2, 0.1], [0.5, 0.1, 0.25, 0.5]], [[0.3, 0.3, 0.5, 0.4], [0, 0, 0, 0]]])
    torch.testing.assert_close(one_box(several, "all"), torch.tensor([[0.1, 0.1, 0.65, 0.5], [0.3, 0.3, 0.5, 0.4]]))
    torch.testing.assert_close(one_box(several, "first"), several[:, 0])


def test_parts_that_are_missing_are_filled_up_and_too_many_refused():
    points = torch.tensor([[[0.5, 0.25, 1.0]]])
    assert places_in({"keypoints": points}, "keypoints", 2).tolist() == [[[0.5, 0.25, 1], [0, 0, 0]]]
    with pytest.raises(UserError, match="a sample has 3 key points: set generator.num_parts"):
        places_in({"keypoints": points.expand(1, 3, 3)}, "keypoints", 2)


def test_maps_by_a_loop():
    source = torch.Generator().manual_seed(1)
    points = torch.rand(4, 5, 3, generator=source)
    points[..., 2] = (points[..., 2] > 0.4).float()
    points[0, 0] = torch.tensor([0.0, 1.0, 1.0])
    maps = keypoint_maps(points, 16)
    expected = torch.zeros(4, 5, 16, 16)
    for sample in range(4):
        for part in range(5):
            x, y, there = points[sample, part].tolist()
            if there:
                expected[sample, part, max(int(16 * y + 0.5), 1) - 1, max(int(16 * x + 0.5), 1) - 1] = 1
    assert torch.equal(maps, expected) and expected[0, 0, 15, 0] == 1
    assert torch.equal(gate(maps)[:, 0], expected.sum(1).clamp(max=1))


def test_no_visible_part_shuts_the_gate_and_two_in_a_cell_open_it_once():
    assert not gate(keypoint_maps(torch.tensor([[[0.5, 0.5, 0.0]]]), 16)).any()
    assert gate(keypoint_maps(torch.tensor([[[0.5, 0.5, 1.0], [0.5, 0.5, 1.0]]]), 16)).sum() == 1


def test_places_are_drawn_into_an_enlarged_copy():
    image = torch.zeros(3, 64, 64)
    boxed = drawn_places(image, torch.tensor([0.25, 0.5, 0.5, 0.25]))
    assert boxed.shape == (3, 256, 256) and boxed.dtype == torch.uint8 and not image.any()
    changed = (boxed != boxed[:, :1, :1]).any(dim=0).nonzero()
    assert changed.amin(dim=0).tolist() == [128, 64] and changed.amax(dim=0).tolist() == [191, 191]
    assert (boxed[:, 160, 128] == boxed[:, 0, 0]).all()                                    # an outline, not filled
    dotted = drawn_places(image, torch.tensor([[0.25, 0.75, 1.0], [0.5, 0.5, 0.0]]))
    where = (dotted != dotted[:, :1, :1]).any(dim=0).nonzero().float()
    torch.testing.assert_close(where.mean(dim=0), torch.tensor([192.0, 64.0]), atol=0.6, rtol=0)
    assert drawn_places(torch.zeros(3, 300, 300), torch.zeros(0, 3)).shape == (3, 300, 300)
