"""What a micro-batch of the transformer keeps for its backward pass, in bytes: ``dalle/training/memory.py`` adds it up.

Counted are the tensors that the products, norms and activations of a block need again, in the type that they are
computed in, with attention that keeps no scores (SDPA's fused forms, FlexAttention) and heads that keep their gradients
and no logits.
"""

from dalle.models.blocks import GATED
from dalle.models.losses import MOST_LOGITS
from dalle.models.transformer import TransformerConfig
from dalle.training.memory import BF16, FP32, Activations


def transformer_activations(config: TransformerConfig, samples: int, bf16: bool) -> Activations:
    """Of ``samples`` streams at once."""
    slots = samples * config.length
    width = BF16 if bf16 else FP32
    inner, gated = config.heads * config.width_of_head, config.mlp in GATED
    statistics = 2 * FP32 * (2 if config.norm == "layernorm" else 1) + FP32 * config.heads
    per_slot = (4 * width * config.dim                   # inputs of both norms, and what they give to the products
                + 4 * width * inner                      # queries, keys, values, and the heads' outputs
                + (4 if gated else 2) * width * config.hidden + statistics)
    if config.qk_norm or config.positions == "rotary":
        per_slot += 3 * width * inner                    # before they were normalised and turned
    full = slots * per_slot
    stream = FP32 * slots * config.dim                   # between blocks: the residual stream, and its gradient
    recomputed = config.recomputed_blocks
    kept = tuple(stream if index < recomputed else full for index in range(config.depth))
    in_backward = 2 * stream + 2 * width * slots * config.hidden
    working = tuple(full + in_backward + (stream if index < recomputed else 0) for index in range(config.depth))
    heads = ((config.text_length, config.num_text_tokens + config.text_length),
             (config.num_image_slots, config.num_codes))
    matrices = [tokens * config.dim for _, tokens in heads]
    logits = max(min(samples * rows * tokens, MOST_LOGITS) for rows, tokens in heads)     # that are there at once
    in_heads = (logits * (2 * width + 2 * FP32) + FP32 * sum(matrices)     # gradients are made with the loss
                + (width * max(matrices) if bf16 else 0) + width * slots * config.dim)
    return Activations(kept, working, in_heads + 2 * stream)
