"""What goes into a step: noise and pairs of the global batch, for any number of processes; and what comes out."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import gans.text
from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.models.base import ModelConfig
from dalle.training.companions import records_of
from dalle.training.task import Loss
from gans import layers
from gans.generator import GANGenerator, Painter, draw_noise, fitted, noise_of_seeds
from gans.task import GANRun, GANTask, StabiliserConfig, filled, other_samples, pyramid, step_generator
from gans.text import StandardisedTextEncoder, Text, TextEncoder


class TinyConfig(ModelConfig):
    image_size: int = 4
    sentence_dim: int = 3


class TinyPainter(Painter):
    """Paints the noise beside the sentence; remembers how large its batches were."""

    model_type = "tiny"
    Config = TinyConfig

    def __init__(self):
        super().__init__(TinyConfig())
        self.weight = nn.Parameter(torch.ones(1))
        self.batches: list[int] = []

    @property
    def noise_dims(self):
        return {"z": 5, "eps": 2}

    def forward(self, noise, sentence):
        flat = torch.cat([noise["z"], noise["eps"], sentence], dim=1) * self.weight
        return flat.repeat(1, 5)[:, :48].unflatten(1, (3, 4, 4)).tanh()

    def paint(self, noise, text, **conditions):
        self.batches.append(len(text.sentence))
        return self(noise, text.sentence), {}


class Letters(nn.Module):
    """Sentence vectors from the letters of a caption."""

    sentence_dim, word_dim, text_length = 3, 2, 4

    def forward(self, captions):
        rows = [[len(caption), caption.count("a"), caption.count("e")] for caption in captions]
        count = len(captions)
        return Text(torch.tensor(rows).float(), torch.zeros(count, 2, 4), torch.ones(count, 4, dtype=torch.bool))

    def warnings(self, captions):
        return [f"{caption} is long" for caption in captions if len(caption) > 20]


class TinyTask(GANTask):
    fresh_noise, wrong_images, wrong_texts = True, "other_class", "rolled"

    def __init__(self, **settings):
        config = GANRun(task="tiny", name="tiny", data=DataConfig(train="none", image_size=4), **settings)
        self.assemble(config, TinyPainter(), nn.Linear(48, 1), Letters())

    def d_loss(self, networks, batch, step):
        return Loss(networks["discriminator"](batch["image"].flatten(1)).mean())

    def real_scores(self, discriminator, batch, image):
        return [discriminator(image.flatten(1))]


class Ranks:
    """The networks of every rank of an imagined job, whose ``everyone`` is looked up in what all of them hold."""

    def __init__(self, task: TinyTask, batch: dict, world_size: int):
        self.shares = [{key: value[rank::world_size] for key, value in batch.items()} for rank in range(world_size)]
        self.task, self.world_size = task, world_size

    def prepare(self, monkeypatch, step: int = 3) -> dict:
        """What the ranks prepare, put back in the order of the global batch."""
        gathered: list[list[torch.Tensor]] = [[] for _ in range(self.world_size)]
        # each rank first says what it shows the others, then all are prepared with the answers
        for recording in (True, False):
            prepared = []
            for rank, share in enumerate(self.shares):
                calls = iter(range(100))

                def exchange(tensor, world_size, rank=rank, calls=calls, recording=recording):
                    place = next(calls)
                    if recording:
                        gathered[rank].append(tensor)
                        return torch.cat([tensor] * world_size)
                    return torch.stack([mine[place] for mine in gathered], dim=1).flatten(0, 1)

                monkeypatch.setattr("gans.task.in_global_order", exchange)
                networks = SimpleNamespace(rank=rank, world_size=self.world_size, bare=self.task.frozen.__getitem__)
                prepared.append(self.task.prepare(share, networks, step))
        return merged(prepared)


def merged(prepared: list[dict]) -> dict:
    def join(parts):
        if isinstance(parts[0], dict):
            return {key: join([part[key] for part in parts]) for key in parts[0]}
        if isinstance(parts[0], Text):
            return Text(*(join(list(fields)) for fields in zip(*parts, strict=True)))
        if isinstance(parts[0], torch.Tensor):
            return torch.stack(parts, dim=1).flatten(0, 1)
        return [row for rows in zip(*parts, strict=True) for row in rows]
    return {key: join([part[key] for part in prepared]) for key in prepared[0]}


def batch(count: int = 8) -> dict:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (count, 3, 4, 4), generator=source, dtype=torch.uint8),
            "class_id": torch.arange(count) % 3, "caption": [f"a{'e' * index}" for index in range(count)]}


def equal(left, right) -> bool:
    if isinstance(left, dict):
        return all(equal(left[key], right[key]) for key in left | right)
    if isinstance(left, Text):
        return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_is_made_of_the_same_whatever_the_number_of_processes(monkeypatch, world_size):
    task = TinyTask()
    one = Ranks(task, batch(), 1).prepare(monkeypatch)
    assert set(one) == {"image", "class_id", "caption", "text", "noise", "noise_g", "wrong_image", "wrong_class_id",
                        "wrong_text"}
    assert equal(one, Ranks(task, batch(), world_size).prepare(monkeypatch))


def test_pictures_are_in_the_range_of_the_generators(monkeypatch):
    given = batch()
    given["image"][0] = torch.tensor(0, dtype=torch.uint8)
    given["image"][1] = torch.tensor(255, dtype=torch.uint8)
    image = Ranks(TinyTask(), given, 1).prepare(monkeypatch)["image"]
    assert float(image[0].unique()) == -1 and float(image[1].unique()) == 1


def test_noise_follows_the_step_and_the_two_phases_have_their_own(monkeypatch):
    task = TinyTask()
    first, second = (Ranks(task, batch(), 1).prepare(monkeypatch, step) for step in (3, 4))
    assert not torch.equal(first["noise"]["z"], second["noise"]["z"])
    assert not torch.equal(first["noise"]["z"], first["noise_g"]["z"])
    assert first["noise"]["eps"].shape == (8, 2)


def test_wrong_text_is_the_next_samples(monkeypatch):
    one = Ranks(TinyTask(), batch(), 1).prepare(monkeypatch)
    assert torch.equal(one["wrong_text"].sentence, one["text"].sentence.roll(-1, 0))


def test_several_captions_give_the_mean_of_their_sentences(monkeypatch):
    given = {**batch(2), "captions": [["a", "aaa"], ["e", "e"]]}
    one = Ranks(TinyTask(), given, 1).prepare(monkeypatch)
    assert one["text"].sentence.tolist() == [[2, 2, 0], [1, 0, 1]]
    assert one["text"].words.shape == (2, 2, 8) and one["text"].mask.shape == (2, 8)


def test_the_words_of_several_captions_are_those_of_all():
    class Words(Letters):
        def forward(self, captions):
            text = super().forward(captions)
            lengths = text.sentence[:, :1]
            return Text(text.sentence, lengths[:, :, None].expand(-1, 2, 4), torch.arange(4) < lengths)

    networks = SimpleNamespace(bare=lambda name: Words())
    text = TinyTask().encode(networks, {"captions": [["a", "aaa"], ["ee", "e"]]})
    assert text.words[:, 0].tolist() == [[1] * 4 + [3] * 4, [2] * 4 + [1] * 4]
    assert text.mask.int().tolist() == [[1, 0, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 0, 0, 0]]


@pytest.mark.parametrize(("samples", "world_size", "synchronised", "said"), [
    (1, 1, False, "set it to 2 or more$"), (1, 2, False, "set it to 4 or more, or sync_batch_norm to true"),
    (1, 1, True, "set it to 2 or more$"), (1, 2, True, None), (2, 2, False, None)])
def test_a_share_of_one_sample_is_refused_where_its_values_are_normalised(samples, world_size, synchronised, said):
    task = TinyTask(sync_batch_norm=synchronised)
    task.check_share(samples, world_size)                        # nothing in it normalises
    network = nn.BatchNorm1d(48)
    task.players["discriminator"].module = layers.synchronised(network) if synchronised else network
    with pytest.raises(UserError, match=said) if said else nullcontext():
        task.check_share(samples, world_size)


def test_other_samples_are_of_another_class_where_there_is_one():
    classes = torch.tensor([0, 0, 0, 1, 2, -1, -1])
    for seed in range(50):
        chosen = other_samples(classes, True, torch.Generator().manual_seed(seed))
        for index, other in enumerate(chosen.tolist()):
            assert other != index
            assert classes[index] < 0 or classes[other] != classes[index]


def test_other_samples_of_one_class_are_just_others():
    for of_other_class in (True, False):
        chosen = other_samples(torch.zeros(5, dtype=torch.int64), of_other_class, torch.Generator().manual_seed(0))
        assert (chosen != torch.arange(5)).all()
    assert other_samples(torch.tensor([3]), True, torch.Generator()).tolist() == [0]


def test_every_other_sample_is_as_likely():
    counts = torch.zeros(4)
    for seed in range(600):
        chosen = other_samples(torch.arange(4), False, torch.Generator().manual_seed(seed))
        counts[chosen[0]] += 1
    assert counts[0] == 0 and (counts[1:] - 200).abs().max() < 50


def test_the_key_of_a_step_gives_its_noise_again():
    draws = [torch.rand(2, generator=step_generator(*key)).tolist() for key in ((1, 2), (1, 2), (1, 3), (12,))]
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0] != draws[3]


# -- config

def test_what_follows_from_elsewhere_is_filled_in_and_not_contradicted():
    assert filled(TinyConfig(), sentence_dim=7).sentence_dim == 7
    assert filled(TinyConfig(image_size=8), sentence_dim=7).image_size == 8
    with pytest.raises(UserError, match="^generator.sentence_dim: Input should be"):
        filled(TinyConfig(), sentence_dim="x")
    with pytest.raises(UserError, match="generator.sentence_dim is 5, .* is 7: leave it out"):
        filled(TinyConfig(sentence_dim=5), sentence_dim=7)


def test_the_penalty_is_a_phase_only_where_it_is_asked_for():
    assert [phase.name for phase in TinyTask().phases] == ["discriminator", "generator"]
    task = TinyTask(stabiliser=StabiliserConfig(r1=10, r1_every=4))
    assert [(phase.name, phase.player, phase.every) for phase in task.phases] == [
        ("discriminator", "discriminator", 1), ("r1", "discriminator", 4), ("generator", "generator", 1)]


def test_the_lazy_penalty_is_as_strong_as_one_in_every_step():
    task = TinyTask(stabiliser=StabiliserConfig(r1=10, r1_every=4))
    discriminator = task.players["discriminator"].module
    networks = SimpleNamespace(penalty=lambda name: discriminator)
    loss = task.r1_loss(networks, {"image": torch.randn(5, 3, 4, 4)}, 0)
    assert float(loss.total) == pytest.approx(4 * 5 * float(discriminator.weight.square().sum()), rel=1e-5)


@pytest.mark.parametrize(("heads", "share"), [((1, 2), 1 + 4), ((1, -1), 1 + 1), ((3,), 9)])
def test_every_head_is_penalised_as_if_it_judged_alone(heads, share):
    """Two heads that agree count twice, not four times, and two that disagree do not cancel."""
    class Heads(TinyTask):
        def real_scores(self, discriminator, batch, image):
            score = discriminator(image.flatten(1))[:, :, None, None]
            return [(weight * score).expand(-1, -1, 5, 5) for weight in heads]       # patches that agree

    task = Heads(stabiliser=StabiliserConfig(r1=2, r1_every=1))
    discriminator = task.players["discriminator"].module
    networks = SimpleNamespace(penalty=lambda name: discriminator)
    loss = task.r1_loss(networks, {"image": torch.randn(5, 3, 4, 4)}, 0)
    assert loss.total.item() == pytest.approx(share * discriminator.weight.square().sum().item(), rel=1e-5)


def test_spectral_norm_and_synchronisation_are_by_config():
    task = TinyTask(stabiliser=StabiliserConfig(spectral_norm=True))
    assert "parametrizations.weight.original" in task.players["discriminator"].module.state_dict()


def test_lower_levels_are_resized_copies():
    image = torch.randn(2, 3, 8, 8)
    levels = pyramid(image, (2, 4, 8))
    assert [level.shape[-1] for level in levels] == [2, 4, 8]
    assert levels[2] is image
    torch.testing.assert_close(pyramid(torch.full((1, 3, 8, 8), 0.3), (4,))[0], torch.full((1, 3, 4, 4), 0.3))


# -- the generator that sampling sees

def generator() -> GANGenerator:
    return GANGenerator(TinyPainter(), Letters())


def test_a_picture_follows_from_its_seed_and_caption_alone():
    captions, seeds = ["a", "bee", "a", "cheese"], [5, 6, 7, 5]
    together = generator().generate(captions, seeds)
    assert together.dtype == torch.uint8 and together.shape == (4, 3, 4, 4)
    for index in range(4):
        assert torch.equal(generator().generate([captions[index]], [seeds[index]])[0], together[index])
    assert not torch.equal(together[0], together[2])
    assert torch.equal(generator().generate(captions, seeds, batch_size=3), together)


def test_batches_are_always_of_one_size():
    paints = generator()
    paints.generate(["a"] * 5, list(range(5)), batch_size=3)
    assert paints.network.batches == [3, 3]


def test_the_network_is_left_in_the_mode_it_was_in():
    network = TinyPainter()
    paints = GANGenerator(network, Letters())
    network.train()
    paints.generate(["a"], [1])
    assert network.training


def test_truncation_shrinks_the_noise_and_other_options_are_refused():
    paints = generator()
    still = paints.generate(["a", "a"], [1, 2], truncation=0.0)
    assert torch.equal(still[0], still[1])
    assert paints.settings() == {"truncation": 1.0}
    with pytest.raises(UserError, match="--top-k is not an option of a tiny model"):
        paints.settings(top_k=3)
    with pytest.raises(UserError, match="from 0 to 1"):
        paints.settings(truncation=2)


def test_a_source_is_refused_where_nothing_is_edited():
    with pytest.raises(UserError, match="leave --image out"):
        generator().generate(["a"], [1], sources=torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_a_network_that_edits_needs_a_source_and_gets_it_in_its_range():
    class Edits(TinyPainter):
        edits = True

        def paint(self, noise, text, **conditions):
            return conditions["source"], {}

    paints = GANGenerator(Edits(), Letters())
    with pytest.raises(UserError, match="give one with --image"):
        paints.generate(["a"], [1])
    sources = torch.randint(0, 256, (3, 3, 4, 4), dtype=torch.uint8)
    assert torch.equal(paints.generate(["a"] * 3, [1, 2, 3], sources=sources), sources)


def test_pictures_that_a_network_shows_reach_the_details():
    class Shows(TinyPainter):
        def paint(self, noise, text, **conditions):
            return self(noise, text.sentence), {"map": text.sentence}

        def pictures(self, values, caption):
            return {caption: values["map"]}

    details = GANGenerator(Shows(), Letters()).generate_with_details(["a", "ee"], [1, 2])[1]
    assert [list(detail["pictures"]) for detail in details] == [["a"], ["ee"]]
    assert details[1]["pictures"]["ee"].tolist() == [2, 0, 2]


def test_warnings_are_the_text_encoders():
    assert generator().caption_warnings(["a", "b" * 30]) == [f"{'b' * 30} is long"]
    assert "reads no captions" in GANGenerator(TinyPainter(), None).caption_warnings(["a"])[0]


def test_noise_laws():
    dims = {"z": 2000}
    uniform = draw_noise(torch.Generator().manual_seed(0), 1, dims, "uniform")["z"]
    assert -1 <= uniform.min() < -0.99 and 0.99 < uniform.max() < 1
    normal = noise_of_seeds([3, 4], dims, "normal")["z"]
    assert normal.shape == (2, 2000) and float(normal.std()) == pytest.approx(1, abs=0.05)
    assert torch.equal(normal[1:], noise_of_seeds([4], dims, "normal")["z"])


def test_a_source_of_another_shape_is_cut_and_resized():
    images = torch.zeros(1, 3, 6, 10, dtype=torch.uint8)
    images[..., 2:8] = 255
    assert (fitted(images, 3) == 1).all()


# -- standardised text

class Uneven(TextEncoder):
    """Sentences and words far from 0, of small spread."""

    def __init__(self):
        super().__init__()
        self.sentence_dim, self.word_dim, self.text_length = 2, 2, 3
        self.scale = nn.Parameter(torch.ones(1))
        self.freeze()

    def encode(self, captions):
        lengths = torch.tensor([float(len(caption)) for caption in captions])
        sentence = torch.stack([5 + 0.01 * lengths, torch.full_like(lengths, 3)], dim=1)
        words = torch.stack([lengths, 2 * lengths], dim=1)[:, :, None].expand(-1, -1, 3)
        return Text(sentence, words, torch.arange(3) < lengths[:, None])

    def save(self, folder):
        Path(folder).mkdir(parents=True)


def test_standardised_text_has_mean_0_and_deviation_1_over_the_captions():
    captions = ["a" * count for count in range(1, 8)]
    encoder = StandardisedTextEncoder.over(Uneven(), captions)
    text = encoder(captions)
    torch.testing.assert_close(text.sentence[:, 0].mean(), torch.tensor(0.0), atol=1e-4, rtol=0)
    torch.testing.assert_close(text.sentence[:, 0].std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert (text.sentence[:, 1] == 0).all()                    # what never differs stays finite
    words = text.words.transpose(1, 2)[text.mask]
    torch.testing.assert_close(words.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)
    assert not text.words.transpose(1, 2)[~text.mask].any()    # padding is no word
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_standardised_text_is_known_by_its_encoder_and_captions_not_by_rounding():
    def record(captions, encoder=None, rounding=0.0):
        task = GANTask()
        task.frozen = {"text": StandardisedTextEncoder.over(encoder or Uneven(), captions)}
        task.frozen["text"].sentence_mean += rounding          # as another processor adds it up
        return records_of(task)["text"]

    other = Uneven()
    other.scale.data += 1e-6
    assert record(["a", "bb"]) == record(["a", "bb"], rounding=1e-6)
    assert record(["a", "bb"])["digest"] not in (record(["a", "b"])["digest"], record(["a", "bb"], other)["digest"])
    assert record(["a", "bb"])["setting"] == "text_encoder"


def test_standardised_text_comes_back_from_its_folder(tmp_path, monkeypatch):
    captions = ["a", "bbb", "cccccc"]
    encoder = StandardisedTextEncoder.over(Uneven(), captions)
    encoder.save(tmp_path / "text")
    load = gans.text.load_text_encoder
    monkeypatch.setattr("gans.text.load_text_encoder",
                        lambda name, device="cpu": Uneven() if name.endswith("encoder") else load(name, device))
    again = gans.text.load_text_encoder(str(tmp_path / "text"))
    assert isinstance(again, StandardisedTextEncoder)
    assert equal(again(captions), encoder(captions))
