"""What there is to see of a picture: its attention word by word, and its scales side by side."""

import torch

from gans.looking import attention_picture, pictures, scales_picture


def test_a_row_a_word_and_a_column_a_refinement():
    image = torch.ones(3, 8, 8)
    image[:, :, 4:] = -1
    first, second = torch.zeros(3, 2, 2), torch.zeros(3, 4, 4)
    first[0] = 0.25                                     # the first word everywhere, the second at the left; no third
    first[1, :, 0] = 0.5
    second[:2] = 1
    picture = attention_picture(image, [first, second])
    assert picture.shape == (3, 3 * 8, 2 * 8) and picture.dtype == torch.uint8
    plain = ((image + 1) / 2 * 255).to(torch.uint8)
    assert torch.equal(picture[:, :8, :8], plain) and torch.equal(picture[:, 8:16, :8], plain)
    assert torch.equal(picture[:, 16:, 8:], plain)
    looked = picture[0, 16:, :8]
    assert (looked[:, :2] == 255).all() and (looked[:, 2:4] < 255).all() and not looked[:, 4:].any()


def test_the_scales_stand_side_by_side_each_with_its_own_pixels():
    small, large = torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).expand(3, 2, 2), torch.ones(3, 4, 4)
    picture = scales_picture([small, large])
    assert picture.shape == (3, 4, 8) and picture.dtype == torch.uint8
    assert torch.equal(picture[0, :, :4], torch.tensor([[0, 0, 255, 255]] * 2 + [[255, 255, 0, 0]] * 2,
                                                       dtype=torch.uint8))
    assert (picture[:, :, 4:] == 255).all()


def test_only_what_there_is_is_shown():
    one, other = torch.zeros(3, 4, 4), torch.zeros(3, 8, 8)
    assert pictures({"image_8": other}) == {}
    assert pictures({"image_4": one, "image_8": other}).keys() == {"scales"}
    assert pictures({"image_8": other, "attention_4": torch.ones(2, 4, 4)}).keys() == {"attention"}
