"""open_clip's towers, computed by our forms: the same weights by the same names, the same function.

Two things are done otherwise. Products and attention are those that ``dalle/models/kernels.py`` names for the device.
And where gradients are wanted, the last block of a tower is computed for the slot that is pooled alone: of its other
slots only keys and values are ever read. That leaves out five sixths of a block, a seventh of a tower of six.
"""

from typing import Any

import torch
from open_clip import CLIP
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dalle.models.kernels import kernels_for
from dalle.models.layers import Linear


class TowerBlock(ResidualAttentionBlock):
    """open_clip's block of self-attention and feed-forward. Input and output [B, S, width]."""

    def attention(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None,
                  attn_mask: Tensor | None = None) -> Tensor:
        if k_x is not None or v_x is not None:
            return super().attention(q_x, k_x, v_x, attn_mask)
        attended = kernels_for(q_x.device).attend(self._heads(q_x, first=0), attn_mask)     # [B, heads, S, head_dim]
        return self.attn.out_proj(attended.transpose(1, 2).flatten(2))

    def forward(self, q_x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None,
                attn_mask: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """With ``slots`` [B], the output of one slot of each sequence alone: [B, 1, width]."""
        if slots is None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        normed = self.ln_1(q_x)
        hidden = taken(q_x, slots) + self.ls_1(self._attend_from(slots, normed, attn_mask))
        return hidden + self.ls_2(self.mlp(self.ln_2(hidden)))

    def _attend_from(self, slots: Tensor, normed: Tensor, mask: Tensor | None) -> Tensor:
        queries = self._heads(taken(normed, slots), first=0, last=1)[0]
        keys, values = self._heads(normed, first=1)
        scores = queries @ keys.transpose(-2, -1) * self.attn.head_dim ** -0.5              # [B, heads, 1, S]
        if mask is not None:
            scores = scores + mask[slots][:, None, None].to(scores.dtype)
        return self.attn.out_proj((scores.softmax(dim=-1) @ values).transpose(1, 2).flatten(2))

    def _heads(self, inputs: Tensor, first: int, last: int = 3) -> Tensor:
        """Those from ``first`` to ``last`` of queries, keys and values, stacked as [n, B, heads, S, head_dim]."""
        attention, width = self.attn, self.attn.embed_dim
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if last - first < 3:
            rows = slice(first * width, last * width)
            weight, bias = weight[rows], None if bias is None else bias[rows]
        projected = kernels_for(inputs.device).linear(inputs, weight, bias)
        return projected.unflatten(-1, (last - first, attention.num_heads, attention.head_dim)).permute(2, 0, 3, 1, 4)


class TowerTransformer(Transformer):
    """open_clip's blocks, one upon the other. Input and output [B, S, width]."""

    pools_first = False      # whether the tower reads nothing but the first slot

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, slots: Tensor | None = None) -> Tensor:
        """With ``slots`` [B], the output of one slot of each sequence alone: [B, 1, width]."""
        if self.pools_first and torch.is_grad_enabled():
            slots = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        if slots is None:
            return super().forward(x, attn_mask)
        *whole, last = self.resblocks
        for block in whole:
            x = block(x, attn_mask=attn_mask)
        return last(x, attn_mask=attn_mask, slots=slots)


def taken(inputs: Tensor, slots: Tensor) -> Tensor:
    """One slot of each sequence: [B, 1, width] of [B, S, width] and [B]."""
    return inputs[torch.arange(len(inputs), device=inputs.device), slots][:, None]


def take_over(towers: nn.Module) -> None:
    """Put the classes of this file in the place of open_clip's, where they stand for exactly those."""
    for part in list(towers.modules()):
        if type(part) in (nn.Linear, NonDynamicallyQuantizableLinear):
            part.__class__ = Linear
        elif type(part) is ResidualAttentionBlock and part.attn.batch_first:
            part.__class__ = TowerBlock
        elif type(part) is Transformer and part.batch_first and \
                all(type(block) in (ResidualAttentionBlock, TowerBlock) for block in part.resblocks):
            part.__class__ = TowerTransformer
    visual = getattr(towers, "visual", None)
    if type(visual) is VisionTransformer and type(visual.transformer) is TowerTransformer:
        visual.transformer.pools_first = visual.attn_pool is None and visual.pool_type == "tok" \
            and not visual.output_tokens


def pools_the_end(towers: Any) -> bool:
    """Whether the text tower reads nothing but the slot of the highest id, as CLIP's does."""
    return type(towers) is CLIP and towers.text_pool_type == "argmax" and towers.text_projection is not None \
        and type(towers.transformer) is TowerTransformer


def encode_ends(towers: CLIP, ids: Tensor) -> Tensor:
    """``towers.encode_text`` of [B, S] ids, of which only the slot of the highest id is pooled: [B, E]."""
    hidden = towers.token_embedding(ids) + towers.positional_embedding
    hidden = towers.transformer(hidden, attn_mask=towers.attn_mask, slots=ids.argmax(dim=-1))
    pooled, projection = towers.ln_final(hidden)[:, 0], towers.text_projection
    return projection(pooled) if isinstance(projection, nn.Module) else pooled @ projection
