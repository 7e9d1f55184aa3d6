"""Image trunks: sizes, what they make of a picture against torchvision's own forward, and what is refused."""

import pytest
import torch
import torchvision
from torch.nn import functional as F

from dalle.errors import UserError
from gans.trunks import SmallTrunk, build_trunk, coordinates, resized


def pictures(count: int = 2, size: int = 64) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(("spec", "size"), [("small:2", 64), ("small:3", 40), ("inception_v3:random", 64),
                                            ("googlenet:random", 64)])
def test_features_have_the_sizes_that_the_trunk_says(spec, size):
    trunk = build_trunk(spec).eval()
    images = pictures(1, size).requires_grad_()
    local, pooled = trunk(images)
    side = {"small": 8, "inception_v3": 17, "googlenet": 14}[spec.partition(":")[0]]
    assert local.shape == (1, trunk.local_dim, side, side) and pooled.shape == (1, trunk.pooled_dim)
    assert trunk.trained == spec.startswith("small")
    assert all(parameter.requires_grad == trunk.trained for parameter in trunk.parameters())
    (local.square().mean() + pooled.square().mean()).backward()
    assert images.grad.abs().sum() > 0                       # a generator may learn through it


def test_the_small_trunk_sees_one_picture_at_a_time_and_where_things_are():
    torch.manual_seed(0)
    trunk = SmallTrunk(4)
    images = pictures(3)
    torch.testing.assert_close(trunk(images)[1][1:2], trunk(images[1:2])[1])
    left, right = -torch.ones(2, 1, 3, 64, 64)
    left[..., 24:40, 8:24], right[..., 24:40, 40:56] = 1, 1
    assert (trunk(left)[1] - trunk(right)[1]).abs().max() > 0.05


def test_coordinates_rise_to_the_right_and_downwards():
    found = coordinates(torch.zeros(2, 3, 2, 3))
    assert found[1].tolist() == [[[-1, 0, 1], [-1, 0, 1]], [[-1, -1, -1], [1, 1, 1]]]


def test_narrow_pictures_are_resized_as_single_ones():
    images = torch.rand(1, 3, 16, 16).bfloat16()
    found = resized(images, 24, antialias=True)
    assert torch.equal(found, resized(images.float(), 24, antialias=True)) and found.dtype == torch.float32


def test_inception_is_torchvisions_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.inception_v3(init_weights=False, transform_input=False)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    trunk = build_trunk(f"inception_v3:{tmp_path / 'weights.pth'}").eval()
    assert sum(parameter.numel() for parameter in trunk.parameters()) == 21_785_568
    kept = {}
    whole.eval().Mixed_6e.register_forward_hook(lambda module, inputs, output: kept.update(local=output))
    whole.fc = torch.nn.Identity()
    images = pictures(1)
    with torch.no_grad():
        local, pooled = trunk(images)
        expected = whole(F.interpolate(images, (299, 299), mode="bilinear", align_corners=True))
    torch.testing.assert_close(local, kept["local"])
    torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-4)


def test_googlenet_is_torchvisions_without_its_classifier(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.googlenet(init_weights=False, transform_input=False)
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    trunk = build_trunk(f"googlenet:{tmp_path / 'weights.pth'}").eval()
    whole.eval().fc = torch.nn.Identity()
    images = pictures(1, 224)
    with torch.no_grad():
        torch.testing.assert_close(trunk(images)[1], whole(images), atol=1e-5, rtol=1e-4)


def test_vgg_gives_fc7_of_normalised_pictures():
    trunk = build_trunk("vgg16:random").eval()
    kinds = [type(layer).__name__ for layer in trunk.network.classifier]
    assert kinds == ["Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout"]
    images = pictures(1, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = ((images / 2 + 0.5) - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        local, pooled = trunk(images)
        torch.testing.assert_close(pooled, trunk.network(normalised))
    assert local.shape == (1, 512, 14, 14) and pooled.shape == (1, 4096)


def test_resnet_gives_the_pool_of_normalised_pictures(tmp_path):
    torch.manual_seed(0)
    whole = torchvision.models.resnet152()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    trunk = build_trunk(f"resnet152:{tmp_path / 'weights.pth'}").eval()
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    whole.eval().fc = torch.nn.Identity()
    images = pictures(1, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        local, pooled = trunk(images)
        torch.testing.assert_close(pooled, whole((images / 2 + 0.5 - mean[:, None, None]) / std[:, None, None]))
    assert local.shape == (1, 2048, 7, 7) and pooled.shape == (1, 2048)


@pytest.mark.parametrize("spec", ["resnet", "small:wide", "small:0", "", "inception"])
def test_unknown_trunks_are_refused_in_one_line(spec):
    with pytest.raises(UserError, match="trunk") as caught:
        build_trunk(spec)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_had_are_refused_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"weights\.pth.*googlenet:FILE") as caught:
        build_trunk(f"googlenet:{tmp_path / 'weights.pth'}")
    assert "\n" not in str(caught.value)

    def offline(name: str):
        raise OSError("no network\nat all")

    monkeypatch.setattr("gans.trunks.hub_state", offline)
    with pytest.raises(UserError, match="googlenet could not be had .no network.; without") as caught:
        build_trunk("googlenet")
    assert "\n" not in str(caught.value)
