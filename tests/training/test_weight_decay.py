"""What weight decay and Muon move, by name, in each model: matrices of products, never an embedding, gain or offset."""

import pytest
import torch
from torch import nn

from dalle.models.clip import ClipConfig, ClipModel
from dalle.models.dvae import PRESETS as CODECS
from dalle.models.dvae import DiscreteVAE
from dalle.models.quantizers import GumbelConfig
from dalle.models.transformer import MODERN, PRESETS, TextToImageTransformer
from dalle.models.vs import VSConfig, VSModel
from dalle.training.optimizers import OptimizerConfig, build_optimizer

BLOCK = ["attention.body.qkv", "attention.body.out", "feed_forward.body.up", "feed_forward.body.down"]
TEXT_BLOCK = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]


def transformer(**changes) -> nn.Module:
    return TextToImageTransformer(PRESETS["debug"].model_copy(update={"depth": 1, "num_text_tokens": 9, "num_codes": 7,
                                                                      **changes}))


def codec(**quantizer) -> nn.Module:
    return DiscreteVAE(CODECS["tiny"].model_copy(update={"quantizer": GumbelConfig(num_codes=7, **quantizer)}))


def clip(**vision) -> nn.Module:
    vision = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16} | vision
    return ClipModel(ClipConfig(vision=vision, text={"layers": 1, "width": 16, "heads": 2}, embed_dim=8, text_length=4,
                                num_text_tokens=10))


def names_in(module: nn.Module, groups: list[dict]) -> list[str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


def decayed(module: nn.Module, name: str = "adamw") -> list[str]:
    groups = build_optimizer(module, OptimizerConfig(name=name, weight_decay=0.1)).param_groups
    return names_in(module, [group for group in groups if group["weight_decay"]])


def weights(*layers: str) -> set[str]:
    return {f"{layer}.weight" for layer in layers}


MODELS = {
    "transformer": (transformer, weights(*(f"blocks.0.{layer}" for layer in BLOCK), "text_head", "image_head")),
    "modern transformer": (lambda: transformer(**MODERN),
                           weights(*(f"blocks.0.{layer}" for layer in BLOCK), "text_head", "image_head")),
    "clip": (clip, {"towers.visual.conv1.weight", "towers.visual.proj", "towers.text_projection",
                    *(f"towers.{tower}transformer.resblocks.0.{layer}" for tower in ("", "visual.")
                      for layer in TEXT_BLOCK)}),
    "vs": (lambda: VSModel(VSConfig(image_dim=4, text_dim=3, embed_dim=2)), weights("image", "text")),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_decays_is_what_is_multiplied(name):
    build, expected = MODELS[name]
    assert sorted(decayed(build())) == sorted(expected)


def with_axes(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.ndim > 1}


@pytest.mark.parametrize(("build", "spared"), [
    (transformer, {"text_embedding.weight", "code_embedding.weight", "text_position", "row_position",
                   "column_position"}),
    (lambda: codec(), set()),                                        # the codebook is a convolution, relaxed or not
    (lambda: codec(logits="cosine", dim=4), {"quantizer.codebook"}),
    (clip, {"towers.positional_embedding", "towers.visual.positional_embedding", "towers.token_embedding.weight"}),
    (lambda: clip(attentional_pool=True, attn_pooler_heads=2),
     {"towers.positional_embedding", "towers.visual.positional_embedding", "towers.token_embedding.weight",
      "towers.visual.attn_pool.query"}),
    (lambda: clip(timm_model_name="tessera_convnext_64", timm_pool="abs_attn", timm_proj="", image_size=64),
     {"towers.positional_embedding", "towers.token_embedding.weight", "towers.visual.head.pool.pos_embed"}),
    (lambda: clip(timm_model_name="vit_tiny_patch16_224", timm_pool="map", timm_proj="", image_size=32),
     {"towers.positional_embedding", "towers.token_embedding.weight", "towers.visual.trunk.pos_embed",
      "towers.visual.trunk.cls_token", "towers.visual.trunk.attn_pool.latent"}),
])
def test_embeddings_with_axes_enough_are_spared(build, spared):
    module = build()
    assert with_axes(module) - set(decayed(module)) == spared


def test_muon_takes_the_blocks_matrices_alone():
    module = transformer()
    optimizer = build_optimizer(module, OptimizerConfig(name="muon", weight_decay=0.1))
    assert set(names_in(module, optimizer.muon.param_groups)) == weights(*(f"blocks.0.{layer}" for layer in BLOCK))
    assert set(decayed(module, "muon")) == MODELS["transformer"][1]


class Declaring(nn.Module):
    def __init__(self, embeddings: list[str], matrices: list[str]):
        super().__init__()
        self.table, self.linear = nn.Parameter(torch.ones(3, 2)), nn.Linear(2, 2)
        self.embedding_parameters = lambda: embeddings
        self.matrix_parameters = lambda: matrices


@pytest.mark.parametrize(("embeddings", "matrices", "message"), [
    (["tables"], [], r"embedding_parameters\(\) lists 'tables', which Declaring lacks"),
    (["table"], ["linear.weights"], r"matrix_parameters\(\) lists 'linear.weights', which Declaring lacks"),
    (["table"], ["table"], "lists 'table', which is an embedding"),
])
def test_a_declaration_that_cannot_be_is_an_error(embeddings, matrices, message):
    with pytest.raises(ValueError, match=message):
        build_optimizer(Declaring(embeddings, matrices), OptimizerConfig(name="muon"))
