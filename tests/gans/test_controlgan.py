"""ControlGAN: the paper's sizes, its attention and its word-level score against loops, what learns in which mode."""

import math
from types import SimpleNamespace

import pytest
import torch
from bare import BareNetworks, count, make_constant, mean_of
from published import Published
from torch import Tensor, nn

import gans.controlgan as controlgan
import gans.refining as refining
from dalle.training.task import Player
from gans.attention import global_attention
from gans.controlgan import (
    ControlGANConfig,
    ControlGANGenerator,
    ControlGANLossConfig,
    ControlGANTask,
    WordDiscriminators,
    channel_attention,
    word_cosines,
    word_discriminator_loss,
    word_level_correlation,
)
from gans.damsm import Damsm, DamsmConfig
from gans.losses import perceptual_loss
from gans.matching import func_attention, word_scores
from gans.perceptual import load_features
from gans.refining import MatchingTask, ScaleDiscriminators
from gans.task import GANOptimizer
from gans.text import Text

PUBLISHED = {"controlgan": Published(paintings=1, one_caption=True)}      # both players see the same fakes
DOUBLES = {controlgan.word_discriminator_loss: (((3,), (3,)), controlgan.word_discriminator_loss)}

BN = (1 + 1e-5) ** -0.5      # what a fresh BatchNorm multiplies by in evaluation mode
DIM, LENGTH = 6, 5
TINY = {"image_size": 32, "sentence_dim": DIM, "word_dim": DIM, "z_dim": 5, "condition_dim": 4, "width": 4}


def make_text(lengths: list[int], total: int = LENGTH) -> Text:
    mask = torch.arange(total)[None] < torch.tensor(lengths)[:, None]
    return Text(torch.randn(len(lengths), DIM), torch.randn(len(lengths), DIM, total) * mask[:, None], mask)


def make_noise(network: ControlGANGenerator, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn(batch, length) for name, length in network.noise_dims.items()}


# -- sizes

@pytest.mark.parametrize(("width", "residuals", "total", "start", "residual", "grow"), [
    (32, 2, 12_918_064, 6_444_928, 498_816, 55_424), (48, 3, 21_005_248, 12_017_472, None, None)])
def test_only_what_is_used_of_the_papers_generators_is_built(monkeypatch, width, residuals, total, start, residual,
                                                             grow):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)
    with torch.device("meta"):
        network = ControlGANGenerator(ControlGANConfig(width=width, residuals=residuals))
    assert count(network.augmentation) == 102_800 and count(network.start) == start
    assert [count(refine.to_values) for refine in network.refine] == [256 * width] * 2
    assert [count(refine.to_places) for refine in network.refine] == [1_048_576, 4_194_304]
    assert count(network.heads) == 81 * width
    assert count(network) == total
    if residual:
        assert [(count(refine.residual), count(refine.grow)) for refine in network.refine] == [(residual, grow)] * 2


def test_the_word_level_discriminator_adds_one_filter(monkeypatch):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)
    with torch.device("meta"):
        network = WordDiscriminators([64, 128, 256], 256, 64, 256)
    assert [count(scale) for scale in network.scales] == [6_313_730, 19_424_002, 71_858_946]
    assert count(network.regions) == 65_536


def test_shapes_follow_the_picture_and_the_network_is_locked_to_it():
    network = ControlGANGenerator(ControlGANConfig(**{**TINY, "image_size": 64}))
    painted = network(make_noise(network, 2), make_text([1, 4]))
    assert [image.shape[-1] for image in painted.images] == [16, 32, 64]
    assert [tuple(maps.shape) for maps in painted.attention] == [(2, LENGTH, 16, 16), (2, LENGTH, 32, 32)]
    assert [refine.to_places.weight.shape[0] for refine in network.refine] == [16 ** 2, 32 ** 2]


# -- channel-wise attention

def test_the_channels_attention_agrees_with_a_loop_written_out(seeded):
    features, text = torch.randn(3, 4, 2, 3, dtype=torch.float64), make_text([2, 5, 3])
    words = torch.randn(3, 6, LENGTH, dtype=torch.float64) * text.mask[:, None]
    found, weights = channel_attention(features, words, text.mask)
    for picture in range(3):
        for channel in range(4):
            known = [word for word in range(LENGTH) if text.mask[picture, word]]
            pixels = features[picture, channel].flatten()
            exps = [math.exp(float(pixels @ words[picture, :, word])) for word in known]
            expected = sum(value / sum(exps) * words[picture, :, word]
                           for value, word in zip(exps, known, strict=True))
            torch.testing.assert_close(found[picture, channel].flatten(), expected)
            for word, value in zip(known, exps, strict=True):
                assert float(weights[picture, channel, word]) == pytest.approx(value / sum(exps))


def test_channel_weights_sum_to_one_and_padding_gets_none(seeded):
    text = make_text([2, 5, 0])
    words = torch.randn(3, 4, LENGTH) * text.mask[:, None]
    found, weights = channel_attention(torch.randn(3, 3, 2, 2), words, text.mask)
    torch.testing.assert_close(weights[:2].sum(dim=2), torch.ones(2, 3))
    assert not weights[0, :, 2:].any()
    assert not weights[2].any() and not found[2].any()          # a caption without words is not NaN


def test_the_released_padding_has_the_score_0_and_thins_out_the_weights(seeded):
    text, features = make_text([2]), torch.randn(1, 3, 2, 2, dtype=torch.float64)
    words = torch.randn(1, 4, LENGTH, dtype=torch.float64) * text.mask[:, None]
    masked, weights = channel_attention(features, words, text.mask)
    released, thin = channel_attention(features, words)
    torch.testing.assert_close(thin.sum(dim=2), torch.ones(1, 3, dtype=torch.float64))
    shares = thin[:, :, :2].sum(dim=2)
    torch.testing.assert_close(thin[:, :, :2] / shares[..., None], weights[:, :, :2])
    torch.testing.assert_close(released, masked * shares[..., None, None])
    scores = features.flatten(2) @ words[:, :, :2]
    torch.testing.assert_close(shares, scores.exp().sum(dim=2) / (scores.exp().sum(dim=2) + LENGTH - 2))


@pytest.mark.parametrize("read", ["context", "h"])
def test_the_channels_read_what_they_are_told_to(seeded, read):
    network = ControlGANGenerator(ControlGANConfig(**TINY, channels_read=read)).eval()
    refine, text, h = network.refine[0], make_text([2, 4]), torch.randn(2, 4, 8, 8)
    context, _ = global_attention(h, refine.to_values(text.words[..., None])[..., 0], text.mask)
    places = torch.einsum("pd,bdt->bpt", refine.to_places.weight[..., 0, 0], text.words)
    channels, _ = channel_attention(context if read == "context" else h, places, text.mask)
    expected = refine.grow(refine.residual(torch.cat([h, context, channels], dim=1)))
    torch.testing.assert_close(refine(h, text, torch.zeros(2, 4))[0], expected)


# -- the generator against a twin of one channel

def gated(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def twin_generator(noise: dict[str, Tensor], text: Text, width: int) -> list[Tensor]:
    """One doubling, two refinements of two residuals: all channels alike, and all places of a word."""
    def grown(x: Tensor) -> Tensor:
        x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        return gated(BN * mean_of(x, 3, padding=1))

    half = gated(text.sentence.mean(dim=1, keepdim=True))                       # mu and log sigma^2 alike
    condition = half + (half / 2).exp() * noise["eps"]
    h = gated(BN * torch.cat([condition, noise["z"]], dim=1).mean(dim=1))[:, None, None, None].expand(-1, 1, 4, 4)
    h = grown(h)
    images = [mean_of(h, 3, padding=1).tanh()]
    for _ in range(2):
        parts = [h, torch.zeros_like(h), torch.zeros_like(h)]
        for picture, mask in enumerate(text.mask):
            known = text.words[picture, :, mask].mean(dim=0)                    # of U and of F_k alike
            places = (width * h[picture, 0, :, :, None] * known).softmax(dim=-1)
            parts[1][picture, 0] = (places * known).sum(dim=-1)
            channels = (parts[1][picture].sum() * known).softmax(dim=-1)
            parts[2][picture, 0] = (channels * known).sum()
        for _ in range(2):
            added = BN * mean_of(gated(BN * mean_of(sum(parts) / 3, 3, padding=1)), 3, padding=1)
            parts = [part + added for part in parts]
        h = grown(sum(parts) / 3)
        images.append(mean_of(h, 3, padding=1).tanh())
    return images


def test_the_generator_agrees_with_a_twin_of_one_channel(seeded):
    network = ControlGANGenerator(ControlGANConfig(**TINY)).double().eval()
    make_constant(network)
    text = make_text([2, 5, 3])
    text = text._replace(sentence=3 * text.sentence.double(), words=3 * text.words.double())
    drawn = {name: 2 * values.double() for name, values in make_noise(network, 3).items()}
    with torch.no_grad():
        found = network(drawn, text).images
    for image, twin in zip(found, twin_generator(drawn, text, TINY["width"]), strict=True):
        torch.testing.assert_close(image, twin.expand(-1, 3, -1, -1), rtol=1e-7, atol=1e-9)
    assert found[-1].std() > 0.01


def test_noise_and_text_make_the_picture_bit_for_bit(seeded):
    network = ControlGANGenerator(ControlGANConfig(**TINY)).eval()
    noise, text = make_noise(network, 2), make_text([2, 5])
    image = network(noise, text).image
    assert torch.equal(network(noise, text).image, image)
    for name in ("z", "eps"):                       # both must be the same: one alone is another picture
        other = network({**noise, name: torch.randn_like(noise[name])}, text).image
        assert not torch.allclose(other, image)


# -- the word-level score

def test_the_word_level_score_agrees_with_a_loop_written_out(seeded):
    regions, text = torch.randn(3, DIM, 2, 3, dtype=torch.float64), make_text([2, 5, 1])
    words = text.words.double()
    found = word_level_correlation(regions, words, text.mask, 3.0, 2.0)
    for picture in range(3):
        n, e = regions[picture].flatten(1), words[picture, :, text.mask[picture]]           # [D, R], [D, T]
        alpha = (3.0 * (e.T @ n).softmax(dim=0)).softmax(dim=1)
        contexts = n @ alpha.T
        cosines = [float(contexts[:, i] @ e[:, i] / (contexts[:, i].norm() * e[:, i].norm()))
                   for i in range(e.shape[1])]
        assert float(found[picture]) == pytest.approx(math.log(sum(math.exp(2 * one) for one in cosines)))


def test_the_word_level_score_is_that_of_the_matching_models_own_pairs(seeded):
    regions, text = torch.randn(4, DIM, 3, 3), make_text([2, 5, 1, 3])
    own = word_scores(regions, text.words, text.mask, gamma3=1.0).diagonal()
    torch.testing.assert_close(word_level_correlation(regions, text.words, text.mask), own)


def test_a_weight_of_each_word_cancels(seeded):
    """So the paper's self-attention over the words, gamma', has no effect."""
    regions, text = torch.randn(2, DIM, 2, 2, dtype=torch.float64), make_text([5, 5])
    words = text.words.double()
    contexts, _ = func_attention(words, regions)
    weights = (words.mean(dim=2)[:, None] @ words).softmax(dim=2)                           # [B, 1, T]
    torch.testing.assert_close(word_cosines(contexts * weights, words), word_cosines(contexts, words))
    torch.testing.assert_close(word_cosines(1000 * contexts, words), word_cosines(contexts, words))


def test_the_papers_sum_cannot_be_taken_from_one(seeded):
    """L_corre = sum_i sigmoid(cos_i) is in [0.27 L, 0.73 L]: at four words and more, 1 - L_corre is never positive."""
    text = make_text([4, 4])
    contexts, _ = func_attention(text.words, torch.randn(2, DIM, 2, 2))
    sums = (word_cosines(contexts, text.words).sigmoid() * text.mask).sum(dim=1)
    lowest, highest = (4 / (1 + math.exp(-cosine)) for cosine in (-1, 1))
    assert lowest > 1 and ((lowest <= sums) & (sums <= highest)).all()


def test_the_filter_begins_with_what_the_matching_model_sees(seeded):
    regions = torch.randn(2, DIM, 3, 3)
    assert torch.equal(WordDiscriminators([8], DIM, 2, DIM)(regions), regions)


def test_values_in_the_padding_change_no_score(seeded):
    regions, text = torch.randn(2, DIM, 2, 2), make_text([2, 4])
    garbage = torch.where(text.mask[:, None], text.words, torch.randn_like(text.words))
    torch.testing.assert_close(word_level_correlation(regions, garbage, text.mask),
                               word_level_correlation(regions, text.words, text.mask))


def test_the_word_losses_by_hand():
    matched, mismatched = (torch.full((3,), math.log(p / (1 - p))) for p in (0.8, 0.3))
    assert float(word_discriminator_loss(matched, mismatched)) == pytest.approx(-(math.log(0.8) + math.log(0.7)) / 2)


# -- the perceptual loss

def test_the_perceptual_loss_sees_every_scale_behind_relu2_2(seeded):
    features = load_features("vgg16_relu2_2:random", normalise=False)
    for side in (64, 128, 256):
        assert features(torch.zeros(1, 3, side, side)).shape == (1, 128, side // 2, side // 2)
    task, image = make_task("released"), torch.rand(2, 3, 32, 32) * 2 - 1
    networks = BareNetworks(SimpleNamespace(players={}, frozen={"features": features}))
    scales = refining.pyramid(image, [8, 16, 32])
    batch = {"image": image, "painted": SimpleNamespace(images=scales)}
    assert float(task.perceptual(networks, batch)) == 0
    fakes = [scale + 0.1 for scale in scales]
    expected = sum(perceptual_loss(features(fake), features(real)) for fake, real in zip(fakes, scales, strict=True))
    found = task.perceptual(networks, {"image": image, "painted": SimpleNamespace(images=fakes)})
    assert float(found) == pytest.approx(float(expected) / 3) and float(found) > 0


# -- what learns

def make_task(mode: str) -> ControlGANTask:
    """A task without a run's folders: one small matching model for all that is frozen."""
    torch.manual_seed(5)
    task = ControlGANTask.__new__(ControlGANTask)
    task.config = SimpleNamespace(mode=mode, loss=ControlGANLossConfig())
    damsm = Damsm(DamsmConfig(num_text_tokens=9, text_length=LENGTH, dim=DIM, embedding_dim=3, trunk="small:2"))
    task.frozen = {"damsm": damsm.eval().requires_grad_(False),
                   "features": load_features("vgg16_relu1_2:random", normalise=False)}
    generator = ControlGANGenerator(ControlGANConfig(**TINY))
    torch.manual_seed(6)
    judge = (ScaleDiscriminators([8, 16, 32], DIM, width=2) if mode == "released"
             else WordDiscriminators([8, 16, 32], DIM, 2, DIM))
    task.players = {"generator": Player(generator, GANOptimizer()), "discriminator": Player(judge, GANOptimizer())}
    return task


def make_batch(task: ControlGANTask) -> dict:
    torch.manual_seed(7)
    text, other = make_text([2, 3, 4]), make_text([3, 4, 2])
    batch = {"image": torch.rand(3, 3, 32, 32) * 2 - 1, "text": text, "wrong_text": other, "matching_text": text,
             "wrong_matching_text": other, "class_id": torch.tensor([-1, -1, -1]), "caption": [""] * 3,
             "noise": make_noise(task.network, 3)}
    return {**batch, "painted": task.paint(BareNetworks(task), batch, 0)}


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: one.grad for name, one in module.named_parameters()}


def d_gradients(mode: str, loss_of) -> dict[str, Tensor | None]:
    task = make_task(mode)
    batch = make_batch(task)
    batch["painted"] = batch["painted"]._replace(images=[image.detach() for image in batch["painted"].images])
    loss_of(task)(task, BareNetworks(task), batch, 0).total.backward()
    return gradients(task.players["discriminator"].module)


def test_the_released_discriminators_learn_what_attngans_do():
    attngan = d_gradients("released", lambda task: MatchingTask.d_loss)
    released = d_gradients("released", lambda task: ControlGANTask.d_loss)
    assert attngan.keys() == released.keys() and all(grad.any() for grad in attngan.values())
    assert all(torch.equal(released[name], grad) for name, grad in attngan.items())


def test_the_papers_discriminators_also_learn_which_words_are_shown():
    attngan = d_gradients("released", lambda task: MatchingTask.d_loss)
    paper = d_gradients("paper", lambda task: ControlGANTask.d_loss)
    assert paper.keys() - attngan.keys() == {"regions.weight"} and paper["regions.weight"].any()
    assert all(torch.equal(paper[name], grad) for name, grad in attngan.items())


def g_gradients(mode: str, words: float) -> tuple[list[Tensor], ControlGANTask]:
    """Of the pictures and of the weights, as in the generator's phase: the discriminators' are not open."""
    task = make_task(mode)
    task.config.loss = ControlGANLossConfig(words=words)
    task.players["discriminator"].module.requires_grad_(False)
    batch = make_batch(task)
    for image in batch["painted"].images:
        image.retain_grad()
    task.g_loss(BareNetworks(task), batch, 0).total.backward()
    return [image.grad for image in batch["painted"].images], task


def test_words_teach_the_last_picture_through_a_filter_that_stands_still():
    without, _ = g_gradients("paper", words=0.0)
    found, task = g_gradients("paper", words=1.0)
    assert all(torch.equal(*pair) for pair in zip(found[:-1], without[:-1], strict=True))
    assert not torch.allclose(found[-1], without[-1])
    assert all(grad is None for grad in gradients(task.players["discriminator"].module).values())
    assert all(grad is not None and grad.any() for grad in gradients(task.network).values())
    assert all(grad is None for module in task.frozen.values() for grad in gradients(module).values())
    released, _ = g_gradients("released", words=1.0)                # which has no such term
    assert all(torch.allclose(*pair) for pair in zip(released, without, strict=True))


def test_the_generators_terms_are_weighed_as_the_config_says():
    task = make_task("paper")
    batch = make_batch(task)
    loss = task.g_loss(BareNetworks(task), batch, 0)
    weights = {"adversarial": 1, "damsm": 5, "perceptual": 1, "kl": 1, "words": 1}
    assert loss.parts.keys() == weights.keys()
    assert loss.total.item() == pytest.approx(sum(weight * float(loss.parts[name])
                                                  for name, weight in weights.items()), rel=1e-5)


def test_the_caption_that_a_picture_is_not_of_is_the_next_samples(monkeypatch, seeded):
    task, text = make_task("paper"), make_text([2, 3, 4])
    monkeypatch.setattr(MatchingTask, "prepare", lambda *arguments: {"matching_text": text})
    networks = SimpleNamespace(rank=0, world_size=1)
    found = task.prepare({}, networks, 0)["wrong_matching_text"]
    assert all(torch.equal(part, own.roll(-1, 0)) for part, own in zip(found, text, strict=True))
    task.config.mode = "released"
    assert task.prepare({}, networks, 0).keys() == {"matching_text"}
