"""The transformer's task: its loss by hand, what is filled in, what is refused, and what it writes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.files import file_digest
from dalle.models import dvae
from dalle.models.transformer import TextToImageTransformer
from dalle.store import load_generator
from dalle.tasks.transformer import TransformerModelConfig, TransformerRun, TransformerTask

CAPTIONS = ["a red circle", "a blue square", "a green star above a red ring", "two red circles"] * 5
TINY: dict[str, Any] = {"dim": 16, "depth": 2, "heads": 2, "token_shift": True}


@pytest.fixture(scope="module")
def companions(tmp_path_factory) -> dict[str, str]:
    """A saved codec (16 px, 4 x 4 codes of 16) in a run folder, and a saved tokenizer."""
    folder = tmp_path_factory.mktemp("companions")
    torch.manual_seed(0)
    codec = dvae.DiscreteVAE(dvae.PRESETS["tiny"])
    codec.save_pretrained(folder / "dvae" / "model")
    CaptionTokenizer.train(CAPTIONS, 300).save(folder / "tokenizer")
    return {"codec": str(folder / "dvae"), "tokenizer": str(folder / "tokenizer")}


def make_run(companions: dict[str, str], model: dict[str, Any] | None = None, **changes: Any) -> TransformerRun:
    data = {"train": "shards", "image_size": 16, "tokenizer": companions["tokenizer"], "text_length": 6,
            **changes.pop("data", {})}
    return TransformerRun(name="test", data=data, codec=companions["codec"],
                          model=TransformerModelConfig(**{**TINY, **(model or {})}), **changes)


class BareNetworks:
    """The engine's view of a task on one device."""

    rank, world_size = 0, 1

    def __init__(self, task: TransformerTask):
        self.modules = {name: player.module for name, player in task.players.items()} | dict(task.frozen)

    def __getitem__(self, name: str) -> torch.nn.Module:
        return self.modules[name]

    bare = penalty = __getitem__


def make_batch(task: TransformerTask, size: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    text = torch.stack([torch.from_numpy(task.tokenizer.encode(caption, 6)) for caption in CAPTIONS[:size]])
    return {"text": text, "image": torch.randint(0, 256, (size, 3, 16, 16), generator=generator, dtype=torch.uint8)}


def test_sizes_are_filled_in_from_codec_and_tokenizer(companions):
    task = TransformerTask(make_run(companions))
    config = task.players["transformer"].module.config
    grid = task.frozen["codec"].grid
    assert (config.grid, config.num_codes, config.text_length) == (grid, 16, 6)
    assert config.num_text_tokens == task.tokenizer.vocab_size
    assert task.tokens_per_sample == 6 + grid[0] * grid[1]
    assert task.flops_per_sample > 0
    assert not any(parameter.requires_grad for parameter in task.frozen["codec"].parameters())


@pytest.mark.parametrize(("model", "data", "message"), [
    ({"grid": (5, 5)}, {}, "codec whose grid does not fit the transformer.*model.grid is 5 x 5"),
    ({"num_codes": 512}, {}, "has 16 codes, model.num_codes is 512"),
    ({"num_text_tokens": 20}, {}, "a tokenizer larger than the model's vocabulary.*model.num_text_tokens is 20"),
    ({"text_length": 9}, {}, "data.text_length is 6, model.text_length is 9"),
    ({}, {"image_size": 32}, "takes pictures of 16 px, data.image_size is 32"),
])
def test_contradictions_are_named(companions, model, data, message):
    with pytest.raises(UserError, match=message):
        TransformerTask(make_run(companions, model, data=data))


def test_a_codec_that_is_not_there_is_a_user_error(companions, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        TransformerTask(make_run({**companions, "codec": str(tmp_path / "nothing")}))


def test_a_larger_vocabulary_than_the_tokenizers_is_kept(companions):
    task = TransformerTask(make_run(companions, {"num_text_tokens": 1000}))
    assert task.players["transformer"].module.config.num_text_tokens == 1000


def test_a_run_says_what_it_lacks(companions):
    with pytest.raises(ValidationError, match="set data.tokenizer"):
        make_run(companions, data={"tokenizer": None})
    with pytest.raises(ValidationError, match="set data.codes"):
        make_run(companions, data={"images": False})
    with pytest.raises(ValidationError, match="set data.validation_codes"):
        make_run(companions, data={"images": False, "codes": "codes", "validation": "shards"})


def test_cached_codes_of_another_codec_are_refused(companions, tmp_path):
    (tmp_path / "codes.json").write_text(json.dumps({"codec_digest": "of another", "num_codes": 16, "grid": [4, 4]}))
    with pytest.raises(UserError, match="made with another codec than"):
        TransformerTask(make_run(companions, data={"codes": str(tmp_path)}))
    digest = file_digest(Path(companions["codec"]) / "model" / "model.safetensors")
    (tmp_path / "codes.json").write_text(json.dumps({"codec_digest": digest, "num_codes": 16, "grid": [4, 4]}))
    TransformerTask(make_run(companions, data={"codes": str(tmp_path)}))


def test_a_preset_is_the_start_and_keys_beside_it_win():
    model = TransformerModelConfig(preset="12b-modern", depth=3)
    assert (model.dim, model.heads, model.depth, model.norm) == (3968, 62, 3, "rmsnorm")
    assert model.grid is None
    with pytest.raises(ValidationError, match="unknown preset 'huge'; known: debug, tiny"):
        TransformerModelConfig(preset="huge")


@pytest.mark.parametrize("layout", ["bos", "boi"])
@pytest.mark.parametrize("text_pads", [True, False])
def test_loss_is_the_weighted_sum_of_two_means(companions, layout, text_pads):
    task = TransformerTask(make_run(companions, {"layout": layout}, loss={"text_pads": text_pads}))
    networks, model = BareNetworks(task), task.players["transformer"].module
    batch = task.prepare(make_batch(task), networks, 0)
    loss = task.phases[0].loss(networks, batch, 0)

    text_logits, image_logits = model(batch["text"], batch["codes"])
    scored = slice(0, 6) if layout == "bos" else slice(1, 6)
    text_sum = 0.0
    for row, ids in enumerate(batch["text"]):
        for slot in range(scored.start, scored.stop):
            target = int(ids[slot]) or model.config.num_text_tokens + slot
            if ids[slot] or text_pads:
                text_sum -= text_logits[row, slot - scored.start].log_softmax(-1)[target].item()
    text_ce = text_sum / (3 * (scored.stop - scored.start))
    image_ce = F.cross_entropy(image_logits.transpose(1, 2), batch["codes"]).item()
    assert loss.total.item() == pytest.approx(text_ce / 8 + image_ce * 7 / 8, rel=1e-5)
    assert loss.parts["text_ce"].item() == pytest.approx(text_ce, rel=1e-5)
    assert loss.parts["image_ce"].item() == pytest.approx(image_ce, rel=1e-5)
    assert not loss.parts["image_ce"].requires_grad


@pytest.mark.parametrize("text_pads", [True, False])
def test_the_mean_of_micro_batches_is_the_batch(companions, text_pads):
    task = TransformerTask(make_run(companions, loss={"text_pads": text_pads}))
    networks = BareNetworks(task)
    batch = task.prepare(make_batch(task, 4), networks, 0)

    def loss_of(rows: slice) -> float:
        return task.next_token_loss(networks, {key: value[rows] for key, value in batch.items()}, 0).total.item()

    assert (loss_of(slice(0, 2)) + loss_of(slice(2, 4))) / 2 == pytest.approx(loss_of(slice(0, 4)), rel=1e-6)


def test_codes_are_the_codecs_or_the_caches(companions):
    task = TransformerTask(make_run(companions))
    networks, batch = BareNetworks(task), make_batch(task)
    codes = task.prepare(batch, networks, 0)["codes"]
    assert torch.equal(codes, task.frozen["codec"].encode(batch["image"].float() / 255))
    cached = torch.zeros_like(codes)
    assert torch.equal(task.prepare({**batch, "codes": cached}, networks, 0)["codes"], cached)


def test_validation_of_ragged_batches_is_exact(companions):
    task = TransformerTask(make_run(companions, loss={"text_pads": False}))
    networks = BareNetworks(task)
    batch = make_batch(task, 4)
    parts = [{key: value[rows] for key, value in batch.items()} for rows in (slice(0, 3), slice(3, 4))]
    split, whole = task.validate(networks, parts), task.validate(networks, [batch])
    for name, mean in whole.items():
        assert split[name].value == pytest.approx(mean.value, rel=1e-5)
    assert whole["text_ce"].count == (batch["text"] != 0).sum()
    assert whole["bits_per_image_token"].value == pytest.approx(whole["image_ce"].value / math.log(2))
    assert whole["image_ce"].value == pytest.approx(math.log(16), abs=0.1)    # an untrained model guesses


def test_dropped_captions_leave_no_nan(companions):
    task = TransformerTask(make_run(companions, loss={"text_pads": False}))
    networks, batch = BareNetworks(task), make_batch(task)
    batch["text"] = torch.zeros_like(batch["text"])
    loss = task.next_token_loss(networks, task.prepare(batch, networks, 0), 0)
    assert loss.parts["text_ce"] == 0
    assert loss.total.isfinite()
    assert task.validate(networks, [batch])["text_ce"].count == 0


def test_it_learns_the_codes_of_four_pictures(companions):
    torch.manual_seed(0)
    task = TransformerTask(make_run(companions))
    networks = BareNetworks(task)
    batch = task.prepare(make_batch(task, 4), networks, 0)
    optimizer = torch.optim.AdamW(task.players["transformer"].module.parameters(), lr=1e-2)
    for _ in range(60):
        loss = task.next_token_loss(networks, batch, 0)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert loss.parts["image_ce"] < 0.8 < math.log(16)


def test_preview_is_the_same_at_every_call_and_leaves_the_mode(companions):
    task = TransformerTask(make_run(companions, preview={"captions": ("a red circle", "a blue square"), "columns": 3}))
    networks = BareNetworks(task)
    model = task.players["transformer"].module.train()
    picture = task.preview(networks, 0)["samples"]
    assert (picture.dtype, tuple(picture.shape)) == (torch.uint8, (3, 2 * 18 + 2, 3 * 18 + 2))
    assert torch.equal(task.preview(networks, 7)["samples"], picture)
    assert model.training


def test_export_samples_without_the_run(companions, tmp_path):
    task = TransformerTask(make_run(companions))
    state = {name: tensor + 1 for name, tensor in task.players["transformer"].module.state_dict().items()}
    task.frozen["codec"].to(torch.bfloat16)    # as an engine may cast it; the export keeps what was loaded
    folder: Path = tmp_path / "run" / "model"
    task.export(str(folder), {"transformer": state})
    assert torch.equal(TextToImageTransformer.from_pretrained(folder).start, state["start"])
    original = dvae.DiscreteVAE.from_pretrained(Path(companions["codec"]) / "model").state_dict()
    exported = dvae.DiscreteVAE.from_pretrained(folder / "codec").state_dict()
    assert all(torch.equal(exported[name], tensor) for name, tensor in original.items())
    images = load_generator(tmp_path / "run").generate(["a red circle"], [0])
    assert (images.dtype, tuple(images.shape)) == (torch.uint8, (1, 3, 16, 16))
