"""DAMSM: the encoders, what moves, two processes, its uses."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bare import BareNetworks, loss_of
from published import Published
from pydantic import ValidationError
from torch import Tensor, nn

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.metrics.retrieval import r_precision
from gans.damsm import (
    Damsm,
    DamsmConfig,
    DamsmOptimizer,
    DamsmRun,
    DamsmTask,
    DamsmTextOptimizer,
    RegionEncoder,
    WordEncoder,
    load_reranker,
)
from gans.matching import damsm_losses
from gans.text import load_text_encoder
from gans.trunks import Trunk, build_trunk

PUBLISHED = {"damsm": Published(one_caption=True)}

CAPTIONS = ["a red circle", "a blue square above a green star", "a small yellow heart", "red", "two circles",
            "a star left of a square", "a purple heart", "a green triangle"]


# -- encoders

def lstm_by_hand(inputs: Tensor, lstm: nn.LSTM, suffix: str) -> Tensor:
    """[T, E] -> the outputs [T, H] of one direction, gate by gate."""
    state = cell = torch.zeros(lstm.hidden_size, dtype=inputs.dtype)
    outputs = []
    for one in inputs:
        gates = getattr(lstm, f"weight_ih_l0{suffix}") @ one + getattr(lstm, f"bias_ih_l0{suffix}") \
            + getattr(lstm, f"weight_hh_l0{suffix}") @ state + getattr(lstm, f"bias_hh_l0{suffix}")
        enter, keep, new, leave = gates.chunk(4)
        cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
        state = leave.sigmoid() * cell.tanh()
        outputs.append(state)
    return torch.stack(outputs)


def test_the_text_encoder_reads_each_caption_from_both_ends():
    torch.manual_seed(0)
    encoder = WordEncoder(30, dim=8, embedding_dim=5).double().eval()
    ids = torch.tensor([[4, 7, 9, 2, 0, 0], [5, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 0]])
    text = encoder(ids)
    assert text.sentence.shape == (4, 8) and text.words.shape == (4, 8, 6)
    assert text.mask.sum(dim=1).tolist() == [4, 1, 6, 1]           # nothing is read as one word
    for row, length in enumerate([4, 1, 6, 1]):
        embedded = encoder.embedding(ids[row, :length])
        forward = lstm_by_hand(embedded, encoder.lstm, "")
        backward = lstm_by_hand(embedded.flip(0), encoder.lstm, "_reverse").flip(0)
        torch.testing.assert_close(text.words[row, :, :length].T, torch.cat([forward, backward], dim=1))
        torch.testing.assert_close(text.sentence[row], torch.cat([forward[-1], backward[0]]))
        assert not text.words[row, :, length:].any()


def test_dropout_falls_on_the_embeddings_alone():
    torch.manual_seed(0)
    encoder = WordEncoder(30, dim=8, embedding_dim=5, dropout=0.5).eval()
    ids = torch.tensor([[4, 7, 9, 2]])
    kept = torch.rand(1, 4, 5) < 0.5
    found = encoder(ids, kept)
    embedded = (encoder.embedding(ids) * 2 * kept)[0]
    torch.testing.assert_close(found.words[0, :4].T, lstm_by_hand(embedded, encoder.lstm, ""))
    assert torch.equal(encoder(ids).words, encoder(ids).words)
    encoder.train()
    assert not torch.equal(encoder(ids).words, encoder(ids).words)


@pytest.mark.parametrize(("vocabulary", "parameters"), [(5450, 2_075_320), (27_297, 8_629_420)])
def test_the_papers_text_encoder_has_the_papers_parameters(vocabulary, parameters):
    encoder = WordEncoder(vocabulary)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == parameters
    assert encoder.embedding.weight.abs().max() <= 0.1 < 2 * encoder.embedding.weight.abs().max()


def test_the_papers_image_encoder_has_the_papers_parameters_and_regions():
    encoder = RegionEncoder(build_trunk("inception_v3:random"), 256).eval()
    new = [*encoder.local.parameters(), *encoder.pooled.parameters()]
    assert sum(parameter.numel() for parameter in new) == 721_152 and encoder.local.bias is None
    assert sum(parameter.numel() for parameter in encoder.trunk.parameters()) == 21_785_568
    assert {id(one) for one in encoder.parameters() if one.requires_grad} == {id(one) for one in new}
    assert all(layer.weight.abs().max() <= 0.1 for layer in (encoder.local, encoder.pooled))
    with torch.no_grad():
        for size in (64, 128, 256, 299):
            local, pooled = encoder(torch.rand(1, 3, size, size) * 2 - 1)
            assert local.shape == (1, 256, 17, 17) and pooled.shape == (1, 256)


def test_the_rate_falls_as_in_the_released_code():
    optimizer = DamsmTextOptimizer(schedule="step", step_every=7, step_factor=0.98)
    rate = 0.002
    for epoch in range(150):
        assert 0.002 * optimizer.factor(7 * epoch + 3, 10_000) == pytest.approx(rate)
        if rate > 0.0002:
            rate *= 0.98
    assert (optimizer.betas, optimizer.clip, DamsmOptimizer().clip) == ((0.5, 0.999), 0.25, 0)
    assert DamsmOptimizer().factor(5000, 10_000) == 1


# -- the task

class TinyTrunk(Trunk):
    """A frozen trunk with a batch norm."""

    local_dim, pooled_dim = 4, 4

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.BatchNorm2d(4), nn.Tanh())
        self.requires_grad_(False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        local = self.body(images)
        return local, local.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("damsm") / "tokenizer"
    CaptionTokenizer.train(CAPTIONS, vocab_size=300).save(folder)
    return folder


def settings(tokenizer: Path, **changes) -> dict:
    data = {"train": "nowhere", "tokenizer": str(tokenizer), "text_length": 4, "image_size": 16}
    return {"task": "damsm", "name": "damsm", "data": data, "model": {"dim": 8, "embedding_dim": 6, "trunk": "small:2"},
            "train": {"batch_size": 8}, **changes}


def make_task(tokenizer: Path, **changes) -> DamsmTask:
    torch.manual_seed(0)
    task = DamsmTask(DamsmRun(**settings(tokenizer, **changes)))
    for player in task.players.values():
        player.module.train()
    return task


def make_batch(tokenizer: Path, count: int = 8) -> dict:
    words = CaptionTokenizer.load(tokenizer)
    captions = (CAPTIONS * count)[:count]
    generator = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator),
            "text": torch.stack([torch.from_numpy(words.encode(caption, 4)) for caption in captions]),
            "caption": captions, "position": torch.arange(count), "class_id": torch.arange(count) % 3}


def gradients(task: DamsmTask, batch: dict, networks: BareNetworks) -> dict[str, Tensor]:
    """Of both phases, one after the other, as the loop runs them but for the steps."""
    with torch.no_grad():
        prepared = task.prepare(batch, networks, 3)
    found = {}
    for phase in task.phases:
        for name in task.players:
            for parameter in trainable(task)[name].values():
                parameter.requires_grad_(name == phase.player)
                parameter.grad = None
        loss_of(task, phase.name, networks, prepared, 3).total.backward()
        found |= {f"{phase.player}.{name}": one.grad for name, one in trainable(task)[phase.player].items()}
    return found


def trainable(task: DamsmTask) -> dict[str, dict[str, nn.Parameter]]:
    return {name: {key: one for key, one in player.module.named_parameters() if not key.startswith("trunk.body")}
            for name, player in task.players.items()}


def test_both_players_follow_the_gradient_of_the_one_loss(tokenizer):
    task, batch = make_task(tokenizer), make_batch(tokenizer)
    found = gradients(task, batch, BareNetworks(task))
    with torch.no_grad():
        prepared = task.prepare(batch, BareNetworks(task), 3)
    for part in task.model.parameters():
        part.requires_grad_(True).grad = None
    text = task.model.text(prepared["ids"], prepared["kept"])
    sum(damsm_losses(*task.model.image(batch["image"].float() / 127.5 - 1), text, batch["class_id"])).backward()
    expected = {name: one.grad for name, one in task.model.named_parameters()}
    assert found.keys() == expected.keys() and all(grad.any() for grad in found.values())
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_it_learns(tokenizer):
    model = {"dim": 8, "embedding_dim": 6, "dropout": 0, "trunk": "small:2"}
    task = make_task(tokenizer, model=model, loss={"same_class": "mismatched"})
    batch = make_batch(tokenizer)
    networks = BareNetworks(task)
    optimizers = {name: torch.optim.Adam(player.module.parameters(), 1e-2) for name, player in task.players.items()}
    totals = []
    for step in range(40):
        with torch.no_grad():
            prepared = task.prepare(batch, networks, step)
        for phase in task.phases:
            loss = loss_of(task, phase.name, networks, prepared, step)
            optimizers[phase.player].zero_grad()
            loss.total.backward()
            optimizers[phase.player].step()
        totals.append(loss.total.item())
    assert totals[-1] < 0.5 * totals[0]
    assert sorted(loss.parts) == ["sent0", "sent1", "words0", "words1"]


@pytest.mark.parametrize("statistics", [True, False])
def test_a_frozen_trunk_keeps_its_weights_and_its_statistics_drift_if_asked(tokenizer, monkeypatch, statistics):
    monkeypatch.setattr("gans.damsm.build_trunk", lambda spec, load=True: TinyTrunk())
    task = make_task(tokenizer, trunk_batch_statistics=statistics)
    assert not any(one.requires_grad for one in task.model.image.trunk.parameters())
    before = {name: tensor.clone() for name, tensor in task.model.image.trunk.state_dict().items()}
    found = gradients(task, make_batch(tokenizer), BareNetworks(task))
    assert {name.partition(".")[2].partition(".")[0] for name in found if name.startswith("image")} \
        == {"local", "pooled"}
    changed = {name for name, tensor in task.model.image.trunk.state_dict().items()
               if not torch.equal(tensor, before[name])}
    drifting = {"body.1.running_mean", "body.1.running_var", "body.1.num_batches_tracked"}
    assert changed == (drifting if statistics else set())
    task.model.eval()
    gradients(task, make_batch(tokenizer), BareNetworks(task))
    assert {name for name, tensor in task.model.image.trunk.state_dict().items()
            if not torch.equal(tensor, before[name])} == changed


def make_pool(tokenizer: Path) -> dict:
    """129 pairs, more captions than candidates: two pools, and one more."""
    return {**make_batch(tokenizer, 129), "caption": [f"caption {number}" for number in range(129)]}


def share(batch: dict, rank: int) -> dict:
    return {name: value[rank::2] for name, value in batch.items()}


def learn_on_rank(rank: int, tasks: list[DamsmTask], batch: dict, pool: dict) -> list[dict[str, Tensor]]:
    return [{**measured(task, pool, BareNetworks(task, rank, 2), lambda part: share(part, rank)),
             **gradients(task, share(batch, rank), BareNetworks(task, rank, 2)), **task.model.image.state_dict()}
            for task in tasks]


def measured(task: DamsmTask, pool: dict, networks: BareNetworks, seen: Callable[[dict], dict]) -> dict[str, Tensor]:
    """The figures of a validation in two batches of ragged shares, of which this process has ``seen`` its part."""
    task.model.eval()
    figures = task.validate(networks, [seen({name: value[part] for name, value in pool.items()})
                                       for part in (slice(0, 96), slice(96, 129))])
    task.model.train()
    return {f"figures/{name}": torch.tensor(figure.value) for name, figure in figures.items()}


@pytest.fixture(scope="module")
def tasks(tokenizer) -> list[DamsmTask]:
    """With a trunk that is trained, and with a frozen one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gans.damsm.build_trunk", lambda spec, load=True: TinyTrunk())
        frozen = make_task(tokenizer)
    return [make_task(tokenizer), frozen]


@pytest.fixture(scope="module")
def ranks(two_ranks, tasks, tokenizer) -> list[list[dict[str, Tensor]]]:
    """What two processes leave of each task: the gradients of their shares, and the picture side's state."""
    return two_ranks(learn_on_rank, tasks, make_batch(tokenizer), make_pool(tokenizer))


@pytest.mark.parametrize("number", [0, 1], ids=["trained", "frozen"])
def test_two_processes_equal_one(ranks, tasks, tokenizer, number):
    task, shares = tasks[number], [found[number] for found in ranks]
    figures = measured(task, make_pool(tokenizer), BareNetworks(task), lambda part: part)
    assert {"figures/recall@1_in_64", "figures/words_recall@5_in_64", "figures/rprecision"} <= figures.keys()
    for found in shares:
        assert {name: found[name].item() for name in figures} == pytest.approx(
            {name: value.item() for name, value in figures.items()})
    expected = gradients(task, make_batch(tokenizer), BareNetworks(task))
    for name, gradient in expected.items():
        torch.testing.assert_close((shares[0][name] + shares[1][name]) / 2, gradient, atol=1e-5, rtol=1e-5)
    for name, tensor in task.model.image.state_dict().items():          # the statistics, too
        torch.testing.assert_close(shares[0][name], tensor, atol=1e-5, rtol=1e-5)


def test_long_captions_keep_a_choice_of_their_words_in_order(tokenizer):
    task, batch = make_task(tokenizer), make_batch(tokenizer)
    found = task.shortened(batch)
    short = (batch["text"] == 0).any(dim=1)
    assert torch.equal(found[short], batch["text"][short]) and 0 < int(short.sum()) < 8
    chosen = set()
    for position in range(40):
        words = task.shortened({**batch, "position": torch.full((8,), position)})[1].tolist()
        whole = iter(task.tokenizer.token_ids(CAPTIONS[1]))
        assert all(word in whole for word in words) and len(words) == 4     # a subsequence
        chosen.add(tuple(words))
    assert len(chosen) > 5
    assert torch.equal(task.shortened(batch), found)
    head = make_task(tokenizer, long_captions="head")
    with torch.no_grad():
        assert torch.equal(head.prepare(batch, BareNetworks(head), 0)["ids"], batch["text"])


def test_validation_reads_pools_of_pairs(tokenizer):
    task, batch = make_task(tokenizer), make_batch(tokenizer, 64)
    task.model.eval()
    figures = task.validate(BareNetworks(task), [share(batch, 0), share(batch, 1)])
    assert {"recall@1_in_64", "recall@5_in_64", "words_recall@1_in_64", "words_recall@5_in_64"} == figures.keys()
    few = task.validate(BareNetworks(task), [share(batch, 0)])
    assert {"recall@1_in_32", "recall@5_in_32", "words_recall@1_in_32", "words_recall@5_in_32"} == few.keys()
    batch["caption"] = [f"caption {number}" for number in range(64)]
    figures = task.validate(BareNetworks(task), [{**batch}, {**batch, "caption": [f"{n}" for n in range(64)]}])
    assert 0 <= figures["rprecision"].value <= 1 and figures["rprecision"].count == 128
    assert task.validate(BareNetworks(task), []) == {}


def test_r_precision_is_one_for_equal_codes_and_chance_for_random_ones():
    codes = nn.functional.normalize(torch.randn(300, 200, generator=torch.Generator().manual_seed(0)), dim=1)
    assert r_precision(codes, codes) == 1
    other = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    assert r_precision(codes, other) < 0.05
    assert r_precision(7 * codes, 0.1 * other) == r_precision(codes, other)


# -- the trained model at work

@pytest.fixture(scope="module")
def exported(tokenizer, tmp_path_factory) -> tuple[DamsmTask, Path]:
    task = make_task(tokenizer)
    task.model.eval()
    folder = tmp_path_factory.mktemp("damsm") / "run"
    task.export(str(folder / "model"), {name: player.module.state_dict() for name, player in task.players.items()})
    return task, folder


def test_as_a_text_encoder(exported, tokenizer, tmp_path):
    task, folder = exported
    encoder = load_text_encoder(str(folder))
    assert (encoder.sentence_dim, encoder.word_dim, encoder.text_length) == (8, 8, 4)
    batch = make_batch(tokenizer)
    found, expected = encoder(batch["caption"]), task.model.text(batch["text"])
    torch.testing.assert_close(tuple(found), tuple(part.detach() for part in expected))
    assert not any(part.requires_grad for part in encoder.parameters())
    assert len(encoder.warnings(["red", CAPTIONS[1]])) == 1
    encoder.save(tmp_path / "text")
    again = load_text_encoder(str(tmp_path / "text"))
    assert torch.equal(again(CAPTIONS).words, encoder(CAPTIONS).words)
    with pytest.raises(UserError, match="text side"):
        Damsm.load(tmp_path / "text")
    with pytest.raises(UserError, match="text side"):
        load_reranker(tmp_path / "text")


def test_as_a_generators_loss(exported, tokenizer):
    task, folder = exported
    model = Damsm.load(folder)
    assert not model.training and not any(one.requires_grad for one in model.parameters())
    text = load_text_encoder(str(folder))(CAPTIONS)
    pictures = (torch.rand(8, 3, 16, 16) * 2 - 1).requires_grad_()
    losses = model.losses(pictures, text, torch.arange(8))
    sum(losses).backward()
    assert pictures.grad.abs().sum(dim=(1, 2, 3)).min() > 0
    local, pooled = model.image(pictures)
    torch.testing.assert_close(losses, damsm_losses(local, pooled, text, torch.arange(8)))
    with pytest.raises(UserError, match="does not exist|no "):
        Damsm.load(folder / "nowhere")


def test_as_a_ranker(exported, tokenizer):
    task, folder = exported
    ranker = load_reranker(folder / "model")
    batch = make_batch(tokenizer)
    with torch.no_grad():
        _, pooled = task.model.image(batch["image"] / 127.5 - 1)
        sentence = task.model.text(batch["text"]).sentence
    expected = torch.cosine_similarity(pooled, sentence)
    torch.testing.assert_close(ranker.score(batch["image"], batch["caption"]), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ranker.encode_image(batch["image"]).norm(dim=1).detach(), torch.ones(8))
    torch.testing.assert_close(ranker.encode_captions(CAPTIONS).norm(dim=1).detach(), torch.ones(8))
    assert ranker.identity["kind"] == "damsm" and len(ranker.caption_warnings(["red", CAPTIONS[1]])) == 1


def test_the_saved_model_keeps_its_gammas(tmp_path):
    model = Damsm(DamsmConfig(num_text_tokens=9, dim=4, embedding_dim=2, trunk=None, gammas=(5.0, 5.0, 10.0)))
    model.save_pretrained(tmp_path)
    assert Damsm.from_pretrained(tmp_path).config.gammas == (5, 5, 10)


@pytest.mark.parametrize(("changes", "words"), [
    ({"data": {"train": "x"}}, "data.tokenizer"),
    ({"data": {"train": "x", "tokenizer": "y", "images": False}}, "data.images"),
    ({"train": {"batch_size": 1}}, "train.batch_size"),
    ({"model": {"dim": 7}}, "dim"),
])
def test_impossible_configs(tokenizer, changes, words):
    with pytest.raises(ValidationError, match=words):
        DamsmRun(**settings(tokenizer, **changes))
