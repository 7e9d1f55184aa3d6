"""The discrete VAE against the released network's numbers, keys and shapes, and against itself through a file."""

import pytest
import torch
from pydantic import ValidationError

from dalle.models.dvae import (
    PRESETS,
    DiscreteVAE,
    DVAEConfig,
    map_pixels,
    unmap_pixels,
)
from dalle.models.dvae_networks import CompactNetworkConfig, OpenAINetworkConfig
from dalle.models.quantizers import FSQConfig, GumbelConfig


def on_meta(config: DVAEConfig) -> DiscreteVAE:
    with torch.device("meta"):
        return DiscreteVAE(config)


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def released_shapes(first: int, widths: list[int], kernels: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """The keys between `input` and `output`, written out from the paper's table."""
    shapes = {}
    channels = first
    for group, width in enumerate(widths, start=1):
        for block in (1, 2):
            prefix, hidden = f"blocks.group_{group}.block_{block}", width // 4
            sides = [channels, hidden, hidden, hidden, width]
            for i, kernel in enumerate(kernels):
                shapes[f"{prefix}.res_path.conv_{i + 1}.w"] = (sides[i + 1], sides[i], kernel, kernel)
                shapes[f"{prefix}.res_path.conv_{i + 1}.b"] = (sides[i + 1],)
            if channels != width:
                shapes[f"{prefix}.id_path.w"] = (width, channels, 1, 1)
                shapes[f"{prefix}.id_path.b"] = (width,)
            channels = width
    return shapes


def test_released_encoder_has_its_parameters_keys_and_shapes():
    encoder = on_meta(PRESETS["openai"]).encoder
    expected = released_shapes(256, [256, 512, 1024, 2048], kernels=(3, 3, 3, 1))
    expected |= {"blocks.input.w": (256, 3, 7, 7), "blocks.input.b": (256,)}
    expected |= {"blocks.output.conv.w": (8192, 2048, 1, 1), "blocks.output.conv.b": (8192,)}
    assert shapes_of(encoder) == expected
    assert len(expected) == 74
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 53_786_240


def test_released_decoder_has_its_parameters_keys_and_shapes():
    model = on_meta(PRESETS["openai"])
    expected = released_shapes(128, [2048, 1024, 512, 256], kernels=(1, 3, 3, 3))
    expected |= {"blocks.input.w": (128, 8192, 1, 1), "blocks.input.b": (128,)}
    expected |= {"blocks.output.conv.w": (6, 256, 1, 1), "blocks.output.conv.b": (6,)}
    assert shapes_of(model.decoder) == expected
    assert len(expected) == 76
    assert sum(parameter.numel() for parameter in model.decoder.parameters()) == 43_829_766
    assert set(model.state_dict()) == {f"encoder.{name}" for name in model.encoder.state_dict()} | {
        f"decoder.{name}" for name in expected
    }


@pytest.mark.parametrize(("side", "grid"), [(256, 32), (64, 8)])
def test_released_network_gives_one_logit_a_code_at_an_eighth_of_the_side(side, grid):
    output = on_meta(PRESETS["openai"])(torch.empty(1, 3, side, side, device="meta"), temperature=1.0)
    assert output.code_logits.shape == (1, 8192, grid, grid)
    assert output.codes.shape == (1, grid * grid)
    assert output.mean.shape == output.log_scale.shape == (1, 3, side, side)


def test_released_network_costs_what_the_specification_counts():
    # 136.15 + 153.98 GMAC forward, two FLOPs each, three times for training; within the 1 % that counting may differ by
    assert on_meta(PRESETS["openai"]).training_flops() == pytest.approx(3 * 2 * 290.13e9, rel=0.01)


def small_openai(**network) -> DVAEConfig:
    return DVAEConfig(
        image_size=16,
        network=OpenAINetworkConfig(hidden=8, decoder_input=8, **network),
        quantizer=GumbelConfig(num_codes=12),
    )


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_residual_gain_is_one_over_the_square_of_the_number_of_layers(blocks):
    model = DiscreteVAE(small_openai(blocks_per_group=blocks))
    for network in (model.encoder, model.decoder):
        assert network.blocks.group_2.block_1.gain == 1 / (4 * blocks) ** 2


def test_doubling_the_last_convolution_moves_the_block_by_the_gain_times_its_branch():
    block = DiscreteVAE(small_openai()).encoder.blocks.group_1.block_2
    x = torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        before, branch = block(x), block.res_path(x)                            # its biases are 0 at the start
        block.res_path.conv_4.w.mul_(2)
        after = block(x)
    assert torch.allclose(after - before, branch / 64, atol=1e-6)


def test_released_convolutions_start_at_one_over_the_root_of_the_fan_in():
    encoder = DiscreteVAE(DVAEConfig(network=OpenAINetworkConfig(hidden=64), quantizer=FSQConfig())).encoder
    weight = encoder.blocks.group_3.block_2.res_path.conv_1.w.detach()
    assert float(weight.std()) == pytest.approx((256 * 9) ** -0.5, rel=0.02)


def test_pixel_map_and_its_inverse():
    mapped = map_pixels(torch.tensor([0.0, 127.5, 255.0]) / 255)
    assert mapped.tolist() == pytest.approx([0.1, 0.5, 0.9])
    images = torch.rand(100)
    assert torch.allclose(unmap_pixels(map_pixels(images)), images, atol=1e-6)
    assert unmap_pixels(torch.tensor([0.0, 0.05, 0.95, 1.0])).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_logit_laplace_picture_is_the_inverse_map_of_the_sigmoid_of_mu():
    model = DiscreteVAE(small_openai())
    assert model.pixels(torch.tensor([0.0, 1.3862943611, -20.0, 20.0])).tolist() == pytest.approx([0.5, 0.875, 0, 1])


SMALL = {
    "openai": small_openai(),
    "fsq": PRESETS["tiny"],
    "gumbel": PRESETS["tiny"].model_copy(update={"quantizer": GumbelConfig(num_codes=10)}),
    "cosine": PRESETS["tiny"].model_copy(update={"quantizer": GumbelConfig(num_codes=10, logits="cosine", dim=4)}),
    "one_stage": DVAEConfig(
        image_size=16,
        likelihood="gaussian",
        network=CompactNetworkConfig(patch=2, widths=(8,), blocks=1),
        quantizer=FSQConfig(levels=(3, 3)),
    ),
}


def without_gradient(name: str, seed: int) -> set[str]:
    """The parameters that a first step leaves where they are."""
    torch.manual_seed(seed)
    model = DiscreteVAE(SMALL[name])
    output = model(torch.rand(2, 3, 16, 16), temperature=1.0)
    loss = output.mean.square().sum()
    if output.log_scale is not None:
        loss = loss + output.log_scale.sum()
    loss.backward()
    return {key for key, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()}


@pytest.mark.parametrize("name", SMALL)
def test_every_weight_learns_through_the_quantiser(name):
    """From some of four first weights: in the narrow networks of these tests a layer's ReLUs may all be off."""
    assert set.intersection(*(without_gradient(name, seed) for seed in range(4))) == set()


@pytest.mark.parametrize("name", SMALL)
def test_codes_and_pictures_have_the_shapes_and_ranges_of_the_contract(name):
    model = DiscreteVAE(SMALL[name]).eval()
    images = torch.rand(3, 3, 16, 16)
    codes = model.encode(images)
    height, width = model.grid
    assert codes.shape == (3, height * width) and codes.dtype == torch.int64
    assert int(codes.min()) >= 0 and int(codes.max()) < model.num_codes
    pictures = model.decode(codes)
    assert pictures.shape == images.shape and pictures.dtype == torch.float32
    assert float(pictures.min()) >= 0 and float(pictures.max()) <= 1
    assert torch.equal(codes, model(images, temperature=1.0).codes)


def test_codes_are_in_raster_order():
    model = DiscreteVAE(SMALL["one_stage"]).eval()
    images = torch.zeros(1, 3, 16, 16)
    changed = images.clone()
    changed[:, :, :2, -2:] = 1.0                                                # the patch in the top right corner
    differing = (model._features(images) - model._features(changed)).abs().sum(dim=1).flatten().nonzero().flatten()
    rows, columns = differing // 8, differing % 8
    assert len(differing) and int(rows.max()) <= 3 and int(columns.min()) >= 4


def test_decoding_codes_equals_the_hard_limit_of_training():
    model = DiscreteVAE(SMALL["fsq"]).eval()
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        trained = model.pixels(model(images, temperature=1.0).mean)
    assert torch.allclose(trained, model.decode(model.encode(images)), atol=1e-5)


def test_one_generator_gives_one_relaxation():
    model, images = DiscreteVAE(SMALL["gumbel"]), torch.rand(1, 3, 16, 16)
    means = [model(images, 1.0, torch.Generator().manual_seed(seed)).mean for seed in (3, 3, 4)]
    assert torch.equal(means[0], means[1])
    assert not torch.equal(means[0], means[2])


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_leaves_the_codes_side_in_full(name):
    model, images = DiscreteVAE(SMALL[name]), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = model(images, temperature=1.0)
    cast = model.bfloat16()(images, temperature=1.0)                            # as DeepSpeed does it
    for output in (under_autocast, cast):
        floats = [output.mean, output.log_scale, output.code_logits]
        assert all(tensor.dtype == torch.float32 for tensor in floats if tensor is not None)


@pytest.mark.parametrize("name", SMALL)
def test_saved_and_loaded_model_gives_the_same_codes_and_pictures(name, tmp_path):
    model = DiscreteVAE(SMALL[name]).eval()
    model.save_pretrained(tmp_path)
    loaded = DiscreteVAE.from_pretrained(tmp_path)
    assert loaded.config == model.config
    images = torch.rand(2, 3, 16, 16)
    codes = model.encode(images)
    assert torch.equal(codes, loaded.encode(images))
    assert torch.equal(model.decode(codes), loaded.decode(codes))


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_fills_its_grid(name):
    model = on_meta(PRESETS[name])
    size = PRESETS[name].image_size
    output = model(torch.empty(1, 3, size, size, device="meta"), temperature=1.0)
    assert output.codes.shape[1] == model.grid[0] * model.grid[1]


def test_compact_network_starts_near_a_grey_picture():
    """He-initialised all the way, its first pictures would be far outside [0, 1] and saturate the codes they train."""
    model = DiscreteVAE(PRESETS["shapes"])
    with torch.no_grad():
        mean = model(torch.rand(2, 3, 64, 64), temperature=1.0).mean
    assert float((mean - 0.5).std()) < 0.5


def test_a_preset_is_a_start_and_other_keys_go_over_it():
    config = DVAEConfig.model_validate({"preset": "shapes", "network": {"blocks": 3}, "quantizer": {"levels": [8, 8]}})
    assert config.network == CompactNetworkConfig(widths=(64, 128), blocks=3)
    assert config.quantizer == FSQConfig(levels=(8, 8))
    other_kind = DVAEConfig.model_validate({"preset": "shapes", "quantizer": {"kind": "gumbel", "num_codes": 64}})
    assert other_kind.quantizer == GumbelConfig(num_codes=64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"preset": "shape"}, "unknown dVAE preset 'shape'; known: openai"),
        ({"image_size": 20}, "not a multiple"),
        ({"preset": "tiny", "network": {"depth": 3}}, "depth"),
    ],
)
def test_a_wrong_config_says_what_is_wrong(values, message):
    with pytest.raises(ValidationError, match=message):
        DVAEConfig.model_validate(values)


def test_pictures_and_codes_that_do_not_fit_are_refused():
    model = DiscreteVAE(PRESETS["tiny"])
    with pytest.raises(ValueError, match="do not divide"):
        model.encode(torch.rand(1, 3, 16, 12))
    with pytest.raises(ValueError, match="5 codes a picture do not fill the grid of 2x2"):
        model.decode(torch.zeros(1, 5, dtype=torch.int64))


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("beyond", [-1, 0])
def test_codes_that_the_codec_does_not_have_are_refused(name, beyond):
    model = DiscreteVAE(SMALL[name])
    code = beyond if beyond < 0 else model.num_codes
    codes = torch.zeros(2, model.grid[0] * model.grid[1], dtype=torch.int64)
    codes[1, 2] = code
    with pytest.raises(ValueError, match=f"{code}.* where the codec has 0 to {model.num_codes - 1}"):
        model.decode(codes)
