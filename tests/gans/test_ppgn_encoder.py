"""PPGN's encoder: CaffeNet's sizes, its convolutions against a loop, classes, and what is refused."""

import math

import pytest
import torch
from bare import BareNetworks, count
from published import Published
from pydantic import ValidationError
from torch import nn

from dalle.errors import UserError
from gans.layers import he_init
from gans.ppgn_encoder import (
    PPGNEncoder,
    PPGNEncoderConfig,
    PPGNEncoderRun,
    PPGNEncoderTask,
    caffenet,
    centred,
    response_norm,
    small_convolutions,
)

PUBLISHED = {"ppgn_encoder": Published(compares=False, one_caption=True)}
SMALL = {"crop": None, "num_classes": 3, "layout": "small", "channels": (4, 4, 4, 6), "code_dim": 8, "hidden_dim": 8,
         "dropout": 0.0}


def make_task(**changes) -> PPGNEncoderTask:
    torch.manual_seed(0)
    return PPGNEncoderTask(PPGNEncoderRun(name="encoder", data={"train": "x", "image_size": 32}, model=SMALL | changes))


def make_batch(classes: list[int]) -> dict:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (len(classes), 3, 32, 32), dtype=torch.uint8, generator=source),
            "class_id": torch.tensor(classes)}


# -- the network

def test_caffenet_has_the_published_layers():
    with torch.device("meta"):
        model = PPGNEncoder(PPGNEncoderConfig()).eval()
        sizes = []
        for layer in model.convolutions:
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
        seen = model(torch.empty(2, 3, 256, 256))
    assert count(model) == 60_965_224
    assert [size for size, layer in zip(sizes, model.convolutions, strict=True) if isinstance(layer, nn.Conv2d)] == [
        (96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13)]
    assert model.fc6.in_features == 9216
    assert [part.shape for part in seen] == [(2, 256, 6, 6), (2, 4096), (2, 1000)]


def test_half_of_the_channels_see_half_in_the_second_convolution():
    torch.manual_seed(0)
    layers = caffenet((2, 4, 4, 4, 4))
    (second,) = (layer for layer in layers if isinstance(layer, nn.Conv2d) and layer.kernel_size == (5, 5))
    x = torch.randn(1, 2, 7, 7)
    changed = x.clone()
    changed[:, 1] += 1
    same = (second(x) == second(changed)).all(dim=(2, 3))[0]
    assert same.tolist() == [True, True, False, False]


def test_the_response_norm_written_out():
    x = torch.randn(1, 7, 1, 1, generator=torch.Generator().manual_seed(0)) * 30
    expected = [float(x[0, c]) / (1 + 1e-4 / 5 * sum(float(x[0, k]) ** 2 for k in range(max(0, c - 2), min(7, c + 3))))
                ** 0.75 for c in range(7)]
    assert response_norm()(x).flatten().tolist() == pytest.approx(expected, rel=1e-5)


def test_the_centre_is_seen():
    image = torch.arange(256.0).expand(1, 3, 256, 256)
    seen = centred(image, 227)
    assert seen.shape == (1, 3, 227, 227) and seen[0, 0, 0, [0, -1]].tolist() == [14, 240]
    model = PPGNEncoder(PPGNEncoderConfig(**SMALL | {"crop": 32}, image_size=48)).eval()
    image = torch.randn(1, 3, 48, 48)
    assert torch.equal(model(image).classes, model(image[..., 8:40, 8:40]).classes)


@pytest.mark.parametrize("side", [16, 32, 64])
def test_the_small_convolutions_halve_four_times(side):
    config = PPGNEncoderConfig(**SMALL, image_size=side)
    pooled = small_convolutions(config.channels)(torch.randn(1, 3, side, side))
    assert pooled.shape == (1, 6, side // 16, side // 16) and config.pooled_side == side // 16


def test_no_number_of_a_code_is_below_zero_and_a_sample_does_not_depend_on_its_company():
    model = PPGNEncoder(PPGNEncoderConfig(**SMALL, image_size=32)).eval()
    images = torch.randn(5, 3, 32, 32)
    seen, alone = model(images), model(images[2:3])
    assert seen.code.min() == 0 and seen.code.max() > 0 and seen.pooled.min() >= 0
    for part, own in zip(seen, alone, strict=True):
        torch.testing.assert_close(part[2:3], own)
    # the classes are read from the code, and the code from pool5
    torch.testing.assert_close(model.fc8(model.fc7(seen.code).relu()), seen.classes)
    torch.testing.assert_close(model.fc6(seen.pooled.flatten(1)).relu(), seen.code)


def test_dropout_acts_in_training_alone_and_never_on_the_code():
    model, images = PPGNEncoder(PPGNEncoderConfig(**SMALL | {"dropout": 0.5}, image_size=32)), torch.randn(4, 3, 32, 32)
    first, second = model(images), model(images)
    assert torch.equal(first.code, second.code) and not torch.equal(first.classes, second.classes)
    model.eval()
    assert torch.equal(model(images).classes, model(images).classes)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_a_signal_keeps_its_size(slope):
    torch.manual_seed(0)
    activate = nn.LeakyReLU(slope)
    layers = [nn.Conv2d(64, 64, 3, padding=1), nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1),
              nn.ConvTranspose2d(64, 64, 3, padding=1), nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1)]
    network = nn.Sequential(*(part for layer in layers for part in (activate, layer)))
    he_init(network, slope)
    x = torch.randn(4, 64, 16, 16)
    inner = network(x).detach()[..., 8:-8, 8:-8]           # the rim sees zeros
    assert float(inner.std()) == pytest.approx(1, rel=0.2)
    line = nn.Linear(64, 4096)
    he_init(line, slope)
    assert float(line.weight.detach().std()) == pytest.approx(math.sqrt(2 / (1 + slope ** 2) / 64), rel=0.02)
    assert not line.bias.any()


# -- training

def test_the_loss_is_the_cross_entropy_and_reaches_every_weight():
    task = make_task()
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch([0, 2, 1]), networks, 0)
    loss = task.class_loss(networks, prepared, 0)
    logits = task.players["encoder"].module(prepared["image"]).classes.tolist()
    expected = sum(math.log(sum(map(math.exp, row))) - row[own] for row, own in zip(logits, [0, 2, 1], strict=True)) / 3
    assert float(loss.total) == pytest.approx(expected, rel=1e-5)
    loss.total.backward()
    assert all(parameter.grad.any() for parameter in task.players["encoder"].module.parameters())


def test_the_accuracy_of_ragged_batches_is_that_of_all():
    task = make_task()
    networks, model = BareNetworks(task), task.players["encoder"].module
    with torch.no_grad():
        model.fc8.weight.zero_()
        model.fc8.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))           # every picture is of class 1
    figures = task.validate(networks, [make_batch([1, 0, 1, 2]), make_batch([0])])
    assert figures["accuracy"].value == pytest.approx(2 / 5)


def test_it_comes_back_from_its_folder_frozen(tmp_path):
    task = make_task()
    model = task.players["encoder"].module
    task.export(str(tmp_path), {"encoder": model.state_dict()})
    loaded = PPGNEncoder.load(tmp_path)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(image).code, model.eval()(image).code)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    (tmp_path / "config.json").write_text('{"model_type": "dvae"}')
    with pytest.raises(UserError, match="holds a 'dvae' model, not 'ppgn_encoder'"):
        PPGNEncoder.load(tmp_path)


# -- what is refused

@pytest.mark.parametrize(("classes", "words"), [
    ([0, -1], "a sample has no class, and PPGN's encoder needs that of each"),
    ([0, 3], "a sample is of class 3, but model.num_classes is 3: set it to the number of classes, 4 or more"),
])
def test_classes_that_cannot_be(classes, words):
    task = make_task()
    with pytest.raises(UserError, match=words):
        task.prepare(make_batch(classes), BareNetworks(task), 0)


@pytest.mark.parametrize(("changes", "words"), [
    ({"channels": (1, 2, 3)}, "channels has 3 numbers, but layout caffenet has 5 convolutions"),
    ({"crop": 300}, "crop 300 is more than image_size 256"),
    ({"crop": 32}, "layout caffenet leaves nothing of 32 pixels"),
])
def test_impossible_sizes(changes, words):
    with pytest.raises(ValidationError, match=words):
        PPGNEncoderConfig(**changes)
