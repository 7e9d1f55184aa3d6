"""CLIP behind its door: captions, pictures, the bounded scale, exact losses over processes, foreign weights."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import distributed

from dalle.models.clip import (
    MAX_LOG_SCALE,
    BoundedLogScale,
    ClipConfig,
    ClipModel,
    contrastive_loss,
    fit_to_square,
    load_open_clip,
    load_open_clip_folder,
)

ROOT = Path(__file__).resolve().parents[2]
VISION = {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
TEXT = {"layers": 1, "width": 16, "heads": 2}


def tiny_config(**changes) -> ClipConfig:
    values = {"vision": VISION, "text": TEXT, "embed_dim": 8, "text_length": 4, "num_text_tokens": 10}
    return ClipConfig(**{**values, **changes})


def tiny_model(seed: int = 0, **changes) -> ClipModel:
    torch.manual_seed(seed)
    return ClipModel(tiny_config(**changes)).eval()


def pictures(count: int, size: int = 16, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def test_captions_are_wrapped_by_start_and_end():
    wrapped = tiny_model().wrap_captions(torch.tensor([[3, 5, 0, 0], [1, 2, 3, 4], [0, 0, 0, 0]]))
    assert wrapped.tolist() == [[10, 3, 5, 11, 0, 0], [10, 1, 2, 3, 4, 11], [10, 11, 0, 0, 0, 0]]


def test_a_long_caption_keeps_its_head_and_its_end_token():
    assert tiny_model().wrap_captions(torch.tensor([[1, 2, 3, 4, 5, 6]])).tolist() == [[10, 1, 2, 3, 4, 11]]


def test_a_shorter_text_tensor_gives_the_same_features():
    model = tiny_model()
    torch.testing.assert_close(model.encode_text(torch.tensor([[3, 5]])),
                               model.encode_text(torch.tensor([[3, 5, 0, 0]])))


def test_features_are_normalised_and_scale_starts_as_in_the_paper():
    output = tiny_model()(pictures(3), torch.tensor([[1, 2, 0, 0]] * 3))
    torch.testing.assert_close(output.image_features.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(output.text_features.norm(dim=1), torch.ones(3))
    assert output.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    assert output.logit_bias is None


def test_siglip_starts_with_scale_ten_and_bias_minus_ten():
    output = tiny_model(siglip=True)(pictures(2), torch.tensor([[1, 2, 0, 0]] * 2))
    assert output.logit_scale.item() == pytest.approx(10)
    assert output.logit_bias.item() == -10


def test_bytes_and_floats_are_the_same_picture():
    model, images = tiny_model(), pictures(2)
    torch.testing.assert_close(model.encode_image(images), model.encode_image(images.float() / 255))


def test_normalisation_happens_inside():
    """A picture of the channel means is zero to the tower."""
    model = tiny_model()
    seen = []
    model.towers.visual.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.encode_image(torch.tensor(model.config.image_mean).view(1, 3, 1, 1).expand(1, 3, 16, 16))
    assert seen[0].abs().max() < 1e-6


def test_other_sizes_are_resized_and_cropped_at_the_centre():
    image = torch.zeros(1, 3, 32, 64)
    image[..., 16:48] = 1.0                      # the middle square of a picture twice as wide as high
    fitted = fit_to_square(image, 16)
    assert fitted.shape == (1, 3, 16, 16)
    assert fitted[..., 2:-2].min() > 0.99
    assert tiny_model().encode_image(pictures(2, size=40)).shape == (2, 8)


def test_a_scale_beyond_the_bound_is_clamped_but_may_return():
    log_scale = torch.tensor(MAX_LOG_SCALE + 1, requires_grad=True)
    value = BoundedLogScale.apply(log_scale).exp()
    assert float(value.detach()) == pytest.approx(100, rel=1e-5)
    (-value).backward()                          # descending would raise the scale further: dropped
    assert log_scale.grad == 0
    log_scale.grad = None
    BoundedLogScale.apply(log_scale).backward()  # descending would lower it: passed on
    assert log_scale.grad == 1


def test_inside_the_bound_the_gradient_is_untouched():
    log_scale = torch.tensor(1.0, requires_grad=True)
    (3 * BoundedLogScale.apply(log_scale)).backward()
    assert log_scale.grad == 3


def test_clip_loss_is_the_symmetric_cross_entropy():
    image = torch.nn.functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=1)
    text = torch.nn.functional.normalize(torch.randn(4, 8, dtype=torch.float64), dim=1)
    scale, expected = 5.0, 0.0
    for row in range(4):
        by_image = [math.exp(scale * float(image[row] @ text[other])) for other in range(4)]
        by_text = [math.exp(scale * float(image[other] @ text[row])) for other in range(4)]
        expected -= math.log(by_image[row] / sum(by_image)) + math.log(by_text[row] / sum(by_text))
    loss = contrastive_loss("clip", 0, 1)(image, text, torch.tensor(scale, dtype=torch.float64), None)
    assert float(loss) == pytest.approx(expected / 8)


def test_siglip_loss_is_equation_one():
    image = torch.nn.functional.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1)
    text = torch.nn.functional.normalize(torch.randn(3, 8, dtype=torch.float64), dim=1)
    expected = 0.0
    for row in range(3):
        for column in range(3):
            sign = 1 if row == column else -1
            logit = 10 * float(image[row] @ text[column]) - 10
            expected += math.log(1 + math.exp(-sign * logit))
    loss = contrastive_loss("siglip", 0, 1)(image, text, torch.tensor(10.0), torch.tensor(-10.0))
    assert float(loss) == pytest.approx(expected / 3)


def gradients(model: ClipModel, kind: str, images, text, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    loss = contrastive_loss(kind, rank, world_size)(*model(images, text))
    loss.backward()
    return {"loss": loss.detach(), **{name: parameter.grad for name, parameter in model.named_parameters()}}


def data_parallel_worker(kind: str, folder: str, rank: int, world_size: int = 2) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    model = tiny_model(siglip=kind == "siglip").double()
    share = slice(3 * rank, 3 * rank + 3)
    images, text = pictures(6), torch.arange(24).reshape(6, 4) % 9 + 1
    found = gradients(model, kind, images[share], text[share], rank, world_size)
    for tensor in found.values():                # what data parallelism does: the mean over the processes
        distributed.all_reduce(tensor)
        tensor /= world_size
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    distributed.destroy_process_group()
    os._exit(0)     # as `Engine.leave` does


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_two_processes_have_the_gradient_of_one(kind, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, kind, str(tmp_path)]
    workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    model = tiny_model(siglip=kind == "siglip").double()
    expected = gradients(model, kind, pictures(6), torch.arange(24).reshape(6, 4) % 9 + 1, 0, 1)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def test_training_flops_of_the_matrix_products():
    """Two per weight and token in the linear layers and the patches, two d a pair of tokens for scores and for sums."""
    width, image_tokens, text_tokens = 16, 5, 6
    block = 12 * width * width                       # query, key, value, out and a feed-forward of four times the width
    image = 2 * (4 * 3 * 8 * 8 * width + image_tokens * block + 2 * image_tokens**2 * width + width * 8)
    text = 2 * (text_tokens * block + 2 * text_tokens**2 * width + width * 8)
    assert tiny_model().training_flops() == 3 * (image + text)


def test_saved_and_loaded_model_gives_the_same_features(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = ClipModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.encode_image(pictures(2)), model.encode_image(pictures(2)), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-B-16-SigLIP", "convnext_base"])
def test_any_open_clip_architecture_takes_our_captions(name):
    with torch.device("meta"):
        model = ClipModel(ClipConfig(architecture=name, text_length=30, num_text_tokens=1000))
    embedding = next(parameter for key, parameter in model.named_parameters() if "token_embedding" in key)
    assert embedding.shape[0] == 1002


@pytest.mark.parametrize(("changes", "words"), [
    ({"architecture": "ViT-B-32"}, "leave out"),
    ({"architecture": "ViT-B-33", "vision": None, "text": None}, "ViT-B-32"),
    ({"vision": None}, "either `architecture`"),
    ({"vision": {**VISION, "patchsize": 8}}, "patch_size"),
    ({"text": {**TEXT, "vocab_size": 8}}, "num_text_tokens"),
])
def test_an_impossible_config_says_why(changes, words):
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)


def test_an_architecture_with_its_own_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocabulary of its own"):
        ClipModel(ClipConfig(architecture="roberta-ViT-B-32", text_length=30, num_text_tokens=1000))


TINY_OPEN_CLIP = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}


@pytest.fixture
def tiny_architecture(tmp_path):
    """A small model config under a name of its own, known to open_clip while the test runs."""
    file = tmp_path / "configs" / "tessera-test-tiny.json"
    file.parent.mkdir()
    file.write_text(json.dumps(TINY_OPEN_CLIP))
    open_clip.add_model_config(file)
    yield "tessera-test-tiny"
    open_clip.factory._MODEL_CONFIG_PATHS.remove(file)
    open_clip.factory._MODEL_CONFIGS.pop("tessera-test-tiny")


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_open_clip_weights_from_a_file(tiny_architecture, tmp_path, suffix):
    torch.manual_seed(0)
    original = open_clip.create_model(tiny_architecture)
    path = tmp_path / f"weights.{suffix}"
    state = {name: tensor.contiguous() for name, tensor in original.state_dict().items()}
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)

    scorer = load_open_clip(tiny_architecture, str(path))
    tokens = open_clip.get_tokenizer(tiny_architecture)(["a red star"])
    expected = torch.nn.functional.normalize(original.eval().encode_text(tokens), dim=-1)
    torch.testing.assert_close(scorer.encode_captions(["a red star"]), expected.detach())
    assert scorer.encode_image(pictures(2, size=50)).shape == (2, 8)


def test_open_clip_weights_from_a_local_hub_folder(tmp_path):
    torch.manual_seed(0)
    original = open_clip.CLIP(**TINY_OPEN_CLIP)
    config = {"model_cfg": TINY_OPEN_CLIP, "preprocess_cfg": {"mean": [0, 0, 0], "std": [1, 1, 1]}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(original.state_dict(), tmp_path / "open_clip_model.safetensors")

    scorer = load_open_clip_folder(tmp_path)
    black = torch.zeros(1, 3, 32, 32)                # mean 0 and std 1: the folder's own preprocessing was used
    expected = torch.nn.functional.normalize(original.eval().encode_image(black), dim=-1).detach()
    torch.testing.assert_close(scorer.encode_image(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), expected)


def test_unknown_or_missing_open_clip_weights(tiny_architecture, tmp_path):
    with pytest.raises(ValueError, match="nearest: ViT-B-32"):
        load_open_clip("ViT-B-32x", "laion2b_s34b_b79k")
    with pytest.raises(ValueError, match="laion2b_s34b_b79k"):
        load_open_clip("ViT-B-32", "laion3b")
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_open_clip(tiny_architecture, str(tmp_path / "none.pt"))
    with pytest.raises(ValueError, match="open_clip_config.json"):
        load_open_clip_folder(tmp_path)


if __name__ == "__main__":
    data_parallel_worker(sys.argv[1], sys.argv[2], int(sys.argv[3]))


@pytest.mark.parametrize(("tower", "change", "message"), [
    ("vision", {"layers": 0}, "vision.layers is 0; it is above 0"),
    ("vision", {"layers": (1, 1, -1, 1)}, "vision.layers is -1"),
    ("vision", {"width": "wide"}, "vision.width: Input should be a valid integer"),
    ("vision", {"patch_dropout": 1.0}, "vision.patch_dropout is 1.0; it is from 0 on and below 1"),
    ("vision", {"width": 20}, "vision.width 20 is not a multiple of vision.head_width 8"),
    ("vision", {"patch_size": 32}, "vision.patch_size 32 is more than the picture's side, 16"),
    ("text", {"layers": -1}, "text.layers is -1"),
    ("text", {"heads": 3}, "text.width 16 is not a multiple of text.heads 3"),
    ("text", {"mlp_ratio": float("nan")}, "text.mlp_ratio is nan"),
])
def test_towers_of_no_size_are_refused(tower, change, message):
    towers = {"vision": VISION, "text": TEXT}
    with pytest.raises(ValueError, match=message):
        tiny_config(**{tower: {**towers[tower], **change}})
