"""Places of a map look for a caption's words: AttnGAN's attention (arXiv 1711.10485, equation 2) and its refinement.

Systems of its line have the attention, and refinements of their own around it.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gans.layers import conv1, residual_glu, up_glu
from gans.text import Text


def global_attention(h: Tensor, words: Tensor, mask: Tensor, released_mask: bool = False,
                     values: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every place's own mixture of the words (equation 2), and its weights.

    ``h`` [B, C, H, W], ``words`` [B, C, T] in the same space, ``mask`` bool [B, T], True for a word -> context
    [B, C, H, W] and attention [B, T, H, W], which sums to 1 over the words (0 everywhere for a caption without any).
    ``values`` [B, D, T]: mixed in the place of the words, which are then only looked for.

    ``released_mask`` masks as the released code does, for comparison: its flat row r = picture * places + place takes
    the words of caption r mod B.
    """
    batch, _, height, width = h.shape
    scores = torch.einsum("bcp,bct->bpt", h.flatten(2), words)                  # not divided by sqrt(C)
    allowed = mask[:, None, :]
    if released_mask:
        rows = torch.arange(batch * height * width, device=h.device) % batch
        allowed = mask[rows].view(batch, height * width, -1)
    # the least finite number, not -inf: a caption without words must not become NaN
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    attention = scores.softmax(dim=-1) * allowed                                # [B, H W, T]
    values = words if values is None else values
    context = torch.einsum("bpt,bct->bcp", attention.to(values.dtype), values)
    return context.unflatten(2, (height, width)), attention.transpose(1, 2).unflatten(2, (height, width))


class Refinement(nn.Module):
    """AttnGAN's F_attn and F: [B, width, S, S] and the words to [B, width, 2S, 2S] and the attention [B, T, S, S].

    ``up``: (channels, channels) -> what doubles the side.
    """

    def __init__(self, width: int, word_dim: int, residuals: int, up: Callable[[int, int], nn.Module] = up_glu):
        super().__init__()
        self.to_values = conv1(word_dim, width)      # U
        self.residual = nn.Sequential(*(residual_glu(2 * width) for _ in range(residuals)))
        self.grow = up(2 * width, width)

    def forward(self, h: Tensor, text: Text, condition: Tensor) -> tuple[Tensor, Tensor]:
        refined, attention = self.attend(h, text)
        return self.grow(refined), attention

    def attend(self, h: Tensor, text: Text) -> tuple[Tensor, Tensor]:
        """[B, 2 width, S, S]: the map with what it found of the words; and where it looked."""
        values = self.to_values(text.words[..., None])[..., 0]                      # [B, width, T]
        context, attention = global_attention(h, values, text.mask)
        return self.residual(torch.cat([h, context], dim=1)), attention
