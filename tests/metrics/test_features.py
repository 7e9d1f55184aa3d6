import json
import pickle
from pathlib import Path

import open_clip
import pytest
import torch
import torch_fidelity
from safetensors.torch import save_file
from torch.utils.data import Dataset
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from dalle.errors import UserError
from dalle.metrics.distributions import Moments, frechet_distance, inception_score, kernel_distance
from dalle.metrics.features import load_extractor, metric_name
from dalle.models.clip import ClipConfig, ClipModel
from dalle.models.inception import resize_like_tensorflow, tensorflow_inception

TINY_OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 64, "width": 8, "heads": 2, "layers": 1},
}


def pictures(count: int, height: int = 24, width: int = 24, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(count, 3, 4, 4, generator=generator)
    pixels = torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic")
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def with_useful_scale(network: torch.nn.Module) -> torch.nn.Module:
    """Random weights whose activations neither die out nor grow over 48 convolutions."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.2)
            torch.nn.init.normal_(module.bias)
    return network


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory) -> Path:
    """A file by the names and shapes of the published one, with random weights."""
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(with_useful_scale(tensorflow_inception()).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def inception(inception_file):
    return load_extractor(f"inception:{inception_file}")


# --------------------------------------------------------------------------------------------------- TensorFlow's

@pytest.mark.parametrize("height, width", [(24, 40), (299, 299), (310, 7)])
def test_the_resize_is_tensorflows(height, width):
    images = pictures(2, height, width).float()
    theirs = interpolate_bilinear_2d_like_tensorflow1x(images, (299, 299), align_corners=False)
    torch.testing.assert_close(resize_like_tensorflow(images), theirs, rtol=0, atol=1e-4)


def test_the_resize_by_hand():
    row = torch.tensor([0.0, 30.0, 60.0]).view(1, 1, 1, 3).expand(1, 1, 3, 3)
    assert resize_like_tensorflow(row, 4)[0, 0, 0].tolist() == pytest.approx([0, 22.5, 45, 60])


class Pictures(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


@pytest.mark.parametrize("layer", ["logits_unbiased", pytest.param("2048", marks=pytest.mark.slow)])
def test_fid_kid_and_is_are_torch_fidelitys_on_the_same_pictures_and_weights(inception, inception_file, layer):
    """Their roots of a 2048 x 2048 product take long: the quick case measures over the 1008 class scores instead."""
    generated, reference = pictures(4, 32, 32, seed=1), pictures(4, 32, 32, seed=2) // 2
    theirs = torch_fidelity.calculate_metrics(
        input1=Pictures(generated), input2=Pictures(reference), fid=True, kid=True, isc=True, cuda=False, cache=False,
        verbose=False, batch_size=4, feature_extractor_weights_path=str(inception_file), feature_layer_fid=layer,
        kid_subsets=4, kid_subset_size=3, isc_splits=2, save_cpu_ram=True)
    features, logits = inception(generated)
    reference_features, reference_logits = inception(reference)

    rows = (reference_features, features) if layer == "2048" else (reference_logits, logits)
    fid = frechet_distance(*map(Moments.of, rows), allow_few=True)
    assert fid == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    kid = kernel_distance(reference_features, features, subsets=4, size=3)
    assert kid == pytest.approx((theirs["kernel_inception_distance_mean"], theirs["kernel_inception_distance_std"]),
                                rel=1e-3)
    score = inception_score(logits, splits=2)
    assert score == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]), rel=1e-3)
    assert fid > 1 and kid[0] > 1e-3 and score[0] > 1.01      # weights that make all equal would prove nothing


def test_features_and_scores_are_those_of_torch_fidelitys_network(inception, inception_file):
    network = FeatureExtractorInceptionV3("reference", ["2048", "logits_unbiased"], str(inception_file))
    images = pictures(2, 40, 28)
    expected_features, expected_logits = network(images)
    features, logits = inception(images)
    torch.testing.assert_close(features, expected_features, rtol=1e-4, atol=1e-4 * float(expected_features.max()))
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4 * float(expected_logits.abs().max()))
    assert (inception.dim, inception.classes) == (2048, 1008) == (features.shape[1], logits.shape[1])
    assert metric_name("fid", inception) == "fid-inception-pytorch-fid"


# -------------------------------------------------------------------------------------------------- torchvision's

def test_torchvisions_inception_with_its_auxiliary_head_in_the_file(tmp_path):
    from torchvision.models import Inception3
    from torchvision.transforms.v2.functional import resize

    whole = with_useful_scale(Inception3(init_weights=False, transform_input=True)).eval()
    torch.save(whole.state_dict(), tmp_path / "weights.pth")
    extractor = load_extractor(f"inception-torchvision:{tmp_path}/weights.pth")
    images = pictures(2, 320, 310)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (resize(images.float() / 255, [299, 299], antialias=True) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        expected = whole(pixels)
    features, logits = extractor(images)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    assert features.shape == (2, 2048) and extractor.classes == 1000
    assert "antialias" in extractor.resize and extractor.name == "inception-torchvision"


# ------------------------------------------------------------------------------------------------------ open_clip

@pytest.fixture
def tiny_architecture(tmp_path):
    file = tmp_path / "configs" / "tessera-features-tiny.json"
    file.parent.mkdir()
    file.write_text(json.dumps(TINY_OPEN_CLIP))
    open_clip.add_model_config(file)
    yield "tessera-features-tiny"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(file)
    open_clip.factory._MODEL_CONFIGS.pop("tessera-features-tiny")


def test_an_open_clip_tower_from_a_file_gives_features_before_normalisation(tiny_architecture, tmp_path):
    torch.manual_seed(0)
    original = open_clip.CLIP(**TINY_OPEN_CLIP).eval()
    save_file(original.state_dict(), tmp_path / "mine.safetensors")
    extractor = load_extractor(f"open_clip:{tiny_architecture}/{tmp_path}/mine.safetensors")
    images = pictures(3, 32, 32)
    mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
    pixels = (images / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    features, logits = extractor(images)
    torch.testing.assert_close(features, original.encode_image(pixels).detach(), rtol=1e-4, atol=1e-5)
    assert logits is None and extractor.classes == 0 and extractor.dim == 8
    assert extractor.features(pictures(2, 50, 40)).shape == (2, 8)
    assert metric_name("kid", extractor) == "kid-open_clip:tessera-features-tiny/mine"
    assert extractor.resize.startswith("bicubic 32 (shortest)")


def test_an_open_clip_folder(tmp_path):
    config = {"model_cfg": TINY_OPEN_CLIP, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    digests = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_file(open_clip.CLIP(**TINY_OPEN_CLIP).state_dict(), folder / "open_clip_model.safetensors")
        extractor = load_extractor(f"open_clip:{folder}")
        digests.append(extractor.digest)
    assert extractor.name == "open_clip:mine" and extractor.dim == 8
    assert digests[0] == digests[1] != digests[2]


def test_weights_that_cannot_be_fetched_name_the_place_and_the_way_out(monkeypatch):
    def no_network(*arguments, **named):
        raise OSError("no route to host")

    monkeypatch.setattr(open_clip, "create_model", no_network)
    with pytest.raises(UserError, match="no route to host.*huggingface.co.*open_clip:ViT-B-32/FILE.*clip:RUN_OR_FOLDE"):
        load_extractor("open_clip:ViT-B-32/openai")


# ---------------------------------------------------------------------------------------------- a CLIP trained here

@pytest.fixture
def clip_run(tmp_path) -> Path:
    torch.manual_seed(0)
    config = ClipConfig(embed_dim=8, vision=TINY_OPEN_CLIP["vision_cfg"], text={"width": 8, "heads": 2, "layers": 1},
                        text_length=4, num_text_tokens=10)
    run = tmp_path / "runs" / "quickstart" / "clip"
    ClipModel(config).save_pretrained(run / "model")
    (run / "config.yaml").write_text("task: clip\nname: quickstart/clip\n")
    return run


def test_a_clip_trained_here_lends_the_metric_its_name(clip_run):
    extractor = load_extractor(f"clip:{clip_run}")
    assert metric_name("fid", extractor) == "fid-clip:quickstart"
    images = pictures(3, 40, 48)
    features, logits = extractor(images)
    torch.testing.assert_close(features, ClipModel.from_pretrained(clip_run / "model").encode_image(images).detach())
    torch.testing.assert_close(features.norm(dim=1), torch.ones(3))
    assert logits is None and extractor.dim == 8 and extractor.resize.startswith("bicubic 32")
    same = load_extractor(f"clip:{clip_run}/model")
    assert (same.name, same.digest) == (extractor.name, extractor.digest)


def test_an_exported_clip_without_a_run_is_called_by_its_folder(clip_run, tmp_path):
    (clip_run / "model").rename(tmp_path / "judge")
    assert load_extractor(f"clip:{tmp_path}/judge").name == "clip:judge"


def test_features_do_not_depend_on_how_pictures_are_batched(clip_run):
    extractor, images = load_extractor(f"clip:{clip_run}"), pictures(70, 32, 32)      # more than a batch
    whole = extractor.features(images)
    apart = torch.cat([extractor.features(part) for part in images.split(9)])
    torch.testing.assert_close(whole, apart, rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize("spec, words", [
    ("inception:/nowhere/w.pth", ["/nowhere/w.pth", "pt_inception-2015-12-05-6726825d.pth",
                                  "github.com/mseitzer/pytorch-fid/releases", "clip:RUN_OR_FOLDER"]),
    ("inception", ["none given", "inception:FILE"]),
    ("inception-torchvision:/nowhere/w.pth", ["inception_v3_google-0cc3c7bd.pth", "download.pytorch.org"]),
    ("open_clip:", ["open_clip:NAME/TAG"]),
    ("open_clip:ViT-B-33/openai", ["nearest: ViT-B-32"]),
    ("open_clip:ViT-B-32//nowhere/w.pt", ["no weights file /nowhere/w.pt"]),
    ("clip:/nowhere", ["/nowhere", "config.json"]),
    ("clip:", ["clip:RUN_OR_FOLDER"]),
    ("resnet:w.pth", ["known: inception:..., inception-torchvision:..., open_clip:..., clip:..."]),
])
def test_what_cannot_be_loaded_is_said_in_one_line(spec, words):
    with pytest.raises(UserError) as caught:
        load_extractor(spec)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_weights_files_that_are_not_what_they_should_be(tmp_path):
    class Program:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    (tmp_path / "program.pth").write_bytes(pickle.dumps({"state_dict": Program()}))
    torch.save({"conv.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("not weights")
    for name, words in (("program", "inception: .*program.pth"), ("other", "weights of another network"),
                        ("text", "neither a zip archive nor a pickle")):
        with pytest.raises(UserError, match=words):
            load_extractor(f"inception:{tmp_path}/{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_not_finite(clip_run):
    model = ClipModel.from_pretrained(clip_run / "model")
    model.towers.visual.conv1.weight.data[0] = torch.nan
    model.save_pretrained(clip_run / "model")
    with pytest.raises(UserError, match="clip:quickstart gave features that are not finite"):
        load_extractor(f"clip:{clip_run}")


def test_another_kind_of_model_is_refused(clip_run):
    description = json.loads((clip_run / "model" / "config.json").read_text())
    (clip_run / "model" / "config.json").write_text(json.dumps({**description, "model_type": "dvae"}))
    with pytest.raises(UserError, match="describes a 'dvae', not a 'clip'"):
        load_extractor(f"clip:{clip_run}")


@pytest.mark.parametrize("images", [torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8, dtype=torch.uint8),
                                    torch.zeros(0, 3, 8, 8, dtype=torch.uint8)])
def test_only_bytes_of_colour_pictures_are_taken(clip_run, images):
    with pytest.raises(ValueError, match=r"uint8 pictures \[N, 3, H, W\]"):
        load_extractor(f"clip:{clip_run}").features(images)
