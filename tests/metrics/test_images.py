import math

import pytest
import torch

from dalle.metrics.images import psnr


def test_psnr_by_hand():
    black, gray = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    gray[0] += 0.1                                            # error 0.01: 20 dB
    gray[1, 0] += 0.3                                         # error 0.09 / 3
    assert psnr(gray, black).tolist() == pytest.approx([20.0, -10 * math.log10(0.03)], abs=1e-4)
    assert psnr(black, black).isinf().all()


def test_psnr_refuses_other_shapes():
    with pytest.raises(ValueError, match="one shape"):
        psnr(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 8, 8))
