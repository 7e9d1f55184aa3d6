"""AC-GAN: the published sizes, the losses by hand, who learns from what, and captions to classes."""

import math
from pathlib import Path

import pytest
import torch
from bare import BareNetworks, LetterEncoder, count
from published import Published
from pydantic import ValidationError
from torch import nn

from dalle.config import load_config
from dalle.errors import UserError
from gans import acgan
from gans.acgan import (
    ACGANConfig,
    ACGANDiscriminator,
    ACGANDiscriminatorConfig,
    ACGANGenerator,
    ACGANRun,
    ACGANTask,
    ActivationNoise,
    Verdict,
    discriminator_loss,
    generator_loss,
)
from gans.classes import ClassCheck, ClassPrototypes, class_accuracy, named_classes
from gans.generator import GANGenerator

PUBLISHED = {"acgan": Published(paintings=2, compares=False)}       # each phase draws its own noise
CLASS_IDS, VERDICT = torch.tensor([0, 2, 1]), ((3,), (3, 3))
DOUBLES = {
    acgan.discriminator_loss: (VERDICT * 2, lambda a, b, c, d: acgan.discriminator_loss(
        Verdict(a, b), Verdict(c, d), CLASS_IDS, CLASS_IDS.flip(0))),
    acgan.generator_loss: (VERDICT, lambda a, b: acgan.generator_loss(Verdict(a, b), CLASS_IDS)),
    acgan.class_loss: (VERDICT[1:], lambda b: acgan.class_loss(Verdict(b, b), CLASS_IDS)),
}

BATCH, CLASSES, DIM = 6, 3, 8
SMALL = {"image_size": 16, "num_classes": CLASSES, "noise_dim": 4, "channels": (8, 8)}
SMALL_DISCRIMINATOR = {"channels": (4, 4, 4), "dropout": 0.0}


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr("gans.task.load_text_encoder", lambda name: LetterEncoder())


def make_task(**changes) -> ACGANTask:
    torch.manual_seed(0)
    settings = {"name": "acgan", "text_encoder": "letters", "data": {"train": "x", "image_size": 16},
                "train": {"batch_size": BATCH}, "discriminator": SMALL_DISCRIMINATOR,
                "generator": {name: value for name, value in SMALL.items() if name != "image_size"}, **changes}
    return ACGANTask(ACGANRun(**settings))


def make_batch(**changes) -> dict:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8, generator=source),
            "class_id": torch.tensor([0, 2, 1, 0, 2, 2]), "caption": ["a", "c", "b", "ab", "cc", "cd"], **changes}


def make_verdict(source: list[float], classes: list[list[float]]) -> Verdict:
    return Verdict(torch.tensor(source), torch.tensor(classes))


# -- the networks

@pytest.mark.parametrize(("preset", "image_size", "expected"), [
    ("imagenet", 128, (16_531_139, 3_015_563)),
    ("cifar", 32, (2_993_763, 1_663_883)),
])
def test_the_published_sizes(preset, image_size, expected):
    config = ACGANConfig(preset=preset)
    assert config.image_size == image_size
    generator = ACGANGenerator(config)
    discriminator = ACGANDiscriminator(ACGANDiscriminatorConfig(), image_size, 10)
    assert (generator.num_parameters, count(discriminator)) == expected
    assert generator.stem.in_features == 110


def test_each_layer_of_the_imagenet_network_has_the_published_shape():
    generator = ACGANGenerator(ACGANConfig(noise_dim=4)).eval()
    sizes = []
    for block in generator.body:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    image = generator({"z": torch.randn(1, 4)}, torch.tensor([3]))
    assert sizes == [(384, 16, 16), (256, 32, 32), (192, 64, 64), (3, 128, 128), (3, 128, 128)]
    assert image.abs().max() <= 1

    discriminator = ACGANDiscriminator(ACGANDiscriminatorConfig(), 128, 10).eval()
    sizes.clear()
    for block in discriminator.trunk:
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    verdict = discriminator(image)
    assert sizes == [(16, 64, 64), (32, 64, 64), (64, 32, 32), (128, 32, 32), (256, 16, 16), (512, 16, 16)]
    assert verdict.source.shape == (1,) and verdict.classes.shape == (1, 10)


@pytest.mark.parametrize(("image_size", "channels"), [(16, (8, 8)), (64, (8, 8, 4)), (32, (4, 4, 4, 4))])
def test_the_picture_has_the_size_asked_for(image_size, channels):
    generator = ACGANGenerator(ACGANConfig(image_size=image_size, channels=channels, noise_dim=2))
    assert generator({"z": torch.randn(2, 2)}, torch.tensor([0, 1])).shape == (2, 3, image_size, image_size)


def test_the_first_weights():
    generator = ACGANGenerator(ACGANConfig(preset="cifar"))
    for layer in (generator.stem, generator.body[0][0]):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not generator.stem.bias.any()


def test_only_the_first_layer_of_the_discriminator_is_without_normalisation():
    trunk = ACGANDiscriminator(ACGANDiscriminatorConfig(), 32, 10).trunk
    assert [any(isinstance(part, nn.BatchNorm2d) for part in block) for block in trunk] == [False] + 5 * [True]
    assert all(block[-1].p == 0.5 for block in trunk)


def test_the_class_changes_the_picture_and_the_discriminator_is_not_told():
    generator = ACGANGenerator(ACGANConfig(**SMALL)).eval()
    noise = {"z": torch.randn(1, 4, generator=torch.Generator().manual_seed(0))}
    first, second = (generator(noise, torch.tensor([number])) for number in (0, 1))
    assert torch.equal(first, generator(noise, torch.tensor([0]))) and not torch.allclose(first, second)
    assert not torch.allclose(first, generator({"z": -noise["z"]}, torch.tensor([0])))
    discriminator = ACGANDiscriminator(ACGANDiscriminatorConfig(**SMALL_DISCRIMINATOR), 16, CLASSES)
    with pytest.raises(TypeError):
        discriminator(first, torch.tensor([0]))


def test_dropout_and_noise_act_in_training_alone():
    settings = ACGANDiscriminatorConfig(channels=(4, 4, 4), activation_noise=0.2)
    discriminator, image = ACGANDiscriminator(settings, 16, CLASSES), torch.randn(2, 3, 16, 16)
    assert not torch.equal(discriminator(image).source, discriminator(image).source)
    discriminator.eval()
    assert torch.equal(discriminator(image).source, discriminator(image).source)
    noisy = ActivationNoise(0.2)(torch.zeros(100, 100))
    assert float(noisy.std()) == pytest.approx(0.2, rel=0.05)
    assert not ActivationNoise(0.0)(torch.zeros(3)).any()


def test_in_evaluation_a_sample_does_not_depend_on_its_company():
    generator = ACGANGenerator(ACGANConfig(**SMALL)).eval()
    discriminator = ACGANDiscriminator(ACGANDiscriminatorConfig(**SMALL_DISCRIMINATOR), 16, CLASSES).eval()
    z, classes, order = torch.randn(4, 4), torch.tensor([0, 1, 2, 0]), torch.tensor([2, 0, 3, 1])
    image = generator({"z": z}, classes)
    torch.testing.assert_close(generator({"z": z[order]}, classes[order]), image[order])
    torch.testing.assert_close(discriminator(image[order]).classes, discriminator(image).classes[order])


# -- the losses

def test_zero_logits_of_ten_classes():
    verdict, classes = Verdict(torch.zeros(4), torch.zeros(4, 10)), torch.arange(4)
    assert float(discriminator_loss(verdict, verdict, classes, classes)) == pytest.approx(5.9915, abs=1e-4)
    assert float(generator_loss(verdict, classes)) == pytest.approx(2.9957, abs=1e-4)


def test_the_losses_written_out():
    real = make_verdict([2.0, -1.0], [[1.0, 0.0, 0.0], [0.0, 2.0, 0.5]])
    fake = make_verdict([0.5, -3.0], [[0.0, 1.0, 0.0], [3.0, 0.0, 0.0]])
    real_class, fake_class = torch.tensor([0, 2]), torch.tensor([1, 1])

    def cross_entropy(logits, label):
        return math.log(sum(math.exp(value) for value in logits)) - logits[label]

    def softplus(value):
        return math.log(1 + math.exp(value))

    class_of_real = (cross_entropy([1, 0, 0], 0) + cross_entropy([0, 2, 0.5], 2)) / 2
    class_of_fake = (cross_entropy([0, 1, 0], 1) + cross_entropy([3, 0, 0], 1)) / 2
    source = (softplus(-2) + softplus(1)) / 2 + (softplus(0.5) + softplus(-3)) / 2
    assert float(discriminator_loss(real, fake, real_class, fake_class)) == \
        pytest.approx(source + class_of_real + class_of_fake, rel=1e-6)
    assert float(discriminator_loss(real, fake, real_class, fake_class, class_weight=0.5)) == \
        pytest.approx(source + 0.5 * (class_of_real + class_of_fake), rel=1e-6)
    assert float(generator_loss(fake, fake_class)) == \
        pytest.approx((softplus(-0.5) + softplus(3)) / 2 + class_of_fake, rel=1e-6)


def test_the_share_that_is_named_right():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    assert class_accuracy(logits, torch.tensor([0, 1, 1, 1])) == 0.75


# -- the step

def test_a_step_moves_its_player_alone_and_the_class_term_reaches_the_generator():
    task = make_task(loss={"class_weight": 1.0})
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    generator, discriminator = networks["generator"], networks["discriminator"]

    task.d_loss(networks, prepared, 0).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.parameters())

    generator.zero_grad()
    fake = discriminator(generator(prepared["noise_g"], prepared["fake_class_g"]))
    nn.functional.cross_entropy(fake.classes, prepared["fake_class_g"]).backward()
    assert generator.stem.weight.grad.abs().sum() > 0 and generator.body[-2].weight.grad.abs().sum() > 0

    loss = task.g_loss(networks, prepared, 0)
    assert 0 <= loss.parts["accuracy"] <= 1 and loss.total.requires_grad


def test_each_player_draws_noise_and_classes_of_its_own():
    task = make_task()
    networks = BareNetworks(task)
    first, again, later = (task.prepare(make_batch(), networks, step) for step in (0, 0, 1))
    assert not torch.equal(first["noise"]["z"], first["noise_g"]["z"])
    assert torch.equal(first["fake_class"], again["fake_class"])
    assert not torch.equal(first["fake_class"], first["fake_class_g"])
    assert not torch.equal(torch.cat([first["fake_class"], first["fake_class_g"]]),
                           torch.cat([later["fake_class"], later["fake_class_g"]]))


def test_the_classes_of_the_fakes_are_uniform():
    task = make_task()
    networks = BareNetworks(task)
    drawn = torch.cat([task.prepare(make_batch(), networks, step)["fake_class"] for step in range(200)])
    shares = torch.bincount(drawn, minlength=CLASSES) / len(drawn)
    assert shares.tolist() == pytest.approx([1 / 3] * 3, abs=0.05)


def test_r1_looks_at_the_source_alone():
    task = make_task(stabiliser={"r1": 2.0, "r1_every": 4})
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    assert [phase.name for phase in task.phases] == ["discriminator", "r1", "generator"]
    task.r1_loss(networks, prepared, 0).total.backward()
    gradient = networks["discriminator"].head.weight.grad
    assert gradient[0].abs().sum() > 0 and not gradient[1:].any()


def test_the_discriminator_tells_eight_pictures_from_fakes():
    task = make_task(train={"batch_size": 8})
    networks = BareNetworks(task)
    batch = {"image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), "class_id": torch.arange(8) % CLASSES,
             "caption": ["a"] * 8}
    optimizer = torch.optim.Adam(networks["discriminator"].parameters(), 1e-3, (0.5, 0.999))
    for step in range(120):
        prepared = task.prepare(batch, networks, step)
        loss = task.d_loss(networks, prepared, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    with torch.no_grad():
        real = networks["discriminator"](prepared["image"])
        fake = networks["discriminator"](networks["generator"](prepared["noise"], prepared["fake_class"]))
    right = torch.cat([real.source > 0, fake.source < 0]).float().mean()
    assert right > 0.9 and class_accuracy(real.classes, batch["class_id"]) > 0.9


# -- classes

def test_prototypes_are_the_means_of_what_was_added():
    source = torch.Generator().manual_seed(2)
    sentences, classes = torch.randn(30, DIM, generator=source), torch.randint(0, 4, (30,), generator=source)
    prototypes = ClassPrototypes(5, DIM)
    for start in (0, 7, 20):
        stop = {0: 7, 7: 20, 20: 30}[start]
        prototypes.add(sentences[start:stop], classes[start:stop])
    for number in range(4):
        torch.testing.assert_close(prototypes.mean[number], sentences[classes == number].mean(dim=0))
    assert prototypes.count.tolist() == torch.bincount(classes, minlength=5).tolist()
    assert not prototypes.mean[4].any()


def test_a_caption_is_of_the_seen_class_of_highest_cosine():
    prototypes = ClassPrototypes(4, 2)
    prototypes.add(torch.tensor([[3.0, 0.0], [0.0, 0.1], [-1.0, -1.0]]), torch.tensor([0, 2, 3]))
    asked = torch.tensor([[0.1, 0.0], [1.0, 2.0], [2.0, 1.0], [-1.0, -2.0], [0.0, 0.0]])
    # a dot product would call the second one class 0; class 1 was never seen, and no text at all is not class 1
    assert prototypes.nearest(asked)[:4].tolist() == [0, 2, 0, 3]
    assert prototypes.nearest(asked)[4] != 1


@pytest.mark.parametrize(("prompts", "expected"), [
    (["class:2", "a red circle", " class: 0 "], [2, -1, 0]),
    (["class:2 red", "Class:1", "class:-1", "class:"], [-1, -1, -1, -1]),
    ([], []),
])
def test_prompts_that_name_a_class(prompts, expected):
    assert named_classes(prompts, 3).tolist() == expected


def test_a_class_that_is_not_there():
    with pytest.raises(UserError, match="class:3 is out of range: this model has the classes 0 to 2"):
        named_classes(["class:3"], 3)


def test_captions_are_painted_as_their_classes():
    task = make_task()
    networks = BareNetworks(task)
    task.prepare(make_batch(), networks, 0)
    painter = task.generator(networks)
    assert painter.network.conditions(["aaa", "class:0", "d"], LetterEncoder()(["aaa", "class:0", "d"])) \
        ["class_id"].tolist() == [0, 0, 2]
    images = painter.generate(["aaa", "class:0", "b", "class:1", "d"], [7] * 5)
    assert images.shape == (5, 3, 16, 16) and images.dtype == torch.uint8
    assert torch.equal(images[0], images[1]) and torch.equal(images[2], images[3])
    assert not torch.equal(images[0], images[2]) and not torch.equal(images[2], images[4])


def test_the_prototypes_are_saved_and_painted_with(tmp_path):
    task = make_task()
    networks = BareNetworks(task)
    task.prepare(make_batch(), networks, 0)
    task.network.save_pretrained(tmp_path)
    loaded = GANGenerator(ACGANGenerator.from_pretrained(tmp_path), LetterEncoder())
    assert torch.equal(loaded.network.prototypes.mean, task.network.prototypes.mean)
    prompts, seeds = ["a", "b", "class:2"], [1, 2, 3]
    assert torch.equal(loaded.generate(prompts, seeds), task.generator(networks).generate(prompts, seeds))
    assert torch.equal(loaded.generate(prompts[1:2], seeds[1:2])[0], loaded.generate(prompts, seeds)[1])


def test_without_a_text_encoder_classes_have_numbers_alone():
    task = make_task(text_encoder=None)
    networks = BareNetworks(task)
    assert "text" not in task.prepare(make_batch(), networks, 0)
    painter = task.generator(networks)
    assert painter.generate(["class:1"], [0]).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match="ask for class:0 to class:2, or train it with a text_encoder"):
        painter.generate(["a red circle"], [0])


def prepare_on_rank(rank: int, task: ACGANTask, batch: dict) -> dict:
    share = {name: value[rank::2] for name, value in batch.items()}
    prepared = task.prepare(share, BareNetworks(task, rank, 2), 0)
    return {"prototypes": task.network.prototypes.state_dict(), "z": prepared["noise_g"]["z"],
            "fake_class": prepared["fake_class"]}


def test_two_processes_have_the_prototypes_of_one(two_ranks):
    task, batch = make_task(), make_batch()
    ranks = two_ranks(prepare_on_rank, task, batch)
    prepared = task.prepare(batch, BareNetworks(task), 0)
    for rank, found in enumerate(ranks):
        for name, value in task.network.prototypes.state_dict().items():
            assert torch.equal(found["prototypes"][name], value)
        assert torch.equal(found["z"], prepared["noise_g"]["z"][rank::2])
        assert torch.equal(found["fake_class"], prepared["fake_class"][rank::2])


# -- what is refused

@pytest.mark.parametrize(("classes", "words"), [
    ([0, 1, -1], "a sample has no class, and AC-GAN needs that of each: write class_id"),
    ([0, 4, 1], "a sample is of class 4, but generator.num_classes is 3: set it to the number of classes, 5 or more"),
])
def test_classes_that_cannot_be(classes, words):
    task = make_task()
    batch = {name: value[:3] for name, value in make_batch().items()} | {"class_id": torch.tensor(classes)}
    with pytest.raises(UserError, match=words):
        task.prepare(batch, BareNetworks(task), 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_bad_class_is_refused_a_step_late():
    check = ClassCheck("AC-GAN", "generator.num_classes", 3)
    assert check(torch.tensor([0, -1, 5], device="cuda")).tolist() == [0, 0, 2]
    with pytest.raises(UserError, match="no class"):
        check(torch.tensor([0, 1, 2], device="cuda"))


@pytest.mark.parametrize(("changes", "words"), [
    ({"preset": "mnist"}, "unknown AC-GAN preset 'mnist'; known: imagenet, cifar"),
    ({"image_size": 60}, "give a multiple of 32"),
    ({"image_size": 16}, "give a multiple of 32"),
])
def test_impossible_sizes(changes, words):
    with pytest.raises(ValidationError, match=words):
        ACGANConfig(**changes)


@pytest.mark.parametrize(("changes", "words"), [
    ({"data": {"train": "x", "image_size": 36}, "text_encoder": "letters"}, "give a multiple of 8"),
    ({"train": {"preview_every": 5}}, "set preview.captions to class:0, class:1"),
])
def test_impossible_runs(changes, words):
    with pytest.raises(ValidationError, match=words):
        ACGANRun(**{"name": "acgan", "data": {"train": "x", "image_size": 128}, **changes})
    ACGANRun(name="acgan", data={"train": "x"}, train={"preview_every": 5}, preview={"captions": ["class:0"]})


@pytest.mark.parametrize("name", ["acgan", "acgan_shapes"])
def test_the_configs_build(name):
    path = Path(__file__).parents[2] / "configs" / "gans" / f"{name}.yaml"
    # standardised text reads the captions of data/shapes, which a fresh clone does not have
    config = load_config(path, ["standardise_text=false"], {"acgan": ACGANRun})
    task = ACGANTask(config)
    if name == "acgan":
        assert (task.network.num_parameters, count(task.players["discriminator"].module)) == (16_531_139, 3_015_563)
