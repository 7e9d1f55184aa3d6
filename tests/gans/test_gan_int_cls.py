"""GAN-INT-CLS: the paper's sizes, its losses at points where they are known, and the style encoder."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.training.engines.base import Engine
from dalle.training.settings import TrainConfig
from gans import gan_int_cls
from gans.gan_int_cls import (
    Discriminator,
    DiscriminatorConfig,
    GANINTCLSConfig,
    GANINTCLSGenerator,
    GANINTCLSRun,
    GANINTCLSTask,
    StyleConfig,
    StyleTask,
    StyleTransfer,
    border_colour,
    clustered,
    discriminator_loss,
    first_place,
    generator_loss,
    same_cluster_auc,
    trunk,
    widths,
)
from gans.text import Text

SMALL = GANINTCLSConfig(width=4, text_dim=6, noise_dim=5, sentence_dim=7)


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("generator_width, discriminator, counts", [
    (128, DiscriminatorConfig(), (18_905_472, 4_030_080)),                               # birds and flowers
    (196, DiscriminatorConfig(width=196, variant="cls"), (41_101_080, 36_183_440)),      # COCO
])
def test_the_papers_sizes_have_the_papers_parameters(generator_width, discriminator, counts):
    with torch.device("meta"):
        assert GANINTCLSGenerator(GANINTCLSConfig(width=generator_width)).num_parameters == counts[0]
        assert parameters(Discriminator(discriminator, 64, 1024)) == counts[1]


def test_the_generator_grows_from_4_to_64_pixels():
    generator = GANINTCLSGenerator(SMALL)
    sides = []
    for layer in generator.layers:
        layer.register_forward_hook(lambda layer, given, out: sides.append(out.shape[-1]))
    image = generator({"z": torch.randn(2, 5)}, torch.randn(2, 7))
    assert image.shape == (2, 3, 64, 64) and image.abs().max() <= 1
    assert list(dict.fromkeys(sides)) == [4, 8, 16, 32, 64]


@pytest.mark.parametrize("size", [16, 32, 128])
def test_other_sizes_follow_the_config(size):
    config = SMALL.model_copy(update={"image_size": size})
    image = GANINTCLSGenerator(config)({"z": torch.randn(2, 5)}, torch.randn(2, 7))
    assert image.shape == (2, 3, size, size)
    assert Discriminator(DiscriminatorConfig(width=4, text_dim=6), size, 7)(image, torch.randn(2, 7)).shape == (2,)


def test_a_side_that_is_no_power_of_two_is_refused():
    with pytest.raises(ValueError, match="power of two"):
        GANINTCLSConfig(image_size=48)


def test_widths_are_the_papers():
    assert widths(128, 64) == [1024, 512, 256, 128] and widths(8, 32) == [64, 32, 16] and widths(8, 128)[-1] == 8


def test_the_bottleneck_follows_the_normalisation_without_an_activation():
    layers = list(GANINTCLSGenerator(SMALL).layers)
    assert [type(layer).__name__ for layer in layers[:6]] == [
        "ConvTranspose2d", "BatchNorm2d", "Sequential", "ConvTranspose2d", "BatchNorm2d", "Sequential"]
    assert len(GANINTCLSGenerator(SMALL.model_copy(update={"large": True})).layers[2]) == 2


def test_no_convolution_has_a_bias():
    for net in (GANINTCLSGenerator(SMALL), Discriminator(DiscriminatorConfig(width=4), 64, 7)):
        assert all(layer.bias is None for layer in net.modules() if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)))


def test_the_two_variants_of_the_discriminator_differ_at_8_pixels_and_in_the_text():
    activated, bare = trunk(4, 64, activation_at_8=True), trunk(4, 64, activation_at_8=False)
    assert len(activated[2]) == 3 and len(bare[2]) == 2 and len(bare[3]) == 2
    assert len(Discriminator(DiscriminatorConfig(width=4), 64, 7).text) == 3
    assert len(Discriminator(DiscriminatorConfig(width=4, variant="cls"), 64, 7).text) == 2


# -- losses

def test_undecided_logits():
    zeros = torch.zeros(4)
    assert float(discriminator_loss(zeros, zeros, zeros, 0.5)) == pytest.approx(2 * math.log(2))
    assert float(generator_loss(zeros, zeros[:2], 1.0)) == pytest.approx(math.log(2))
    assert float(discriminator_loss(zeros, None, zeros, 0.0)) == pytest.approx(2 * math.log(2))


def test_the_discriminators_weights():
    cost = {name: math.log(1 + math.exp(x)) for name, x in (("real", -1.0), ("wrong", 2.0), ("fake", 3.0))}
    one, two, three = torch.tensor([1.0]), torch.tensor([2.0]), torch.tensor([3.0])
    assert float(discriminator_loss(one, two, three, 0.25)) == pytest.approx(
        cost["real"] + 0.25 * cost["wrong"] + 0.75 * cost["fake"], rel=1e-5)


def test_points_between_captions_count_by_their_number_and_weight():
    plain, between = torch.tensor([1.0, -1.0]), torch.tensor([2.0])
    costs = [math.log(1 + math.exp(-x)) for x in (1.0, -1.0, 2.0)]
    assert float(generator_loss(plain, between, 0.5)) == pytest.approx(
        (costs[0] + costs[1] + 0.5 * costs[2]) / 3, rel=1e-5)
    assert float(generator_loss(plain, between[:0], 0.5)) == pytest.approx((costs[0] + costs[1]) / 2, rel=1e-5)


# -- the task

class Encoder(nn.Module):
    sentence_dim, word_dim, text_length = 7, 2, 3

    def forward(self, captions):
        rows = torch.tensor([[len(caption) / 10 + place for place in range(7)] for caption in captions])
        count = len(captions)
        return Text(rows, torch.zeros(count, 2, 3), torch.ones(count, 3, dtype=torch.bool))


def make_task(monkeypatch, **loss) -> GANINTCLSTask:
    monkeypatch.setattr(gan_int_cls, "load_encoder", lambda config: Encoder())
    torch.manual_seed(0)
    return GANINTCLSTask(GANINTCLSRun(
        name="x", data=DataConfig(train="none", image_size=16), text_encoder="none",
        generator=GANINTCLSConfig(width=4, text_dim=6, noise_dim=5), discriminator=DiscriminatorConfig(width=4),
        loss=loss))


def networks_of(task) -> SimpleNamespace:
    class Networks(dict):
        rank, world_size = 0, 1

        def bare(self, name):
            return self[name]

    return Networks({**task.frozen, **{name: player.module for name, player in task.players.items()}})


def batch(count: int = 4) -> dict:
    return {"image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8),
            "class_id": torch.arange(count), "caption": ["x" * (index + 1) for index in range(count)]}


def test_points_between_captions_lie_between_the_two_halves(monkeypatch):
    task = make_task(monkeypatch, beta=0.25)
    prepared = task.prepare(batch(), networks_of(task), 0)
    sentence = prepared["text"].sentence
    torch.testing.assert_close(prepared["between"], 0.25 * sentence[:2] + 0.75 * sentence[2:])
    assert len(prepared["noise_g"]["z"]) == 6 and len(prepared["noise"]["z"]) == 4


def test_equal_captions_have_nothing_between_them(monkeypatch):
    task = make_task(monkeypatch)
    prepared = task.prepare({**batch(), "caption": ["same"] * 4}, networks_of(task), 0)
    torch.testing.assert_close(prepared["between"], prepared["text"].sentence[:2])


def test_an_odd_share_of_the_batch_is_refused_at_the_start(monkeypatch):
    task = make_task(monkeypatch)
    engine = Engine(task.config.model_copy(update={"train": TrainConfig(batch_size=6)}), torch.device("cpu"),
                    world_size=2)
    with pytest.raises(UserError, match="over 2 processes train.batch_size 6 must be a multiple of 4"):
        engine.check(task)
    make_task(monkeypatch, interpolated=0.0).check_share(3, 2)


def test_the_three_systems_by_config(monkeypatch):
    plain = make_task(monkeypatch, mismatched=0.0, interpolated=0.0)
    prepared = plain.prepare(batch(), networks_of(plain), 0)
    assert "wrong_image" not in prepared and "between" not in prepared
    loss = plain.d_loss(networks_of(plain), prepared, 0)
    assert "wrong" not in loss.parts
    assert plain.g_loss(networks_of(plain), prepared, 0).total.requires_grad
    cls = make_task(monkeypatch, interpolated=0.0)
    assert "wrong" in cls.d_loss(networks_of(cls), cls.prepare(batch(), networks_of(cls), 0), 0).parts


def test_each_loss_reaches_only_its_network(monkeypatch):
    task = make_task(monkeypatch)
    networks = networks_of(task)
    prepared = task.prepare(batch(), networks, 0)
    generator, discriminator = networks["generator"], networks["discriminator"]
    task.d_loss(networks, prepared, 0).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad is not None for parameter in discriminator.parameters())
    discriminator.requires_grad_(False)
    task.g_loss(networks, prepared, 0).total.backward()
    assert generator.text[0].weight.grad.abs().sum() > 0          # its own projection learns, phi(t) does not
    assert not prepared["text"].sentence.requires_grad


# -- style

def style_model() -> StyleTransfer:
    torch.manual_seed(0)
    return StyleTransfer(StyleConfig(generator=SMALL, width=4))


def test_the_style_is_as_long_as_the_noise_and_paints_with_another_caption():
    model = style_model().eval()
    image = torch.randn(2, 3, 64, 64)
    assert model(image).shape == (2, 5)
    text = Text(torch.randn(2, 7), torch.zeros(2, 2, 3), torch.ones(2, 3, dtype=torch.bool))
    painted, _ = model.paint({}, text, source=image)
    assert torch.equal(painted, model.generator({"z": model(image)}, text.sentence))


def test_the_inverted_generator_neither_learns_nor_leaves_evaluation_mode():
    model = style_model().train()
    assert not any(module.training for module in model.generator.modules())
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is None for parameter in model.generator.parameters())
    assert all(parameter.grad is not None for parameter in model.style.parameters())


def style_figures(rank: int, world_size: int) -> dict[str, float]:
    """Of a rank's share of 61 pictures in two batches, whose objects' places are known."""
    generator = torch.Generator().manual_seed(5)
    whole = {"image": torch.randint(0, 256, (61, 3, 64, 64), dtype=torch.uint8, generator=generator),
             "meta": [{"objects": [{"center": place}]} for place in torch.rand(61, 2, generator=generator).tolist()]}
    batches = [{name: values[part][rank::world_size] for name, values in whole.items()}
               for part in (slice(0, 40), slice(40, 61))]
    networks = SimpleNamespace(bare=lambda name: style_model().eval(), world_size=world_size)
    task = SimpleNamespace(config=SimpleNamespace(clusters=5), encode=lambda networks, batch: Text(
        batch["image"].float().mean(dim=(2, 3)), torch.zeros(1), torch.zeros(1)))
    return {name: figure.value for name, figure in StyleTask.validate(task, networks, batches).items()}


def test_styles_are_told_apart_among_all_pictures_whatever_the_processes(monkeypatch):
    """Rank 1's rows are what it hands to the gathering; rank 0 gets them in turn with its own."""
    expected, others = style_figures(0, 1), []
    assert expected.keys() == {f"{kind}_auc/{what}" for kind in ("style", "caption") for what in ("background", "pose")}

    def hand_in(rows: torch.Tensor, world_size: int) -> torch.Tensor:
        others.append(rows)
        return rows

    def in_turn(rows: torch.Tensor, world_size: int) -> torch.Tensor:
        whole = rows.new_empty(len(rows) + len(others[0]), *rows.shape[1:])
        whole[0::world_size], whole[1::world_size] = rows, others.pop(0)
        return whole

    monkeypatch.setattr(gan_int_cls, "of_everyone", hand_in)
    assert style_figures(1, 2) != pytest.approx(expected)          # a share's own clusters and pairs
    monkeypatch.setattr(gan_int_cls, "of_everyone", in_turn)
    assert style_figures(0, 2) == pytest.approx(expected)


def test_area_under_the_curve_is_the_share_of_pairs_in_the_right_order():
    torch.manual_seed(1)
    vectors, clusters = torch.randn(12, 3), np.array([0, 0, 1, 1, 2, 2, 0, 1, 2, 0, 1, 2])
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    pairs = [(float(unit[i] @ unit[j]), clusters[i] == clusters[j]) for i in range(12) for j in range(i)]
    same = [score for score, alike in pairs if alike]
    different = [score for score, alike in pairs if not alike]
    expected = sum(a > b for a in same for b in different) / (len(same) * len(different))
    assert same_cluster_auc(vectors, clusters) == pytest.approx(expected, abs=1e-9)


def test_area_under_the_curve_at_its_ends():
    clusters = np.array([0, 0, 1, 1])
    told = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    assert same_cluster_auc(told, clusters) == 1
    assert same_cluster_auc(torch.ones(4, 2), clusters) == 0.5
    assert math.isnan(same_cluster_auc(told, np.zeros(4)))


def test_clusters_of_separate_points_are_found():
    points = np.concatenate([np.random.default_rng(0).normal(place, 0.01, (20, 2)) for place in (0, 5, 10)])
    labels = clustered(points, 3)
    assert [len(set(labels[start:start + 20].tolist())) for start in (0, 20, 40)] == [1, 1, 1]
    assert len(set(labels.tolist())) == 3


def test_what_the_evaluation_reads_off_a_picture():
    image = torch.zeros(1, 3, 8, 8)
    image[:, 0] = 0.5
    image[:, :, 2:6, 2:6] = 1
    torch.testing.assert_close(border_colour(image), torch.tensor([[0.5, 0.0, 0.0]]))
    assert first_place({"objects": [{"center": [0.25, 0.5]}]}) == [0.25, 0.5]
    assert first_place({}) is None and first_place(None) is None
