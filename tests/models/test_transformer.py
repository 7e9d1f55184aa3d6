"""The transformer: what each slot may know, what it is scored against, and its sizes."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from small_transformers import PIECES, each_layout, each_piece, make_batch, make_model

from dalle.models.blocks import FeedForward
from dalle.models.transformer import (
    IGNORED_TARGET,
    PRESETS,
    TextToImageTransformer,
    TransformerConfig,
    attention_patterns,
)


@each_layout
@each_piece
def test_logits_have_their_own_vocabularies_in_fp32(pieces, layout):
    model = make_model(layout=layout, **pieces)
    text, codes = make_batch(model)
    with torch.autocast("cpu", torch.bfloat16):
        text_logits, image_logits = model(text, codes)
    assert text_logits.shape == (2, 4, 9 + 4)
    assert image_logits.shape == (2, 12, 7)
    assert text_logits.dtype == image_logits.dtype == torch.float32


def run_stream(model: TextToImageTransformer, stream: torch.Tensor) -> torch.Tensor:
    return model.norm(model._run_blocks(stream))


@each_layout
@each_piece
def test_no_slot_sees_the_future(pieces, layout):
    model = make_model(layout=layout, **pieces)
    stream = model.embed(*make_batch(model, 1))[:, :16].detach().requires_grad_()
    outputs = run_stream(model, stream)
    for slot in range(16):
        gradient, = torch.autograd.grad(outputs[0, slot].sum(), stream, retain_graph=True)
        seen = gradient[0].abs().sum(dim=-1) > 0
        assert not seen[slot + 1:].any()
        assert seen[:min(slot + 1, 5)].all(), "a slot sees the whole text up to itself"


@pytest.mark.parametrize("name", ["full", "row", "column", "conv"])
def test_one_layer_sees_exactly_what_its_pattern_permits(name):
    model = make_model(depth=1, attention=name)
    stream = model.embed(*make_batch(model, 1))[:, :16].detach().requires_grad_()
    outputs = run_stream(model, stream)
    mask = attention_patterns(model.config)[0].mask()
    for slot in range(16):
        gradient, = torch.autograd.grad(outputs[0, slot].sum(), stream, retain_graph=True)
        assert torch.equal(gradient[0].abs().sum(dim=-1) > 1e-9, mask[slot, :16])


def test_stream_layouts():
    for layout, start_slot in (("bos", 0), ("boi", 4)):
        model = make_model(layout=layout, positions="rotary")   # no position vectors in the way
        text, codes = torch.tensor([[3, 0, 5, 0]]), torch.arange(12)[None] % 7
        stream = model.embed(text, codes[:, :-1])
        assert stream.shape == (1, 16, 16)
        assert torch.equal(stream[0, start_slot], model.start)
        words = torch.cat([stream[0, :start_slot], stream[0, start_slot + 1:]])[:4]
        assert torch.equal(words, model.text_embedding.weight[[3, 9 + 1, 5, 9 + 3]])
        assert torch.equal(stream[0, 5:], model.code_embedding.weight[codes[0, :-1]])


def test_text_targets_name_pads_by_position():
    text = torch.tensor([[3, 0, 5, 0]])
    assert make_model().text_targets(text).tolist() == [[3, 10, 5, 12]]
    assert make_model(layout="boi").text_targets(text).tolist() == [[10, 5, 12, IGNORED_TARGET]]


def test_positions_are_rows_plus_columns():
    model = make_model()
    stream = model.embed(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 12, dtype=torch.long))
    at_row_1_column_2 = model.code_embedding.weight[0] + model.row_position[1, 0] + model.column_position[0, 2]
    torch.testing.assert_close(stream[0, 5 + 6], at_row_1_column_2)
    torch.testing.assert_close(stream[0, 1 + 2], model.text_embedding.weight[9 + 2] + model.text_position[2])


@each_layout
def test_a_pad_learns_only_where_its_slot_is_empty_and_steers_the_picture(layout):
    model = make_model(layout=layout)
    text, codes = torch.tensor([[3, 1, 0, 0]]), make_batch(model, 1)[1]
    text_logits, image_logits = model(text, codes)
    (text_logits.sum() + image_logits.square().sum()).backward()
    used = model.text_embedding.weight.grad.abs().sum(dim=1) > 0
    assert used.nonzero().flatten().tolist() == [1, 3, 9 + 2, 9 + 3]
    with torch.no_grad():
        model.text_embedding.weight[9 + 3] += torch.randn(16)
    assert not torch.allclose(model(text, codes)[1], image_logits)


def test_loss_at_initialisation_is_that_of_a_guess():
    torch.manual_seed(0)
    model = TextToImageTransformer(PRESETS["debug"].model_copy(update={"dim": 32, "zero_init_heads": False}))
    text, codes = make_batch(model, 4)
    text_logits, image_logits = model(text, codes)
    text_ce = F.cross_entropy(text_logits.flatten(0, 1), model.text_targets(text).flatten())
    image_ce = F.cross_entropy(image_logits.flatten(0, 1), codes.flatten())
    assert text_ce.item() == pytest.approx(math.log(16_384 + 16), abs=0.05)
    assert image_ce.item() == pytest.approx(math.log(8192), abs=0.05)
    assert (text_ce / 8 + image_ce * 7 / 8).item() == pytest.approx(9.098, abs=0.05)


def test_zero_heads_guess_exactly():
    model = TextToImageTransformer(PRESETS["debug"].model_copy(update={"zero_init_heads": True, "num_codes": 32}))
    assert model(*make_batch(model))[1].abs().max() == 0


@pytest.mark.parametrize(("kind", "expected"), [
    ("gelu", 0.8413447), ("gelu_tanh", 0.8411920), ("relu2", 1.0), ("swiglu", 0.7310586), ("geglu", 0.8413447)])
def test_feed_forward_of_ones(kind, expected):
    layer = FeedForward(1, 1, kind, bias=False)
    for parameter in layer.parameters():
        parameter.data.fill_(1.0)
    assert layer(torch.ones(1)).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True, 1])
def test_checkpointing_changes_no_gradient(checkpointing):
    model = make_model(token_shift=True, checkpointing=checkpointing)
    model.train()
    text, codes = make_batch(model)
    text_logits, image_logits = model(text, codes)
    (text_logits.sum() + image_logits.square().sum()).backward()
    assert float(model.blocks[0].attention.body.qkv.weight.grad.norm()) == pytest.approx(expected_norm(), rel=1e-5)


def expected_norm() -> float:
    model = make_model(token_shift=True)
    text, codes = make_batch(model)
    text_logits, image_logits = model(text, codes)
    return float(torch.autograd.grad(text_logits.sum() + image_logits.square().sum(),
                                     model.blocks[0].attention.body.qkv.weight)[0].norm())


def test_dropout_acts_only_in_training():
    model = make_model(dropout=0.5)
    text, codes = make_batch(model)
    assert torch.equal(model(text, codes)[1], model(text, codes)[1])
    model.train()
    assert not torch.equal(model(text, codes)[1], model(text, codes)[1])


def test_embedding_gradient_is_scaled_and_the_rest_is_not():
    gradients = []
    for share in (1.0, 0.1):
        model = make_model(embedding_gradient=share)
        text, codes = make_batch(model)
        model(text, codes)[1].square().sum().backward()
        gradients.append((model.code_embedding.weight.grad, model.blocks[0].attention.body.qkv.weight.grad))
    torch.testing.assert_close(gradients[1][0], gradients[0][0] * 0.1)
    torch.testing.assert_close(gradients[1][1], gradients[0][1])


@pytest.mark.parametrize(("name", "core"), [
    ("debug", 196_608), ("tiny", 6_291_456), ("base", 84_934_656), ("medium", 301_989_888), ("2.8b", 2_831_155_200),
    ("5.6b", 5_549_064_192), ("12b", 12_092_178_432)])
def test_core_weights_of_the_presets(name, core):
    with torch.device("meta"):
        model = TextToImageTransformer(PRESETS[name])
    matrices = dict(model.named_parameters())
    assert sum(matrices[key].numel() for key in model.matrix_parameters()) == core


def test_the_12b_preset_has_its_parameters():
    with torch.device("meta"):
        model = TextToImageTransformer(PRESETS["12b"])
    dim, depth, pads = 3968, 64, 256
    embeddings = (16_384 + pads + 8192 + 256 + 64 + 1) * dim
    heads = (16_384 + pads + 8192) * dim
    biases_and_gains = depth * (3 + 1 + 4 + 1 + 4) * dim + 2 * dim
    assert model.num_parameters == 12 * dim**2 * depth + embeddings + heads + biases_and_gains == 12_293_828_224


def test_every_preset_is_a_model():
    for config in PRESETS.values():
        with torch.device("meta"):
            assert TextToImageTransformer(config).num_parameters > 0


def test_the_forward_of_a_loss_sums_what_its_logits_score():
    model = make_model(layout="boi")
    text, codes = make_batch(model)
    targets = model.text_targets(text)
    targets[0, 0] = IGNORED_TARGET
    text_logits, image_logits = model(text, codes)
    text_sum, image_sum = model(text, codes, targets)
    torch.testing.assert_close(text_sum, F.cross_entropy(text_logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    torch.testing.assert_close(image_sum, F.cross_entropy(image_logits.flatten(0, 1), codes.flatten(), reduction="sum"))


@pytest.mark.parametrize("name", ["xl", "2.8b", "5.6b", "12b"])
def test_wide_heads_have_the_same_weights(name):
    with torch.device("meta"):
        narrow, wide = TextToImageTransformer(PRESETS[name]), TextToImageTransformer(PRESETS[f"{name}-128"])
    assert (wide.config.width_of_head, narrow.config.width_of_head) == (128, 64)
    assert wide.num_parameters == narrow.num_parameters
    assert wide.flops_per_sample() == narrow.flops_per_sample()
    assert PRESETS[f"{name}-128-modern"].width_of_head == 128


def test_matrix_parameters_are_the_blocks_weights():
    names = make_model(qk_norm=True).matrix_parameters()
    assert len(names) == 4 * 4
    assert all(name.startswith("blocks.") and name.endswith("weight") and "norm" not in name for name in names)


def test_flops_of_a_model_counted_by_hand():
    config = TransformerConfig(dim=8, depth=1, heads=2, text_length=2, num_text_tokens=10, grid=(1, 3), num_codes=5,
                               attention="full")
    length = 5
    layer = 12 * 8 * 8
    pairs = length * (length + 1) // 2
    heads = 2 * (12 * 8) + 3 * (5 * 8)
    with torch.device("meta"):
        model = TextToImageTransformer(config)
    assert model.flops_per_sample() == 3 * (2 * layer * length + 2 * heads + 2 * 2 * 8 * pairs)


def test_a_large_model_costs_about_six_operations_a_weight():
    with torch.device("meta"):
        model = TextToImageTransformer(PRESETS["12b"])
    assert model.flops_per_sample() == pytest.approx(6 * 12_092_178_432 * 1280, rel=0.03)


@pytest.mark.parametrize(("changes", "message"), [
    ({"dim": 30, "heads": 4}, "not a multiple of heads"),
    ({"positions": "rotary", "head_dim": 6}, "multiple of 4, not 6"),
    ({"token_shift": True, "dim": 18, "heads": 2}, "not a multiple of 4"),
    ({"conv_kernel": 4}, "odd"),
    ({"attention": ()}, "at least one"),
])
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        make_model(**changes)


def test_wrong_lengths_are_refused():
    model = make_model()
    text, codes = make_batch(model)
    for wrong in ((text[:, :-1], codes), (text, codes[:, :-1])):
        with pytest.raises(ValueError, match="4 text and 12 image slots"):
            model(*wrong)


def test_saved_and_loaded_it_is_the_same(tmp_path):
    model = make_model(**PIECES["list"])
    model.save_pretrained(tmp_path)
    loaded = TextToImageTransformer.from_pretrained(tmp_path)
    batch = make_batch(model)
    assert loaded.config == model.config
    assert all(itertools.starmap(torch.equal, zip(loaded(*batch), model(*batch), strict=True)))


def test_compiled_it_gives_the_same_logits():
    model = make_model(token_shift=True, attention="full", depth=1)
    batch = make_batch(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(*batch), model(*batch))
    compiled(*batch)[1].sum().backward()
    assert model.start.grad is not None


@pytest.mark.parametrize(("asked", "calls"), [(False, 4), (0, 4), (True, 8), (3, 7), (99, 8)])
def test_so_many_blocks_from_the_first_on_are_computed_again(asked, calls):
    model = make_model(depth=4, checkpointing=asked)
    seen = []
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, given, index=index: seen.append(index))
    run_stream(model, model.embed(*make_batch(model))).sum().backward()
    assert len(seen) == calls and sorted(seen[4:]) == list(range(calls - 4))
