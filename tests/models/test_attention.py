"""Every form of attention against the formula, with every pattern."""

import math

import pytest
import torch
import torch.nn.functional as F

from dalle.models import plain
from dalle.models.attention import Attention
from dalle.models.cpu.attention import math_attention
from dalle.models.fused import sdpa_attention
from dalle.models.masks import additive_mask, block_mask
from dalle.models.patterns import AttentionPattern

CPU = torch.device("cpu")


def by_formula(stacked: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    queries, keys, values = stacked
    scores = queries @ keys.transpose(-2, -1) / math.sqrt(stacked.shape[-1])
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ values


@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_every_implementation_is_the_formula(name):
    pattern = AttentionPattern(name, 3, (3, 4), 3)
    stacked = torch.randn(3, 2, 2, 14, 8)
    expected = by_formula(stacked, pattern.mask()[:14, :14])
    torch.testing.assert_close(plain.attention(stacked, additive_mask(pattern, 14, CPU, torch.float32)), expected)
    torch.testing.assert_close(math_attention(stacked, additive_mask(pattern, 14, CPU, torch.float32)), expected)
    torch.testing.assert_close(sdpa_attention(stacked, pattern.mask()[:14, :14]), expected)
    if name == "full":
        torch.testing.assert_close(sdpa_attention(stacked, None), expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_block_mask_is_the_pattern(name):
    flex_attention = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    pattern = AttentionPattern(name, 3, (3, 4), 3)
    stacked = torch.randn(3, 1, 2, 14, 16)
    with torch.no_grad():
        out = flex_attention(*stacked, block_mask=block_mask(pattern, 14, CPU))
    torch.testing.assert_close(out, by_formula(stacked, pattern.mask()[:14, :14]))


def test_bfloat16_attention_is_close_to_exact():
    pattern = AttentionPattern("full", 4, (5, 4))
    stacked = torch.randn(3, 2, 2, 23, 16)
    out = math_attention(stacked.bfloat16(), additive_mask(pattern, 23, CPU, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), by_formula(stacked, pattern.mask()[:23, :23]), atol=0.03, rtol=0.05)


def test_query_key_norm_bounds_the_scores():
    attention = Attention(16, 2, 8, AttentionPattern("full", 2, (2, 2)), qk_norm=True)
    stacked = attention.position(torch.randn(3, 1, 2, 5, 8) * 100, None)
    assert (stacked[0] @ stacked[1].transpose(-2, -1)).abs().max() <= 8 + 1e-4    # |q| = |k| = sqrt(head_dim)


@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_sdpa_and_math_give_the_same_gradients(name):
    pattern = AttentionPattern(name, 3, (3, 4), 3)
    gradients = []
    for backend in ("math", "sdpa"):
        torch.manual_seed(0)
        attention = Attention(16, 2, 8, pattern, rotary=True, backend=backend)
        inputs = torch.randn(2, 14, 16, requires_grad=True)
        constants = attention.constants(14, CPU, torch.float32)
        F.mse_loss(attention(inputs, constants), torch.ones(2, 14, 16)).backward()
        gradients.append([inputs.grad, attention.qkv.weight.grad])
    torch.testing.assert_close(gradients[0], gradients[1])
