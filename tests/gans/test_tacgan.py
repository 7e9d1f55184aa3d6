"""TAC-GAN: the published sizes, the losses by hand, ranges, wrong pictures, and two steps of the generator."""

import math
from pathlib import Path

import pytest
import torch
from bare import BareNetworks, LetterEncoder, count, sentence_text
from published import Published
from pydantic import ValidationError
from torch import nn

from dalle.config import load_config
from dalle.errors import UserError
from gans import tacgan
from gans.acgan import Verdict
from gans.classes import class_accuracy
from gans.tacgan import (
    Offset,
    TACGANConfig,
    TACGANDiscriminator,
    TACGANDiscriminatorConfig,
    TACGANGenerator,
    TACGANRun,
    TACGANTask,
    class_loss,
    discriminator_loss,
    generator_loss,
    normalisation,
    unit_halves,
)

PUBLISHED = {"tacgan": Published(paintings=3)}        # the generator moves twice
CLASS_IDS, VERDICT = torch.tensor([0, 2, 1]), ((3,), (3, 3))
DOUBLES = {
    tacgan.discriminator_loss: (VERDICT * 3, lambda a, b, c, d, e, f: tacgan.discriminator_loss(
        Verdict(a, b), Verdict(c, d), Verdict(e, f), CLASS_IDS, CLASS_IDS.flip(0))),
    tacgan.generator_loss: (VERDICT, lambda a, b: tacgan.generator_loss(Verdict(a, b), CLASS_IDS)),
    tacgan.class_loss: (VERDICT[1:], lambda b: tacgan.class_loss(Verdict(b, b), CLASS_IDS)),
}

BATCH, CLASSES, DIM = 6, 3, 8


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr("gans.task.load_text_encoder", lambda name: LetterEncoder())


def make_task(**changes) -> TACGANTask:
    torch.manual_seed(0)
    settings = {"name": "tacgan", "text_encoder": "letters", "data": {"train": "x", "image_size": 16},
                "train": {"batch_size": BATCH}, "generator": {"width": 4, "noise_dim": 4, "text_dim": 5},
                "discriminator": {"width": 4, "text_dim": 5, "num_classes": CLASSES}, **changes}
    return TACGANTask(TACGANRun(**settings))


def make_batch(**changes) -> dict:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (BATCH, 3, 16, 16), dtype=torch.uint8, generator=source),
            "class_id": torch.tensor([0, 2, 1, 0, 2, 2]), "caption": ["a", "c", "b", "ab", "cc", "cd"], **changes}


def sigmoid_cross_entropy(logits: list[float], label: int) -> float:
    """The mean over classes, written out."""
    terms = [math.log(1 + math.exp(-value if index == label else value)) for index, value in enumerate(logits)]
    return sum(terms) / len(terms)


# -- the networks

@pytest.mark.parametrize(("norm", "expected"), [
    ("offset", (11_373_479, 8_477_131)),
    ("affine", (11_374_439, 8_478_539)),
])
def test_the_published_sizes(norm, expected):
    generator = TACGANGenerator(TACGANConfig(norm=norm))
    discriminator = TACGANDiscriminator(TACGANDiscriminatorConfig(norm=norm), 128, 4800)
    assert (generator.num_parameters, count(discriminator)) == expected


def test_each_layer_has_the_published_shape():
    generator = TACGANGenerator(TACGANConfig(sentence_dim=DIM)).eval()
    discriminator = TACGANDiscriminator(TACGANDiscriminatorConfig(), 128, DIM).eval()
    sizes = []
    for block in (generator.first, *generator.body, *discriminator.trunk):
        block.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    text = sentence_text(torch.randn(1, DIM))
    image = generator({"z": torch.randn(1, 100)}, text)
    assert sizes == [(512, 8, 8), (256, 16, 16), (128, 32, 32), (64, 64, 64), (3, 128, 128)]
    sizes.clear()
    verdict = discriminator(image, text)
    assert sizes == [(64, 64, 64), (64, 64, 64), (128, 32, 32), (256, 16, 16), (512, 8, 8)]     # 64: before, after LR
    assert discriminator.joint[0].in_channels == 612 and discriminator.source.in_features == 32_768
    assert verdict.source.shape == (1,) and verdict.classes.shape == (1, 102)


@pytest.mark.parametrize("image_size", [16, 64, 80])
def test_the_sizes_follow_the_picture(image_size):
    generator = TACGANGenerator(TACGANConfig(image_size=image_size, width=2, sentence_dim=DIM))
    discriminator = TACGANDiscriminator(TACGANDiscriminatorConfig(width=2), image_size, DIM)
    text = sentence_text(torch.randn(2, DIM))
    image = generator({"z": torch.randn(2, 100)}, text)
    assert image.shape == (2, 3, image_size, image_size)
    assert discriminator(image, text).classes.shape == (2, 102)


def test_pictures_are_in_0_1_inside_and_in_minus_1_1_outside():
    generator = TACGANGenerator(TACGANConfig(image_size=16, width=2, sentence_dim=DIM)).eval()
    with torch.no_grad():
        generator.body[-1].weight.mul_(100)
    noise, text = {"z": torch.randn(4, 100)}, sentence_text(torch.randn(4, DIM))
    image, details = generator.paint(noise, text)
    inside = generator(noise, text)
    assert 0 <= inside.min() < 0.1 and 0.9 < inside.max() <= 1 and not details
    torch.testing.assert_close(image, 2 * inside.detach() - 1)


def test_normalisation_has_an_offset_and_no_gain():
    layer, x = normalisation(2, "offset"), torch.randn(8, 2, 3, 3)
    assert [tuple(parameter.shape) for parameter in layer.parameters()] == [(2,)]
    nn.init.constant_(layer[1].bias, 0.5)
    mean, variance = x.mean(dim=(0, 2, 3), keepdim=True), x.var(dim=(0, 2, 3), keepdim=True, unbiased=False)
    torch.testing.assert_close(layer(x), (x - mean) / (variance + 1e-3).sqrt() + 0.5)
    assert sum(parameter.numel() for parameter in normalisation(2, "affine").parameters()) == 4
    assert torch.equal(Offset(2)(x), x)


def test_the_first_weights_are_xaviers():
    generator = TACGANGenerator(TACGANConfig(sentence_dim=DIM))
    weight = generator.stem.weight.detach()
    bound = math.sqrt(6 / (200 + 32_768))
    assert float(weight.abs().max()) == pytest.approx(bound, rel=1e-3)
    assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not any(parameter.any() for name, parameter in generator.named_parameters() if name.endswith("bias"))


def test_each_half_of_the_text_has_length_1():
    vector = torch.randn(3, 4800, generator=torch.Generator().manual_seed(0))
    scaled = unit_halves(vector)
    torch.testing.assert_close(scaled.square().sum(dim=1), torch.full((3,), 2.0))
    torch.testing.assert_close(scaled[:, :2400].norm(dim=1), torch.ones(3))
    torch.testing.assert_close(scaled[:, 2400:] * vector[:, 2400:].norm(dim=1, keepdim=True), vector[:, 2400:])
    torch.testing.assert_close(unit_halves(scaled), scaled)


@pytest.mark.parametrize("halves", [True, False])
def test_whether_the_length_of_the_text_counts(halves):
    generator = TACGANGenerator(TACGANConfig(image_size=16, width=2, sentence_dim=DIM, halves=halves)).eval()
    noise, sentence = {"z": torch.randn(1, 100)}, torch.ones(1, DIM)
    images = [generator(noise, sentence_text(scale * sentence)) for scale in (1, 5)]
    assert torch.allclose(*images) == halves


def test_in_evaluation_a_sample_does_not_depend_on_its_company():
    generator = TACGANGenerator(TACGANConfig(image_size=16, width=2, sentence_dim=DIM)).eval()
    discriminator = TACGANDiscriminator(TACGANDiscriminatorConfig(width=2), 16, DIM).eval()
    z, sentence, order = torch.randn(4, 100), torch.randn(4, DIM), torch.tensor([2, 0, 3, 1])
    image = generator({"z": z}, sentence_text(sentence))
    torch.testing.assert_close(generator({"z": z[order]}, sentence_text(sentence[order])), image[order])
    assert not torch.allclose(generator({"z": -z}, sentence_text(sentence)), image)
    verdict = discriminator(image, sentence_text(sentence))
    again = discriminator(image[order], sentence_text(sentence[order]))
    torch.testing.assert_close(again.classes, verdict.classes[order])


# -- the losses

def test_zero_logits():
    verdict, classes = Verdict(torch.zeros(4), torch.zeros(4, 102)), torch.arange(4)
    assert float(discriminator_loss(verdict, verdict, verdict, classes, classes)) == pytest.approx(6 * math.log(2))
    assert float(generator_loss(verdict, classes)) == pytest.approx(2 * math.log(2))


def test_the_losses_written_out():
    logits = {"real": (2.0, [1.0, 0.0, -1.0]), "wrong": (0.5, [0.0, 2.0, 0.5]), "fake": (-1.0, [0.0, 1.0, 0.0])}
    verdicts = {name: Verdict(torch.tensor([source]), torch.tensor([classes]))
                for name, (source, classes) in logits.items()}
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(0.5)) + math.log(1 + math.exp(-1))
                + sigmoid_cross_entropy(logits["real"][1], 0) + sigmoid_cross_entropy(logits["wrong"][1], 2)
                + sigmoid_cross_entropy(logits["fake"][1], 0))
    real_class, wrong_class = torch.tensor([0]), torch.tensor([2])
    assert float(discriminator_loss(*verdicts.values(), real_class, wrong_class)) == pytest.approx(expected, rel=1e-6)
    expected = math.log(1 + math.exp(1)) + sigmoid_cross_entropy(logits["fake"][1], 0)
    assert float(generator_loss(verdicts["fake"], real_class)) == pytest.approx(expected, rel=1e-6)


def test_classes_are_labels_not_a_distribution():
    verdict, label = Verdict(torch.zeros(1), torch.tensor([[3.0, -1.0, 0.5]])), torch.tensor([2])
    assert float(class_loss(verdict, label)) == pytest.approx(sigmoid_cross_entropy([3.0, -1.0, 0.5], 2), rel=1e-6)
    shifted = Verdict(verdict.source, verdict.classes + 1)      # a softmax would not see the difference
    assert float(class_loss(shifted, label)) != pytest.approx(float(class_loss(verdict, label)), abs=0.1)
    softmax = nn.functional.cross_entropy(verdict.classes, label)
    assert float(class_loss(verdict, label)) != pytest.approx(float(softmax), abs=0.1)


# -- the step

def test_two_steps_of_the_generator_on_the_same_noise():
    task = make_task()
    assert [(phase.name, phase.player, phase.repeats) for phase in task.phases] == \
        [("discriminator", "discriminator", 1), ("generator", "generator", 2)]
    prepared = task.prepare(make_batch(), BareNetworks(task), 0)
    assert "noise_g" not in prepared


def test_noise_is_uniform():
    task = make_task(train={"batch_size": BATCH}, generator={"width": 4, "noise_dim": 2000})
    z = task.prepare(make_batch(), BareNetworks(task), 0)["noise"]["z"]
    assert z.abs().max() <= 1 and float(z.square().mean()) == pytest.approx(1 / 3, rel=0.05)


def test_wrong_pictures_bring_their_own_classes():
    task, batch = make_task(), make_batch()
    rights = batch["image"].float() / 255
    for step in range(5):
        prepared = task.prepare(batch, BareNetworks(task), step)
        torch.testing.assert_close(prepared["image"], rights)
        for index in range(BATCH):
            distance = (rights - prepared["wrong_image"][index]).abs().amax(dim=(1, 2, 3))
            source = int(distance.argmin())
            assert distance[source] < 1e-5 and source != index
            assert prepared["wrong_class_id"][index] == batch["class_id"][source]


def test_a_step_moves_its_player_alone():
    task = make_task()
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    generator, discriminator = networks["generator"], networks["discriminator"]
    task.d_loss(networks, prepared, 0).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    task.g_loss(networks, prepared, 0).total.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    assert generator.text.project[0].weight.grad.abs().sum() > 0


def test_the_wrong_pictures_class_is_not_the_texts():
    task = make_task()
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    first = task.d_loss(networks, prepared, 0).total
    other = task.d_loss(networks, {**prepared, "wrong_class_id": (prepared["wrong_class_id"] + 1) % CLASSES}, 0).total
    real = task.d_loss(networks, {**prepared, "class_id": (prepared["class_id"] + 1) % CLASSES}, 0).total
    assert len({round(loss.item(), 6) for loss in (first, other, real)}) == 3


def test_r1_looks_at_the_source_alone():
    task = make_task(stabiliser={"r1": 1.0})
    networks = BareNetworks(task)
    task.r1_loss(networks, task.prepare(make_batch(), networks, 0), 0).total.backward()
    discriminator = networks["discriminator"]
    assert discriminator.source.weight.grad.abs().sum() > 0 and discriminator.classes.weight.grad is None


def test_the_discriminator_tells_eight_pictures_from_fakes():
    task = make_task(train={"batch_size": 8}, discriminator={"width": 8, "text_dim": 8, "num_classes": CLASSES})
    networks = BareNetworks(task)
    batch = {"image": torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8), "class_id": torch.arange(8) % CLASSES,
             "caption": list("abcdefgh")}
    optimizer = torch.optim.Adam(networks["discriminator"].parameters(), 2e-3, (0.5, 0.999))
    for step in range(300):
        prepared = task.prepare(batch, networks, step)
        loss = task.d_loss(networks, prepared, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    with torch.no_grad():
        real = networks["discriminator"](prepared["image"], prepared["text"])
        fake = networks["discriminator"](networks["generator"](prepared["noise"], prepared["text"]), prepared["text"])
    assert torch.cat([real.source > 0, fake.source < 0]).float().mean() > 0.9
    assert class_accuracy(real.classes, batch["class_id"]) > 0.9


def test_a_saved_generator_paints_the_same(tmp_path):
    task = make_task()
    networks = BareNetworks(task)
    task.network.save_pretrained(tmp_path)
    painter = task.generator(networks)
    images = painter.generate(["ab", "cd"], [1, 2])
    assert torch.equal(painter.generate(["cd"], [2])[0], images[1])
    painter.network = TACGANGenerator.from_pretrained(tmp_path)
    assert torch.equal(painter.generate(["ab", "cd"], [1, 2]), images)


# -- what is refused

@pytest.mark.parametrize(("classes", "words"), [
    ([0, 1, -1], "a sample has no class, and TAC-GAN needs that of each: write class_id"),
    ([0, 4, 1], "a sample is of class 4, but discriminator.num_classes is 3"),
])
def test_classes_that_cannot_be(classes, words):
    task = make_task()
    batch = {name: value[:3] for name, value in make_batch().items()} | {"class_id": torch.tensor(classes)}
    with pytest.raises(UserError, match=words):
        task.prepare(batch, BareNetworks(task), 0)


def test_it_reads_captions():
    with pytest.raises(UserError, match="set text_encoder"):
        make_task(text_encoder=None)


@pytest.mark.parametrize(("changes", "words"), [
    ({"image_size": 100}, "not a multiple of 16"),
    ({"sentence_dim": 5}, "no two halves: set halves to false"),
    ({"norm": "layer"}, "'offset' or 'affine'"),
])
def test_impossible_sizes(changes, words):
    with pytest.raises(ValidationError, match=words):
        TACGANConfig(**changes)


def test_a_wrong_picture_needs_a_second_sample():
    with pytest.raises(ValidationError, match="train.batch_size"):
        TACGANRun(name="tacgan", data={"train": "x"}, train={"batch_size": 1})


@pytest.mark.parametrize("name", ["tacgan", "tacgan_shapes"])
def test_the_configs_build(name, monkeypatch):
    monkeypatch.setattr(LetterEncoder, "sentence_dim", 4800)
    path = Path(__file__).parents[2] / "configs" / "gans" / f"{name}.yaml"
    # standardised text reads the captions of data/shapes, which a fresh clone does not have
    config = load_config(path, ["standardise_text=false"], {"tacgan": TACGANRun})
    task = TACGANTask(config)
    if name == "tacgan":
        assert (task.network.num_parameters, count(task.players["discriminator"].module)) == (11_373_479, 8_477_131)
