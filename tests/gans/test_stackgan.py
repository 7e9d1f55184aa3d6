"""StackGAN, what both stages share: the published sizes, losses by hand, and what each phase teaches whom."""

import math

import pytest
import torch
from bare import BareNetworks, loss_of
from scipy import stats
from stackgans import STAGES, VARIANTS, count, lively, loaded, make_task
from torch import nn

from dalle.training.engines.launching import create_engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from gans import stackgan
from gans.losses import kl_log_sigma, kl_logvar
from gans.outputs import Scores
from gans.stackgan import (
    MeanDiscriminator,
    SentenceDiscriminator,
    StackGANDiscriminatorConfig,
    discriminator_loss,
    truncated_normal,
    two_headed_discriminator_loss,
)
from gans.stackgan1 import StackGAN1Config, StackGAN1Generator
from gans.stackgan2 import StackGAN2Config, StackGAN2Generator

DOUBLES = {
    stackgan.discriminator_loss: (((3,),) * 3, stackgan.discriminator_loss),
    stackgan.two_headed_discriminator_loss: (((3,),) * 5, lambda a, b, c, d, e: stackgan.two_headed_discriminator_loss(
        Scores(a, b, c), Scores(d, None, e))),
}

LN2 = math.log(2)
COCO = StackGAN1Config(variant="pytorch", width=192)
COCO_DISCRIMINATOR = StackGANDiscriminatorConfig(width=96)


# -- the published sizes

def test_the_papers_networks_have_the_papers_parameters():
    with torch.device("meta"):
        assert count(StackGAN1Generator(StackGAN1Config())) == 14_264_192
        assert count(SentenceDiscriminator(64, 1024, StackGANDiscriminatorConfig(), stage=1)) == 4_029_824
        assert count(StackGAN2Generator(StackGAN2Config()), trainable=True) == 26_290_080
        assert count(SentenceDiscriminator(256, 1024, StackGANDiscriminatorConfig(), stage=2)) == 48_603_520


def test_cocos_networks_have_the_codes_parameters():
    with torch.device("meta"):
        first = StackGAN1Generator(COCO)
        assert (count(first), count(first.augmentation)) == (20_020_832, 262_400)
        assert count(MeanDiscriminator(64, 128, COCO_DISCRIMINATOR, stage=1)) == 12_407_425
        second = StackGAN2Generator(StackGAN2Config(variant="pytorch", width=192, residuals=2, stage1=COCO))
        assert (count(second), count(second, trainable=True)) == (57_151_312, 37_130_480)
        assert count(MeanDiscriminator(256, 128, COCO_DISCRIMINATOR, stage=2)) == 159_889_538


def test_the_pytorch_codes_own_defaults_have_its_parameters():
    first = StackGAN1Config(variant="pytorch")
    with torch.device("meta"):
        assert count(StackGAN1Generator(first)) == 10_301_248
        assert count(MeanDiscriminator(64, 128, StackGANDiscriminatorConfig(), stage=1)) == 5_715_713
        assert count(StackGAN2Generator(StackGAN2Config(variant="pytorch", stage1=first)), True) == 26_290_080
        assert count(MeanDiscriminator(256, 128, StackGANDiscriminatorConfig(), stage=2)) == 71_269_122


@VARIANTS
def test_the_stages_paint_64_and_256_pixels(variant):
    with torch.device("meta"):
        first = StackGAN1Config(variant=variant)
        second = StackGAN2Generator(StackGAN2Config(variant=variant, stage1=first))
        noise = {name: torch.zeros(2, size) for name, size in second.noise_dims.items()}
        small = second.stage1(noise, torch.zeros(2, 1024)).image
        assert small.shape == (2, 3, 64, 64)
        assert second.encoder(small).shape == (2, 512, 16, 16)
        assert second(noise, torch.zeros(2, 1024)).image.shape == (2, 3, 256, 256)


# -- conditioning augmentation

def test_the_divergences_are_those_of_gaussians():
    zero, one = torch.zeros(3, 4), torch.ones(3, 4)
    assert kl_log_sigma(zero, zero) == kl_logvar(zero, zero) == 0
    assert kl_log_sigma(one, zero) == kl_logvar(one, zero) == 0.5
    mean, log_sigma = torch.randn(3, 4), torch.randn(3, 4)
    laws = torch.distributions.Normal(mean, log_sigma.exp()), torch.distributions.Normal(zero, one)
    expected = torch.distributions.kl_divergence(*laws).mean()
    torch.testing.assert_close(kl_log_sigma(mean, log_sigma), expected)
    torch.testing.assert_close(kl_logvar(mean, 2 * log_sigma), expected)


def test_the_papers_noise_is_a_truncated_normal():
    normal = torch.linspace(-6, 6, 101)
    expected = stats.truncnorm.ppf(stats.norm.cdf(normal.double().numpy()), -2, 2)
    torch.testing.assert_close(truncated_normal(normal), torch.from_numpy(expected).float(), atol=2e-4, rtol=1e-4)
    assert truncated_normal(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([-2, 2])


# -- the discriminators and the losses

def test_a_wrong_mean_is_judged_with_the_features_of_the_picture():
    for stage in (1, 2):
        discriminator = lively(MeanDiscriminator(16, 4, StackGANDiscriminatorConfig(width=4), stage))
        image, mean, wrong = torch.randn(3, 3, 16, 16), torch.randn(3, 4), torch.randn(3, 4)
        scores = discriminator(image, mean, wrong)
        torch.testing.assert_close(scores.mismatched, discriminator(image, wrong).matched)
        assert (scores.alone is None) == (stage == 1) and discriminator(image, mean).mismatched is None


def test_undecided_discriminators_cost_two_bits():
    zero = torch.zeros(5)
    assert float(discriminator_loss(zero, zero, zero)) == pytest.approx(2 * LN2)
    undecided = Scores(zero, zero, zero)
    assert float(two_headed_discriminator_loss(undecided, undecided)) == pytest.approx(2 * LN2)


def cost(logits: list[float], target: int) -> float:
    return sum(math.log(1 + math.exp(-logit if target else logit)) for logit in logits) / len(logits)


def test_the_losses_agree_with_sums_written_out():
    real, wrong, fake, alone, fake_alone = [1.0, -2.0], [0.5, 3.0], [-1.5, 0.25], [2.0, 0.1], [-0.3, 1.1]
    tensors = [torch.tensor(logits) for logits in (real, wrong, fake, alone, fake_alone)]
    expected = cost(real, 1) + 0.5 * (cost(wrong, 0) + cost(fake, 0))
    assert float(discriminator_loss(*tensors[:3])) == pytest.approx(expected, rel=1e-6)
    expected = (cost(real, 1) + cost(alone, 1)) / 2 + (cost(fake, 0) + cost(wrong, 0) + cost(fake_alone, 0)) / 3
    two_headed = two_headed_discriminator_loss(Scores(tensors[0], tensors[1], tensors[3]),
                                               Scores(tensors[2], None, tensors[4]))
    assert float(two_headed) == pytest.approx(expected, rel=1e-6)


# -- training

@VARIANTS
@STAGES
def test_each_phase_gives_gradient_to_its_player(shop, variant, stage):
    task = make_task(shop, variant, stage)
    networks = BareNetworks(task)
    generator, discriminator = networks["generator"], networks["discriminator"]
    batch = task.prepare(loaded(16 * stage), networks, 0)
    loss_of(task, "discriminator", networks, batch).total.backward()
    assert all(each.grad is None for each in generator.parameters())
    assert all(each.grad is not None for each in discriminator.parameters())
    discriminator.requires_grad_(False)
    loss_of(task, "generator", networks, batch).total.backward()
    for name, parameter in generator.named_parameters():
        assert (parameter.grad is None) == name.startswith("stage1."), name


@VARIANTS
@STAGES
def test_the_first_losses_are_those_of_an_undecided_discriminator(shop, variant, stage):
    task = make_task(shop, variant, stage)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(16 * stage), networks, 0)
    for parameter in networks["discriminator"].parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        assert float(loss_of(task, "discriminator", networks, batch).total) == pytest.approx(2 * LN2)
        loss = loss_of(task, "generator", networks, batch)
    heads = 2 if (variant, stage) == ("pytorch", 2) else 1
    assert float(loss.parts["adversarial"]) == pytest.approx(heads * LN2)
    assert float(loss.total) == pytest.approx(heads * LN2 + 2 * float(loss.parts["kl"]), rel=1e-5)


@VARIANTS
@STAGES
def test_cocos_fakes_are_painted_once_a_step_and_the_papers_twice(shop, variant, stage, tmp_path):
    task = make_task(shop, variant, stage)
    engine = create_engine(task.config)
    engine.prepare(task, tmp_path)
    for step in range(2):
        train_step(engine, task, loaded(16 * stage), step, task.config, Meter())
    tracked = {int(buffer) for name, buffer in task.network.named_buffers()
               if name.endswith("num_batches_tracked") and not name.startswith("stage1.")}
    assert tracked == {2 if variant == "pytorch" else 4}


@VARIANTS
@STAGES
def test_r1_looks_at_every_head_of_real_pairs(shop, variant, stage):
    task = make_task(shop, variant, stage)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(16 * stage), networks, 0)
    image = batch["image"].clone().requires_grad_(True)
    scores = task.real_scores(networks.penalty("discriminator"), batch, image)
    assert [len(each) for each in scores] == [4] * (2 if (variant, stage) == ("pytorch", 2) else 1)
    assert all(torch.autograd.grad(each.sum(), image, retain_graph=True)[0].abs().sum() > 0 for each in scores)
