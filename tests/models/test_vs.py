"""The VS model: the paper's size and start, the ranking loss against a loop, and the Inception that feeds it."""

import math

import pytest
import timm
import torch
from safetensors.torch import save_file

from dalle.models.vs import (
    InceptionResNetConfig,
    InceptionResNetFeatures,
    VSConfig,
    VSModel,
    linear_map,
    vs_ranking_loss,
)


def test_the_papers_sizes_have_the_papers_parameters():
    assert VSModel(VSConfig()).num_parameters == 1_311_744


def test_the_maps_start_as_the_papers():
    torch.manual_seed(0)
    layer = linear_map(600, 400).requires_grad_(False)
    assert float(layer.weight.std()) == pytest.approx(math.sqrt(6 / 1000), rel=0.01)
    assert float(layer.weight.abs().max()) > 2 * math.sqrt(6 / 1000)      # normal, not uniform up to that bound
    assert not layer.bias.any()


def test_each_output_is_a_map_of_its_own_onto_the_sphere():
    model = VSModel(VSConfig(image_dim=6, text_dim=4, embed_dim=3))
    images, texts = torch.randn(5, 6), torch.randn(5, 4)
    seen, said = model(images, texts)
    torch.testing.assert_close(seen.norm(dim=1), torch.ones(5))
    expected = texts @ model.text.weight.T + model.text.bias
    torch.testing.assert_close(said, expected / expected.norm(dim=1, keepdim=True))


def test_the_loss_agrees_with_a_loop_written_out():
    similarity = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    expected = 0.0
    for i in range(5):
        for j in range(5):
            if i != j:
                expected += max(0.0, 0.2 - float(similarity[i, i]) + float(similarity[i, j]))
                expected += max(0.0, 0.2 - float(similarity[j, j]) + float(similarity[i, j]))
    assert float(vs_ranking_loss(similarity)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("margin", [0.2, 0.5])
def test_identical_embeddings_cost_the_margin_for_every_pair(margin):
    batch = 7
    same = torch.nn.functional.normalize(torch.ones(batch, 3), dim=1)
    assert float(vs_ranking_loss(same @ same.T, margin)) == pytest.approx(2 * batch * (batch - 1) * margin)


def test_the_diagonal_costs_nothing():
    assert vs_ranking_loss(torch.tensor([[-1.0]])) == 0
    assert vs_ranking_loss(2 * torch.eye(4) - 1) == 0                     # pairs at 1, all others at -1
    similarity = torch.tensor([[0.5, 0.4], [0.1, 0.7]], requires_grad=True)
    loss = vs_ranking_loss(similarity)      # only picture 0 has another caption within the margin: 0.2 - 0.5 + 0.4
    loss.backward()
    assert loss.item() == pytest.approx(0.1)
    torch.testing.assert_close(similarity.grad, torch.tensor([[-1.0, 1.0], [0.0, 0.0]]))


def test_only_square_matrices_are_ranked():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        vs_ranking_loss(torch.zeros(2, 3))


def test_inception_features_are_timms_before_its_classifier(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("inception_resnet_v2", num_classes=7).eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    model = InceptionResNetFeatures.load(tmp_path / "weights.safetensors", image_size=139)
    images = torch.randint(0, 256, (1, 3, 139, 139), dtype=torch.uint8)
    with torch.no_grad():
        found = model.encode_image(images)
        maps = network.forward_features(images / 127.5 - 1)
    assert maps.shape == (1, 1536, 3, 3) and found.shape == (1, InceptionResNetFeatures.dim)
    torch.testing.assert_close(found, maps.mean(dim=(2, 3)), atol=1e-5, rtol=1e-4)
    assert InceptionResNetConfig().image_size == 299
