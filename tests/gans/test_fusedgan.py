"""FusedGAN: its sizes, networks against one-channel twins, losses by hand, who moves when, and unlabelled pictures."""

import math

import pytest
import torch
import torch.nn.functional as F
from bare import CAPTIONS, BareNetworks, LetterEncoder, count, make_constant, mean_of
from published import Published
from pydantic import ValidationError
from torch import Tensor, nn

from dalle.data.settings import DataConfig
from dalle.data.shapes.making import ShapesConfig, make_shapes
from dalle.errors import UserError
from dalle.training.engines.base import Engine
from dalle.training.task import Loss
from gans import fusedgan
from gans.fusedgan import (
    ConditionalDiscriminator,
    FusedGANConfig,
    FusedGANDiscriminatorConfig,
    FusedGANGenerator,
    FusedGANRun,
    FusedGANTask,
    UnconditionalDiscriminator,
    discriminator_loss,
    generator_loss,
    is_labelled,
)
from gans.generator import GANGenerator, load_gan
from gans.text import Text

# once for D_c, once for the branch, once for the structure prior
PUBLISHED = {"fusedgan": Published(zero=2, player="conditional", paintings=3)}
DOUBLES = {
    fusedgan.discriminator_loss: (((3,),) * 3, fusedgan.discriminator_loss),
    fusedgan.generator_loss: (((3,), ()), lambda fake, kl: fusedgan.generator_loss(fake, kl, 0.7)),
}
BN = (1 + 1e-5) ** -0.5      # what a fresh BatchNorm multiplies by in evaluation mode
TINY = {"image_size": 16, "sentence_dim": 8, "z_dim": 3, "condition_dim": 4, "width": 2, "residuals": 1}
OF_PAIR = {"u": {"structure", "unconditional", "discriminator_u"}, "c": {"structure", "conditional", "discriminator_c"}}


def drawn(network: FusedGANGenerator, number: int) -> dict[str, Tensor]:
    return {name: torch.randn(number, length) for name, length in network.noise_dims.items()}


# -- sizes

def test_the_sizes_of_the_paper_config(monkeypatch):
    monkeypatch.setattr(fusedgan, "dcgan_init", lambda module: None)
    with torch.device("meta"):
        network, judges = FusedGANGenerator(FusedGANConfig()), FusedGANDiscriminatorConfig()
        parts = [count(part) for part in (
            network.structure, network.unconditional, network.conditional, UnconditionalDiscriminator(judges, 64),
            ConditionalDiscriminator(judges, 64, 1024))]
        structure = network.structure(torch.zeros(2, 100))
    assert structure.shape == (2, 256, 16, 16)
    trunk = 16 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 512) + 2 * (128 + 256 + 512)
    assert parts == [
        101 * 16384 + 16 * (1024 * 512 + 512 * 256) + 2 * (1024 + 512 + 256),
        16 * (256 * 128 + 128 * 3) + 2 * 128,
        1025 * 256 + 9 * 384 * 256 + 2 * 256 + 2 * (2 * 9 * 256 ** 2 + 4 * 256) + 16 * (256 * 128 + 128 * 3) + 2 * 128,
        trunk + 16 * 512 + 1,
        trunk + 1025 * 128 + 640 * 512 + 2 * 512 + 16 * 512 + 1]
    assert (sum(parts[:3]), sum(parts[3:])) == (16_714_496, 5_991_042)


@pytest.mark.parametrize("size", [16, 32, 128])
def test_other_sizes_follow_the_config(size):
    network = FusedGANGenerator(FusedGANConfig(**{**TINY, "image_size": size}))
    noise, sentence = drawn(network, 2), torch.randn(2, 8)
    assert network.structure(noise["z"]).shape == (2, 4, size // 4, size // 4)
    image = network(noise, sentence).image
    assert image.shape == (2, 3, size, size) and image.abs().max() <= 1
    judges = FusedGANDiscriminatorConfig(width=2, text_dim=3)
    assert UnconditionalDiscriminator(judges, size)(image).shape == (2,)
    assert ConditionalDiscriminator(judges, size, 8)(image, sentence).shape == (2,)


@pytest.mark.parametrize("size", [8, 48])
def test_impossible_sizes_are_refused(size):
    with pytest.raises(ValidationError, match=f"image_size is a power of two, 16 or more, not {size}"):
        FusedGANConfig(image_size=size)


# -- networks against twins of one channel

def constant(network: nn.Module) -> nn.Module:
    make_constant(network)
    for part in network.modules():
        if isinstance(part, nn.ConvTranspose2d):
            nn.init.constant_(part.weight, 1 / part.in_channels)
    return network.double().eval()


def grown(x: Tensor) -> Tensor:
    """[B, 1, S, S] -> [B, 1, 2S, 2S]: what a transposed convolution of weights 1 / channels makes of equal ones."""
    return F.conv_transpose2d(x, torch.ones(1, 1, 4, 4, dtype=x.dtype), stride=2, padding=1)


def test_the_generators_agree_with_a_twin_of_one_channel(seeded):
    network = constant(FusedGANGenerator(FusedGANConfig(**{**TINY, "image_size": 32})))
    noise = {name: values.double() for name, values in drawn(network, 3).items()}
    sentence = torch.randn(3, 8, dtype=torch.float64)
    structure = F.relu(BN * noise["z"].mean(dim=1))[:, None, None, None].expand(-1, 1, 4, 4)
    structure = F.relu(BN * grown(structure))                                                # 8 x 8, 4 channels
    torch.testing.assert_close(network.structure(noise["z"]), structure.expand(-1, 4, -1, -1))
    alone = grown(F.relu(BN * grown(structure))).tanh()
    torch.testing.assert_close(network.unconditional(network.structure(noise["z"])), alone.expand(-1, 3, -1, -1))
    half = F.leaky_relu(sentence.mean(dim=1, keepdim=True), 0.2)                             # mu and log sigma alike
    condition = (half + half.exp() * noise["eps"]).mean(dim=1)[:, None, None, None].expand(-1, 1, 8, 8)
    fused = F.relu(BN * mean_of((structure + condition) / 2, 3, padding=1))                  # 4 channels of each
    fused = F.relu(fused + BN * mean_of(F.relu(BN * mean_of(fused, 3, padding=1)), 3, padding=1))
    expected = grown(F.relu(BN * grown(fused))).tanh()
    torch.testing.assert_close(network(noise, sentence).image, expected.expand(-1, 3, -1, -1))


def test_the_discriminators_agree_with_a_twin_of_one_channel(seeded):
    config = FusedGANDiscriminatorConfig(width=2, text_dim=6)
    image, sentence = torch.rand(3, 3, 32, 32, dtype=torch.float64) - 0.4, torch.randn(3, 8, dtype=torch.float64)
    x = F.leaky_relu(mean_of(image.mean(dim=1, keepdim=True), 4, 2, 1), 0.2)
    for _ in range(2):
        x = F.leaky_relu(BN * mean_of(x, 4, 2, 1), 0.2)
    torch.testing.assert_close(constant(UnconditionalDiscriminator(config, 32))(image), mean_of(x, 4).flatten())
    words = F.leaky_relu(sentence.mean(dim=1), 0.2)[:, None, None, None]
    joined = F.leaky_relu(BN * (8 * x + 6 * words) / 14, 0.2)
    torch.testing.assert_close(constant(ConditionalDiscriminator(config, 32, 8))(image, sentence),
                               mean_of(joined, 4).flatten())


# -- the structure prior

def text_of(captions: list[str]) -> Text:
    return LetterEncoder()(captions)


def test_both_pictures_of_a_noise_are_painted_on_one_map(seeded):
    network, seen = FusedGANGenerator(FusedGANConfig(**TINY)), []
    for branch in (network.unconditional, network.conditional):
        branch.register_forward_pre_hook(lambda branch, given: seen.append(given[0]))
    noise = drawn(network, 2)
    network.eval().paint(noise, text_of(["a", "b"]))
    assert len(seen) == 2 and seen[0] is seen[1]
    network.paint(noise, text_of(["c", "d"]), unconditional=torch.ones(2))
    assert len(seen) == 3 and torch.equal(seen[2], seen[0])       # another text: the same posture, bit for bit


def test_the_picture_without_a_caption_does_not_know_the_caption():
    paints = GANGenerator(FusedGANGenerator(FusedGANConfig(**TINY)), LetterEncoder())
    nn.init.normal_(paints.network.conditional.augmentation.project.weight, std=3.0)
    images, details = paints.generate_with_details(["a", "hedge", "a"], [1, 1, 2])
    assert not torch.equal(images[0], images[1])
    first, second, third = (detail["pictures"]["unconditional"] for detail in details)
    assert torch.equal(first, second) and not torch.equal(first, third)
    alone = paints.generate(["a", "hedge", "a"], [1, 1, 2], unconditional="yes")
    assert torch.equal(alone, torch.stack([first, second, third]))


def test_painting_without_the_caption_is_an_option():
    paints = GANGenerator(FusedGANGenerator(FusedGANConfig(**TINY)), LetterEncoder())
    assert paints.settings(unconditional="No") == {"truncation": 1.0, "unconditional": False}
    assert paints.settings() == {"truncation": 1.0, "unconditional": False}
    with pytest.raises(UserError, match="--option unconditional=maybe: write yes or no"):
        paints.settings(unconditional="maybe")
    with pytest.raises(UserError, match="--top-k is not an option"):
        paints.settings(top_k=3)


def test_the_divergence_is_zero_where_the_augmentation_is_the_standard_normal_alone():
    augment = FusedGANGenerator(FusedGANConfig(**TINY)).conditional.augmentation
    sentence, eps = torch.randn(5, 8), torch.randn(5, 4)
    for parameter in augment.parameters():
        nn.init.zeros_(parameter)
    assert augment.kl(augment(sentence, eps)) == 0
    for place in (0, 4):             # a mean, a log sigma
        with torch.no_grad():
            augment.project.bias.zero_()[place] = 0.5
        assert augment.kl(augment(sentence, eps)) > 0


# -- the losses

def test_the_losses_by_hand():
    def softplus(x: float) -> float:
        return math.log(1 + math.exp(x))

    real, fake, wrong = (torch.tensor([value, value]) for value in (1.0, 2.0, 3.0))
    assert discriminator_loss(real, fake).item() == pytest.approx(softplus(-1) + softplus(2))
    assert discriminator_loss(real, fake, wrong).item() == pytest.approx(
        softplus(-1) + (softplus(3) + softplus(2)) / 2)
    assert generator_loss(fake).item() == pytest.approx(softplus(-2))
    assert generator_loss(fake, torch.tensor(0.25), 3.0).item() == pytest.approx(softplus(-2) + 0.75)


# -- who moves when

def make_task(monkeypatch, data: dict | None = None, **settings) -> FusedGANTask:
    monkeypatch.setattr(fusedgan, "load_encoder", lambda config: LetterEncoder())
    torch.manual_seed(0)
    return FusedGANTask(FusedGANRun(
        name="x", data=DataConfig(**{"train": "none", "image_size": 16, **(data or {})}), text_encoder="none",
        generator={name: value for name, value in TINY.items() if name not in ("image_size", "sentence_dim")},
        discriminator={"width": 2, "text_dim": 3}, train={"batch_size": 8, "precision": "fp32"}, **settings))


def batch(number: int = 8) -> dict:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (number, 3, 16, 16), generator=source, dtype=torch.uint8),
            "class_id": torch.zeros(number, dtype=torch.int64), "caption": CAPTIONS[:number],
            "key": [f"sample{place}" for place in range(number)]}


class Trained:
    """A task in an engine, whose phases can be played one by one."""

    def __init__(self, task: FusedGANTask, folder):
        self.task = task
        self.engine = Engine(task.config, torch.device("cpu"))
        self.engine.prepare(task, folder)

    def prepared(self, step: int = 0) -> dict:
        with torch.no_grad():
            return self.task.prepare(self.task.on_host(batch(), step), self.engine.networks, step)

    def play(self, pair: str = "", step: int = 0) -> None:
        """The phases of a step, or of one of its pairs."""
        prepared = self.prepared(step)
        self.engine.set_rates(step, 100)
        for phase in self.task.phases:
            if not pair or phase.name.endswith(f"_{pair}") or phase.player in OF_PAIR[pair] - {"structure"}:
                self.engine.begin_phase(phase)
                self.engine.begin_micro_batch(last=True)
                self.engine.backward(phase.loss(self.engine.networks, prepared, step).total)
                self.engine.step()

    def weights(self) -> dict[str, list[Tensor]]:
        return {name: [one.detach().clone() for one in player.module.parameters()]
                for name, player in self.task.players.items()}


def moved(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    return {name for name in before
            if not all(torch.equal(one, other) for one, other in zip(before[name], after[name], strict=True))}


@pytest.mark.parametrize("pair", ["u", "c"])
def test_a_pairs_turn_moves_that_pair_and_the_structure_prior_alone(monkeypatch, tmp_path, pair):
    """Also once Adam remembers gradients of all of them, by which it would move those without one."""
    trained = Trained(make_task(monkeypatch), tmp_path)
    for step in range(3):
        trained.play(step=step)
    before = trained.weights()
    trained.play(pair, step=3)
    assert moved(before, trained.weights()) == OF_PAIR[pair]


def test_the_pairs_take_turns(monkeypatch):
    task = make_task(monkeypatch, stabiliser={"r1": 1.0, "r1_every": 4})
    assert [(phase.name, phase.player, phase.every) for phase in task.phases] == [
        ("discriminator_u", "discriminator_u", 1), ("r1_u", "discriminator_u", 4),
        ("unconditional", "unconditional", 1), ("structure_u", "structure", 1),
        ("discriminator_c", "discriminator_c", 1), ("r1_c", "discriminator_c", 4),
        ("conditional", "conditional", 1), ("structure_c", "structure", 1)]


def test_a_joint_step_moves_the_structure_prior_once_on_both_losses(monkeypatch):
    task = make_task(monkeypatch, joint_g=True)
    assert [phase.name for phase in task.phases] == [
        "discriminator_u", "discriminator_c", "unconditional", "conditional", "structure"]
    networks = BareNetworks(task)
    prepared = task.prepare(batch(), networks, 0)
    gradients = []
    for loss in (task.g_loss_u, task.g_loss_c, task.joint_g_loss):
        gradients.append(torch.autograd.grad(loss(networks, prepared, 0).total, task.network.structure.parameters()))
    for alone, conditional, both in zip(*gradients, strict=True):
        torch.testing.assert_close(alone + conditional, both)


@pytest.mark.parametrize("pair", ["u", "c"])
def test_gradients_reach_who_should_learn_and_no_other(monkeypatch, pair):
    task = make_task(monkeypatch, loss={"matching_aware": True})
    networks = BareNetworks(task)
    prepared = task.prepare(batch(), networks, 0)

    def reached(loss: Loss) -> set[str]:
        for player in task.players.values():
            player.module.zero_grad(set_to_none=True)
        loss.total.backward()
        found = {name: [one.grad is not None and bool(one.grad.any()) for one in player.module.parameters()]
                 for name, player in task.players.items()}
        assert all(any(got) == all(got) for got in found.values())
        return {name for name, got in found.items() if all(got)}

    assert reached(getattr(task, f"d_loss_{pair}")(networks, prepared, 0)) == {f"discriminator_{pair}"}
    assert reached(getattr(task, f"g_loss_{pair}")(networks, prepared, 0)) == OF_PAIR[pair]


def test_each_pair_has_a_noise_of_its_own(monkeypatch):
    task = make_task(monkeypatch)
    prepared = task.prepare(batch(), BareNetworks(task), 0)
    assert not torch.equal(prepared["noise"]["z"], prepared["noise_u"]["z"])
    assert not torch.equal(prepared["noise_u"]["z"], task.prepare(batch(), BareNetworks(task), 1)["noise_u"]["z"])
    assert prepared["unpaired"] is prepared["image"] and "wrong_text" not in prepared


def test_mismatched_pairs_are_judged_where_they_are_asked_for(monkeypatch):
    plain, aware = make_task(monkeypatch), make_task(monkeypatch, loss={"matching_aware": True})
    assert not plain.config.makes_pairs and aware.config.makes_pairs
    networks = BareNetworks(aware)
    prepared = aware.prepare(batch(), networks, 0)
    sentence = prepared["text"].sentence
    assert torch.equal(prepared["wrong_text"].sentence, sentence.roll(-1, 0))
    judge = networks["discriminator_c"]
    with torch.no_grad():
        fake = networks["conditional"](networks["structure"](prepared["noise"]["z"]), sentence,
                                       prepared["noise"]["eps"]).image
        expected = discriminator_loss(judge(prepared["image"], sentence), judge(fake, sentence),
                                      judge(prepared["image"], sentence.roll(-1, 0)))
    torch.testing.assert_close(aware.d_loss_c(networks, prepared, 0).total, expected)


# -- pictures without captions

def test_a_share_of_the_samples_is_labelled_and_always_the_same():
    keys = [f"{place:06d}" for place in range(4000)]
    known = [is_labelled(key, 0.25, 0) for key in keys]
    assert abs(sum(known) / 4000 - 0.25) < 0.03
    assert known == [is_labelled(key, 0.25, 0) for key in keys] != [is_labelled(key, 0.25, 1) for key in keys]
    assert all(is_labelled(key, 0.5, 0) for key, had in zip(keys, known, strict=True) if had)      # more are more
    assert all(is_labelled(key, 1.0, 0) for key in keys) and not any(is_labelled(key, 0.0, 0) for key in keys)


def test_the_conditional_pair_sees_labelled_pictures_again_and_again(monkeypatch):
    task = make_task(monkeypatch, labelled=0.4, loss={"matching_aware": True})
    given = batch()
    monkeypatch.setattr(fusedgan, "is_labelled", lambda key, share, seed: key in ("sample1", "sample4", "sample6"))
    prepared = task.prepare(task.on_host(given, 0), BareNetworks(task), 0)
    chosen = [1, 4, 6, 1, 4, 6, 1, 4]
    images, sentence = given["image"].float() / 127.5 - 1, LetterEncoder()(given["caption"]).sentence
    torch.testing.assert_close(prepared["image"], images[chosen])
    assert torch.equal(prepared["text"].sentence, sentence[chosen])
    assert torch.equal(prepared["wrong_text"].sentence, sentence[[4, 6, 1, 4, 6, 1, 4, 6]])
    torch.testing.assert_close(prepared["unpaired"], images)                      # D_u sees all
    assert prepared["any_labelled"] == 1


def test_a_batch_without_a_label_teaches_the_conditional_pair_nothing(monkeypatch):
    task = make_task(monkeypatch, labelled=0.4, stabiliser={"r1": 1.0})
    monkeypatch.setattr(fusedgan, "is_labelled", lambda key, share, seed: False)
    networks = BareNetworks(task)
    prepared = task.prepare(task.on_host(batch(), 0), networks, 0)
    for loss in (task.d_loss_c, task.g_loss_c, task.r1_loss_c):
        assert loss(networks, prepared, 0).total == 0
    assert task.g_loss_u(networks, prepared, 0).total > 0


@pytest.mark.parametrize("joint", [False, True])
def test_training_works_without_any_label(monkeypatch, tmp_path, joint):
    trained = Trained(make_task(monkeypatch, labelled=0.0, joint_g=joint), tmp_path)
    before = trained.weights()
    for step in range(2):
        trained.play(step=step)
    assert moved(before, trained.weights()) == OF_PAIR["u"]


def test_unpaired_pictures_come_from_shards_of_their_own(monkeypatch, tmp_path):
    make_shapes(ShapesConfig(count=24, validation=0, size=16, samples_per_shard=12), tmp_path)
    task = make_task(monkeypatch, unpaired=str(tmp_path / "train"))
    pool = [task._pool.fetch([place])["image"][0] for place in range(24)]
    networks = BareNetworks(task)

    def unpaired(step: int, rank: int = 0, world_size: int = 1) -> Tensor:
        given = {name: values[rank::world_size] for name, values in batch().items()}
        monkeypatch.setattr("gans.task.in_global_order", lambda tensor, world_size: tensor.repeat(world_size, 1))
        return task.prepare(given, BareNetworks(task, rank, world_size), step)["unpaired"]

    assert len({image.numpy().tobytes() for image in pool}) > 20
    expected = torch.stack(pool[8:16]).float() / 127.5 - 1
    torch.testing.assert_close(unpaired(1), expected)
    torch.testing.assert_close(unpaired(1, rank=1, world_size=2), expected[1::2])      # each has its share
    assert task.d_loss_u(networks, task.prepare(batch(), networks, 1), 0).total > 0


# -- what is kept

def test_an_export_holds_all_three_generators_as_they_were_averaged(monkeypatch, tmp_path):
    task = make_task(monkeypatch)
    monkeypatch.setattr(LetterEncoder, "save", lambda self, folder: None, raising=False)
    states = {name: {key: value + 0.25 if value.is_floating_point() else value
                     for key, value in player.module.state_dict().items()} for name, player in task.players.items()}
    task.export(str(tmp_path), states)
    network = load_gan(tmp_path, "cpu").network
    assert network.config == task.network.config
    for name in ("structure", "unconditional", "conditional"):
        found = network.get_submodule(name).state_dict()
        assert found.keys() == states[name].keys()
        assert all(torch.equal(found[key], value) for key, value in states[name].items())


def test_what_paints_while_training_is_made_of_the_players(monkeypatch):
    task = make_task(monkeypatch, sync_batch_norm=True)
    assert all(task.network.get_submodule(name) is task.players[name].module
               for name in ("structure", "unconditional", "conditional"))
    own = {id(one) for name in OF_PAIR["u"] | OF_PAIR["c"] for one in task.players[name].module.parameters()}
    assert {id(one) for one in task.network.parameters()} < own
    assert task.generator(BareNetworks(task)).network is task.network
