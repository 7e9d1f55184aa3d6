"""GAN-INT-CLS: the paper's sizes, its losses at points where they are known, and what its steps are made of."""

import math
from types import SimpleNamespace

import pytest
import torch
from bare import count
from published import Published
from torch import nn

from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.training.engines.base import Engine
from dalle.training.settings import TrainConfig
from gans import gan_int_cls
from gans.gan_int_cls import (
    GANINTCLSConfig,
    GANINTCLSDiscriminator,
    GANINTCLSDiscriminatorConfig,
    GANINTCLSGenerator,
    GANINTCLSRun,
    GANINTCLSTask,
    discriminator_loss,
    generator_loss,
    trunk,
    widths,
)
from gans.text import Text

PUBLISHED = {"gan_int_cls": Published(zero=2, paintings=2, unpaired=("loss.interpolated=0",))}
DOUBLES = {
    gan_int_cls.discriminator_loss: (((3,),) * 3, lambda a, b, c: gan_int_cls.discriminator_loss(a, b, c, 0.5)),
    gan_int_cls.generator_loss: (((3,), (2,)), lambda a, b: gan_int_cls.generator_loss(a, b, 0.7)),
}

SMALL = GANINTCLSConfig(width=4, text_dim=6, noise_dim=5, sentence_dim=7)


@pytest.mark.parametrize("generator_width, discriminator, counts", [
    (128, GANINTCLSDiscriminatorConfig(), (18_905_472, 4_030_080)),                               # birds and flowers
    (196, GANINTCLSDiscriminatorConfig(width=196, variant="cls"), (41_101_080, 36_183_440)),      # COCO
])
def test_the_papers_sizes_have_the_papers_parameters(generator_width, discriminator, counts):
    with torch.device("meta"):
        assert GANINTCLSGenerator(GANINTCLSConfig(width=generator_width)).num_parameters == counts[0]
        assert count(GANINTCLSDiscriminator(discriminator, 64, 1024)) == counts[1]


def test_the_generator_grows_from_4_to_64_pixels():
    generator = GANINTCLSGenerator(SMALL)
    sides = []
    for layer in generator.layers:
        layer.register_forward_hook(lambda layer, given, out: sides.append(out.shape[-1]))
    image = generator({"z": torch.randn(2, 5)}, torch.randn(2, 7))
    assert image.shape == (2, 3, 64, 64) and image.abs().max() <= 1
    assert list(dict.fromkeys(sides)) == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("size", [16, 32, 128])
def test_other_sizes_follow_the_config(size):
    config = SMALL.model_copy(update={"image_size": size})
    image = GANINTCLSGenerator(config)({"z": torch.randn(2, 5)}, torch.randn(2, 7))
    assert image.shape == (2, 3, size, size)
    discriminator = GANINTCLSDiscriminator(GANINTCLSDiscriminatorConfig(width=4, text_dim=6), size, 7)
    assert discriminator(image, torch.randn(2, 7)).shape == (2,)


def test_a_side_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        GANINTCLSConfig(image_size=48)


def test_widths_are_the_papers():
    assert widths(128, 64) == [1024, 512, 256, 128] and widths(8, 32) == [64, 32, 16] and widths(8, 128)[-1] == 8


def test_the_bottleneck_follows_the_normalisation_without_an_activation():
    layers = list(GANINTCLSGenerator(SMALL).layers)
    assert [type(layer).__name__ for layer in layers[:6]] == [
        "ConvTranspose2d", "BatchNorm2d", "Sequential", "ConvTranspose2d", "BatchNorm2d", "Sequential"]
    assert len(GANINTCLSGenerator(SMALL.model_copy(update={"large": True})).layers[2]) == 2


def test_no_convolution_has_a_bias():
    for net in (GANINTCLSGenerator(SMALL), GANINTCLSDiscriminator(GANINTCLSDiscriminatorConfig(width=4), 64, 7)):
        assert all(layer.bias is None for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)))


def test_the_two_variants_of_the_discriminator_differ_at_8_pixels_and_in_the_text():
    activated, bare = trunk(4, 64, activation_at_8=True), trunk(4, 64, activation_at_8=False)
    assert len(activated[2]) == 3 and len(bare[2]) == 2 and len(bare[3]) == 2
    assert len(GANINTCLSDiscriminator(GANINTCLSDiscriminatorConfig(width=4), 64, 7).text) == 3
    assert len(GANINTCLSDiscriminator(GANINTCLSDiscriminatorConfig(width=4, variant="cls"), 64, 7).text) == 2


# -- losses

def test_undecided_logits():
    zeros = torch.zeros(4)
    assert float(discriminator_loss(zeros, zeros, zeros, 0.5)) == pytest.approx(2 * math.log(2))
    assert float(generator_loss(zeros, zeros[:2], 1.0)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zeros, None, zeros, 0.0)) == pytest.approx(2 * math.log(2))


def test_the_discriminators_weights():
    cost = {name: math.log(1 + math.exp(x)) for name, x in (("real", -1.0), ("wrong", 2.0), ("fake", 3.0))}
    one, two, three = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    assert float(discriminator_loss(one, two, three, 0.25)) == pytest.approx(
        cost["real"] + 0.25 * cost["wrong"] + 0.75 * cost["fake"], rel=1e-5)


def test_points_between_captions_count_by_their_number_and_weight():
    plain, between = torch.tensor([1.0, -1.0]), torch.tensor([2.0])
    costs = [math.log(1 + math.exp(-x)) for x in (1.0, -1.0, 2.0)]
    assert float(generator_loss(plain, between, 0.5)) == pytest.approx(
        (costs[0] + costs[1] + 0.5 * costs[2]) / 3, rel=1e-5)
    assert float(generator_loss(plain, between[:0], 0.5)) == pytest.approx((costs[0] + costs[1]) / 2, rel=1e-5)


# -- the task

class Encoder(nn.Module):
    sentence_dim, word_dim, text_length = 7, 2, 3

    def forward(self, captions):
        rows = torch.tensor([[len(caption) / 10 + place for place in range(7)] for caption in captions])
        count = len(captions)
        return Text(rows, torch.zeros(count, 2, 3), torch.ones(count, 3, dtype=torch.bool))


def make_task(monkeypatch, **loss) -> GANINTCLSTask:
    monkeypatch.setattr(gan_int_cls, "load_encoder", lambda config: Encoder())
    torch.manual_seed(0)
    return GANINTCLSTask(GANINTCLSRun(
        name="x", data=DataConfig(train="none", image_size=16), text_encoder="none",
        generator=GANINTCLSConfig(width=4, text_dim=6, noise_dim=5),
        discriminator=GANINTCLSDiscriminatorConfig(width=4), loss=loss))


def networks_of(task) -> SimpleNamespace:
    class Networks(dict):
        rank, world_size = 0, 1

        def bare(self, name):
            return self[name]

    return Networks({**task.frozen, **{name: player.module for name, player in task.players.items()}})


def batch(count: int = 4) -> dict:
    return {"image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8),
            "class_id": torch.arange(count), "caption": ["x" * (index + 1) for index in range(count)]}


def test_points_between_captions_lie_between_the_two_halves(monkeypatch):
    task = make_task(monkeypatch, beta=0.25)
    prepared = task.prepare(batch(), networks_of(task), 0)
    sentence = prepared["text"].sentence
    torch.testing.assert_close(prepared["between"], 0.25 * sentence[:2] + 0.75 * sentence[2:])
    assert len(prepared["noise_g"]["z"]) == 6 and len(prepared["noise"]["z"]) == 4


def test_equal_captions_have_nothing_between_them(monkeypatch):
    task = make_task(monkeypatch)
    prepared = task.prepare({**batch(), "caption": ["same"] * 4}, networks_of(task), 0)
    torch.testing.assert_close(prepared["between"], prepared["text"].sentence[:2])


def test_an_odd_share_of_the_batch_is_refused_at_the_start(monkeypatch):
    task = make_task(monkeypatch)
    engine = Engine(task.config.model_copy(update={"train": TrainConfig(batch_size=6)}), torch.device("cpu"),
                    world_size=2)
    with pytest.raises(UserError, match="over 2 processes train.batch_size 6 must be a multiple of 4"):
        engine.check(task)
    make_task(monkeypatch, interpolated=0.0).check_share(3, 2)


def test_the_three_systems_by_config(monkeypatch):
    plain = make_task(monkeypatch, mismatched=0.0, interpolated=0.0)
    prepared = plain.prepare(batch(), networks_of(plain), 0)
    assert "wrong_image" not in prepared and "between" not in prepared
    loss = plain.d_loss(networks_of(plain), prepared, 0)
    assert "wrong" not in loss.parts
    assert plain.g_loss(networks_of(plain), prepared, 0).total.requires_grad
    cls = make_task(monkeypatch, interpolated=0.0)
    assert "wrong" in cls.d_loss(networks_of(cls), cls.prepare(batch(), networks_of(cls), 0), 0).parts


def test_each_loss_reaches_only_its_network(monkeypatch):
    task = make_task(monkeypatch)
    networks = networks_of(task)
    prepared = task.prepare(batch(), networks, 0)
    generator, discriminator = networks["generator"], networks["discriminator"]
    task.d_loss(networks, prepared, 0).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.requires_grad_(False)
    task.g_loss(networks, prepared, 0).total.backward()
    assert generator.text[0].weight.grad.abs().sum() > 0          # its own projection learns, phi(t) does not
    assert not prepared["text"].sentence.requires_grad
