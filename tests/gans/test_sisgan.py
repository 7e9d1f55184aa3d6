"""SISGAN: the paper's sizes, its frozen VGG-16, its three kinds of pairs and its losses by hand."""

import math

import pytest
import torch
import torchvision
from editors import Encoder, batch_of, build, same_text
from published import Published
from pydantic import ValidationError
from safetensors.torch import save_file

from dalle.errors import UserError
from gans import sisgan
from gans.editing import halvings
from gans.sisgan import (
    SISGANConfig,
    SISGANDiscriminator,
    SISGANDiscriminatorConfig,
    SISGANGenerator,
    VGGEncoder,
    discriminator_loss,
    generator_loss,
    relevant,
    relevant_text,
)
from gans.task import Exchange
from gans.text import Text

PUBLISHED = {"sisgan": Published(paintings=2)}        # each phase draws its own noise
EDITOR = {"generator": {"encoder": "plain", "channels": 4, "residual_blocks": 1},
          "discriminator": {"channels": 4, "text_dim": 3}}
DOUBLES = {
    sisgan.discriminator_loss: (((3,),) * 3, sisgan.discriminator_loss),
    sisgan.generator_loss: (((3,), ()), sisgan.generator_loss),
}

TINY = {"image_size": 32, "sentence_dim": 6, "condition_dim": 4, "channels": 4, "residual_blocks": 1,
        "encoder": "plain"}


def text_of(batch, sentence_dim=6, word_dim=5, length=3):
    return Text(torch.randn(batch, sentence_dim), torch.randn(batch, word_dim, length),
                torch.ones(batch, length, dtype=torch.bool))


def tiny_generator(**settings):
    torch.manual_seed(0)
    return SISGANGenerator(SISGANConfig(**{**TINY, **settings}))


def trainable(module):
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


# -- the paper's sizes

def test_the_plain_generator_has_the_paper_s_parameters():
    assert SISGANGenerator(SISGANConfig(encoder="plain")).num_parameters == 26_014_851


def test_the_generator_with_vgg_has_the_paper_s_parameters_and_shapes():
    generator = SISGANGenerator(SISGANConfig())
    assert (generator.num_parameters, trainable(generator)) == (31_028_931, 23_388_291)
    source, text = torch.rand(1, 3, 64, 64) * 2 - 1, text_of(1, 300)
    assert generator.encoder(source).shape == (1, 512, 16, 16)
    image, details = generator.eval().paint({"eps": torch.zeros(1, 128)}, text, source)
    assert image.shape == (1, 3, 64, 64) and image.abs().max() <= 1 and not details


def test_the_discriminator_has_the_paper_s_parameters():
    discriminator = SISGANDiscriminator(SISGANDiscriminatorConfig(), 64, 300)
    assert sum(parameter.numel() for parameter in discriminator.parameters()) == 3_937_217
    assert discriminator(torch.zeros(2, 3, 64, 64), torch.zeros(2, 300)).shape == (2,)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_other_sides_fit(size):
    generator = tiny_generator(image_size=size)
    image = generator({"eps": torch.randn(2, 4)}, text_of(2), torch.zeros(2, 3, size, size)).image
    assert image.shape == (2, 3, size, size)
    discriminator = SISGANDiscriminator(SISGANDiscriminatorConfig(channels=4, text_dim=3), size, 6)
    assert discriminator(image, torch.randn(2, 6)).shape == (2,)


def test_a_side_that_cannot_be_halved_to_four_is_refused():
    assert [halvings(side, 4, least=2) for side in (16, 64, 256)] == [2, 4, 6]
    for side in (8, 48, 65):
        with pytest.raises(UserError, match=f"image_size is {side}"):
            halvings(side, 4, least=2)


def test_configs_that_cannot_be_built_are_refused():
    with pytest.raises(ValidationError, match="multiple of 4"):
        SISGANConfig(image_size=66)
    with pytest.raises(ValidationError, match="set channels to 128"):
        SISGANConfig(channels=16)


# -- VGG-16

def test_vgg_is_torchvision_s_without_its_third_pool(tmp_path):
    torch.manual_seed(0)
    published = torchvision.models.vgg16_bn(weights=None).features.eval()
    for part in published[:33]:
        if isinstance(part, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(part.running_mean, std=0.1)
    state = {f"features.{name}": tensor for name, tensor in published.state_dict().items()}
    save_file({**state, "classifier.0.weight": torch.zeros(2, 2)}, tmp_path / "vgg.safetensors")
    encoder = VGGEncoder(dilation=1)
    encoder.load_imagenet(str(tmp_path / "vgg.safetensors"))

    image = torch.rand(2, 3, 16, 16)
    normalised = torchvision.transforms.functional.normalize(image, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = torch.nn.Sequential(*published[:23], *published[24:33])(normalised)
    found = encoder(2 * image - 1)
    assert found.shape == (2, 512, 4, 4) and expected.std() > 0
    torch.testing.assert_close(found, expected)


def test_only_the_last_three_convolutions_of_vgg_are_dilated():
    convolutions = [part for part in VGGEncoder(dilation=2).layers if isinstance(part, torch.nn.Conv2d)]
    assert [part.dilation[0] for part in convolutions] == [1] * 7 + [2] * 3
    assert [part.padding[0] for part in convolutions] == [1] * 7 + [2] * 3


def test_weights_of_vgg_that_cannot_be_had_are_one_line(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="vgg_weights: .*generator.encoder to plain") as caught:
        VGGEncoder(1).load_imagenet(str(tmp_path / "bad.safetensors"))
    assert "\n" not in str(caught.value)


def test_vgg_never_learns_and_its_statistics_never_change():
    generator = SISGANGenerator(SISGANConfig(image_size=16, sentence_dim=6, condition_dim=4, residual_blocks=0))
    before = {name: value.clone() for name, value in generator.encoder.state_dict().items()}
    generator.train()
    optimizer = torch.optim.SGD([part for part in generator.parameters() if part.requires_grad], lr=0.1)
    text = text_of(2)
    generator({"eps": torch.randn(2, 4)}, text, torch.rand(2, 3, 16, 16)).image.sum().backward()
    optimizer.step()
    assert all(parameter.grad is None for parameter in generator.encoder.parameters())
    assert text.sentence.grad is None
    assert all(torch.equal(value, before[name]) for name, value in generator.encoder.state_dict().items())
    assert generator.training and not generator.encoder.training


def test_a_saved_generator_comes_back_with_its_vgg(tmp_path):
    generator = SISGANGenerator(SISGANConfig(image_size=16, sentence_dim=6, residual_blocks=0)).eval()
    generator.save_pretrained(tmp_path)
    again = SISGANGenerator.from_pretrained(tmp_path)
    noise, text, source = {"eps": torch.randn(1, 128)}, text_of(1), torch.rand(1, 3, 16, 16)
    assert torch.equal(generator.paint(noise, text, source)[0], again.paint(noise, text, source)[0])


# -- how the networks behave

def test_first_weights_are_dcgan_s():
    generator = tiny_generator(channels=32)
    weight = generator.merge[0].weight
    assert float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(generator.augment.project.weight.std()) == pytest.approx(0.02, rel=0.3)
    assert generator.augment.project.bias is None


def test_the_picture_follows_the_source_the_sentence_and_the_noise():
    generator = tiny_generator().eval()
    for part in generator.modules():       # 0.02 leaves next to nothing after so many layers
        if isinstance(part, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(part.weight)
    noise, text, source = {"eps": torch.randn(2, 4)}, text_of(2), torch.rand(2, 3, 32, 32)
    first = generator.paint(noise, text, source)[0]
    assert torch.equal(first, generator.paint(noise, text, source)[0])
    for other in (({"eps": torch.randn(2, 4)}, text, source), (noise, text_of(2), source),
                  (noise, text, torch.rand(2, 3, 32, 32))):
        assert (generator.paint(*other)[0] - first).abs().max() > 1e-4


def test_batches_can_be_permuted():
    generator = tiny_generator().eval()
    discriminator = SISGANDiscriminator(SISGANDiscriminatorConfig(channels=4, text_dim=3), 32, 6).eval()
    order = torch.tensor([2, 0, 1])
    eps, text, source = torch.randn(3, 4), text_of(3), torch.rand(3, 3, 32, 32)
    image = generator.paint({"eps": eps}, text, source)[0]
    permuted = generator.paint({"eps": eps[order]}, Text(*(part[order] for part in text)), source[order])[0]
    torch.testing.assert_close(permuted, image[order])
    torch.testing.assert_close(discriminator(image[order], text.sentence[order]),
                               discriminator(image, text.sentence)[order])


# -- pairs and losses

def test_the_first_half_is_edited_after_the_next_one_s_text_and_the_second_after_its_own():
    assert relevant(torch.arange(8)).tolist() == [1, 2, 3, 0, 4, 5, 6, 7]
    assert relevant(torch.arange(5)).tolist() == [1, 0, 2, 3, 4]
    texts = torch.randn(6, 2)
    assert torch.equal(relevant(texts)[3:], texts[3:])


def test_relevant_texts_are_those_of_the_global_batch():
    class Ranks:
        def __init__(self, rank, world_size):
            self.rank, self.world_size = rank, world_size

    whole = text_of(4)
    alone = relevant_text(Exchange(Ranks(0, 1)), whole)
    assert all(torch.equal(part, relevant(full)) for part, full in zip(alone, whole, strict=True))

    class Second(Exchange):         # what the two processes would gather
        def everyone(self, tensor):
            return next(full for full in whole if full[1::2].shape == tensor.shape and full[1::2].equal(tensor))

    shared = relevant_text(Second(Ranks(1, 2)), Text(*(part[1::2] for part in whole)))
    assert all(torch.equal(part, full[1::2]) for part, full in zip(shared, alone, strict=True))


def test_logits_of_zero_cost_two_log_two():
    zero = torch.zeros(4)
    assert float(discriminator_loss(zero, zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(discriminator_loss(zero, zero, zero, negative_weight=1)) == pytest.approx(3 * math.log(2))
    assert float(generator_loss(zero, torch.tensor(0.3))) == pytest.approx(math.log(2) + 0.3)
    assert float(generator_loss(zero, torch.tensor(0.3), kl=0)) == pytest.approx(math.log(2))


def test_the_discriminator_s_loss_by_hand():
    logit = {share: math.log(share / (1 - share)) for share in (0.9, 0.3, 0.2)}
    found = discriminator_loss(*(torch.tensor([logit[share]]) for share in (0.9, 0.3, 0.2)))
    assert float(found) == pytest.approx(-math.log(0.9) - 0.5 * math.log(0.7) - 0.5 * math.log(0.8))


def test_the_divergence_by_hand():
    generator = tiny_generator()
    text = text_of(2)
    augmented = generator({"eps": torch.zeros(2, 4)}, text, torch.zeros(2, 3, 32, 32)).augmented
    raw = text.sentence @ generator.augment.project.weight.T
    mean, log_sigma = torch.where(raw > 0, raw, 0.2 * raw).chunk(2, dim=1)
    expected = (-log_sigma + 0.5 * (torch.exp(2 * log_sigma) + mean**2 - 1)).mean()
    torch.testing.assert_close(generator.augment.kl(augmented), expected)
    torch.testing.assert_close(augmented.condition, mean)


# -- a step

def test_sisgan_s_step(monkeypatch):
    task, networks = build(monkeypatch, "sisgan", discriminator=EDITOR["discriminator"],
                           generator={**EDITOR["generator"], "residual_blocks": 0})
    prepared = task.prepare(batch_of(), networks, 0)
    encoder = Encoder()
    assert same_text(prepared["wrong_text"], encoder(["bb", "ccc", "dddd", "a"]))
    assert same_text(prepared["relevant_text"], encoder(["bb", "a", "ccc", "dddd"]))
    assert not torch.equal(prepared["noise"]["eps"], prepared["noise_g"]["eps"])
    for parameter in task.players["discriminator"].module.parameters():
        parameter.data.zero_()
    assert task.d_loss(networks, prepared, 0).total.item() == pytest.approx(2 * math.log(2))
    found = task.g_loss(networks, prepared, 0)
    assert found.total.item() == pytest.approx(math.log(2) + found.parts["kl"].item())
