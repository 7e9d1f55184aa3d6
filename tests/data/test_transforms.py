import numpy as np
import pytest
from PIL import Image

from dalle.data.transforms import needed_sides, to_square

CROPS = ["none", "center", "random", "dvae", "transformer"]


def rng(seed=0):
    return np.random.default_rng(seed)


def coordinates(width, height):
    """A picture whose pixels say where they are: red = x, green = y."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def area_average(values, target):
    """The exact area mean of a square, by loops over the output."""
    side = len(values)
    out = np.zeros((target, target))
    for row in range(target):
        for column in range(target):
            total = 0.0
            for y in range(side):
                for x in range(side):
                    down = min(y + 1, (row + 1) * side / target) - max(y, row * side / target)
                    along = min(x + 1, (column + 1) * side / target) - max(x, column * side / target)
                    if down > 0 and along > 0:
                        total += down * along * values[y, x]
            out[row, column] = total / (side / target) ** 2
    return out


@pytest.mark.parametrize("crop", CROPS)
def test_a_picture_of_the_right_size_is_not_resampled(crop):
    values = rng().integers(0, 256, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(to_square(Image.fromarray(values), 16, crop, False, rng()), values)


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (7, 100), (1, 1), (17, 16), (23, 23)])
@pytest.mark.parametrize("flip", [False, True])
def test_every_size_comes_out_square(crop, size, flip):
    for seed in range(5):
        out = to_square(Image.new("RGB", size, (9, 8, 7)), 16, crop, flip, rng(seed))
        assert out.shape == (16, 16, 3) and out.dtype == np.uint8 and (out == (9, 8, 7)).all()


def test_center_takes_the_middle():
    out = to_square(coordinates(40, 16), 16, "center", False, None)
    assert out[0, 0].tolist() == [12, 0, 0] and out[15, 15].tolist() == [27, 15, 0]


def test_none_keeps_the_whole_width():
    out = to_square(coordinates(64, 16), 16, "none", False, None)
    assert out[:, 0, 0].max() < 4 and out[:, -1, 0].min() > 59


def test_random_reaches_every_place_and_is_repeatable():
    lefts = {int(to_square(coordinates(20, 16), 16, "random", False, rng(seed))[0, 0, 0]) for seed in range(100)}
    assert lefts == {0, 1, 2, 3, 4}
    first, second = (to_square(coordinates(99, 70), 16, "random", True, rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_whole_ratios_are_exact_means_and_others_stay_close():
    values = rng().integers(0, 256, (48, 48), dtype=np.uint8)
    picture = Image.merge("RGB", [Image.fromarray(values)] * 3)
    exact = area_average(values.astype(float), 16)
    assert np.abs(to_square(picture, 16, "center", False, None)[..., 0] - exact).max() < 0.6
    smooth = np.add.outer(np.arange(45), 2 * np.arange(45)).astype(np.uint8)
    picture = Image.merge("RGB", [Image.fromarray(smooth)] * 3)
    inner = (slice(1, -1), slice(1, -1))
    difference = to_square(picture, 16, "center", False, None)[..., 0] - area_average(smooth.astype(float), 16)
    assert np.abs(difference[inner]).max() <= 1.5


def test_dvae_scales_to_nine_to_twelve_eighths_before_the_cut():
    """32 pixels: t in [36, 48], so the cut shows between 32/48 and 32/36 of the square."""
    spans = []
    for seed in range(300):
        out = to_square(coordinates(200, 200), 32, "dvae", False, rng(seed)).astype(float)
        spans.append((out[0, -1, 0] - out[0, 0, 0]) / (200 * 31 / 32))
    assert min(spans) == pytest.approx(32 / 48, abs=0.02) and max(spans) == pytest.approx(32 / 36, abs=0.02)


def test_dvae_does_not_upsample_what_is_just_large_enough():
    out = to_square(coordinates(34, 34), 32, "dvae", False, rng(1)).astype(int)      # t = s = 34: pixels as they are
    assert (np.diff(out[..., 0], axis=1) == 1).all() and (np.diff(out[..., 1], axis=0) == 1).all()


def test_transformer_crop_stays_near_the_middle():
    """Width 96, height 32: offsets in [3 * 64 // 8, 5 * 64 // 8) = [24, 40)."""
    lefts = [int(to_square(coordinates(96, 32), 32, "transformer", False, rng(seed))[0, 0, 0]) for seed in range(300)]
    assert min(lefts) == 24 and max(lefts) == 39
    spans = []
    for seed in range(300):
        out = to_square(coordinates(200, 200), 32, "transformer", False, rng(seed)).astype(float)
        spans.append((out[0, -1, 0] - out[0, 0, 0]) / (200 * 31 / 32))
    assert min(spans) == pytest.approx(32 / 36, abs=0.02) and max(spans) == pytest.approx(1, abs=0.02)


def test_small_pictures_are_scaled_up_whole():
    out = to_square(coordinates(8, 8), 32, "dvae", False, rng()).astype(int)
    assert out[..., 0].min() == 0 and out[..., 0].max() == 7


def test_half_of_the_pictures_are_mirrored():
    firsts = [int(to_square(coordinates(16, 16), 16, "center", True, rng(seed))[0, 0, 0]) for seed in range(400)]
    assert set(firsts) == {0, 15} and 160 < firsts.count(15) < 240


PLACES = 13       # of a square of 64 in one of 76, each way


def test_a_square_is_cut_from_the_resized_picture_at_every_place():
    """76 pixels for a size of 64: nothing is resampled, and the cut is uniform over 13 x 13 places."""
    picture = coordinates(76, 76)
    places = set()
    for seed in range(2000):
        out = to_square(picture, 64, "random", False, rng(seed), crop_from=76 / 64)
        x, y, _ = out[0, 0].tolist()
        places.add((x, y))
        np.testing.assert_array_equal(out, np.asarray(picture)[y:y + 64, x:x + 64])
    assert places == {(x, y) for x in range(PLACES) for y in range(PLACES)}


@pytest.mark.parametrize(("crop", "side", "resized"), [
    ("none", (200, 100), (76, 76)), ("random", (200, 100), (152, 76)), ("random", (90, 120), (76, 101)),
    ("none", (32, 40), (76, 76)), ("random", (16, 16), (76, 76))])
def test_what_is_cut_is_a_part_of_the_picture_resized_as_a_whole(crop, side, resized):
    """Whole pictures lose their aspect (GAN-INT-CLS), or keep it by their shorter side (AttnGAN)."""
    values = np.kron(rng(1).integers(0, 256, (side[1] // 4 + 1, side[0] // 4 + 1, 3)), np.ones((4, 4, 1)))
    picture = Image.fromarray(values[:side[1], :side[0]].astype(np.uint8))
    smaller = min(side) >= 76
    whole = picture.resize(resized, Image.Resampling.HAMMING if smaller else Image.Resampling.BICUBIC)
    for seed in range(5):
        draws = rng(seed)
        x, y = (int(draws.integers(length - 64 + 1)) for length in resized)
        out = to_square(picture, 64, crop, False, rng(seed), crop_from=76 / 64).astype(int)
        difference = np.abs(out - np.asarray(whole)[y:y + 64, x:x + 64].astype(int))
        assert difference.max() <= 3 and difference.mean() < 0.5


def test_cut_pictures_are_mirrored_too_and_repeatable():
    outs = [to_square(coordinates(76, 76), 64, "random", True, rng(seed), crop_from=76 / 64) for seed in range(400)]
    mirrored = sum(out[0, 0, 0] > out[0, -1, 0] for out in outs)
    assert 160 < mirrored < 240
    np.testing.assert_array_equal(outs[3], to_square(coordinates(76, 76), 64, "random", True, rng(3), 76 / 64))


def test_the_released_sides():
    """76, 152, 304 (StackGAN, AttnGAN), 355 (DAMSM), 74 (SISGAN), 136 (TAGAN), 256 for 224 (VSE)."""
    factors = {64: (76 / 64, 76), 128: (76 / 64, 152), 256: (76 / 64, 304), 299: (76 / 64, 355)}
    for size, (factor, side) in [*factors.items(), (64, (74 / 64, 74)), (128, (136 / 128, 136)), (224, (8 / 7, 256))]:
        assert needed_sides(size, "random", factor) == (side, side)


def test_needed_sides():
    assert [needed_sides(256, crop) for crop in CROPS] == [(256, 256)] * 3 + [(288, 384), (256, 288)]


@pytest.mark.parametrize("crop", CROPS)
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (64, 32), (7, 100), (17, 16), (23, 23)])
def test_an_array_is_cut_and_resized_as_the_same_picture_is(crop, size):
    values = rng().integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    for seed in range(5):
        factor = 1.25 if crop in ("none", "random") and seed % 2 else 1.0
        expected = to_square(Image.fromarray(values), 16, crop, True, rng(seed), factor)
        np.testing.assert_array_equal(to_square(values, 16, crop, True, rng(seed), factor), expected)
