"""The style encoder: what it inverts and leaves alone, and how well its styles are told apart."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from published import Published

from gans import style
from gans.gan_int_cls import GANINTCLSConfig
from gans.style import StyleConfig, StyleTask, StyleTransfer, border_colour, clustered, first_place, same_cluster_auc
from gans.text import Text

PUBLISHED = {"style": Published(paintings=1, finished="generator", compares=False)}

SMALL = GANINTCLSConfig(width=4, text_dim=6, noise_dim=5, sentence_dim=7)


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

    monkeypatch.setattr(style, "of_everyone", hand_in)
    assert style_figures(1, 2) != pytest.approx(expected)          # a share's own clusters and pairs
    monkeypatch.setattr(style, "of_everyone", in_turn)
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
