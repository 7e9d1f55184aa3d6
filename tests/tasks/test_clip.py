"""The CLIP task: which pictures are replaced, what recall counts, what is exported, and that it learns."""

import math

import pytest
import torch
from pydantic import ValidationError

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.clip import ClipModel
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.sampling.rerank import load_reranker
from dalle.tasks.clip import ClipRun, ClipTask, chosen_positions, recall
from dalle.training.optimizers import OptimizerConfig, build_optimizer

CODEC = {
    "image_size": 16,
    "likelihood": "gaussian",
    "network": {"kind": "compact", "patch": 4, "widths": [8, 16], "blocks": 1, "tail": 8},
    "quantizer": {"kind": "fsq", "levels": [4, 4]},
}
MODEL = {
    "vision": {"layers": 1, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16},
    "text": {"layers": 1, "width": 16, "heads": 2},
    "embed_dim": 8,
}


class BareNetworks:
    """One process without an engine: every network as it is."""

    rank, world_size = 0, 1

    def __init__(self, task: ClipTask):
        self.modules = {**{name: player.module for name, player in task.players.items()}, **task.frozen}

    def __getitem__(self, name):
        return self.modules[name]

    bare = __getitem__


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    CaptionTokenizer.train(["a red star", "a blue circle"] * 3, vocab_size=280).save(folder / "tokenizer")
    DiscreteVAE(DVAEConfig(**CODEC)).save_pretrained(folder / "dvae" / "model")
    return folder


def make_task(folders, model=MODEL, seed=0, **loss) -> ClipTask:
    torch.manual_seed(0)
    data = {"train": str(folders), "image_size": 16, "tokenizer": str(folders / "tokenizer"), "text_length": 4}
    return ClipTask(ClipRun(name="clip", seed=seed, data=data, model=model, loss=loss))


def make_batch(count: int, codes: bool = False) -> dict:
    generator = torch.Generator().manual_seed(1)
    batch = {
        "image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
        "text": torch.randint(1, 250, (count, 4), generator=generator),
        "position": torch.arange(100, 100 + count),
    }
    return batch | ({"codes": torch.randint(0, 16, (count, 4), generator=generator)} if codes else {})


def test_recall_counts_both_directions():
    similarity = torch.tensor([[0.9, 0.8, 0.1],      # caption 0 is the best for picture 0
                               [0.7, 0.6, 0.2],      # picture 1 prefers caption 0 to its own
                               [0.1, 0.2, 0.3]])
    # captions to pictures: column 0 right, column 1 prefers picture 0, column 2 right
    assert recall(similarity, 1) == pytest.approx((2 / 3 + 2 / 3) / 2)
    assert recall(similarity, 2) == 1


def test_features_that_collapsed_recall_nothing():
    assert recall(torch.ones(8, 8), 5) == 0


def test_the_choice_of_reconstructions_is_a_function_of_seed_and_position():
    positions = torch.arange(2000)
    chosen = chosen_positions(positions, seed=3, share=0.5)
    assert 0.45 < chosen.double().mean() < 0.55
    assert torch.equal(chosen[500:600], chosen_positions(positions[500:600], seed=3, share=0.5))
    assert not torch.equal(chosen, chosen_positions(positions, seed=4, share=0.5))
    assert chosen_positions(positions, 3, 1.0).all() and not chosen_positions(positions, 3, 0.0).any()


@pytest.mark.parametrize("cached", [False, True])
def test_chosen_pictures_are_reconstructed_and_the_others_are_not(folders, cached):
    task = make_task(folders, reconstructions=0.5, codec=str(folders / "dvae"))
    batch = make_batch(8, codes=cached)
    prepared = task.prepare(task.on_host(batch, 0), BareNetworks(task), 0)
    codec = task.frozen["codec"]
    codes = batch["codes"] if cached else codec.encode(batch["image"].float() / 255)
    expected = (codec.decode(codes) * 255).round().clamp(0, 255).byte()
    chosen = chosen_positions(batch["position"], 0, 0.5)
    assert 0 < chosen.sum() < 8
    assert (prepared["image"][chosen].int() - expected[chosen].int()).abs().max() <= 1
    assert torch.equal(prepared["image"][~chosen], batch["image"][~chosen])


def test_without_reconstructions_the_batch_is_left_alone(folders):
    task, batch = make_task(folders), make_batch(4)
    assert task.frozen == {} and task.prepare(task.on_host(batch, 0), BareNetworks(task), 0) is batch


def test_the_loss_starts_near_chance_and_its_parts_are_told(folders):
    task = make_task(folders)
    loss = task.contrast(BareNetworks(task), make_batch(16), 0)
    assert abs(float(loss.total.detach()) - math.log(16)) < 3
    assert loss.parts["logit_scale"].item() == pytest.approx(1 / 0.07, rel=1e-4)
    assert not loss.parts["contrast"].requires_grad


def test_siglip_is_chosen_by_the_loss(folders):
    task = make_task(folders, kind="siglip")
    loss = task.contrast(BareNetworks(task), make_batch(4), 0)
    assert task.players["clip"].module.config.siglip
    assert loss.parts["logit_bias"].item() == -10


def test_a_batch_is_never_split():
    assert ClipTask.splits_batch is False


def test_it_learns_and_validation_sees_it(folders):
    task = make_task(folders)
    networks, batch = BareNetworks(task), make_batch(64)
    optimizer = build_optimizer(task.players["clip"].module, OptimizerConfig(lr=1e-2))
    before = task.validate(networks, [batch])["recall@1_in_64"]
    for step in range(80):
        loss = task.contrast(networks, batch, step).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = task.validate(networks, [batch])["recall@1_in_64"]
    assert before.count == after.count == 64
    assert before.value < 0.1 and after.value > 0.5


def test_pools_are_whole_and_batches_do_not_matter(folders):
    task = make_task(folders)
    networks, batch = BareNetworks(task), make_batch(150)
    whole = task.validate(networks, [batch])
    parts = [{name: value[start : start + 40] for name, value in batch.items()} for start in range(0, 150, 40)]
    split = task.validate(networks, parts)
    assert whole["recall@5_in_64"].count == 128                  # two whole pools, 22 samples left out
    assert whole["recall@5_in_64"].value == pytest.approx(split["recall@5_in_64"].value)
    assert "recall@1_in_1000" not in whole and task.validate(networks, []) == {}


@pytest.mark.parametrize(("count", "pool"), [(63, 32), (32, 32), (3, 2), (1, None)])
def test_a_set_that_fills_no_pool_is_measured_in_the_largest_that_it_does(folders, count, pool):
    task = make_task(folders)
    figures = task.validate(BareNetworks(task), [make_batch(count)])
    assert figures.keys() == ({f"recall@{k}_in_{pool}" for k in (1, 5)} if pool else set())
    assert all(figure.count == count // pool * pool for figure in figures.values())


def test_the_export_is_a_reranker(folders, tmp_path):
    task = make_task(folders)
    module = task.players["clip"].module
    task.export(str(tmp_path), {"clip": module.state_dict()})
    loaded = ClipModel.from_pretrained(tmp_path)
    assert loaded.config.num_text_tokens == task.tokenizer.vocab_size
    batch = make_batch(3)
    scores = load_reranker(str(tmp_path)).score(batch["image"], ["a red star"] * 3)
    text = torch.from_numpy(task.tokenizer.encode("a red star", 4))[None].expand(3, -1)
    expected = (module.eval().encode_image(batch["image"]) * module.encode_text(text)).sum(dim=1)
    torch.testing.assert_close(scores, expected.detach())


@pytest.mark.parametrize(("changes", "words"), [
    ({"loss": {"reconstructions": 0.5}}, "loss.codec"),
    ({"data": {"train": "x"}}, "data.tokenizer"),
    ({"model": {}}, "either `architecture`"),
])
def test_impossible_configs(folders, changes, words):
    values = {"name": "clip", "data": {"train": "x", "tokenizer": "y"}, "model": MODEL}
    with pytest.raises(ValidationError, match=words):
        ClipRun(**{**values, **changes})


def test_a_codec_that_is_not_there(folders):
    with pytest.raises(UserError, match=r"loss\.codec: .*nowhere does not exist"):
        make_task(folders, reconstructions=0.5, codec=str(folders / "nowhere"))
