"""StackGAN++: the paper's sizes with and without captions, the joint loss by hand, and the colours of the levels."""

import math

import numpy as np
import pytest
import torch
from bare import BareNetworks, count, loss_of
from published import Published
from pydantic import ValidationError
from torch import nn

from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.clip import ClipConfig, ClipModel
from dalle.training.ema import EMA
from gans import stackgan_v2
from gans.clip_text import ClipTextEncoder
from gans.generator import load_gan
from gans.outputs import Scores
from gans.stackgan_v2 import (
    Discriminators,
    FirstLevel,
    StackGANv2Config,
    StackGANv2Generator,
    StackGANv2Run,
    StackGANv2Task,
    adversarial_loss,
    colour_consistency,
    colour_statistics,
    conditional_loss,
    unconditional_loss,
)

PUBLISHED = {"stackgan_v2": Published(paintings=1)}      # both players see the same fakes
DOUBLES = {
    stackgan_v2.conditional_loss: (((3,),) * 6, lambda a, b, c, d, e, f: stackgan_v2.conditional_loss(
        *(Scores(matched, alone=alone) for matched, alone in ((a, b), (c, d), (e, f))))),
    stackgan_v2.unconditional_loss: (((3,),) * 2, lambda a, b: stackgan_v2.unconditional_loss(
        Scores(alone=a), Scores(alone=b))),
    stackgan_v2.adversarial_loss: (((3,),) * 2, lambda a, b: stackgan_v2.adversarial_loss([Scores(a, alone=b)])),
    stackgan_v2.colour_consistency: (((2, 3, 4, 4),), lambda large: stackgan_v2.colour_consistency(
        [torch.linspace(-1, 1, 24, dtype=large.dtype).view(2, 3, 2, 2), large])),
}

LN2 = math.log(2)
SIZES = [64, 128, 256]
TINY = {"image_size": 32, "levels": 2, "width": 8, "residuals": 1, "z_dim": 3, "condition_dim": 4}
CAPTIONS = ["a red circle", "a blue square", "a green star", "a yellow heart"]
MODES = pytest.mark.parametrize("conditional", [True, False])


def tiny(**settings) -> StackGANv2Generator:
    torch.manual_seed(0)
    return StackGANv2Generator(StackGANv2Config(**{**TINY, "sentence_dim": 6, **settings}))


def noise_for(generator: StackGANv2Generator, batch: int) -> dict:
    source = torch.Generator().manual_seed(0)
    return {name: torch.randn(batch, size, generator=source) for name, size in generator.noise_dims.items()}


# -- the published sizes

def test_the_papers_networks_with_captions_have_its_parameters():
    with torch.device("meta"):
        generator = StackGANv2Generator(StackGANv2Config())
        discriminators = Discriminators(SIZES, 64, condition_dim=128)
    assert count(generator) == 21_239_696
    assert count(generator.augmentation) == 524_800 and count(generator.first) == 20_074_240
    assert [count(level) for level in generator.later] == [480_384, 157_248]
    assert [count(level) for level in discriminators.levels] == [5_723_906, 18_834_178, 71_269_122]


def test_the_papers_networks_without_captions_have_its_parameters():
    with torch.device("meta"):
        assert count(StackGANv2Generator(StackGANv2Config(conditional=False))) == 16_472_208
        discriminators = Discriminators(SIZES, 64, condition_dim=None)
    assert [count(level) for level in discriminators.levels] == [2_765_569, 15_875_841, 68_310_785]


@MODES
def test_the_paper_paints_64_128_and_256_pixels(conditional):
    with torch.device("meta"):
        generator = StackGANv2Generator(StackGANv2Config(conditional=conditional))
        noise = {name: torch.zeros(2, size) for name, size in generator.noise_dims.items()}
        painted = generator(noise, torch.zeros(2, 1024))
        assert [tuple(image.shape) for image in painted.images] == [(2, 3, size, size) for size in SIZES]
        mean = painted.augmented.mean if conditional else None
        scores = Discriminators(SIZES, 64, 128 if conditional else None)(painted.images, mean)
        assert [level.alone.shape for level in scores] == [(2,)] * 3
        assert all((level.matched is None) != conditional for level in scores)


@pytest.mark.parametrize(("image_size", "levels", "sizes"), [(64, 3, [16, 32, 64]), (32, 1, [32]),
                                                             (32, 3, [8, 16, 32])])
def test_levels_follow_the_config(image_size, levels, sizes):
    generator = tiny(image_size=image_size, levels=levels)
    painted = generator(noise_for(generator, 2), torch.randn(2, 6))
    assert [image.shape[-1] for image in painted.images] == sizes == generator.config.sizes
    assert all(image.abs().max() <= 1 for image in painted.images)
    scores = Discriminators(sizes, 4, condition_dim=4)(painted.images, painted.augmented.mean)
    assert [len(level.matched) for level in scores] == [2] * levels


@pytest.mark.parametrize("settings", [{"image_size": 96}, {"image_size": 16, "levels": 3}, {"width": 6, "levels": 3}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(ValidationError, match="image_size is a power of two|width is halved"):
        StackGANv2Config(**settings)


def test_the_first_weights_are_orthogonal():
    generator = tiny()
    weight = generator.augmentation.project.weight      # [16, 6]
    torch.testing.assert_close(weight.T @ weight, torch.eye(6), atol=1e-5, rtol=0)
    kernel = Discriminators([16], 8, None).levels[0].trunk[1][0].weight.flatten(1)      # [16, 8 * 16]
    torch.testing.assert_close(kernel @ kernel.T, torch.eye(16), atol=1e-5, rtol=0)


# -- the generator

def test_a_gated_unit_halves_the_channels():
    gate = nn.GLU(dim=1)
    x = torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(gate(x), x[:, :3] * torch.sigmoid(x[:, 3:]))
    level = FirstLevel(5, width=4, size=16)
    assert level.linear[0].out_features == 2 * 16 * 16 and level.linear(torch.randn(2, 5)).shape == (2, 16 * 16)
    assert level(torch.randn(2, 5)).shape == (2, 4, 16, 16)


def seen_by(module: nn.Module) -> list:
    seen = []
    module.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs))
    return seen


def test_the_caption_enters_every_level_and_the_noise_the_first():
    generator = tiny().eval()
    first, later = seen_by(generator.first), seen_by(generator.later[0])
    noise, sentence = noise_for(generator, 2), torch.randn(2, 6)
    images = generator(noise, sentence).images
    other_z = generator({**noise, "z": -noise["z"]}, sentence).images
    other_condition = generator({**noise, "eps": -noise["eps"]}, sentence).images
    for changed in (other_z, other_condition):
        assert all(not torch.allclose(one, two, atol=1e-4) for one, two in zip(images, changed, strict=True))
    assert torch.equal(later[0][1], later[1][1]) and not torch.equal(later[0][1], later[2][1])
    assert torch.equal(first[0][0], torch.cat([later[0][1], noise["z"]], dim=1))      # [c; z]


def test_without_captions_the_noise_enters_every_level():
    generator = tiny(conditional=False).eval()
    first, later = seen_by(generator.first), seen_by(generator.later[0])
    noise = noise_for(generator, 2)
    painted = generator(noise)
    assert list(noise) == ["z"] and painted.augmented is None
    assert torch.equal(first[0][0], noise["z"]) and torch.equal(later[0][1], noise["z"])


@MODES
def test_a_picture_depends_on_its_own_noise_and_caption_alone(conditional):
    generator = tiny(conditional=conditional).eval()
    noise, sentence, order = noise_for(generator, 4), torch.randn(4, 6), torch.tensor([2, 0, 3, 1])
    images = generator(noise, sentence).images
    assert all(map(torch.equal, images, generator(noise, sentence).images))
    mixed = generator({name: values[order] for name, values in noise.items()}, sentence[order]).images
    for one, two in zip(images, mixed, strict=True):
        torch.testing.assert_close(two, one[order], atol=1e-4, rtol=1e-3)


def test_the_condition_without_noise_is_the_mean():
    generator = tiny()
    augmented = generator.augmentation(torch.randn(3, 6), torch.zeros(3, 4))
    assert torch.equal(augmented.condition, augmented.mean) and augmented.mean.min() < 0
    sentence = torch.randn(3, 6)
    painted = generator(noise_for(generator, 3), sentence)
    assert torch.equal(generator.mean(sentence), painted.augmented.mean)


def test_the_average_starts_as_the_live_weights():
    generator = tiny()
    average = EMA(generator, StackGANv2Run.model_fields["generator_optimizer"].default.ema)
    live = {name: parameter.clone() for name, parameter in generator.named_parameters()}
    with average.applied():
        assert all(torch.equal(live[name], parameter) for name, parameter in generator.named_parameters())
    assert average.decay == 0.999


# -- losses

def cost(logits: list[float], target: int) -> float:
    return sum(math.log(1 + math.exp(-logit if target else logit)) for logit in logits) / len(logits)


def test_undecided_discriminators_cost_a_bit_a_term():
    zero = torch.zeros(4)
    both, alone, matched = Scores(zero, alone=zero), Scores(alone=zero), Scores(zero)
    assert float(conditional_loss(both, both, both)) == pytest.approx(6 * LN2)
    assert float(conditional_loss(matched, matched, matched)) == pytest.approx(2 * LN2)
    assert float(unconditional_loss(alone, alone)) == pytest.approx(2 * LN2)
    assert float(adversarial_loss([both] * 3)) == pytest.approx(6 * LN2)
    assert float(adversarial_loss([alone] * 3)) == pytest.approx(3 * LN2)


def test_the_joint_loss_takes_a_wrong_picture_alone_for_real():
    logits = {name: np.random.default_rng(index).normal(size=3).tolist()
              for index, name in enumerate(("real", "wrong", "fake", "real_alone", "wrong_alone", "fake_alone"))}
    real, wrong, fake = (Scores(torch.tensor(logits[name]), alone=torch.tensor(logits[f"{name}_alone"]))
                         for name in ("real", "wrong", "fake"))
    conditional = cost(logits["real"], 1) + cost(logits["wrong"], 0) + cost(logits["fake"], 0)
    alone = cost(logits["real_alone"], 1) + cost(logits["wrong_alone"], 1) + cost(logits["fake_alone"], 0)
    assert float(conditional_loss(real, wrong, fake)) == pytest.approx(conditional + alone, rel=1e-5)
    halves = cost(logits["real"], 1) + 0.5 * (cost(logits["wrong"], 0) + cost(logits["fake"], 0))
    single = [scores._replace(alone=None) for scores in (real, wrong, fake)]
    assert float(conditional_loss(*single)) == pytest.approx(halves, rel=1e-5)


def test_the_statistics_are_those_of_the_pixels():
    image = torch.rand(2, 3, 5, 7)
    means, covariances = colour_statistics(image)
    for picture, mean, covariance in zip(image.numpy(), means, covariances, strict=True):
        pixels = picture.reshape(3, -1)
        np.testing.assert_allclose(mean, pixels.mean(axis=1), atol=1e-6)
        np.testing.assert_allclose(covariance, np.cov(pixels, bias=True), atol=1e-6)


def test_one_colour_at_every_level_costs_nothing():
    colour = torch.tensor([0.3, -0.5, 0.9])[None, :, None, None]
    images = [colour.expand(2, 3, size, size) for size in (4, 8, 16)]
    assert float(colour_consistency(images)) == pytest.approx(0, abs=1e-12)


def test_colours_that_differ_cost_the_mean_square():
    dark, light = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 8, 8), 0.5)
    assert float(colour_consistency([dark, light])) == pytest.approx(0.25)
    striped = light.clone()
    striped[..., ::2] *= -1      # mean 0, every covariance 0.25
    assert float(colour_consistency([dark, striped])) == pytest.approx(5 * 0.25**2)
    assert float(colour_consistency([dark, striped, light.repeat(1, 1, 2, 2)])) == pytest.approx(
        10 * 0.25**2 + 0.25)


def test_the_smaller_picture_is_the_standard():
    images = [torch.rand(2, 3, size, size, requires_grad=True) for size in (4, 8, 16)]
    colour_consistency(images).backward()
    assert images[0].grad is None and images[1].grad is not None and images[2].grad is not None
    only_last = [image.detach().requires_grad_(True) for image in images]
    colour_consistency(only_last[1:]).backward()
    assert only_last[1].grad is None


# -- training

@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    """The folder of a text encoder."""
    torch.manual_seed(0)
    tokenizer = CaptionTokenizer.train_words(CAPTIONS)
    config = ClipConfig(embed_dim=6, text_length=6, num_text_tokens=tokenizer.vocab_size,
                        vision={"layers": 1, "width": 16, "head_width": 16, "patch_size": 8, "image_size": 16},
                        text={"layers": 1, "width": 16, "heads": 1})
    folder = tmp_path_factory.mktemp("encoder")
    ClipTextEncoder(ClipModel(config), tokenizer).save(folder)
    return str(folder)


def make_task(encoder: str, conditional: bool = True, reads: str = "mean", **settings) -> StackGANv2Task:
    torch.manual_seed(0)
    sizes = {name: value for name, value in TINY.items() if name != "image_size"}
    return StackGANv2Task(StackGANv2Run(
        name="two", text_encoder=encoder if conditional else None, data=DataConfig(train="none", image_size=32),
        generator={"conditional": conditional, **sizes}, discriminator={"width": 4, "reads": reads}, **settings))


def loaded() -> dict:
    source = torch.Generator().manual_seed(2)
    return {"image": torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=source),
            "class_id": torch.arange(4), "caption": CAPTIONS}


@MODES
@pytest.mark.parametrize("joint", [True, False])
def test_each_phase_gives_gradient_to_its_player(encoder, conditional, joint):
    task = make_task(encoder, conditional, loss={"joint": joint, "colour": 1.0})
    networks = BareNetworks(task)
    batch = task.prepare(loaded(), networks, 0)
    loss_of(task, "discriminator", networks, batch).total.backward()
    generator, discriminator = networks["generator"], networks["discriminator"]
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    loss_of(task, "generator", networks, batch).total.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


@MODES
def test_the_first_losses_are_those_of_undecided_discriminators(encoder, conditional):
    task = make_task(encoder, conditional)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(), networks, 0)
    for parameter in networks["discriminator"].parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        judged, painted = loss_of(task, "discriminator", networks, batch), loss_of(task, "generator", networks, batch)
    terms = 6 if conditional else 2
    assert {name: float(part) for name, part in judged.parts.items()} == pytest.approx(
        {"at_16": terms * LN2, "at_32": terms * LN2})
    assert float(painted.parts["adversarial"]) == pytest.approx((4 if conditional else 2) * LN2)
    rest = 2 * painted.parts["kl"] if conditional else 50 * painted.parts["colour"]
    assert float(painted.total) == pytest.approx(float(painted.parts["adversarial"] + rest), rel=1e-5)


def test_lower_levels_see_copies_of_the_same_crop(encoder):
    task = make_task(encoder)
    raw = loaded()
    batch = task.prepare(raw, BareNetworks(task), 0)
    for name in ("image", "wrong_image"):
        small, large = batch[f"{name}s"]
        assert torch.equal(large, batch[name]) and small.shape == (4, 3, 16, 16)
        expected = nn.functional.interpolate(large, (16, 16), mode="bilinear", antialias=True, align_corners=False)
        assert torch.equal(small, expected)
    assert bool((batch["wrong_class_id"] != raw["class_id"]).all()) and "noise_g" not in batch


def test_the_augmentation_learns_from_the_generators_conditions_only(encoder):
    task = make_task(encoder)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(), networks, 0)
    told = seen_by(networks["discriminator"])
    loss_of(task, "discriminator", networks, batch)
    assert not any(mean.requires_grad for _, mean in told)
    networks.modules["discriminator"] = lambda images, mean: [Scores(mean.sum(dim=1))]      # blind to pictures
    task.config = task.config.model_copy(update={"loss": task.config.loss.model_copy(update={"kl": 0.0})})
    loss_of(task, "generator", networks, batch).total.backward()
    weight = networks["generator"].augmentation.project.weight
    assert weight.grad.abs().sum() > 0


def test_a_sentence_that_is_read_itself_does_not_pass_through_the_augmentation(encoder):
    task = make_task(encoder, reads="sentence")
    networks = BareNetworks(task)
    batch = task.prepare(loaded(), networks, 0)
    assert torch.equal(batch["condition"], batch["text"].sentence)
    told = seen_by(networks["discriminator"])
    loss_of(task, "discriminator", networks, batch)
    loss_of(task, "generator", networks, batch)
    assert len(told) == 4 and all(condition is batch["condition"] for _, condition in told)
    task.network.zero_grad()
    networks.modules["discriminator"] = lambda images, condition: [Scores(images[-1].mean(dim=(1, 2, 3)))]
    loss_of(task, "generator", networks, batch).total.backward()
    assert task.network.augmentation.project.weight.grad.abs().sum() > 0        # by way of the pictures


def test_r1_looks_at_every_head_of_every_level(encoder):
    for conditional, heads in ((True, 4), (False, 2)):
        task = make_task(encoder, conditional)
        networks = BareNetworks(task)
        batch = task.prepare(loaded(), networks, 0)
        image = batch["image"].clone().requires_grad_(True)
        scores = task.real_scores(networks.penalty("discriminator"), batch, image)
        assert [len(each) for each in scores] == [4] * heads
        assert all(torch.autograd.grad(each.sum(), image, retain_graph=True)[0].abs().sum() > 0 for each in scores)


def test_without_captions_a_prompt_changes_nothing(encoder, tmp_path):
    task = make_task(encoder, conditional=False)
    assert not task.frozen
    task.export(str(tmp_path), {"generator": task.network.state_dict()})
    painter = load_gan(tmp_path, "cpu")
    images = painter.generate(["a red circle", "a blue square", ""], [1, 1, 2])
    assert images.shape == (3, 3, 32, 32)
    assert torch.equal(images[0], images[1]) and not torch.equal(images[0], images[2])
    with pytest.raises(ValidationError, match="leave text_encoder out"):
        StackGANv2Run(name="two", data=DataConfig(train="none"), text_encoder=encoder, generator={"conditional": False})


def test_without_captions_none_need_be_read(encoder):
    task = make_task(encoder, conditional=False)
    batch = {name: value for name, value in loaded().items() if name != "caption"}
    prepared = task.prepare(batch, BareNetworks(task), 0)
    assert prepared["sentence"] is None and "text" not in prepared and "wrong_images" not in prepared


def test_with_captions_an_encoder_is_needed():
    with pytest.raises(UserError, match="set text_encoder"):
        StackGANv2Task(StackGANv2Run(name="two", data=DataConfig(train="none", image_size=32), generator=TINY))
