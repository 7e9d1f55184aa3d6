"""GAWWN: the paper's sizes, what follows the box or the key points and what does not, what its steps are made of."""

import math
from collections import Counter

import pytest
import torch
from bare import CAPTIONS, BareNetworks, LetterEncoder, count, loss_of
from published import Published
from pydantic import ValidationError

from dalle.data.settings import DataConfig
from dalle.errors import UserError
from gans import gawwn
from gans.gawwn import (
    BoxGenerator,
    GAWWNConfig,
    GAWWNDiscriminator,
    GAWWNDiscriminatorConfig,
    GAWWNGenerator,
    GAWWNRun,
    GAWWNTask,
    KeypointGenerator,
)
from gans.gawwn_keypoints import GAWWNKeypointsConfig, GAWWNKeypointsGenerator, load_places, shuffled
from gans.generator import GANGenerator
from gans.task import Exchange, GANTask

PUBLISHED = {"gawwn": Published(zero=1, paintings=1, finished="places")}      # both players see the same fakes

BOX, POINTS = "box", "keypoints"
CONDITIONS = [BOX, POINTS]
GENERATORS = {BOX: BoxGenerator, POINTS: KeypointGenerator}
PARTS, DIM = 3, 8


def sizes(condition: str, size: int = 64, **changes) -> GAWWNConfig:
    return GAWWNConfig(**{"condition": condition, "image_size": size, "width": 4, "num_parts": PARTS, "noise_dim": 5,
                          "sentence_dim": DIM, "places": places_config(condition), **changes})


def places_config(condition: str) -> GAWWNKeypointsConfig:
    return GAWWNKeypointsConfig(condition=condition, num_parts=PARTS, width=4, noise_dim=3, sentence_dim=DIM)


def make_places(condition: str, count: int = 4) -> torch.Tensor:
    if condition == BOX:
        return torch.tensor([[0.25, 0.125, 0.5, 0.25], [0, 0, 1, 1], [0.5, 0.5, 0.25, 0.5], [0, 0.5, 0.5, 0.5]])[:count]
    points = torch.rand(count, PARTS, 3, generator=torch.Generator().manual_seed(1))
    points[..., 2] = torch.tensor([1.0, 1.0, 0.0])
    return points * points[..., 2:]


def make_pair(condition: str, size: int = 64):
    torch.manual_seed(0)
    config = sizes(condition, size)
    return GAWWNGenerator(config), GAWWNDiscriminator(GAWWNDiscriminatorConfig(width=4, text_dim=6), config)


# -- sizes

@pytest.mark.parametrize(("condition", "expected"), [(BOX, (73_545_699, 16_763_137)),
                                                     (POINTS, (26_471_043, 14_667_905))])
def test_the_papers_sizes_have_the_papers_parameters(condition, expected):
    with torch.device("meta"):
        config = GAWWNConfig(condition=condition)
        assert count(GENERATORS[condition](config)) == expected[0]
        assert count(GAWWNDiscriminator(GAWWNDiscriminatorConfig(), config)) == expected[1]


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_joint_map_is_of_16_cells_whatever_the_size(condition, size):
    generator, discriminator = make_pair(condition, size)
    sides = []
    generator.layers.paint[0].register_forward_hook(lambda layer, given, out: sides.append(given[0].shape[2:]))
    discriminator.region.register_forward_hook(lambda layer, given, out: sides.append(given[0].shape[2:]))
    places, sentence = make_places(condition), torch.randn(4, DIM)
    image = generator({"z": torch.randn(4, 5)}, sentence, places)
    assert image.shape == (4, 3, size, size) and image.abs().max() <= 1
    assert discriminator(image, sentence, places).shape == (4,)
    assert sides == [(16, 16), (16, 16)]


def test_a_side_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        GAWWNConfig(image_size=96)
    with pytest.raises(ValueError, match="greater than or equal to 32"):
        GAWWNConfig(image_size=16)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_convolution_has_a_bias(condition):
    for network in make_pair(condition):
        convolutions = [part for part in network.modules() if isinstance(part, torch.nn.modules.conv._ConvNd)]
        assert convolutions and all(part.bias is not None for part in convolutions)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_samples_do_not_see_each_other_when_it_samples(condition):
    generator, discriminator = (network.eval() for network in make_pair(condition))
    places, sentence, z = make_places(condition), torch.randn(4, DIM), torch.randn(4, 5)
    order = torch.tensor([2, 0, 3, 1])
    image = generator({"z": z}, sentence, places)
    torch.testing.assert_close(generator({"z": z[order]}, sentence[order], places[order]), image[order])
    torch.testing.assert_close(discriminator(image[order], sentence[order], places[order]),
                               discriminator(image, sentence, places)[order])


# -- what follows the place

def entering(module, call) -> torch.Tensor:
    """What the first call of ``module`` is given while ``call`` runs."""
    seen = []
    hook = module.register_forward_hook(lambda layer, given, out: seen.append(given[0]))
    call()
    hook.remove()
    return seen[0]


def test_the_local_path_paints_into_the_box_alone():
    generator, _ = make_pair(BOX)
    layers = generator.layers
    box = torch.tensor([[4 / 15, 2 / 15, 6 / 15, 3 / 15]] * 2)                 # cells 4 to 10, 2 to 5
    joint = entering(layers.paint, lambda: layers(torch.randn(2, 5), torch.randn(2, DIM), box))
    around, inside = joint.chunk(2, dim=1)
    assert inside[:, :, 2:6, 4:11].any() and around[:, :, 8:].any()
    outside = inside.clone()
    outside[:, :, 2:6, 4:11] = 0
    assert outside.max() < 1e-4 * inside.max()                                 # cells at the edges, but for rounding
    text = entering(layers.global_text, lambda: layers(torch.randn(2, 5), torch.randn(2, DIM), box))
    assert text[:, :, 3, 5].abs().min() > 0 and text[:, :, 8:].abs().max() == 0


def test_without_a_visible_part_the_gated_text_is_exactly_nothing():
    generator, _ = make_pair(POINTS)
    layers = generator.layers
    points = make_places(POINTS)
    points[0] = 0
    given = entering(layers.local_path, lambda: layers(torch.randn(4, 5), torch.randn(4, DIM), points))
    assert not given[0].any()
    assert ((given[1] != 0).any(dim=0).sum()) == 2                             # two of three parts, a cell each
    assert not layers.gated(torch.randn(4, 16), torch.zeros(4, PARTS, 16, 16)).any()


def of_the_local_path(discriminator: GAWWNDiscriminator, *given) -> torch.Tensor:
    """Logits without the path that looks at everything."""
    with torch.no_grad():
        discriminator.join[0].weight[:, 4:] = 0
    return discriminator.eval()(*given)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_one_path_looks_at_the_place_and_the_other_everywhere(condition):
    _, discriminator = make_pair(condition)
    places = torch.tensor([[0, 0, 0.25, 0.25]]) if condition == BOX else torch.tensor([[[0.1, 0.1, 1.0], [0, 0, 0],
                                                                                        [0, 0, 0]]])
    for part in discriminator.modules():            # the small first weights would let nothing through
        if isinstance(part, torch.nn.modules.conv._ConvNd):
            torch.nn.init.normal_(part.weight, std=part.weight[0].numel() ** -0.5)
    image, sentence = torch.randn(1, 3, 64, 64), torch.randn(1, DIM)
    far, near = image.clone(), image.clone()
    far[..., 40:, 40:] += 1
    near[..., :8, :8] += 1
    assert discriminator.eval()(image, sentence, places) != discriminator(far, sentence, places)
    local = of_the_local_path(discriminator, image, sentence, places)
    assert torch.equal(local, of_the_local_path(discriminator, far, sentence, places))
    assert not torch.allclose(local, of_the_local_path(discriminator, near, sentence, places))
    assert not torch.allclose(local, of_the_local_path(discriminator, image, -sentence, places))


def test_the_warped_text_says_nothing_of_the_place():
    _, discriminator = make_pair(BOX)
    image, sentence = torch.randn(4, 3, 64, 64), torch.randn(1, DIM).expand(4, -1)
    warped = entering(discriminator.warped, lambda: discriminator(image, sentence, make_places(BOX)))
    torch.testing.assert_close(warped, warped[:1, :, :1, :1].expand_as(warped))


@pytest.mark.parametrize("norm", [True, False])
def test_a_batch_of_fakes_has_a_mean_of_its_own_only_without_the_norm_of_vectors(norm):
    config = GAWWNDiscriminatorConfig(width=4, text_dim=6, vector_norm=norm)
    discriminator = GAWWNDiscriminator(config, sizes(POINTS))
    said = entering(discriminator.join[-2], lambda: discriminator(torch.rand(4, 3, 64, 64), torch.randn(4, DIM),
                                                                  make_places(POINTS)))
    assert (said.mean(dim=0).abs().max() < 1e-5) == norm


# -- the task

def make_task(monkeypatch, condition: str, **changes) -> GAWWNTask:
    monkeypatch.setattr(gawwn, "load_encoder", lambda config: LetterEncoder())
    monkeypatch.setattr(gawwn, "load_places", lambda *asked: GAWWNKeypointsGenerator(places_config(condition)))
    torch.manual_seed(0)
    return GAWWNTask(make_run(condition, **changes))


def make_run(condition: str, places: str | None = None, **changes) -> GAWWNRun:
    kind = places or ("boxes" if condition == BOX else "keypoints")
    data = DataConfig(train="x", image_size=32, places=kind)
    return GAWWNRun(name="x", places="none", text_encoder="none", data=data,
                    generator={"condition": condition, "width": 4, "num_parts": PARTS, "noise_dim": 5},
                    discriminator={"width": 4, "text_dim": 6}, **changes)


def make_batch(condition: str, count: int = 4) -> dict:
    torch.manual_seed(3)
    own = {"boxes": make_places(BOX, count)[:, None]} if condition == BOX else {"keypoints": make_places(POINTS, count)}
    return {"image": torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8), "class_id": torch.arange(count),
            "caption": CAPTIONS[:count], "position": torch.arange(count), **own}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_undecided_logits_cost_what_they_must(monkeypatch, condition):
    task = make_task(monkeypatch, condition)
    networks = BareNetworks(task)
    for parameter in networks["discriminator"].join[-1].parameters():
        torch.nn.init.zeros_(parameter)
    prepared = task.prepare(make_batch(condition), networks, 0)
    for name, cost in (("discriminator", 2 * math.log(2)), ("generator", math.log(2))):
        assert loss_of(task, name, networks, prepared).total.item() == pytest.approx(cost, rel=1e-5)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_each_loss_reaches_only_its_network(monkeypatch, condition):
    task = make_task(monkeypatch, condition)
    networks = BareNetworks(task)
    generator, discriminator = networks["generator"], networks["discriminator"]
    prepared = task.prepare(make_batch(condition), networks, 0)
    loss_of(task, "discriminator", networks, prepared).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.requires_grad_(False)
    before = {name: value.clone() for name, value in generator.places.state_dict().items()}
    loss_of(task, "generator", networks, prepared).total.backward()
    assert all((parameter.grad is None) == name.startswith("places.") for name, parameter in
               generator.named_parameters())
    assert generator.layers.read.text.weight.grad.abs().sum() > 0 and not prepared["text"].sentence.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in generator.places.state_dict().items())
    assert generator.train().layers.training and not generator.places.training


def test_the_discriminators_terms_are_weighed(monkeypatch):
    task = make_task(monkeypatch, POINTS, loss={"mismatched": 0.25})
    networks = BareNetworks(task)
    prepared = task.prepare(make_batch(POINTS), networks, 0)
    logits = iter([torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])])      # real, wrong, fake
    judged = []
    networks.modules["discriminator"] = lambda *given: judged.append(given) or next(logits)
    cost = [math.log(1 + math.exp(x)) for x in (-1.0, 2.0, 3.0)]
    assert float(loss_of(task, "discriminator", networks, prepared).total.detach()) == pytest.approx(
        cost[0] + 0.25 * cost[1] + 0.75 * cost[2], rel=1e-5)
    real, wrong, fake = judged
    assert torch.equal(real[0], wrong[0]) and not torch.equal(real[0], fake[0])         # a wrong text, not a picture
    assert torch.equal(wrong[1], prepared["wrong_text"]) and torch.equal(real[1], fake[1])
    assert all(torch.equal(given[2], prepared["places"]) for given in judged)


def test_the_shuffled_texts_are_those_of_the_batch_in_an_order_of_seed_and_step():
    alone = Exchange(BareNetworksOf(0, 1))
    sentence = torch.arange(6.0)[:, None]
    orders = [tuple(shuffled(alone, sentence, 0, step)[:, 0].tolist()) for step in range(50)]
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in orders) and len(set(orders)) > 45
    assert orders[7] == tuple(shuffled(alone, sentence, 0, 7)[:, 0].tolist())
    assert orders[7] != tuple(shuffled(alone, sentence, 1, 7)[:, 0].tolist())
    stays = Counter(number == place for order in orders for place, number in enumerate(order))
    assert 20 < stays[True] < 90                                                # one in six may stay where it is


class BareNetworksOf:
    def __init__(self, rank: int, world_size: int):
        self.rank, self.world_size = rank, world_size


def test_two_processes_shuffle_as_one(monkeypatch):
    sentence = torch.randn(6, 3)
    expected = shuffled(Exchange(BareNetworksOf(0, 1)), sentence, 5, 9)
    for rank in range(2):
        exchange = Exchange(BareNetworksOf(rank, 2))
        monkeypatch.setattr(exchange, "everyone", lambda own: sentence)
        assert torch.equal(shuffled(exchange, sentence[rank::2], 5, 9), expected[rank::2])


def test_the_places_of_a_batch(monkeypatch):
    task = make_task(monkeypatch, BOX, which="first")
    batch = make_batch(BOX) | {"boxes": torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.5, 0.5]]] * 4)}
    networks = BareNetworks(task)
    assert task.prepare(batch, networks, 0)["places"].tolist() == [[0.25, 0.25, 0.25, 0.25]] * 4
    around = make_task(monkeypatch, BOX)
    assert around.prepare(batch, networks, 0)["places"].tolist() == [[0.25, 0.25, 0.75, 0.75]] * 4
    points = make_task(monkeypatch, POINTS)
    short = make_batch(POINTS) | {"keypoints": make_places(POINTS)[:, :1]}
    assert points.prepare(short, networks, 0)["places"].shape == (4, PARTS, 3)


@pytest.mark.parametrize(("condition", "places"), [(BOX, "keypoints"), (POINTS, "boxes")])
def test_data_that_do_not_say_where_are_refused(condition, places):
    with pytest.raises(ValidationError, match=f"condition {condition} is learnt from .*: set data.places to"):
        make_run(condition, places=places)


def test_another_generator_of_places_is_refused(tmp_path):
    GAWWNKeypointsGenerator(places_config(POINTS)).save_pretrained(tmp_path)
    assert load_places(str(tmp_path), POINTS, PARTS).config == places_config(POINTS)
    with pytest.raises(UserError, match="gives keypoints, but generator.condition is box"):
        load_places(str(tmp_path), BOX, PARTS)
    with pytest.raises(UserError, match="gives 3 parts, but generator.num_parts is 4"):
        load_places(str(tmp_path), POINTS, 4)
    GAWWNGenerator(sizes(BOX, 32)).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="holds a 'gawwn' model: give a run of gawwn_keypoints"):
        load_places(str(tmp_path / "other"), POINTS, PARTS)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_pictures_around_the_samples_own_places_are_judged(monkeypatch, condition):
    task = make_task(monkeypatch, condition)
    batch = make_batch(condition) | {"caption": ["a red circle", "a blue square at the top"] * 2}
    figures = task.validate(BareNetworks(task), [batch, batch])
    assert figures["given/object_colour"].count == 8 and figures["given/place"].count == 4
    assert all(0 <= figure.value <= 1 for figure in figures.values())
    assert task.validate(BareNetworks(task), [batch | {"caption": ["a bird"] * 4}]) == {}


# -- to sample

def make_generator(condition: str) -> GANGenerator:
    torch.manual_seed(0)
    return GANGenerator(GAWWNGenerator(sizes(condition, 32)), LetterEncoder())


@pytest.mark.parametrize(("condition", "options"), [(BOX, {"box": "0.25,0,0.5,0.5"}),
                                                    (POINTS, {"keypoints": "0.5:0.25,-,1:1"})])
def test_pictures_are_painted_around_what_is_given_or_what_the_caption_says(condition, options):
    generator = make_generator(condition)
    alone, _ = generator.generate_with_details(["abc", "abc"], [1, 2])
    given, details = generator.generate_with_details(["abc", "abc"], [1, 2], **options)
    assert not torch.equal(alone, given) and not torch.equal(alone[0], alone[1])
    assert details[0]["pictures"]["places"].shape == (3, 256, 256)
    with torch.no_grad():
        for parameter in generator.network.places.parameters():
            parameter.neg_()
    assert torch.equal(generator.generate(["abc", "abc"], [1, 2], **options), given)    # needs no generator of places
    assert not torch.equal(generator.generate(["abc", "abc"], [1, 2]), alone)


def test_the_given_place_is_the_one_painted_around():
    network = make_generator(BOX).network
    conditions = network.conditions(["a"], None, **network.options(box="0.25,0,0.5,0.5"))
    assert conditions["places"].tolist() == [[0.25, 0, 0.5, 0.5]]
    points = make_generator(POINTS).network
    conditions = points.conditions(["a"] * 2, None, **points.options(keypoints="0.5:0.25,-,1:1"))
    assert conditions["places"].tolist() == [[[0.5, 0.25, 1], [0, 0, 0], [1, 1, 1]]] * 2
    assert points.options(keypoints=[(0.5, 0.25), None]) == {"keypoints": ((0.5, 0.25), None), "complete": False}


def test_some_parts_may_be_given_and_the_others_found():
    network = make_generator(POINTS).network.eval()
    conditions = network.conditions(["a"], None, **network.options(keypoints="-,0.5:0.25", complete="true"))
    text = LetterEncoder()(["abc"])
    noise = {name: torch.randn(1, length) for name, length in network.noise_dims.items()}
    _, seen = network.paint(noise, text, **conditions)
    torch.testing.assert_close(seen["place"][0, 1], torch.tensor([0.5, 0.25, 1.0]))
    expected = network.places({"z": noise["z_places"]}, text.sentence, conditions["given"])[0]
    for found, made in zip(seen["place"][0], expected, strict=True):
        assert torch.equal(found[:2], made[:2]) if found[2] else made[2] <= 0.5


@pytest.mark.parametrize(("condition", "options", "message"), [
    (BOX, {"box": "0,0,1"}, "box '0,0,1': write X,Y,WIDTH,HEIGHT"),
    (BOX, {"box": "a,b,c,d"}, "write X,Y,WIDTH,HEIGHT"), (BOX, {"box": "nan,0,1,1"}, "write X,Y,WIDTH,HEIGHT"),
    (BOX, {"box": "20,30,5,5"}, "in shares of the side"), (BOX, {"box": 5}, "write X,Y,WIDTH,HEIGHT"),
    (BOX, {"box": "0.5,0,0.75,1"}, "does not lie in the picture"), (BOX, {"box": "0,0,0,1"}, "does not lie in"),
    (BOX, {"keypoints": "0:0"}, "told where by box: keypoints is not an option"),
    (POINTS, {"box": "0,0,1,1"}, "told where by keypoints: box is not an option"),
    (POINTS, {"keypoints": "0.5"}, "write X:Y,X:Y"), (POINTS, {"keypoints": "0.5:2"}, "write X:Y,X:Y"),
    (POINTS, {"keypoints": "-,-"}, "give 1 to 3 parts"), (POINTS, {"keypoints": "0:0,0:0,0:0,0:0"}, "give 1 to 3"),
    (POINTS, {"keypoints": "0:0", "complete": "maybe"}, "complete is 'maybe': true or false"),
    (POINTS, {"top_k": 3}, "--top-k is not an option of a gawwn model"),
])
def test_places_that_cannot_be_are_refused_in_one_line(condition, options, message):
    with pytest.raises(UserError, match=message) as error:
        make_generator(condition).settings(**options)
    assert "\n" not in str(error.value)


def test_the_penalty_of_real_pictures_can_be_taken(monkeypatch):
    """Through the crop, whose own derivative is asked for."""
    task = make_task(monkeypatch, BOX, stabiliser={"r1": 1.0})
    networks = BareNetworks(task)
    loss = GANTask.r1_loss(task, networks, task.prepare(make_batch(BOX), networks, 0), 0)
    loss.total.backward()
    assert networks["discriminator"].region[0].weight.grad.abs().sum() > 0
