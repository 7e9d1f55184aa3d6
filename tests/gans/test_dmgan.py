"""DM-GAN: the paper's sizes, the memory against a loop and its limits, its switches, spectral norms."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from bare import count, make_constant, mean_of
from published import Published
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

import gans.refining as refining
from gans.dmgan import DMGANConfig, DMGANGenerator, DMGANRun, DMGANTask, Memory, Remembered
from gans.layers import spectrally_normalised
from gans.refining import ScaleDiscriminators, discriminator_loss
from gans.text import Text

PUBLISHED = {"dmgan": Published(paintings=1, one_caption=True)}      # both players see the same fakes
DOUBLES = {}                                                          # its losses are those of gans/refining.py

BN = (1 + 1e-5) ** -0.5      # what a fresh BatchNorm multiplies by in evaluation mode
TINY = {"image_size": 32, "sentence_dim": 6, "word_dim": 6, "z_dim": 5, "condition_dim": 4, "width": 4}
WORDS, WIDTH, MEMORY, LENGTH = 6, 4, 5, 5
SWITCHES = list(product(("gated", "even", "words"), ("keys", "even"), ("values", "keys"),
                        ("gated", "concatenated", "added")))


def sized(build, *arguments, **options) -> nn.Module:
    """The network without its weights: they would fill the memory."""
    with torch.device("meta"):
        return build(*arguments, **options)


@pytest.fixture
def no_init(monkeypatch):
    monkeypatch.setattr(refining, "orthogonal_init", lambda module: None)


def make_text(lengths: list[int], dim: int = WORDS, total: int = LENGTH) -> Text:
    """Padding holds numbers, too: nothing may come of them."""
    mask = torch.arange(total)[None] < torch.tensor(lengths)[:, None]
    return Text(torch.randn(len(lengths), dim), torch.randn(len(lengths), dim, total), mask)


def make_noise(network: DMGANGenerator, batch: int) -> dict[str, Tensor]:
    return {name: torch.randn(batch, length) for name, length in network.noise_dims.items()}


def make_memory(**options) -> Memory:
    torch.manual_seed(0)
    return Memory(WORDS, WIDTH, MEMORY, **options).double()


def asked(lengths: tuple[int, ...] = (2, 5, 3)) -> tuple[Tensor, Tensor, Tensor]:
    """A map [3, 4, 2, 3], words [3, 6, 5] and their mask."""
    torch.manual_seed(1)
    text = make_text(list(lengths))
    return torch.randn(len(lengths), WIDTH, 2, 3, dtype=torch.float64), text.words.double(), text.mask


@pytest.fixture
def generator() -> DMGANGenerator:
    torch.manual_seed(0)
    return DMGANGenerator(DMGANConfig(**TINY))


# -- sizes

@pytest.mark.parametrize(("residuals", "total", "residual", "stage"), [
    (2, 21_449_042, 886_272, 1_092_161), (3, 22_335_314, 1_329_408, 1_535_297)])
def test_the_papers_generators_have_the_papers_parameters(no_init, residuals, total, residual, stage):
    network = sized(DMGANGenerator, DMGANConfig(residuals=residuals))
    assert count(network.start) == 19_156_736
    for refine in network.refine:
        memory = refine.memory
        assert [count(part) for part in (memory.word_gate, memory.map_gate, memory.write_map, memory.write_word,
                                         memory.to_key, memory.to_value, memory.respond)] == [
            256, 64, 8_320, 32_896, 8_256, 8_256, 129]
        assert (count(refine.residual), count(refine.grow), count(refine)) == (residual, 147_712, stage)
    assert count(network) == total


def test_the_papers_discriminators_have_the_papers_parameters(no_init):
    network = sized(ScaleDiscriminators, [64, 128, 256], 256, DMGANRun.model_fields["discriminator"].default.width,
                    spectral=True)
    assert [count(scale) for scale in network.scales] == [1_878_242, 5_155_810, 18_264_546]


def test_the_runs_defaults_are_the_papers(no_init, monkeypatch):
    """The task builds the spectral discriminators, and AttnGAN's where that is asked for."""
    sizes, task = DMGANConfig(), DMGANTask.__new__(DMGANTask)
    config = DMGANRun.model_construct(discriminator=DMGANRun.model_fields["discriminator"].default)
    with torch.device("meta"):
        assert count(task.make_discriminator(config, sizes).scales[0]) == 1_878_242
        config.__dict__["discriminator"] = config.discriminator.model_copy(update={"spectral": False, "width": 64})
        assert count(task.make_discriminator(config, sizes).scales[0]) == 6_313_730
    loss = DMGANRun.model_fields["loss"].default
    assert (loss.kl, loss.damsm) == (1, 5) and DMGANRun.model_fields["generator_optimizer"].default.ema == 0.999


def test_shapes_of_pictures_and_attention(generator):
    painted = generator(make_noise(generator, 2), make_text([3, 5]))
    assert [tuple(image.shape) for image in painted.images] == [(2, 3, side, side) for side in (8, 16, 32)]
    assert [tuple(maps.shape) for maps in painted.attention] == [(2, LENGTH, 8, 8), (2, LENGTH, 16, 16)]
    images, seen = generator.eval().paint(make_noise(generator, 2), make_text([2, 4]))
    assert images.shape == (2, 3, 32, 32) and not images.requires_grad
    assert list(seen) == ["image_8", "image_16", "image_32", "attention_8", "attention_16"]


# -- the memory

def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def by_a_loop(memory: Memory, h: Tensor, words: Tensor, allowed) -> dict[str, Tensor]:
    """Word by word and place by place, in numbers; ``allowed(picture, place, word)``."""
    weights = {name: tensor.squeeze(-1).squeeze(-1) for name, tensor in memory.named_parameters()}

    def embedded(name: str, vector: Tensor) -> Tensor:
        return (weights[f"{name}.0.weight"] @ vector + weights[f"{name}.0.bias"]).clamp(min=0)

    batch, channels, height, width = h.shape
    length = words.shape[2]
    shapes = {"gate": (1, length), "memory": (MEMORY, length), "key": (channels, length), "value": (channels, length),
              "attention": (length, height, width), "read": (channels, height, width), "response": (1, height, width),
              "fused": (channels, height, width)}
    found = {name: torch.zeros(batch, *shape, dtype=h.dtype) for name, shape in shapes.items()}
    for b in range(batch):
        described = h[b].flatten(1).sum(dim=1) / (height * width)
        for t in range(length):
            word = words[b, :, t]
            gate = sigmoid(float(weights["word_gate.weight"][0] @ word + weights["map_gate.weight"][0] @ described))
            written = gate * embedded("write_word", word) + (1 - gate) * embedded("write_map", described)
            found["gate"][b, 0, t], found["memory"][b, :, t] = gate, written
            found["key"][b, :, t] = embedded("to_key", written)
            found["value"][b, :, t] = embedded("to_value", written)
        for place in range(height * width):
            y, x = divmod(place, width)
            here = h[b, :, y, x]
            likely = {t: math.exp(float(found["key"][b, :, t] @ here)) for t in range(length) if allowed(b, place, t)}
            for t, weight in likely.items():
                found["attention"][b, t, y, x] = weight / sum(likely.values())
                found["read"][b, :, y, x] += weight / sum(likely.values()) * found["value"][b, :, t]
            read = found["read"][b, :, y, x]
            gate = sigmoid(float(weights["respond.weight"][0] @ torch.cat([here, read]) + weights["respond.bias"]))
            found["response"][b, 0, y, x] = gate
            found["fused"][b, :, y, x] = gate * read + (1 - gate) * here
    return found


@pytest.mark.parametrize("released", [False, True])
def test_the_memory_agrees_with_a_loop_written_out(released):
    memory = make_memory(released_mask=released)
    h, words, mask = asked()
    with torch.no_grad():
        found = memory(h, words, mask)
        expected = by_a_loop(memory, h, words, lambda b, place, t: mask[(b * 6 + place) % 3 if released else b, t])
    for name, values in found._asdict().items():
        torch.testing.assert_close(values, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    assert 0 < found.gate.min() < found.gate.max() < 1 and found.attention.std() > 0.01


def test_attention_sums_to_one_and_nothing_written_is_below_zero():
    h, words, mask = asked()
    found = make_memory()(h, words, mask)
    torch.testing.assert_close(found.attention.sum(dim=1), torch.ones_like(found.attention[:, 0]))
    assert not found.attention.movedim(1, -1)[~mask[:, None, None].expand(-1, 2, 3, -1)].any()
    assert all((part >= 0).all() and (part > 0).any() for part in (found.memory, found.key, found.value))


def test_the_response_gates_ends_are_the_map_and_what_was_read():
    memory, (h, words, mask) = make_memory(), asked()
    with torch.no_grad():
        memory.respond.bias.fill_(-800.0)
        assert torch.equal(memory(h, words, mask).fused, h)
        memory.respond.bias.fill_(800.0)
        found = memory(h, words, mask)
    assert torch.equal(found.fused, found.read) and not torch.equal(found.read, h)


def test_what_is_written_hands_the_map_no_gradient_but_follows_it():
    memory, (h, words, mask) = make_memory(), asked()
    h.requires_grad_()
    found = memory(h, words, mask)
    written = (found.gate, found.memory, found.key, found.value)
    assert all(torch.autograd.grad(part.sum(), h, retain_graph=True, allow_unused=True)[0] is None for part in written)
    (gradient,) = torch.autograd.grad(found.fused.sum(), h, retain_graph=True)
    assert gradient.abs().min() > 0                 # query, response gate and what stays of the map
    found.fused.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in memory.parameters())
    other = memory(h + 1, words, mask)
    assert all(not torch.allclose(one, two) for one, two in zip(written, other[:4], strict=True))


def test_the_maps_gradient_is_that_of_differences_with_the_writing_held():
    """Query, response gate and (1 - gate) h: the loop's own gradient, with the memory as it was written for h."""
    memory, (h, words, mask) = make_memory(), asked((3,))
    written = memory.write(h, words)
    memory.write = lambda *_: tuple(part.detach() for part in written)
    assert torch.autograd.gradcheck(lambda x: memory(x, words, mask).fused, h.requires_grad_(), fast_mode=True)


@pytest.mark.parametrize(("writing", "addressing", "reading", "response"), SWITCHES)
def test_every_part_can_be_switched_off_and_no_weight_is_left_without_a_use(writing, addressing, reading, response):
    memory = make_memory(writing=writing, addressing=addressing, reading=reading, response=response)
    h, words, mask = asked()
    found: Remembered = memory(h, words, mask)
    found.fused.square().sum().backward()
    assert all(weight.grad is not None for weight in memory.parameters())
    assert found.fused.shape == (3, WIDTH * (2 if response == "concatenated" else 1), 2, 3)
    assert (found.gate is None) == (writing != "gated") and (found.response is None) == (response != "gated")

    written, described = words[..., None], h.mean(dim=(2, 3), keepdim=True)
    word = memory.write_word(written)[..., 0]
    picture = None if writing == "words" else memory.write_map(described)[..., 0].expand_as(word)
    share = {"gated": found.gate, "even": 0.5, "words": 1.0}[writing]
    torch.testing.assert_close(found.memory, word if picture is None else share * word + (1 - share) * picture)
    if addressing == "even":
        even = (mask / mask.sum(dim=1, keepdim=True)).double()
        torch.testing.assert_close(found.attention, even[:, :, None, None].expand(-1, -1, 2, 3))
    assert (found.value is found.key) == (reading == "keys")
    torch.testing.assert_close(found.read, torch.einsum("bthw,bct->bchw", found.attention, found.value))
    if response == "concatenated":
        assert torch.equal(found.fused, torch.cat([found.read, h], dim=1))
    elif response == "added":
        assert torch.equal(found.fused, found.read + h)


@pytest.mark.parametrize("response", ["gated", "concatenated", "added"])
def test_a_generator_paints_with_any_response(response):
    network = DMGANGenerator(DMGANConfig(**TINY, response=response, memory_dim=3))
    assert network(make_noise(network, 2), make_text([2, 5])).image.shape == (2, 3, 32, 32)
    assert network.refine[0].memory.to_value[0].weight.shape[:2] == (TINY["width"], 3)


def test_padding_and_the_order_of_words_change_no_picture(generator):
    generator.eval()
    text, drawn = make_text([2, 5, 4]), make_noise(generator, 3)
    painted = generator(drawn, text)
    longer = generator(drawn, text._replace(words=torch.cat([text.words, torch.randn(3, WORDS, 2)], dim=2),
                                            mask=F.pad(text.mask, (0, 2))))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = generator(drawn, text._replace(words=text.words[:, :, order], mask=text.mask[:, order]))
    for image, padded, other in zip(painted.images, longer.images, shuffled.images, strict=True):
        torch.testing.assert_close(image, padded)
        torch.testing.assert_close(image, other)


# -- the networks against a twin of one channel

def gated(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def twin_up(x: Tensor) -> Tensor:
    return gated(BN * mean_of(x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3), 3, padding=1))


def twin_memory(h: Tensor, words: Tensor, mask: Tensor, width: int) -> Tensor:
    """``h`` [B, 1, H, W], equal in all channels; ``words`` [B, T], the mean over theirs."""
    described = h.mean(dim=(1, 2, 3))[:, None]
    gate = (words + described).sigmoid()
    written = gate * words.relu() + (1 - gate) * described.relu()           # key and value alike
    scores = width * h[..., None] * written[:, None, None, None]
    attention = scores.masked_fill(~mask[:, None, None, None], -math.inf).softmax(dim=-1)
    read = (attention * written[:, None, None, None]).sum(dim=-1)
    response = ((h + read) / 2).sigmoid()
    return response * read + (1 - response) * h


def twin_generator(noise: dict[str, Tensor], text: Text, width: int, residuals: int) -> list[Tensor]:
    half = gated(text.sentence.mean(dim=1, keepdim=True))
    condition = half + (half / 2).exp() * noise["eps"]
    h = gated(BN * torch.cat([condition, noise["z"]], dim=1).mean(dim=1))[:, None, None, None].expand(-1, 1, 4, 4)
    h = twin_up(h)
    images = [mean_of(h, 3, padding=1).tanh()]
    for _ in range(2):
        h = twin_memory(h, text.words.mean(dim=1), text.mask, width)
        for _ in range(residuals):
            h = h + BN * mean_of(gated(BN * mean_of(h, 3, padding=1)), 3, padding=1)
        h = twin_up(h)
        images.append(mean_of(h, 3, padding=1).tanh())
    return images


def test_the_generator_agrees_with_a_twin_of_one_channel():
    torch.manual_seed(3)
    network = DMGANGenerator(DMGANConfig(**TINY)).double().eval()
    make_constant(network)
    text = make_text([2, 5, 3])
    text = text._replace(sentence=3 * text.sentence.double(), words=3 * text.words.double())
    drawn = {name: 2 * values.double() for name, values in make_noise(network, 3).items()}
    with torch.no_grad():
        found = network(drawn, text).images
    for image, twin in zip(found, twin_generator(drawn, text, TINY["width"], 2), strict=True):
        torch.testing.assert_close(image, twin.expand(-1, 3, -1, -1), rtol=1e-7, atol=1e-9)
    assert found[-1].std() > 0.01


# -- the discriminators

def make_discriminators(sides: list[int], width: int = 2) -> ScaleDiscriminators:
    torch.manual_seed(0)
    return ScaleDiscriminators(sides, WORDS, width, spectral=True).double()


def convolutions(network: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: part for name, part in network.named_modules() if isinstance(part, nn.Conv2d)}


def is_question(name: str) -> bool:
    return name.split(".")[2] in ("conditional", "unconditional")


def singular(weight: Tensor) -> Tensor:
    return torch.linalg.svdvals(weight.flatten(1))


def test_all_weights_but_those_of_the_questions_have_spectral_norms_and_none_a_batch_normalisation():
    network = make_discriminators([16, 64, 128])
    assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in network.modules())
    parts = convolutions(network)
    assert {name for name, part in parts.items() if not is_parametrized(part)} == \
        {name for name in parts if is_question(name)} != set()
    assert all(part.bias is not None for part in parts.values())
    trained = {name for name, _ in network.named_parameters()}
    assert not any(name.endswith(("_u", "_v")) for name in trained)
    again = spectrally_normalised(make_discriminators([16]))        # as stabiliser.spectral_norm asks for it
    assert all(len(part.parametrizations.weight) == 1 for part in convolutions(again).values())


def test_the_first_weights_are_orthogonal_and_their_norms_are_held_at_one():
    network = make_discriminators([16])
    for name, part in convolutions(network).items():
        if not is_question(name):
            own = singular(part.parametrizations.weight.original)
            torch.testing.assert_close(own, torch.ones_like(own), rtol=1e-5, atol=0)
            with torch.no_grad():
                part.parametrizations.weight.original.normal_(0, 3).mul_(torch.arange(
                    1, 1 + len(part.weight), dtype=torch.float64)[:, None, None, None])
    image, sentence = torch.randn(2, 3, 16, 16, dtype=torch.float64), torch.randn(2, WORDS, dtype=torch.float64)
    norms = []
    for _ in range(200):
        network([image], sentence)
        norms.append([float(singular(part.weight.detach())[0]) for name, part in convolutions(network).items()
                      if not is_question(name)])
    assert max(abs(norm - 1) for norm in norms[-1]) < 1e-6
    assert max(abs(norm - 1) for norm in norms[0]) > 1e-4


def test_the_normalisation_of_a_weight_by_hand():
    """One round from the vectors before, u first; sigma = u W v hands its gradient to W, not to u and v."""
    part = convolutions(make_discriminators([16]))["scales.0.features.1.0"]
    held = part.parametrizations.weight
    with torch.no_grad():
        held.original.normal_()
    weight = held.original.detach().clone().flatten(1).requires_grad_()
    v = held[0]._v.clone()
    u = F.normalize(weight.detach() @ v, dim=0)
    v = F.normalize(weight.detach().T @ u, dim=0)
    expected = weight / (u @ weight @ v)
    found = part.weight
    torch.testing.assert_close(found.flatten(1), expected)
    direction = torch.randn_like(found)
    (expected * direction.flatten(1)).sum().backward()
    (found * direction).sum().backward()
    torch.testing.assert_close(held.original.grad.flatten(1), weight.grad)


def test_a_picture_is_judged_whatever_the_others_are():
    network = make_discriminators([32, 64])
    images = [torch.randn(3, 3, side, side, dtype=torch.float64) for side in (32, 64)]
    sentence = torch.randn(3, WORDS, dtype=torch.float64)
    network.eval()
    together = network(images, sentence)
    alone = network([image[1:2] for image in images], sentence[1:2])
    for all_of_them, one in zip(together, alone, strict=True):
        torch.testing.assert_close(all_of_them.matched[1:2], one.matched)
        torch.testing.assert_close(all_of_them.alone[1:2], one.alone)


def twin_scores(image: Tensor, sentence: Tensor, width: int, narrowings: int) -> tuple[Tensor, Tensor]:
    """A constant matrix [C, N] of 1 / N has the norm sqrt(C / N)."""
    def step(x: Tensor, inputs: int, outputs: int, size: int, stride: int) -> Tensor:
        norm = math.sqrt(outputs / (inputs * size * size))
        return F.leaky_relu(mean_of(x, size, stride, 1) / norm, 0.2)

    x, channels = step(image.mean(dim=1, keepdim=True), 3, width, 4, 2), width
    while x.shape[-1] > 4:
        x, channels = step(x, channels, 2 * channels, 4, 2), 2 * channels
    for _ in range(narrowings):
        x, channels = step(x, channels, channels // 2, 3, 1), channels // 2
    said, dim = sentence.mean(dim=1)[:, None, None, None], sentence.shape[1]
    joined = (channels * x + dim * said) / (channels + dim)
    return mean_of(x, 4).flatten(), mean_of(step(joined, channels + dim, channels, 3, 1), 4).flatten()


def test_the_discriminators_agree_with_a_twin_of_one_channel():
    network = make_discriminators([64, 128, 256])
    for part in convolutions(network).values():
        weight = part.parametrizations.weight.original if is_parametrized(part) else part.weight
        nn.init.constant_(weight, 1 / weight[0].numel())
        nn.init.zeros_(part.bias)
    torch.manual_seed(4)
    images = [torch.rand(2, 3, side, side, dtype=torch.float64) - 0.4 for side in (64, 128, 256)]
    sentence, other = torch.randn(2, 2, WORDS, dtype=torch.float64)
    with torch.no_grad():
        for level, scores in enumerate(network(images, sentence, other)):
            alone, pair = twin_scores(images[level], sentence, 2, narrowings=level)
            torch.testing.assert_close(scores.alone, alone, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(scores.matched, pair, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(scores.mismatched, twin_scores(images[level], other, 2, level)[1])


# -- what learns

def test_the_discriminators_loss_leaves_the_generator_alone(generator):
    text = make_text([2, 3])
    judge = ScaleDiscriminators([8, 16, 32], WORDS, 2, spectral=True)
    painted = generator(make_noise(generator, 2), text)
    real = judge([torch.randn_like(image) for image in painted.images], text.sentence, text.sentence[1:])
    fake = judge([image.detach() for image in painted.images], text.sentence)
    sum(discriminator_loss(*scores) for scores in zip(real, fake, strict=True)).backward()
    assert all(one.grad is None for one in generator.parameters())
    assert all(one.grad is not None for one in judge.parameters())
