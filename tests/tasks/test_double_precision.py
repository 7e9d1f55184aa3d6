"""The losses of the main job follow the type that they get: in doubles their gradients are those of differences."""

import pytest
import torch
from torch.autograd import gradcheck

from dalle.models.clip import contrastive_loss
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.perceptual import edge_distance
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.models.vs import vs_ranking_loss
from dalle.tasks.dvae import kl_to_uniform, logit_laplace_nll, squared_error, uneven_usage

PICTURES = (2, 3, 8, 8)
CASES = {    # name -> (the loss, its shapes)
    "squared_error": (squared_error, (PICTURES, PICTURES)),
    "logit_laplace_nll": (lambda mean, scale: logit_laplace_nll(mean, scale, torch.full(PICTURES, 0.3).double()),
                          (PICTURES, PICTURES)),
    "kl_to_uniform": (lambda x: kl_to_uniform(x.log_softmax(dim=-1)), ((2, 2, 2, 4),)),
    "uneven_usage": (lambda x: uneven_usage(x.log_softmax(dim=-1)), ((2, 2, 2, 4),)),
    "edge_distance": (edge_distance, (PICTURES, PICTURES)),
    "vs_ranking_loss": (vs_ranking_loss, ((3, 3),)),
    "clip": (lambda image, text, scale: contrastive_loss("clip", 0, 1)(image, text, scale, None), ((3, 2), (3, 2), ())),
    "siglip": (contrastive_loss("siglip", 0, 1), ((3, 2), (3, 2), (), ())),
}


@pytest.mark.parametrize("name", CASES)
def test_a_loss_of_doubles_is_a_double_with_the_gradient_of_differences(name):
    loss, shapes = CASES[name]
    source = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert loss(*inputs).dtype == torch.float64
    assert gradcheck(loss, inputs, atol=1e-8, rtol=1e-6, fast_mode=True)


def test_a_codec_and_a_transformer_of_doubles_agree_with_those_of_fp32():
    codec = DiscreteVAE(DVAEConfig(image_size=16)).eval()
    pictures = torch.rand(2, 3, 16, 16)
    codes = codec.encode(pictures)
    sizes = {"dim": 16, "depth": 1, "heads": 2, "text_length": 3, "num_text_tokens": 9, "grid": (2, 2), "num_codes": 5}
    transformer = TextToImageTransformer(TransformerConfig(**sizes)).eval()
    stream = torch.randint(1, 9, (2, 3)), torch.randint(0, 5, (2, 4))
    narrow = codec.decode(codes), *transformer(*stream)
    wide = codec.double().decode(codes), *transformer.double()(*stream)
    for single, double in zip(narrow, wide, strict=True):
        assert single.dtype == torch.float32 and double.dtype == torch.float64
        torch.testing.assert_close(single.double(), double, atol=1e-5, rtol=1e-4)
        assert (double.float().double() != double).any()      # nothing on the way was rounded to fp32
