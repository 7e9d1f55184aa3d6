"""Frozen features of pictures: their places in VGG-16, their weights, and those of a network that was trained here."""

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from dalle.errors import UserError
from gans.perceptual import VGG_LAYERS, SmallFeatures, load_features
from gans.trunks import SmallTrunk


@pytest.mark.parametrize(("layer", "channels", "halvings"), [
    ("relu1_2", 64, 0), ("relu2_2", 128, 1), ("relu3_3", 256, 2), ("relu4_3", 512, 3), ("relu5_3", 512, 4)])
def test_each_layer_is_where_its_name_says(layer, channels, halvings):
    features = load_features(f"vgg16_{layer}:random")
    found = features(torch.rand(2, 3, 32, 64) * 2 - 1)
    assert found.shape == (2, channels, 32 >> halvings, 64 >> halvings) and (found >= 0).all()
    assert sum(parameter.requires_grad for parameter in features.parameters()) == 0 and not features.training


def test_weights_of_a_file_are_those_of_the_whole_network(tmp_path, seeded):
    whole = torchvision.models.vgg16(init_weights=False).eval()
    save_file(whole.state_dict(), tmp_path / "vgg.safetensors")
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    plain = load_features(f"vgg16_relu2_2:{tmp_path}/vgg.safetensors", normalise=False)
    torch.testing.assert_close(plain(image), whole.features[:VGG_LAYERS["relu2_2"]](image))
    normed = load_features(f"vgg16_relu2_2:{tmp_path}/vgg.safetensors")
    assert not torch.allclose(plain(image), normed(image))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(normed(image), plain(((image + 1) / 2 - mean) / std))


def test_the_small_trunk_lends_what_it_sees_first(seeded):
    trunk = SmallTrunk(4)
    features = SmallFeatures(trunk)
    image = (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    found = features(image)
    assert found.shape == (2, 8, 16, 16)
    found.square().mean().backward()
    assert image.grad.abs().sum() > 0


def test_unknown_features_are_refused_in_one_line():
    with pytest.raises(UserError, match="unknown features 'vgg16_relu9_9'"):
        load_features("vgg16_relu9_9")
    with pytest.raises(UserError, match="could not be had"):
        load_features("vgg16_relu2_2:nowhere.safetensors")
