"""HDGAN: the paper's sizes, both networks against a one-channel twin, the losses by hand, and the further stage."""

import pytest
import torch
import torch.nn.functional as F
from bare import count, loss_of, make_constant, mean_of
from published import Published
from pydantic import ValidationError
from torch import Tensor, nn

import gans.hdgan as hdgan
from dalle.errors import UserError
from gans.hdgan import (
    HDGANConfig,
    HDGANDiscriminator,
    HDGANGenerator,
    HDGANRun,
    HDGANTask,
    PatchScores,
    adversarial_loss,
    discriminator_loss,
    extension_loss,
    generator_loss,
    halvings,
    load_base,
)
from gans.text import Text

PUBLISHED = {"hdgan": Published(paintings=1)}      # both players see the same fakes
PATCHES = ((3,), (3, 1, 2, 2))
DOUBLES = {
    hdgan.discriminator_loss: (PATCHES * 3, lambda a, b, c, d, e, f: hdgan.discriminator_loss(
        *([PatchScores(*pair)] for pair in ((a, b), (c, d), (e, f))))),
    hdgan.adversarial_loss: (PATCHES, lambda a, b: hdgan.adversarial_loss([PatchScores(a, b)])),
    hdgan.generator_loss: ((*PATCHES, ()), lambda a, b, kl: hdgan.generator_loss([PatchScores(a, b)], kl)),
    hdgan.extension_loss: ((*PATCHES, (2, 3, 4, 4)), lambda a, b, large: hdgan.extension_loss(
        [PatchScores(a, b)], [torch.zeros(2, 3, 2, 2, dtype=large.dtype), large])),
}

BN = (1 + 1e-5) ** -0.5      # what a fresh BatchNorm multiplies by in evaluation mode
TINY = {"image_size": 64, "sentence_dim": 12, "z_dim": 5, "condition_dim": 6, "width": 8}


def sized(build, *arguments, **options) -> nn.Module:
    """The network without its weights: they would fill the memory."""
    with torch.device("meta"):
        return build(*arguments, **options)


@pytest.fixture
def no_init(monkeypatch):
    monkeypatch.setattr(hdgan, "dcgan_init", lambda module: None)


def text(batch: int, dim: int = 12) -> Text:
    return Text(torch.randn(batch, dim), torch.zeros(batch, 4, 3), torch.ones(batch, 3, dtype=torch.bool))


def noise(network: HDGANGenerator, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn(batch, length) for name, length in network.noise_dims.items()}


# -- sizes

def test_the_papers_generator_has_the_papers_parameters(no_init):
    network = sized(HDGANGenerator, HDGANConfig())
    assert {side: count(scale) for side, scale in network.base.scales.items()} == {
        "4": 18_878_464, "8": 9_440_256, "16": 4_720_640, "32": 2_360_832, "64": 1_180_672, "128": 590_592,
        "256": 147_840}
    assert count(network) == 41_378_496


def test_the_further_stage_adds_and_trains_only_its_own(no_init):
    network = sized(HDGANGenerator, HDGANConfig(image_size=512, extended=True))
    assert count(network) == 41_545_824
    assert sum(one.numel() for one in network.parameters() if one.requires_grad) == 167_328


def test_the_papers_discriminators_have_the_papers_parameters(no_init):
    assert count(sized(HDGANDiscriminator, [64, 128, 256], range(3), 1024)) == 25_693_606


@pytest.mark.parametrize(("side", "expected"), [
    (64, [128, 256, 512]), (128, [64, 128, 256, 512]), (256, [32, 64, 128, 256, 512]),
    (512, [32, 64, 128, 256, 512, 512])])
def test_channels_of_the_discriminators(side, expected):
    with torch.device("meta"):
        assert [layer.out_channels for layer in halvings(side, 512) if isinstance(layer, nn.Conv2d)] == expected


def test_pictures_of_each_level_and_the_local_maps():
    network = HDGANGenerator(HDGANConfig(**{**TINY, "image_size": 256}))
    images = network(noise(network, 2), text(2)).images
    assert [tuple(image.shape) for image in images] == [(2, 3, side, side) for side in (64, 128, 256)]
    scores = HDGANDiscriminator([64, 128, 256, 512], range(4), 12, width=16, text_dim=4)(
        [*images, torch.zeros(2, 3, 512, 512)], torch.randn(2, 12))
    assert [tuple(score.pair.shape) for score in scores] == [(2,)] * 4
    assert [tuple(score.local.shape) for score in scores] == [(2, 1, 1, 1), (2, 1, 1, 1), (2, 1, 5, 5), (2, 1, 5, 5)]


@pytest.mark.parametrize("size", [32, 64])
def test_small_pictures_drop_the_top_scales(size):
    network = HDGANGenerator(HDGANConfig(**{**TINY, "image_size": size}))
    assert list(map(int, network.base.scales)) == [side for side in (4, 8, 16, 32, 64) if side <= size]
    images = network(noise(network, 3), text(3)).images
    assert [image.shape[-1] for image in images] == [size // 4, size // 2, size]
    scores = HDGANDiscriminator(network.config.sides, range(3), 12, width=16)(images, torch.randn(3, 12))
    assert [score.local.shape[-1] for score in scores] == [1, 1, 5]


@pytest.mark.parametrize("size", [48, 16, 1024])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValidationError, match=f"image_size {size}"):
        HDGANConfig(image_size=size)


# -- the networks against a twin of one channel

def mirrored(x: Tensor) -> Tensor:
    return mean_of(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3)


def twin_residual(x: Tensor) -> Tensor:
    return x + BN * mirrored(F.relu(BN * mirrored(x)))


def twin_generator(sentence: Tensor, eps: Tensor, z: Tensor, sides: list[int], last: int) -> list[Tensor]:
    half = F.leaky_relu(sentence.mean(dim=1, keepdim=True), 0.2)       # mu and log sigma alike
    condition = half + half.exp() * eps
    x = BN * torch.cat([condition, z], dim=1).mean(dim=1)
    x = twin_residual(x[:, None, None, None].expand(-1, 1, 4, 4))
    images, side = [], 4
    while side < last:
        side *= 2
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        if side in (8, 32, 128, 256):
            x = F.relu(BN * mirrored(x))
        x = twin_residual(x)
        if side in sides:
            images.append(mirrored(x).tanh())
    return images


def test_the_generator_agrees_with_a_twin_of_one_channel():
    network = HDGANGenerator(HDGANConfig(**{**TINY, "image_size": 128})).double().eval()
    make_constant(network)
    torch.manual_seed(1)
    given = text(3)._replace(sentence=torch.randn(3, 12, dtype=torch.float64))
    drawn = {name: values.double() for name, values in noise(network, 3).items()}
    with torch.no_grad():
        found = network(drawn, given).images
    expected = twin_generator(given.sentence, drawn["eps"], drawn["z"], [32, 64, 128], 128)
    for image, twin in zip(found, expected, strict=True):
        torch.testing.assert_close(image, twin.expand(-1, 3, -1, -1), rtol=1e-9, atol=1e-12)
    assert found[-1].std() > 0.01


def twin_scores(image: Tensor, sentence: Tensor, width: int, text_dim: int, patches: bool) -> tuple[Tensor, Tensor]:
    x = F.leaky_relu(mean_of(image.mean(dim=1, keepdim=True), 3, 2, 1), 0.2)
    while x.shape[-1] > 8:
        x = F.leaky_relu(BN * mean_of(x, 3, 2, 1), 0.2)
    code = F.leaky_relu(BN * mean_of(x, 5), 0.2)
    words = F.leaky_relu(sentence.mean(dim=1), 0.2)[:, None, None, None]
    joined = F.leaky_relu(BN * (width * code + text_dim * words) / (width + text_dim), 0.2)
    return mean_of(joined, 4).flatten(), mean_of(x if patches else code, 4)


def test_the_discriminators_agree_with_a_twin_of_one_channel():
    network = HDGANDiscriminator([16, 32, 64], range(3), 12, width=32, text_dim=6).double().eval()
    make_constant(network)
    torch.manual_seed(2)
    images = [torch.rand(2, 3, side, side, dtype=torch.float64) - 0.4 for side in (16, 32, 64)]
    sentence = torch.randn(2, 12, dtype=torch.float64)
    with torch.no_grad():
        for level, scores in enumerate(network(images, sentence)):
            pair, local = twin_scores(images[level], sentence, 32, 6, patches=level == 2)
            torch.testing.assert_close(scores.pair, pair, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(scores.local, local, rtol=1e-9, atol=1e-12)


# -- the losses

def scores(pair: float, local: float, patches: int = 1) -> PatchScores:
    return PatchScores(torch.full((2,), pair), torch.full((2, 1, patches, patches), local))


def test_perfect_answers_cost_nothing():
    real, wrong, fake = scores(1, 1), scores(0, 1), scores(0, 0)
    assert discriminator_loss([real] * 3, [wrong] * 3, [fake] * 3) == 0
    assert generator_loss([scores(1, 1)] * 3, torch.tensor(0.0)) == 0


def test_the_losses_by_hand():
    real, wrong, fake = scores(0.5, 2.0, 5), scores(1.0, 0.0, 5), scores(3.0, -1.0, 5)
    # pair 0.25 + (1 + 9) / 2; local 1 + (1 + 1) / 2
    assert discriminator_loss([real], [wrong], [fake]).item() == pytest.approx(5.25 + 2)
    assert discriminator_loss([real] * 2, [wrong] * 2, [fake] * 2).item() == pytest.approx(2 * 7.25)
    # (3 - 1)^2 + (-1 - 1)^2, and 4 times the divergence
    assert adversarial_loss([fake]).item() == pytest.approx(8)
    assert generator_loss([fake], torch.tensor(0.25)).item() == pytest.approx(9)
    assert generator_loss([fake], torch.tensor(0.25), lambda_kl=2).item() == pytest.approx(8.5)


def test_the_further_stage_stays_near_the_picture_before_it():
    before = torch.rand(2, 3, 8, 8, requires_grad=True)
    enlarged = F.interpolate(before, (16, 16), mode="bilinear").detach()
    assert extension_loss([scores(1, 1)], [before, enlarged]) == 0
    made = (enlarged + 0.25).requires_grad_(True)
    loss = extension_loss([scores(1, 1)], [before, made], weight=2)
    loss.backward()
    assert loss.item() == pytest.approx(0.5) and before.grad is None and made.grad is not None


# -- what learns

def test_the_discriminators_loss_leaves_the_generator_alone():
    network = HDGANGenerator(HDGANConfig(**TINY))
    judge = HDGANDiscriminator([16, 32, 64], range(3), 12, width=16)
    given, sentence = text(2), torch.randn(2, 12)
    with torch.no_grad():
        fakes = network(noise(network, 2), given).images
    images = [torch.randn(2, 3, side, side) for side in (16, 32, 64)]
    discriminator_loss(judge(images, sentence), judge(images, sentence), judge(fakes, sentence)).backward()
    assert all(one.grad is None for one in network.parameters())
    assert all(one.grad is not None for one in judge.parameters())


def test_the_further_stage_leaves_the_finished_generator_as_it_was():
    finished = HDGANGenerator(HDGANConfig(**{**TINY, "image_size": 32, "levels": 2}))
    network = HDGANGenerator(HDGANConfig(**{**TINY, "levels": 2, "extended": True}))
    network.base.load_state_dict(finished.base.state_dict())
    network.train()
    judge = HDGANDiscriminator([64], [2], 12, width=16)
    drawn, given = noise(network, 3), text(3)
    images = network(drawn, given).images
    assert [image.shape[-1] for image in images] == [16, 32, 64]
    for image, before in zip(images, finished.eval()(drawn, given).images, strict=False):
        torch.testing.assert_close(image, before)
    extension_loss(judge(images[-1:], given.sentence), images).backward()
    assert all(one.grad is None for one in network.base.parameters())
    assert all(one.grad is not None and one.grad.any() for one in network.extension.parameters())
    for name, values in network.base.state_dict().items():
        torch.testing.assert_close(values, finished.base.state_dict()[name])       # running statistics, too


def test_a_further_stage_needs_a_finished_generator():
    data = {"train": "somewhere", "image_size": 64}
    with pytest.raises(ValidationError, match="a further stage needs both"):
        HDGANRun(name="run", data=data, generator={"extended": True})
    with pytest.raises(ValidationError, match="a further stage needs both"):
        HDGANRun(name="run", data=data, base="runs/hdgan")


class Bare:
    """What a task sees of an engine of one process."""

    rank, world_size = 0, 1

    def __init__(self, task: HDGANTask):
        self.networks = {name: player.module for name, player in task.players.items()}

    def __getitem__(self, name: str) -> nn.Module:
        return self.networks[name]

    bare = penalty = __getitem__


class Reader(nn.Module):
    """An encoder of which only the size is asked."""

    sentence_dim = 12


@pytest.fixture
def finished(tmp_path) -> HDGANGenerator:
    network = HDGANGenerator(HDGANConfig(**{**TINY, "image_size": 32, "levels": 2}))
    network.save_pretrained(tmp_path / "model")
    return network


def test_the_run_of_a_further_stage_continues_the_finished_one(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(hdgan, "load_encoder", lambda config: Reader())
    config = HDGANRun(name="run", data={"train": "somewhere", "image_size": 64}, base=str(tmp_path),
                      generator={"extended": True}, discriminator={"width": 16})
    task = HDGANTask(config)
    assert task.network.config == finished.config.model_copy(update={"image_size": 64, "extended": True})
    assert task.sides == [64] and len(task.players["discriminator"].module.scales) == 1
    given, image = text(3), torch.randn(3, 3, 64, 64)
    batch = {"image": image, "wrong_image": image.flip(0), "text": given, "noise": noise(task.network, 3)}
    loss_of(task, "discriminator", Bare(task), batch).total.backward()
    assert all(one.grad is None for one in task.network.parameters())
    loss_of(task, "generator", Bare(task), batch).total.backward()
    assert all(one.grad is None for one in task.network.base.parameters())
    assert all(one.grad is not None for one in task.network.extension.parameters())
    scores = task.real_scores(Bare(task)["discriminator"], batch, image)
    assert [tuple(score.shape) for score in scores] == [(3,), (3, 1, 5, 5)]


@pytest.mark.usefixtures("finished")
def test_a_finished_generator_of_another_side_is_refused(tmp_path):
    assert load_base(str(tmp_path), 64).config.image_size == 32
    with pytest.raises(UserError, match="paints pictures of 32; data.image_size must be twice that"):
        load_base(str(tmp_path), 128)
