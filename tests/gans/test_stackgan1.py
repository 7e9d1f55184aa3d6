"""StackGAN's stage I: sizes and first weights, the two forms of its augmentation, and what its steps are made of."""

import pytest
import torch
from bare import BareNetworks, loss_of
from published import Published
from stackgans import VARIANTS, first_run, lively, loaded, make_task, noise_for, tiny, tiny_second
from torch import nn

from dalle.errors import UserError
from gans.stackgan import (
    MeanDiscriminator,
    SentenceDiscriminator,
    StackGANDiscriminatorConfig,
    discriminator_loss,
    truncated_normal,
)
from gans.stackgan1 import StackGAN1Config, StackGAN1Generator, StackGAN1Task

PUBLISHED = {"stackgan1": Published(paintings=2)}        # of the paper: each phase draws its own noise

# -- the networks


def test_the_sides_of_stage_1_double_from_four():
    sides = []
    generator = tiny(image_size=64)
    for layer in generator.trunk:
        layer.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    generator(noise_for(generator, 2), torch.randn(2, 6))
    assert sorted(set(sides)) == [4, 8, 16, 32, 64]


@VARIANTS
@pytest.mark.parametrize("image_size", [16, 32, 64])
def test_sizes_follow_the_config(variant, image_size):
    generator = tiny(variant, image_size)
    image = generator(noise_for(generator, 3), torch.randn(3, 6)).image
    assert image.shape == (3, 3, image_size, image_size) and image.abs().max() <= 1
    for stage in (1, 2):
        if variant == "tf":
            scores = SentenceDiscriminator(image_size, 6, StackGANDiscriminatorConfig(width=4, text_dim=5), stage)
            assert scores(image, torch.randn(3, 6)).shape == (3,)
        else:
            scores = MeanDiscriminator(image_size, 4, StackGANDiscriminatorConfig(width=4), stage)
            assert scores(image, torch.randn(3, 4)).matched.shape == (3,)


@pytest.mark.parametrize("settings", [{"image_size": 48}, {"image_size": 8}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(ValueError, match="power of two"):
        StackGAN1Config(**settings)


def test_first_weights_are_those_of_the_form():
    for variant, bounded in (("tf", True), ("pytorch", False)):
        torch.manual_seed(0)
        generator = StackGAN1Generator(StackGAN1Config(variant=variant, width=32, sentence_dim=64))
        weights = {kind: torch.cat([part.weight.detach().flatten() for part in generator.modules()
                                    if isinstance(part, kind)]) for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)}
        assert (float(weights[nn.Conv2d].abs().max()) <= 0.04) == bounded
        assert float(weights[nn.Linear].std()) == pytest.approx(0.02, rel=0.02)
        assert float(weights[nn.BatchNorm2d].mean()) == pytest.approx(1, abs=0.01)
        assert float(weights[nn.BatchNorm2d].std()) == pytest.approx(0.02, rel=0.2)


@pytest.mark.parametrize("generator", [tiny(), tiny("pytorch"), tiny_second(), tiny_second("pytorch")])
def test_a_picture_depends_on_its_own_noise_and_caption_alone(generator):
    lively(generator)
    noise, sentence = noise_for(generator, 4), torch.randn(4, 6)
    image = generator(noise, sentence).image
    assert torch.equal(image, generator(noise, sentence).image)
    order = torch.tensor([2, 0, 3, 1])
    mixed = generator({name: values[order] for name, values in noise.items()}, sentence[order]).image
    torch.testing.assert_close(mixed, image[order], atol=2e-3, rtol=1e-3)      # sums in another order
    for name in noise:
        other = generator({**noise, name: -noise[name]}, sentence).image
        assert not torch.allclose(other, image, atol=1e-3), name
    assert not torch.allclose(generator(noise, -sentence).image, image, atol=1e-3)


def test_the_forms_read_noise_and_condition_in_their_own_order():
    for variant, z_first in (("tf", False), ("pytorch", True)):
        generator, seen = tiny(variant), []
        generator.trunk[0].register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        noise = noise_for(generator, 2)
        generator(noise, torch.randn(2, 6))
        place = slice(0, 3) if z_first else slice(4, 7)
        assert torch.equal(seen[0][:, place], noise["z"])


def test_a_discriminator_learns_eight_pictures_of_a_frozen_generator():
    generator = tiny(image_size=16).requires_grad_(False)
    torch.manual_seed(1)
    discriminator = SentenceDiscriminator(16, 6, StackGANDiscriminatorConfig(width=8, text_dim=4), stage=1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, (0.5, 0.999))
    real, sentence = torch.rand(8, 3, 16, 16) * 2 - 1, torch.randn(8, 6)
    for step in range(60):
        fake = generator(noise_for(generator, 8, step), sentence).image
        real_scores, fake_scores = discriminator(real, sentence), discriminator(fake, sentence)
        loss = discriminator_loss(real_scores, fake_scores, fake_scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(torch.cat([real_scores > 0, fake_scores < 0]).float().mean()) > 0.9


# -- conditioning augmentation

@VARIANTS
def test_the_condition_without_noise_is_the_mean(variant):
    generator = lively(tiny(variant))
    augmented = generator.augmentation(torch.randn(5, 6), torch.zeros(5, 4))
    assert torch.equal(augmented.condition, augmented.mean)
    assert torch.equal(truncated_normal(torch.zeros(2)), torch.zeros(2))


def test_each_form_has_its_own_law_of_the_spread():
    sentence, eps = torch.randn(50, 6), torch.ones(50, 4)
    paper, coco = (lively(tiny(variant)).augmentation for variant in ("tf", "pytorch"))
    for part, scale in ((paper, 1.0), (coco, 0.5)):
        hidden = sentence @ part.project.weight.T + part.project.bias
        hidden = torch.where(hidden > 0, hidden, 0.2 * hidden) if part is paper else hidden.clamp(min=0)
        expected = hidden[:, :4] + (scale * hidden[:, 4:]).exp()
        torch.testing.assert_close(part(sentence, eps).condition, expected)
    augmented = coco(sentence, eps)
    assert augmented.mean.min() >= 0 and augmented.spread.min() >= 0      # sigma >= 1
    assert paper(sentence, eps).mean.min() < 0


@VARIANTS
def test_only_the_paper_truncates(variant):
    generator = lively(tiny(variant))
    noise = noise_for(generator, 2)
    one, other = ({**noise, "eps": torch.full((2, 4), value)} for value in (9.0, 20.0))
    sentence = torch.randn(2, 6)
    same = torch.allclose(generator(one, sentence).image, generator(other, sentence).image)
    assert same == (variant == "tf")


# -- training

def test_the_paper_pairs_wrong_pictures_and_draws_twice(shop):
    task = make_task(shop, "tf", 1)
    raw = loaded(16)
    batch = task.prepare(raw, BareNetworks(task), 0)
    assert not torch.equal(batch["noise"]["z"], batch["noise_g"]["z"])
    assert bool((batch["wrong_class_id"] != raw["class_id"]).all())
    torch.testing.assert_close(batch["wrong_image"], raw["image"][batch["wrong_class_id"]] / 127.5 - 1)


def test_coco_pairs_the_next_caption_and_draws_once(shop):
    task = make_task(shop, "pytorch", 1)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(16), networks, 0)
    assert "noise_g" not in batch and "wrong_image" not in batch
    painted = networks["generator"](batch["noise"], batch["text"].sentence)
    assert torch.equal(batch["mean"], painted.augmented.mean.detach())
    assert torch.equal(batch["wrong_mean"], batch["mean"][[1, 2, 3, 0]])


def test_cocos_augmentation_learns_through_the_picture_alone(shop):
    task = make_task(shop, "pytorch", 1)
    networks, seen = BareNetworks(task), []
    batch = task.prepare(loaded(16), networks, 0)
    networks["discriminator"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss_of(task, "generator", networks, batch)
    image, mean = seen[0]
    assert image.requires_grad and not mean.requires_grad


def test_a_setting_that_follows_from_the_data_is_not_set_otherwise(shop):
    config = first_run(shop.folder, "tf")
    wrong = config.model_copy(update={"generator": StackGAN1Config(image_size=32)})
    with pytest.raises(UserError, match=r"generator\.image_size is 32"):
        StackGAN1Task(wrong)
