"""The VS task: what moves, that it learns, what each process sees, what is exported, and what it refuses."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.metrics.vs import load_vs, mean_and_deviation, vs_similarity
from dalle.models.clip import ClipConfig, ClipModel
from dalle.store import model_folder
from dalle.tasks.vs import VSRun, VSTask
from dalle.training.optimizers import build_optimizer

TEXT_LENGTH = 12
CLIP = {"embed_dim": 16, "vision": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 4, "image_size": 16},
        "text": {"layers": 1, "width": 32, "heads": 2}}


@pytest.fixture(scope="module")
def clip(workshop, tmp_path_factory) -> Path:
    """The run folder of a CLIP with the workshop's tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vs") / "clip"
    tokenizer = CaptionTokenizer.load(workshop.folder / "data" / "tokenizer")
    config = ClipConfig(**CLIP, text_length=TEXT_LENGTH, num_text_tokens=tokenizer.vocab_size)
    ClipModel(config).save_pretrained(folder / "model")
    tokenizer.save(folder / "model" / "tokenizer")
    return folder


def settings(workshop, clip: Path, **changes) -> dict:
    data = workshop.folder / "data"
    return {
        "task": "vs", "name": "vs", "image_features": str(clip), "text_features": str(clip), "model": {"embed_dim": 8},
        "data": {"train": str(data / "train"), "validation": str(data / "validation"), "image_size": 16, "workers": 0,
                 "tokenizer": str(data / "tokenizer"), "text_length": TEXT_LENGTH},
        "train": {"steps": 4, "batch_size": 8, "precision": "bf16", "log_every": 1, "validate_every": 4,
                  "save_every": 2},
        **changes,
    }


def write(workshop, clip: Path, runs: Path) -> Path:
    runs.mkdir(parents=True, exist_ok=True)
    path = runs / "vs.yaml"
    path.write_text(yaml.safe_dump({**settings(workshop, clip), "output": str(runs)}))
    return path


class BareNetworks:
    """One process without an engine: every network as it is."""

    rank, world_size = 0, 1

    def __init__(self, task: VSTask):
        self.modules = {**{name: player.module for name, player in task.players.items()}, **task.frozen}

    def __getitem__(self, name):
        return self.modules[name]

    bare = __getitem__


def make_task(workshop, clip, **changes) -> VSTask:
    torch.manual_seed(0)
    return VSTask(VSRun(**settings(workshop, clip, **changes)))


def make_batch(count: int) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
            "text": torch.randint(1, 250, (count, TEXT_LENGTH), generator=generator)}


def test_it_learns_and_only_the_maps_move(workshop, clip):
    task = make_task(workshop, clip, model={"embed_dim": 16})
    networks, batch = BareNetworks(task), make_batch(64)
    frozen = {name: tensor.clone() for name, tensor in task.frozen["text"].state_dict().items()}
    optimizer = build_optimizer(task.players["vs"].module, task.config.optimizer.model_copy(update={"lr": 1e-2}))
    losses = []
    before = task.validate(networks, [batch])
    prepared = task.prepare(batch, networks, 0)
    for step in range(300):
        loss = task.rank(networks, prepared, step)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    after = task.validate(networks, [batch])
    assert losses[-1] < 0.5 * losses[0]
    assert after["similarity"].count == 64 and after["similarity"].value > before["similarity"].value
    assert after["recall@5_in_64"].value > before["recall@5_in_64"].value + 0.2
    assert all(torch.equal(frozen[name], tensor) for name, tensor in task.frozen["text"].state_dict().items())


def test_the_papers_optimiser_is_the_default(workshop, clip):
    optimizer = make_task(workshop, clip, optimizer={"ema": 0.5}).players["vs"].optimizer
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip) == (2e-4, (0.5, 0.999), 0, 0)
    assert optimizer.schedule == "constant"


@pytest.fixture(scope="module")
def straight(workshop, commands, clip, tmp_path_factory) -> Path:
    """The folder of a run of four steps in one go."""
    runs = tmp_path_factory.mktemp("straight")
    assert commands["train"](write(workshop, clip, runs)) == 0
    return runs / "vs"


def tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step_*"))[-1]
    return {f"{path.relative_to(newest)}:{name}": tensor for path in sorted(newest.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


def test_four_steps_equal_two_a_stop_and_two(straight, workshop, commands, clip, tmp_path):
    config = write(workshop, clip, tmp_path)
    assert commands["train"](config, "--stop-after", 2) == 0
    assert commands["train"](config) == 0
    expected, found = tensors(straight), tensors(tmp_path / "vs")
    assert expected.keys() == found.keys() and len(expected) > 4
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def prepare_on_rank(rank: int, task: VSTask, batch: dict) -> dict[str, torch.Tensor]:
    networks = BareNetworks(task)
    networks.rank, networks.world_size = rank, 2
    with torch.no_grad():
        return task.prepare({name: value[rank::2] for name, value in batch.items()}, networks, 0)


def test_every_process_sees_the_global_batch(workshop, clip, two_ranks):
    # with equal features each process has the one loss and gradient
    task, batch = make_task(workshop, clip), make_batch(8)
    with torch.no_grad():
        expected = task.prepare(batch, BareNetworks(task), 0)
    for found in two_ranks(prepare_on_rank, task, batch):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0)


def test_the_export_measures_the_similarity(straight, clip):
    scorer = load_vs(model_folder(straight))
    images, captions = make_batch(3)["image"], ["a red circle", "a blue square above a green star", "a red circle"]
    tower, tokenizer = ClipModel.from_pretrained(clip / "model"), CaptionTokenizer.load(clip / "model" / "tokenizer")
    expected = []
    for image, caption in zip(images, captions, strict=True):
        text = torch.from_numpy(tokenizer.encode(caption, TEXT_LENGTH))[None]
        seen, said = scorer.maps(tower.encode_image(image[None]), tower.encode_text(text))
        expected.append(float((seen @ said.T).detach()))
    mean = sum(expected) / 3
    deviation = (sum((value - mean) ** 2 for value in expected) / 3) ** 0.5
    assert vs_similarity(scorer, images, captions) == pytest.approx((mean, deviation), abs=1e-5)
    assert mean_and_deviation(scorer.cosines(images, captions)) == vs_similarity(scorer, images, captions)
    with pytest.raises(ValueError, match="3 pictures but 1 captions"):
        scorer.cosines(images, captions[:1])


def test_another_network_for_pictures_is_exported_beside_the_captions(workshop, clip, tmp_path):
    wide = ClipModel(ClipConfig(**{**CLIP, "embed_dim": 24}, text_length=2, num_text_tokens=300)).eval()
    wide.save_pretrained(tmp_path / "wide")
    task = make_task(workshop, clip, image_features=str(tmp_path / "wide"))
    prepared = task.prepare(batch := make_batch(2), BareNetworks(task), 0)
    assert prepared["image_features"].shape == (2, 24) and prepared["text_features"].shape == (2, 16)
    torch.testing.assert_close(prepared["image_features"], wide.encode_image(batch["image"]))
    task.export(str(tmp_path / "vs"), {"vs": task.players["vs"].module.state_dict()})
    scorer = load_vs(tmp_path / "vs")
    torch.testing.assert_close(scorer.image.encode_image(batch["image"]), prepared["image_features"])
    torch.testing.assert_close(scorer.text.encode_text(batch["text"]), prepared["text_features"])


@pytest.mark.parametrize(("changes", "words"), [
    ({"data": {"train": "x"}}, "data.tokenizer"),
    ({"data": {"train": "x", "tokenizer": "y", "images": False}}, "data.images"),
    ({"train": {"batch_size": 1}}, "train.batch_size"),
    ({"text_features": None}, "text_features"),
    ({"model": {"image_dim": 3}}, "image_dim"),
])
def test_impossible_configs(workshop, clip, changes, words):
    with pytest.raises(ValidationError, match=words):
        VSRun(**settings(workshop, clip, **changes))


def test_features_that_cannot_be_had_are_refused_in_one_line(workshop, clip, tmp_path):
    def refusal(**changes) -> str:
        with pytest.raises(UserError) as caught:
            make_task(workshop, clip, **changes)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    data = settings(workshop, clip)["data"]
    assert re.match("text_features: .*nowhere does not exist", refusal(text_features=str(tmp_path / "nowhere")))
    codec = str(workshop.folder / "runs" / "dvae")
    assert "image_features" in (message := refusal(image_features=codec)) and "'dvae' model, not a 'clip'" in message
    assert "set it to 12" in refusal(data={**data, "text_length": 5})
    CaptionTokenizer.train(["a red star"], vocab_size=270).save(tmp_path / "tokenizer")
    assert "is not the tokenizer of text_features" in refusal(
        data={**data, "tokenizer": str(tmp_path / "tokenizer")})
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    message = refusal(image_features=f"inception_resnet_v2:{tmp_path / 'weights.pth'}")
    assert "weights.pth" in message and "published at" in message


def test_a_folder_that_is_no_vs_model_is_refused(clip, tmp_path):
    with pytest.raises(UserError, match="'clip' model, not 'vs'"):
        load_vs(clip / "model")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        load_vs(tmp_path)
