import math

import numpy as np
import pytest
import torch

from dalle.metrics.images import MS_SSIM_WEIGHTS, ms_ssim, ms_ssim_scales, psnr, ssim


def test_psnr_by_hand():
    black, gray = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    gray[0] += 0.1                                            # error 0.01: 20 dB
    gray[1, 0] += 0.3                                         # error 0.09 / 3
    assert psnr(gray, black).tolist() == pytest.approx([20.0, -10 * math.log10(0.03)], abs=1e-4)
    assert psnr(black, black).isinf().all()


def test_ssim_of_equal_and_of_flat_pictures_by_hand():
    noise = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert ssim(noise, noise).tolist() == pytest.approx([1, 1], abs=1e-6)
    light, dark = torch.full((1, 3, 16, 16), 0.75), torch.full((1, 3, 16, 16), 0.25)
    stability = 0.01 ** 2                                     # flat pictures differ in luminance alone
    expected = (2 * 0.75 * 0.25 + stability) / (0.75 ** 2 + 0.25 ** 2 + stability)
    assert float(ssim(light, dark)) == pytest.approx(expected, abs=1e-6)


def test_ssim_is_the_formula_of_the_paper():
    """Wang et al. 2004, equation 13, one window of 11 x 11 after the other."""
    generator = torch.Generator().manual_seed(1)
    images, references = torch.rand(2, 2, 3, 12, 14, generator=generator).double()
    places = np.arange(11) - 5
    window = np.exp(-(places[:, None] ** 2 + places ** 2) / (2 * 1.5 ** 2))
    window /= window.sum()
    for image, reference, measured in zip(images.numpy(), references.numpy(), ssim(images, references), strict=True):
        values = []
        for x, y in zip(image, reference, strict=True):
            x, y = (np.pad(channel, 5, mode="reflect") for channel in (x, y))
            for top in range(12):
                for left in range(14):
                    a, b = (channel[top : top + 11, left : left + 11] for channel in (x, y))
                    mean_a, mean_b = (window * a).sum(), (window * b).sum()
                    var_a, var_b = (window * a * a).sum() - mean_a ** 2, (window * b * b).sum() - mean_b ** 2
                    covariance = (window * a * b).sum() - mean_a * mean_b
                    values.append((2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                                  / ((mean_a ** 2 + mean_b ** 2 + 1e-4) * (var_a + var_b + 9e-4)))
        assert float(measured) == pytest.approx(np.mean(values), abs=1e-6)


@pytest.mark.parametrize("metric", [psnr, ssim, ms_ssim])
def test_other_shapes_are_refused(metric):
    with pytest.raises(ValueError, match="one shape"):
        metric(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 8, 8))


def test_ssim_refuses_pictures_smaller_than_its_window_reaches():
    with pytest.raises(ValueError, match="more than 5 pixels"):
        ssim(torch.zeros(1, 3, 5, 8), torch.zeros(1, 3, 5, 8))


@pytest.mark.parametrize(("side", "scales"), [(64, 3), (128, 4), (256, 5)])
def test_ms_ssim_of_equal_and_of_flat_pictures_by_hand(side, scales):
    noise = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(noise, noise).tolist() == pytest.approx([1, 1], abs=1e-5)
    light, dark = torch.full((1, 3, side, side), 0.8), torch.full((1, 3, side, side), 0.2)
    luminance = (2 * 0.8 * 0.2 + 1e-4) / (0.8**2 + 0.2**2 + 1e-4)      # of the coarsest scale alone
    weights = MS_SSIM_WEIGHTS[:scales]
    assert ms_ssim_scales(side) == scales and sum(MS_SSIM_WEIGHTS) == pytest.approx(1, abs=1e-3)
    assert float(ms_ssim(light, dark)) == pytest.approx(
        luminance ** (weights[-1] * sum(MS_SSIM_WEIGHTS) / sum(weights)), abs=5e-4)      # flat pictures cancel in fp32


def test_ms_ssim_refuses_pictures_smaller_than_its_window():
    assert ms_ssim_scales(11) == 1
    with pytest.raises(ValueError, match="more than 10 pixels"):
        ms_ssim(torch.zeros(1, 3, 10, 10), torch.zeros(1, 3, 10, 10))
