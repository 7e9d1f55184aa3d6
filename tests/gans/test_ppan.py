"""PPAN: sizes, the skips, one class head, the four losses by hand, where each gradient goes, and both wrong pairs."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bare import BareNetworks, LetterEncoder, count, loss_of, sentence_text, trained
from published import Published
from pydantic import ValidationError
from torch import Tensor, nn

from dalle.config import load_config
from dalle.errors import UserError
from dalle.training.task import detached
from gans import ppan
from gans.hdgan import HDGANConfig, HDGANDiscriminator, HDGANGenerator, PatchScores
from gans.losses import bce, mse, perceptual_loss
from gans.perceptual import load_features
from gans.ppan import (
    ClassHead,
    PPANConfig,
    PPANDiscriminator,
    PPANGenerator,
    PPANLossConfig,
    PPANRun,
    PPANTask,
    PyramidScores,
    Skipped,
    class_loss,
    discriminator_class_loss,
    discriminator_loss,
    generator_loss,
)

PUBLISHED = {"ppan": Published(paintings=1)}       # both players see the same fakes, as HDGAN's
CLASS_IDS, LEVEL, LOGITS = torch.tensor([0, 2, 1]), ((3,), (3, 1, 2, 2)), (3, 3)


def answers(pair: Tensor, local: Tensor, classes: Tensor | None = None) -> PyramidScores:
    return PyramidScores([PatchScores(pair, local)], classes)


DOUBLES = {
    ppan.class_loss: ((LOGITS,), lambda a: ppan.class_loss(a, CLASS_IDS)),
    ppan.discriminator_class_loss: ((LOGITS,) * 3, lambda a, b, c: ppan.discriminator_class_loss(
        a, b, c, CLASS_IDS, CLASS_IDS.flip(0))),
    ppan.discriminator_loss: ((*LEVEL, LOGITS) * 3, lambda *given: ppan.discriminator_loss(
        answers(*given[:3]), answers(*given[3:6]), answers(*given[6:]), CLASS_IDS, CLASS_IDS.flip(0), bce, 0.5)),
    ppan.generator_loss: ((*LEVEL, LOGITS, (), ()), lambda a, b, c, perceptual, kl: ppan.generator_loss(
        answers(a, b, c), CLASS_IDS, perceptual, kl, PPANLossConfig())),
}

TINY = {"image_size": 32, "sentence_dim": 8, "z_dim": 5, "condition_dim": 6, "width": 8}
BATCH, CLASSES = 6, 3


@pytest.fixture(autouse=True)
def _letters(monkeypatch):
    monkeypatch.setattr(ppan, "load_encoder", lambda config: LetterEncoder())


def make_task(**sections) -> PPANTask:
    torch.manual_seed(0)
    tree = {"name": "ppan", "data": {"train": "somewhere", "image_size": 32}, "train": {"batch_size": BATCH},
            "generator": {name: TINY[name] for name in ("z_dim", "condition_dim", "width")},
            "discriminator": {"width": 16, "text_dim": 4, "num_classes": CLASSES},
            "features": "vgg16_relu1_2:random", "text_encoder": "letters"}
    return PPANTask(PPANRun(**{**tree, **sections}))


def make_batch(classes: bool = True) -> dict:
    torch.manual_seed(1)
    return {"image": torch.randint(0, 256, (BATCH, 3, 32, 32), dtype=torch.uint8),
            "class_id": torch.arange(BATCH) % CLASSES if classes else torch.full((BATCH,), -1),
            "caption": ["a", "bb", "abc", "dd", "ef", "h"]}


# -- the networks

def test_the_generator_is_hdgans_and_the_discriminators_are_too_but_for_the_class_head(monkeypatch):
    for module in ("gans.hdgan", "gans.ppan"):
        monkeypatch.setattr(f"{module}.dcgan_init", lambda network: None)
    with torch.device("meta"):
        generator, theirs = PPANGenerator(PPANConfig()), HDGANGenerator(HDGANConfig())
        judges = PPANDiscriminator([64, 128, 256], 1024, 150)
        rivals = HDGANDiscriminator([64, 128, 256], range(3), 1024)
    assert {name: tensor.shape for name, tensor in generator.state_dict().items()} == \
        {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    assert count(generator) == 41_378_496 and count(rivals) == 25_693_606
    head = 512 * 512 * 4 * 4 + 2 * 512 + 512 * 150 + 150
    assert count(judges.classes) == head == 4_272_278 and count(judges) == 25_693_606 + head


def test_three_discriminators_share_nothing():
    task = make_task()
    judges = task.players["discriminator"].module
    owners = [{id(one) for one in scale.parameters()} for scale in judges.scales]
    assert len(owners) == 3 and not owners[0] & owners[1] and not owners[1] & owners[2] and not owners[0] & owners[2]
    assert set().union(*owners) | {id(one) for one in judges.classes.parameters()} == set(map(id, judges.parameters()))
    assert list(task.players) == ["generator", "discriminator"]


def test_pictures_and_scores_of_each_level():
    generator = PPANGenerator(PPANConfig(**{**TINY, "image_size": 256}))
    noise = {name: torch.randn(2, length) for name, length in generator.noise_dims.items()}
    images = generator(noise, sentence_text(torch.randn(2, 8))).images
    assert [tuple(image.shape) for image in images] == [(2, 3, side, side) for side in (64, 128, 256)]
    judges = PPANDiscriminator([64, 128, 256], 8, CLASSES, width=16, text_dim=4)
    right, wrong = judges(images, torch.randn(2, 8), torch.randn(2, 8))
    assert [tuple(score.local.shape) for score in right.levels] == [(2, 1, 1, 1), (2, 1, 1, 1), (2, 1, 5, 5)]
    assert all(score.pair.shape == (2,) for score in right.levels) and right.classes.shape == (2, CLASSES)
    for one, other in zip(right.levels, wrong.levels, strict=True):
        assert torch.equal(one.local, other.local) and not torch.equal(one.pair, other.pair)


def test_several_sentences_are_judged_as_each_by_itself():
    judges = PPANDiscriminator([8, 16, 32], 8, CLASSES, width=16, text_dim=4).eval()
    images, sentences = [torch.randn(3, 3, side, side) for side in (8, 16, 32)], torch.randn(2, 3, 8)
    for scores, sentence in zip(judges(images, *sentences), sentences, strict=True):
        for level, scale, image in zip(scores.levels, judges.scales, images, strict=True):
            for found, expected in zip(level, scale(image, sentence), strict=True):
                torch.testing.assert_close(found, expected)


def test_the_class_is_read_off_the_mean_over_places():
    head = ClassHead(4, 2).eval()
    nn.init.constant_(head.features[0].weight, 1 / 64)
    nn.init.eye_(head.logits.weight)
    nn.init.zeros_(head.logits.bias)
    code = torch.randn(3, 4, 8, 8)
    windows = code.mean(dim=1, keepdim=True).unfold(2, 4, 1).unfold(3, 4, 1).mean(dim=(-2, -1))      # [3, 1, 5, 5]
    expected = F.leaky_relu(windows * (1 + 1e-5) ** -0.5, 0.2).mean(dim=(1, 2, 3))
    found = head(ppan.Looked(code, code[..., :4, :4]))
    torch.testing.assert_close(found, expected[:, None].expand(-1, 2))


def test_a_skip_adds_what_came_in_enlarged():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 4)
    wide = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(Skipped(nn.Upsample(scale_factor=2), 3, 3)(x), 2 * wide)
    narrow = Skipped(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 2, 1)), 3, 2)
    weight, bias = narrow.body[1].weight + narrow.around[0].weight, narrow.body[1].bias
    torch.testing.assert_close(narrow(x), F.conv2d(wide, weight, bias))
    plain, skips = PPANGenerator(PPANConfig(**TINY)), PPANGenerator(PPANConfig(**TINY, skips=True))
    assert count(skips) - count(plain) == 64 * 32 + 32 * 16        # the channels change at 8 and at 32
    noise = {name: torch.randn(2, length) for name, length in plain.noise_dims.items()}
    assert [image.shape[-1] for image in skips(noise, sentence_text(torch.randn(2, 8))).images] == [8, 16, 32]


# -- the losses

def told(pair: float, local: float, classes: list[float] | None = None) -> PyramidScores:
    level = PatchScores(torch.full((2,), pair), torch.full((2, 1, 5, 5), local))
    return PyramidScores([level] * 3, None if classes is None else torch.tensor([classes, classes]))


def cross_entropy(logits: list[float], label: int) -> float:
    return math.log(sum(map(math.exp, logits))) - logits[label]


def test_the_losses_by_hand():
    real, wrong, fake = told(0.5, 2.0, [1, 0, -1]), told(1.0, 0.0, [0, 2, 0.5]), told(3.0, -1.0, [0, 1, 0])
    right_id, wrong_id = torch.tensor([0, 0]), torch.tensor([2, 2])
    entropies = cross_entropy([1, 0, -1], 0) + cross_entropy([0, 2, 0.5], 2) + cross_entropy([0, 1, 0], 0)
    # at each of three levels: pair 0.25 + (1 + 9) / 2; local 1 + (1 + 1) / 2
    found = discriminator_loss(real, wrong, fake, right_id, wrong_id, mse, 0.5)
    assert float(found) == pytest.approx(3 * 7.25 + 0.5 * entropies, rel=1e-6)
    weights = PPANLossConfig(class_weight=0.5, perceptual=3, kl=2)
    found = generator_loss(fake, right_id, torch.tensor(0.25), torch.tensor(0.125), weights)
    assert float(found) == pytest.approx(3 * 8 + 0.5 * cross_entropy([0, 1, 0], 0) + 0.75 + 0.25, rel=1e-6)


def test_cross_entropies_by_hand():
    nothing = told(0.0, 0.0)
    # pair ln 2 (1 + 1 / 2 + 1 / 2) and patches as much, at three levels; the generator's ln 2 twice
    loss = discriminator_loss(nothing, nothing, nothing, CLASS_IDS, CLASS_IDS, bce)
    assert float(loss) == pytest.approx(3 * 4 * math.log(2), rel=1e-6)
    loss = generator_loss(nothing, CLASS_IDS, torch.tensor(0.0), torch.tensor(0.0), PPANLossConfig(adversarial="bce"))
    assert float(loss) == pytest.approx(3 * 2 * math.log(2), rel=1e-6)


def test_perfect_answers_cost_nothing_and_exchanged_labels_cost_what_they_are_apart():
    real, wrong, fake = told(1, 1), told(0, 1), told(0, 0)
    none = torch.tensor([0, 0])
    assert discriminator_loss(real, wrong, fake, none, none) == 0
    assert float(discriminator_loss(wrong, real, fake, none, none)) == pytest.approx(3 * (1 + 0.5))
    exchanged = told(-1, -1)
    good = discriminator_loss(told(1, 1), told(-1, 1), exchanged, none, none, bce)
    bad = discriminator_loss(told(-1, 1), told(1, 1), exchanged, none, none, bce)
    low, high = math.log(1 + math.exp(-1)), math.log(1 + math.exp(1))
    assert float(bad - good) == pytest.approx(3 * 1.5 * (high - low), rel=1e-5)


def test_every_picture_has_its_own_class():
    logits = torch.randn(3, 4, 5)
    right, wrong = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 3, 2, 1])
    expected = F.cross_entropy(logits[0], right) + F.cross_entropy(logits[1], wrong) + F.cross_entropy(logits[2], right)
    torch.testing.assert_close(discriminator_class_loss(*logits, right, wrong), expected)
    assert float(class_loss(torch.zeros(4, 5), right)) == pytest.approx(math.log(5), rel=1e-6)


def test_equal_pictures_have_no_perceptual_distance():
    features = load_features("vgg16_relu3_3:random")
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    assert perceptual_loss(features(image), features(image)) == 0
    assert perceptual_loss(features(image), features(image.flip(0))) > 0
    one, other = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    by_picture = ((one - other) ** 2).flatten(1).sum(dim=1) / (3 * 4 * 5)
    torch.testing.assert_close(perceptual_loss(one, other), by_picture.mean())
    assert trained(features) == {}


# -- what learns

def prepared_by(task: PPANTask, batch: dict | None = None) -> tuple[BareNetworks, dict]:
    networks = BareNetworks(task)
    return networks, task.prepare(make_batch() if batch is None else batch, networks, 0)


@pytest.mark.parametrize("mismatch", ["text", "image"])
def test_a_step_moves_its_player_alone(mismatch):
    task = make_task(loss={"mismatch": mismatch})
    networks, prepared = prepared_by(task)
    loss_of(task, "discriminator", networks, prepared).total.backward()
    assert all(one.grad is None for one in networks["generator"].parameters())
    assert all(one.grad is not None for one in networks["discriminator"].parameters())
    loss_of(task, "generator", networks, prepared).total.backward()
    assert all(one.grad is not None and one.grad.any() for one in networks["generator"].parameters())
    assert trained(networks["features"]) == {}


def gradients(task: PPANTask, **weights: float) -> dict[str, bool]:
    """The generator's parameters, and whether the loss of these weights moves them beside L1 and L2."""
    networks, prepared = prepared_by(task)
    grads = []
    for own in ({}, weights):
        silent = {"class_weight": 0, "perceptual": 0, "kl": 0}
        task.config = task.config.model_copy(update={"loss": PPANLossConfig(**silent | own)})
        task.network.zero_grad()
        loss_of(task, "generator", networks, prepared).total.backward()
        grads.append({name: one.grad.clone() for name, one in task.network.named_parameters()})
    return {name: not torch.equal(before, grads[1][name]) for name, before in grads[0].items()}


@pytest.mark.parametrize("weights", [{"class_weight": 1.0}, {"perceptual": 100.0}])
def test_classes_and_features_are_the_last_pictures_alone(weights):
    moved = gradients(make_task(), **weights)
    heads = {name: changed for name, changed in moved.items() if ".heads." in name}
    assert {name.split(".")[2] for name, changed in heads.items() if changed} == {"32"}
    assert {name.split(".")[2] for name in heads} == {"8", "16", "32"}
    assert all(changed for name, changed in moved.items() if ".heads." not in name)


def test_no_class_comes_from_the_first_two_discriminators():
    task = make_task()
    networks, prepared = prepared_by(task)
    (scores,) = networks["discriminator"](ppan.pyramid(prepared["image"], task.sides), prepared["text"].sentence)
    class_loss(scores.classes, prepared["class_id"]).backward()
    judges = networks["discriminator"]
    assert all(one.grad is None for scale in judges.scales[:2] for one in scale.parameters())
    assert judges.scales[2].features[0].weight.grad.any() and judges.classes.logits.weight.grad.any()
    assert judges.scales[2].code[0].weight.grad is None          # the head looks at the 8x8 map


def test_r1_sees_every_level_and_no_class():
    task = make_task(stabiliser={"r1": 1.0})
    networks, prepared = prepared_by(task)
    scores = task.real_scores(networks["discriminator"], prepared, prepared["image"])
    assert [tuple(score.shape) for score in scores] == [(6,), (6, 1, 1, 1)] * 2 + [(6,), (6, 1, 5, 5)]
    task.r1_loss(networks, prepared, 0).total.backward()
    judges = networks["discriminator"]
    assert judges.classes.logits.weight.grad is None
    assert all(scale.features[0].weight.grad.any() for scale in judges.scales)


# -- the wrong pairs

def test_the_wrong_pair_is_the_picture_with_another_text():
    task = make_task()
    networks, prepared = prepared_by(task)
    torch.testing.assert_close(prepared["wrong_text"].sentence, prepared["text"].sentence.roll(-1, 0))
    assert "wrong_image" not in prepared
    networks["discriminator"].eval()
    real, wrong, wrong_class_id = task.real_pairs(networks["discriminator"], prepared)
    assert torch.equal(wrong_class_id, prepared["class_id"]) and torch.equal(wrong.classes, real.classes)
    (alone,) = networks["discriminator"](ppan.pyramid(prepared["image"], task.sides), prepared["wrong_text"].sentence)
    for one, other in zip(wrong.levels, alone.levels, strict=True):
        torch.testing.assert_close(one.pair, other.pair)


def test_or_a_picture_of_another_class_with_the_text():
    task = make_task(loss={"mismatch": "image"})
    networks, prepared = prepared_by(task)
    assert "wrong_text" not in prepared and (prepared["wrong_class_id"] != prepared["class_id"]).all()
    networks["discriminator"].eval()
    real, wrong, wrong_class_id = task.real_pairs(networks["discriminator"], prepared)
    assert torch.equal(wrong_class_id, prepared["wrong_class_id"])
    (alone,) = networks["discriminator"](ppan.pyramid(prepared["wrong_image"], task.sides), prepared["text"].sentence)
    torch.testing.assert_close(wrong.classes, alone.classes)
    assert not torch.equal(wrong.levels[-1].local, real.levels[-1].local)


@pytest.mark.parametrize("adversarial", ["lsgan", "bce"])
def test_the_step_is_the_sum_of_its_parts(adversarial):
    task = make_task(loss={"adversarial": adversarial, "class_weight": 0.5, "perceptual": 3.0, "kl": 0.25})
    networks, prepared = prepared_by(task)
    with torch.no_grad():
        prepared["painted"] = task.paint(networks, prepared, 0)
        networks["discriminator"].eval()
        found = task.g_loss(networks, prepared, 0)
        images, sentence = prepared["painted"].images, prepared["text"].sentence
        (fake,) = networks["discriminator"](images, sentence)
        error = {"lsgan": lambda x: (x - 1).square().mean(), "bce": lambda x: F.softplus(-x).mean()}[adversarial]
        expected = sum(error(score) for level in fake.levels for score in level)
        expected += 0.5 * F.cross_entropy(fake.classes, prepared["class_id"])
        expected += 3 * (networks["features"](images[-1]) - networks["features"](prepared["image"])).square().mean()
        mean, log_sigma = prepared["painted"].augmented[1:]
        expected += 0.25 * (-log_sigma + 0.5 * ((2 * log_sigma).exp() + mean.square() - 1)).mean()
    torch.testing.assert_close(found.total, expected)
    assert detached({"painted": prepared["painted"]}) and set(found.parts) == {"perceptual", "kl", "accuracy"}


# -- classes

@pytest.mark.parametrize(("changed", "words"), [
    (-1, "a sample has no class, and PPAN needs that of each"),
    (CLASSES, "a sample is of class 3, but discriminator.num_classes is 3"),
])
def test_classes_that_cannot_be(changed, words):
    batch = make_batch()
    batch["class_id"][2] = changed
    with pytest.raises(UserError, match=words):
        prepared_by(make_task(), batch)


def test_without_classes_there_is_no_head():
    task = make_task(discriminator={"width": 16, "text_dim": 4, "num_classes": 0}, loss={"class_weight": 0})
    assert make_task().needs_classes and not task.needs_classes
    networks, prepared = prepared_by(task, make_batch(classes=False))
    for phase in ("discriminator", "generator"):
        loss = loss_of(task, phase, networks, prepared)
        loss.total.backward()
        assert torch.isfinite(loss.total) and not any("accuracy" in name for name in loss.parts)
    with pytest.raises(ValidationError, match="without classes there is no L3: set loss.class_weight to 0"):
        make_task(discriminator={"num_classes": 0})


def test_the_papers_config_builds(monkeypatch):
    monkeypatch.setattr("gans.hdgan.dcgan_init", lambda network: None)
    monkeypatch.setattr(ppan, "dcgan_init", lambda network: None)
    monkeypatch.setattr(LetterEncoder, "sentence_dim", 1024)
    path = Path(__file__).parents[2] / "configs" / "gans" / "ppan.yaml"
    config = load_config(path, ["features=vgg16_relu3_3:random"], {"ppan": PPANRun})
    with torch.device("meta"):
        monkeypatch.setattr(ppan, "load_features", lambda spec: nn.Identity())
        task = PPANTask(config)
    assert (count(task.network), count(task.players["discriminator"].module)) == (41_378_496, 29_965_884)
    assert PPANRun.model_fields["features"].default == "vgg16_relu3_3" and task.sides == [64, 128, 256]
