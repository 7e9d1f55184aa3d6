"""Small transformers with every piece that a config can choose, and batches for them."""

import pytest
import torch

from dalle.models.transformer import MODERN, TextToImageTransformer, TransformerConfig

PIECES = {
    "plain": {},
    "full": {"attention": "full"},
    "row": {"attention": "row"},
    "column": {"attention": "column"},
    "conv": {"attention": "conv"},
    "clamp": {"attention": "conv", "conv_mode": "clamp"},
    "torus": {"attention": "conv", "conv_mode": "torus"},
    "list": {"attention": ("row", "column", "conv", "full")},
    "shift": {"token_shift": True, "mlp": "relu2"},
    "sandwich": {"sandwich_norm": True, "mlp": "geglu", "head_dim": 12},
    "modern": MODERN,
    "modern_shift": {**MODERN, "token_shift": True, "attention": "full"},
    "swiglu": {"mlp": "swiglu", "bias": False, "norm": "rmsnorm"},
    "gelu": {"mlp": "gelu"},
}
each_piece = pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES.keys())
each_layout = pytest.mark.parametrize("layout", ["bos", "boi"])


def make_model(seed: int = 0, **changes) -> TextToImageTransformer:
    """A model of 4 text and 3 x 4 image slots with weights large enough that every path matters."""
    torch.manual_seed(seed)
    sizes = {"dim": 16, "depth": 4, "heads": 2, "text_length": 4, "num_text_tokens": 9, "grid": (3, 4), "num_codes": 7,
             "conv_kernel": 3}
    model = TextToImageTransformer(TransformerConfig(**{**sizes, **changes})).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.4)
    return model


def make_batch(model: TextToImageTransformer, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    config = model.config
    text = torch.randint(0, config.num_text_tokens, (batch, config.text_length))
    return text, torch.randint(0, config.num_codes, (batch, config.num_image_slots))
