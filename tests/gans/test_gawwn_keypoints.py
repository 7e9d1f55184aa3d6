"""GAWWN's generator of key points: its layers by count, what is given, its losses by hand, its steps."""

import math

import pytest
import torch
from bare import CAPTIONS, BareNetworks, LetterEncoder, count, loss_of
from published import Published
from pydantic import ValidationError

from dalle.data.settings import DataConfig
from gans import gawwn_keypoints
from gans.gawwn_keypoints import (
    GAWWNKeypointsConfig,
    GAWWNKeypointsDiscriminator,
    GAWWNKeypointsDiscriminatorConfig,
    GAWWNKeypointsGenerator,
    GAWWNKeypointsRun,
    GAWWNKeypointsTask,
    discriminator_loss,
    kept,
    located,
)

PUBLISHED = {"gawwn_keypoints": Published(unpaired=("loss.mismatched=0",), compares=False)}
DOUBLES = {discriminator_loss: (((3,),) * 3, lambda a, b, c: discriminator_loss(a, b, c, 0.3))}

PARTS, DIM = 3, 8
SMALL = {"num_parts": PARTS, "width": 4, "noise_dim": 5}


def fully(inputs: int, *outputs: int, norm: bool) -> int:
    total = 0
    for width in outputs:
        total, inputs = total + (inputs + 1) * width + (2 * width if norm else 0), width
    return total


@pytest.mark.parametrize(("condition", "numbers"), [("keypoints", 45), ("box", 5)])
def test_the_papers_layers(condition, numbers):
    """Three readers to 512, 512 and 512 > 256 numbers, then 1024, 512, 256 and the places; two that are judged."""
    with torch.device("meta"):
        config = GAWWNKeypointsConfig(condition=condition)
        generator = GAWWNKeypointsGenerator(config)
        discriminator = GAWWNKeypointsDiscriminator(GAWWNKeypointsDiscriminatorConfig(), config.elements, 1024)
    assert count(generator) == (
        fully(100, 512, norm=False) + fully(1024, 512, norm=False) + fully(numbers, 512, 256, norm=True)
        + fully(1280, 1024, 512, 256, norm=True) + fully(256, numbers, norm=False))
    assert count(discriminator) == (fully(numbers, 512, 256, norm=True) + fully(1024, 512, 256, norm=True)
                                    + fully(512, 256, norm=True) + fully(256, 1, norm=False))


def test_what_is_given_stays_and_the_rest_is_generated():
    generated, given = torch.full((1, 2, 3), 0.25), torch.tensor([[[0.5, 0.75, 1.0], [0, 0, 0]]])
    assert kept(generated, given).tolist() == [[[0.5, 0.75, 1], [0.25, 0.25, 0.25]]]
    network = GAWWNKeypointsGenerator(GAWWNKeypointsConfig(**SMALL, sentence_dim=DIM))
    places = network({"z": torch.randn(4, 5)}, torch.randn(4, DIM), given.repeat(4, 2, 1)[:, :PARTS])
    assert places.shape == (4, PARTS, 3) and (places >= 0).all() and (places <= 1).all()
    assert torch.equal(places[:, 0], given[:, 0].expand(4, -1)) and not torch.equal(places[:, 1], places[:, 0])


def test_what_is_given_moves_the_rest():
    network = GAWWNKeypointsGenerator(GAWWNKeypointsConfig(**SMALL, sentence_dim=DIM)).eval()
    noise, sentence = {"z": torch.randn(2, 5)}, torch.randn(2, DIM)
    nothing = network.nothing_given(sentence)
    one = nothing.clone()
    one[:, 0] = torch.tensor([0.9, 0.1, 1.0])
    assert not torch.allclose(network(noise, sentence, nothing)[:, 1:], network(noise, sentence, one)[:, 1:])


def test_a_part_is_there_or_not_and_one_always_is():
    made = torch.tensor([[[0.1, 0.2, 0.9], [0.3, 0.4, 0.2]], [[0.1, 0.2, 0.3], [0.3, 0.4, 0.4]]])
    torch.testing.assert_close(located(made, "keypoints"), torch.tensor(
        [[[0.1, 0.2, 1], [0, 0, 0]], [[0, 0, 0], [0.3, 0.4, 1]]]))
    assert located(torch.tensor([[[0.1, 0.2, 0.3, 0.4, 0.9]]]), "box").tolist() == [
        pytest.approx([0.1, 0.2, 0.3, 0.4])]


def test_the_losses_by_hand():
    zeros = torch.zeros(4)
    assert float(discriminator_loss(zeros, zeros)) == pytest.approx(2 * math.log(2))
    cost = [math.log(1 + math.exp(x)) for x in (-1.0, 3.0, 2.0)]
    one, three, two = torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([2.0])
    assert float(discriminator_loss(one, three)) == pytest.approx(cost[0] + cost[1], rel=1e-5)
    assert float(discriminator_loss(one, three, two, 0.25)) == pytest.approx(
        cost[0] + 0.75 * cost[1] + 0.25 * cost[2], rel=1e-5)


def make_task(monkeypatch, condition: str = "keypoints", **loss) -> GAWWNKeypointsTask:
    monkeypatch.setattr(gawwn_keypoints, "load_encoder", lambda config: LetterEncoder())
    torch.manual_seed(0)
    kind = "boxes" if condition == "box" else "keypoints"
    return GAWWNKeypointsTask(GAWWNKeypointsRun(
        name="x", text_encoder="none", data=DataConfig(train="x", image_size=16, places=kind), loss=loss,
        generator={**SMALL, "condition": condition}, discriminator={"width": 4}))


def make_batch(count: int = 8) -> dict:
    torch.manual_seed(1)
    points = torch.rand(count, PARTS, 3)
    points[..., 2] = (points[..., 2] > 0.3).float()
    return {"image": torch.zeros(count, 3, 16, 16, dtype=torch.uint8), "class_id": torch.arange(count),
            "caption": CAPTIONS[:count], "position": torch.arange(count), "keypoints": points * points[..., 2:],
            "boxes": torch.tensor([0.25, 0.25, 0.5, 0.5]).expand(count, 1, 4)}


def test_each_part_is_given_once_in_ten_by_seed_and_step(monkeypatch):
    task, batch = make_task(monkeypatch), make_batch()
    networks = BareNetworks(task)
    chosen = there = 0
    for step in range(60):
        prepared = task.prepare(batch, networks, step)
        given, places = prepared["given"], prepared["places"]
        assert all(torch.equal(part, place) or not part.any()
                   for part, place in zip(given.flatten(0, 1), places.flatten(0, 1), strict=True))
        chosen, there = chosen + int((given[..., 2] > 0).sum()), there + int((places[..., 2] > 0).sum())
    assert 0.07 < chosen / there < 0.13
    assert torch.equal(task.prepare(batch, networks, 5)["given"], task.prepare(batch, networks, 5)["given"])
    assert not make_task(monkeypatch, given=0.0).prepare(batch, networks, 0)["given"].any()


@pytest.mark.parametrize("condition", ["keypoints", "box"])
@pytest.mark.parametrize("mismatched", [0.0, 0.5])
def test_each_loss_reaches_only_its_network(monkeypatch, condition, mismatched):
    task = make_task(monkeypatch, condition, mismatched=mismatched)
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    assert ("wrong_text" in prepared) == bool(mismatched)
    generator, discriminator = networks["generator"], networks["discriminator"]
    loss_of(task, "discriminator", networks, prepared).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.requires_grad_(False)
    loss_of(task, "generator", networks, prepared).total.backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())


def test_a_box_is_one_element_that_is_there(monkeypatch):
    task = make_task(monkeypatch, "box")
    prepared = task.prepare(make_batch(), BareNetworks(task), 0)
    assert prepared["places"].tolist() == [[[0.25, 0.25, 0.5, 0.5, 1]]] * 8


def test_a_given_place_draws_no_gradient_and_no_noise():
    network = GAWWNKeypointsGenerator(GAWWNKeypointsConfig(**SMALL, sentence_dim=DIM))
    given = torch.ones(2, PARTS, 3)
    network({"z": torch.randn(2, 5)}, torch.randn(2, DIM), given).sum().backward()
    assert all(not parameter.grad.any() for parameter in network.parameters())


def test_data_that_do_not_say_where_are_refused():
    with pytest.raises(ValidationError, match="set data.places to keypoints"):
        GAWWNKeypointsRun(name="x", text_encoder="none", data=DataConfig(train="x"))


@pytest.mark.parametrize(("condition", "figures"), [("keypoints", {"distance", "seen"}), ("box", {"distance"})])
def test_validation_measures_how_far_it_is_off(monkeypatch, condition, figures):
    task, batch = make_task(monkeypatch, condition), make_batch()
    networks = BareNetworks(task)
    made = task.made(networks, batch["caption"], list(range(8)))
    batch["keypoints"] = located(made, "keypoints") if condition == "keypoints" else batch["keypoints"]
    batch["boxes"] = made[:, :, :4]
    found = task.validate(networks, [batch])
    assert found.keys() == figures
    if condition == "keypoints":
        assert found["distance"].value == pytest.approx(0, abs=1e-6) and found["seen"].value > 0.5
        batch["keypoints"] = batch["keypoints"] + torch.tensor([0.3, 0.4, 0.0]) * batch["keypoints"][..., 2:]
        assert task.validate(networks, [batch])["distance"].value == pytest.approx(0.5, rel=1e-4)


def test_the_penalty_is_of_the_places(monkeypatch):
    task = make_task(monkeypatch)
    networks = BareNetworks(task)
    loss = task.r1_loss(networks, task.prepare(make_batch(), networks, 0), 0)
    assert float(loss.parts["gradient"]) > 0


def test_the_preview_draws_the_places_of_each_caption(monkeypatch):
    task = make_task(monkeypatch)
    shown = task.preview(BareNetworks(task), 0)
    assert shown.keys() == {"places"} and shown["places"].dtype == torch.uint8
