"""PPGN: the published generator, the chain against a loop and by its checks, conditions, losses, who learns."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from bare import BareNetworks, LetterEncoder, count, loss_of
from published import Published
from pydantic import ValidationError
from torch import Tensor, nn

from dalle.config import load_config
from dalle.errors import UserError
from dalle.store import load_tokenizer
from gans import ppgn
from gans.generator import GANGenerator, load_gan
from gans.ppgn import (
    Companions,
    PPGNConfig,
    PPGNDiscriminator,
    PPGNDiscriminatorConfig,
    PPGNGenerator,
    PPGNLossConfig,
    PPGNRun,
    PPGNTask,
    discriminator_loss,
    generator_loss,
    load_companions,
    squared_error,
)
from gans.ppgn_encoder import PPGNEncoder, PPGNEncoderConfig
from gans.stream import Stream, StreamConfig, StreamNetwork
from gans.task import filled

PUBLISHED = {"ppgn": Published(zero=2, paintings=1, normalised=False, compares=False)}     # both see the same picture
DOUBLES = {
    ppgn.squared_error: (((3, 2, 2), (3, 2, 2)), ppgn.squared_error),
    ppgn.discriminator_loss: (((3,), (3,)), ppgn.discriminator_loss),
    ppgn.generator_loss: (((3,), (), ()), lambda a, b, c: ppgn.generator_loss(a, (0.5, b), (2.0, c), adversarial=3.0)),
}

SIDE, CLASSES, DIM, BATCH = 32, 3, 8, 4
ENCODER = {"image_size": SIDE, "crop": None, "num_classes": CLASSES, "layout": "small", "channels": (4, 4, 4, 6),
           "code_dim": DIM, "hidden_dim": 8, "dropout": 0.0}
CHAIN = {"steps": 6, "lr": 0.5}
GENERATOR = {"stem_channels": 6, "channels": ((6, 4), (4,)),
             **{f"by_{name}": CHAIN for name in ("class", "caption", "clip")}}
DISCRIMINATOR = {"layers": ((3, 2, 4), (3, 2, 4)), "code_dims": (6, 5), "hidden_dim": 6, "dropout": 0.0}


class Speller:
    """A captioner of one word a letter: how bright the picture is in the channel of each of a, b and c."""

    def ids(self, captions) -> Tensor:
        return torch.tensor([[caption.count(letter) for letter in "abc"] for caption in captions])

    def log_likelihood(self, images: Tensor, ids: Tensor) -> Tensor:
        return (images.mean(dim=(2, 3)) * ids).sum(dim=1)

    def warnings(self, captions) -> list[str]:
        return [f"{caption}: too long" for caption in captions if len(caption) > 9]


@pytest.fixture(autouse=True)
def letters(monkeypatch):
    monkeypatch.setattr("gans.task.load_text_encoder", lambda name: LetterEncoder())


@pytest.fixture
def encoder_folder(tmp_path) -> Path:
    torch.manual_seed(3)
    PPGNEncoder(PPGNEncoderConfig(**ENCODER)).save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder"


@pytest.fixture
def make_task(encoder_folder):
    def make(**changes) -> PPGNTask:
        torch.manual_seed(0)
        settings = {"name": "ppgn", "encoder": str(encoder_folder), "text_encoder": "letters",
                    "data": {"train": "x", "image_size": SIDE}, "generator": GENERATOR,
                    "discriminator": DISCRIMINATOR, "train": {"batch_size": BATCH}, **changes}
        return PPGNTask(PPGNRun(**settings))

    return make


@pytest.fixture
def captioner_folder(clip_folder, tmp_path) -> Path:
    """A captioner that was never trained, with the tokenizer of the CLIP."""
    tokenizer = load_tokenizer(clip_folder / "model" / "tokenizer")
    network = StreamNetwork(StreamConfig(num_text_tokens=tokenizer.vocab_size, text_length=6, trunk="small:4",
                                         embedding_dim=8, hidden_dim=8))
    Stream(network, tokenizer).save(tmp_path / "captioner")
    return tmp_path / "captioner"


def make_batch() -> dict:
    source = torch.Generator().manual_seed(1)
    return {"image": torch.randint(0, 256, (BATCH, 3, SIDE, SIDE), dtype=torch.uint8, generator=source),
            "class_id": torch.tensor([0, 2, 1, 2]), "caption": ["a", "c", "b", "cc"]}


class Networks(BareNetworks):
    """With the mean over one process."""

    def all_reduce_mean(self, value: Tensor) -> Tensor:
        return value


def sized(build, *arguments) -> nn.Module:
    """The network without its weights: they would fill the memory."""
    with torch.device("meta"):
        return build(*arguments)


# -- the networks

def test_the_generator_has_the_published_layers():
    network = sized(PPGNGenerator, PPGNConfig())
    assert count(network) == 56_097_891
    sizes = []
    for layer in [*network.stem, *network.body]:
        layer.register_forward_hook(lambda module, inputs, output: sizes.append((module, tuple(output.shape[1:]))))
    assert network(torch.empty(2, 4096, device="meta")).shape == (2, 3, 256, 256)
    assert [size for module, size in sizes if isinstance(module, nn.Linear)] == [(4096,)] * 3
    assert [size for module, size in sizes if isinstance(module, nn.ConvTranspose2d)] == [
        (256, 8, 8), (512, 8, 8), (256, 16, 16), (256, 16, 16), (128, 32, 32), (128, 32, 32), (64, 64, 64),
        (32, 128, 128), (3, 256, 256)]
    learned = [module for module, _ in sizes if isinstance(module, (nn.Linear, nn.ConvTranspose2d))]
    followed = [module for module, _ in sizes if not isinstance(module, nn.Unflatten)]
    # every layer but the last is followed by LeakyReLU 0.3, and nothing else is there
    assert followed[::2] == learned and followed[-1] is learned[-1]
    assert all(isinstance(part, nn.LeakyReLU) and part.negative_slope == 0.3 for part in followed[1::2])


def test_the_discriminator_has_deepsims_layers():
    network = sized(PPGNDiscriminator, PPGNDiscriminatorConfig(), 4096)
    sizes = []
    for layer in network.places:
        layer.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(output.shape[1:])))
    logits = network(torch.empty(2, 3, 256, 256, device="meta"), torch.empty(2, 4096, device="meta"))
    assert logits.shape == (2,)
    assert sizes[::2] == [(32, 64, 64), (64, 64, 64), (128, 32, 32), (256, 32, 32), (256, 16, 16)]
    assert [part.in_features for part in network.modules() if isinstance(part, nn.Linear)] == [4096, 1024, 768, 512]


def small_generator(**changes) -> PPGNGenerator:
    torch.manual_seed(0)
    return PPGNGenerator(PPGNConfig(**{**GENERATOR, "image_size": SIDE, "code_dim": DIM, "num_classes": CLASSES,
                                       "sentence_dim": DIM, **changes}))


def test_a_transposed_layer_against_a_loop():
    """[1, 1, 2, 2] by the kernel of 4 at stride 2 and padding 1: each pixel lays its kernel down, and they add up."""
    layer = ppgn.doubling(1, 1).double()
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64)
    expected = torch.zeros(6, 6, dtype=torch.float64)
    for row in range(2):
        for column in range(2):
            expected[2 * row : 2 * row + 4, 2 * column : 2 * column + 4] += x[0, 0, row, column] * layer.weight[0, 0]
    torch.testing.assert_close(layer(x)[0, 0], expected[1:5, 1:5] + layer.bias)


def test_a_picture_follows_from_its_own_code():
    network, codes = small_generator(), torch.rand(5, DIM) * 3
    images = network(codes)
    torch.testing.assert_close(network(codes[[3, 0]]), images[[3, 0]])
    assert images.std() > 0.1 and not torch.allclose(images[0], images[1])
    judge = PPGNDiscriminator(PPGNDiscriminatorConfig(**DISCRIMINATOR), DIM)
    logits = judge(images, codes)
    torch.testing.assert_close(judge(images[[3, 0]], codes[[3, 0]]), logits[[3, 0]])
    assert not torch.allclose(judge(images, codes.flip(0)), logits)


@pytest.mark.parametrize(("size", "channels"), [(48, ((4,), (4,), (4,), (4,))), (4, ((4,), (4,)))])
def test_impossible_sizes(size, channels):
    with pytest.raises(ValidationError, match="give a multiple of"):
        PPGNConfig(image_size=size, channels=channels)


# -- conditions

def generator_with(encoder_folder: Path, captioner: Speller | None = None, clip: Path | None = None,
                   **changes) -> PPGNGenerator:
    network = small_generator(**changes).eval()
    found = load_companions(str(encoder_folder), clip=None if clip is None else str(clip))
    network.companions = found._replace(captioner=captioner)
    return network


def judged(network: PPGNGenerator, condition: str, captions: list[str], text=None) -> Tensor:
    """What the condition says of three pictures of noise, with its gradient to them."""
    images = torch.randn(len(captions), 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = network.options(condition=condition)
    found = network.conditions(captions, text, **options)["log_condition"](images)
    (gradient,) = torch.autograd.grad(found.sum(), images)
    assert gradient.flatten(1).any(dim=1).all()
    return found


def test_the_default_is_what_reads_most_of_a_caption(encoder_folder, clip_folder):
    for captioner, clip, expected in ((Speller(), clip_folder, "caption"), (None, clip_folder, "clip"),
                                      (None, None, "class")):
        network = generator_with(encoder_folder, captioner, clip)
        assert network.options()["condition"] == expected
        assert network.options(condition="class")["condition"] == "class"
    with pytest.raises(UserError, match="condition 'clip' is not one of this model: class"):
        network.options(condition="clip")


def test_the_published_chains():
    for name, chain in (("class", (200, 1e-5, 1.0, 1e-17, 1.0, 1.0)), ("caption", (200, 1e-3, 1.0, 1e-17, 1.0, 1e-10))):
        assert tuple(getattr(PPGNConfig(), f"by_{name}").model_dump().values()) == chain


def test_options_are_read_and_checked(encoder_folder):
    network = generator_with(encoder_folder, by_class={"steps": 9, "lr": 0.5})
    assert network.options() == {"condition": "class", "steps": 9, "e1": 1e-5, "e2": 1.0, "e3": 1e-17, "lr": 0.5,
                                 "final_fraction": 1.0}
    given = network.options(steps="12", e1="0.1", lr=2)
    assert (given["steps"], given["e1"], given["lr"], given["e2"]) == (12, 0.1, 2.0, 1.0)
    for wrong, words in (({"steps": "few"}, "steps=few"), ({"e1": -1}, "e1=-1"), ({"steps": 0}, "steps=0"),
                         ({"guidance": 3}, "guidance is not an option of a ppgn model: condition, steps, e1, e2")):
        with pytest.raises(UserError, match=words):
            network.options(**wrong)


def test_classes_by_name_and_by_the_nearest_prototype(encoder_folder):
    network, text = generator_with(encoder_folder), LetterEncoder()
    network.prototypes.add(text(["a", "b"]).sentence, torch.tensor([0, 2]))
    captions = ["class:2", "aa", "b"]
    found = judged(network, "class", captions, text(captions))
    images = torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = network.companions.encoder(images).classes.log_softmax(dim=1)[torch.arange(3), torch.tensor([2, 0, 2])]
    torch.testing.assert_close(found, expected)
    with pytest.raises(UserError, match="class:3 is out of range"):
        judged(network, "class", ["class:3"])
    with pytest.raises(UserError, match="ask for class:0 to class:2, or train it with a text_encoder"):
        judged(small := generator_with(encoder_folder), "class", ["a red circle"])
    assert small.config.class_gradient == "target"


def test_captions_by_what_a_captioner_would_say(encoder_folder):
    network = generator_with(encoder_folder, Speller())
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    means = images.mean(dim=(2, 3))
    torch.testing.assert_close(judged(network, "caption", ["aab", "c"]),
                               torch.stack([2 * means[0, 0] + means[0, 1], means[1, 2]]))
    with pytest.raises(UserError, match="--option condition=class"):
        judged(network, "caption", ["class:1"])
    assert network.caption_warnings(["aaaa aaaa aaaa", "a"]) == ["aaaa aaaa aaaa: too long"]


def test_captions_by_what_a_clip_finds_alike(encoder_folder, clip_folder):
    network = generator_with(encoder_folder, clip=clip_folder)
    captions = ["a red circle", "two pink rings"]
    found = judged(network, "clip", captions)
    clip = network.companions.clip
    images = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    output = clip.model((images + 1) / 2, clip.ids(captions))
    cosines = (output.image_features * output.text_features).sum(dim=1)
    torch.testing.assert_close(found, output.logit_scale * cosines)


def test_a_chain_paints_what_it_climbs_towards(encoder_folder):
    """More red for a, more blue for c; and the strip shows the way there."""
    painter = GANGenerator(generator_with(encoder_folder, Speller(), by_caption={"steps": 30, "lr": 0.3}), None)
    images, details = painter.generate_with_details(["aaa", "ccc"], [1, 1])
    red, blue = images.float().mean(dim=(2, 3))[:, [0, 2]]
    assert red[0] > blue[0] and blue[1] > red[1]
    strip = details[0]["pictures"]["chain"]
    assert strip.shape == (3, SIDE, 7 * SIDE) and torch.equal(strip[..., -SIDE:], images[0])
    same = details[1]["pictures"]["chain"][..., :SIDE]
    assert torch.equal(strip[..., :SIDE], same) and not torch.equal(strip, details[1]["pictures"]["chain"])


def test_a_short_chain_shows_what_it_has(encoder_folder):
    painter = GANGenerator(generator_with(encoder_folder, Speller()), None)
    _, details = painter.generate_with_details(["a"], [0], steps=2)
    assert details[0]["pictures"]["chain"].shape == (3, SIDE, 3 * SIDE)


def test_a_picture_follows_from_its_seed_with_the_noise_of_its_chain(encoder_folder):
    painter = GANGenerator(generator_with(encoder_folder, Speller()), None)
    options = {"e3": 0.01, "steps": 5}
    images = painter.generate(["a", "b", "a"], [1, 2, 3], **options)
    assert torch.equal(painter.generate(["b"], [2], **options)[0], images[1])
    assert not torch.equal(images[0], images[2])
    assert not torch.equal(painter.generate(["b"], [2], steps=5, e3=0.0)[0], images[1])


# -- the losses

def test_the_losses_by_hand():
    made, real = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [3.0, 0.0]])
    assert float(squared_error(made, real)) == pytest.approx((1 + 4 + 9) / 2)
    assert float(squared_error(made.view(2, 1, 1, 2), real.view(2, 1, 1, 2))) == pytest.approx(7)
    zero = torch.zeros(3)
    assert float(discriminator_loss(zero, zero)) == pytest.approx(2 * math.log(2))
    assert float(generator_loss(zero, (0.5, torch.tensor(4.0)), (2.0, torch.tensor(3.0)), adversarial=10)) == \
        pytest.approx(10 * math.log(2) + 2 + 6)
    real, fake = torch.tensor([2.0, -1.0]), torch.tensor([0.5, -3.0])
    expected = sum(math.log(1 + math.exp(x)) for x in (-2, 1, 0.5, -3)) / 2
    assert float(discriminator_loss(real, fake)) == pytest.approx(expected, rel=1e-6)


def test_the_weights_are_deepsims_in_another_range():
    weights = PPGNLossConfig()
    # a picture of 0..255 differs by 127.5 times as much as one of -1..1
    assert weights.image * (1 / 127.5) ** 2 == pytest.approx(2e-6)
    assert (weights.pooled, weights.code, weights.adversarial, weights.pause) == (0.01, 0.01, 100, 0.1)


# -- the step

def test_codes_of_pictures_are_painted_without_noise(make_task):
    task = make_task()
    networks = Networks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    assert prepared["noise"] == {}
    seen = task.frozen["encoder"](prepared["image"])
    assert torch.equal(prepared["seen"].code, seen.code) and not prepared["seen"].code.requires_grad
    painted = task.paint(networks, prepared, 0).image
    torch.testing.assert_close(painted, task.network(seen.code))


def test_who_learns_from_what(make_task):
    task = make_task()
    networks = Networks(task)
    encoder = task.frozen["encoder"].requires_grad_(False).eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    prepared = task.prepare(make_batch(), networks, 0)
    generator, discriminator = networks["generator"], networks["discriminator"]
    loss_of(task, "discriminator", networks, prepared).total.backward()
    assert all(parameter.grad is None for parameter in generator.parameters())
    assert all(parameter.grad.any() for parameter in discriminator.parameters())
    for alone in ("image", "pooled", "code", "adversarial"):
        weights = {name: float(name == alone) for name in ("image", "pooled", "code", "adversarial")}
        one = make_task(loss=weights)
        loss_of(one, "generator", Networks(one), one.prepare(make_batch(), Networks(one), 0)).total.backward()
        # by each term alone, and for pool5 and fc6 through the encoder, which stays as it is
        assert all(parameter.grad.any() for parameter in one.network.parameters()), alone
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def test_the_terms_are_weighted_as_said(make_task):
    weights = {"image": 0.5, "pooled": 0.25, "code": 2.0, "adversarial": 3.0}
    task = make_task(loss=weights)
    networks = Networks(task)
    prepared = task.prepare(make_batch(), networks, 0)
    loss = loss_of(task, "generator", networks, prepared)
    image, seen = task.network(prepared["seen"].code), prepared["seen"]
    made = task.frozen["encoder"](image)
    parts = {"image": (image - prepared["image"]).square().sum() / BATCH,
             "pooled": (made.pooled - seen.pooled).square().sum() / BATCH,
             "code": (made.code - seen.code).square().sum() / BATCH,
             "adversarial": nn.functional.softplus(-networks["discriminator"](image, seen.code)).mean()}
    for name, value in parts.items():
        torch.testing.assert_close(loss.parts[name], value.detach())
    torch.testing.assert_close(loss.total, sum(weights[name] * value for name, value in parts.items()))


@pytest.mark.parametrize(("discriminator", "generator", "expected"), [(0.09, 1.0, 0.0), (0.11, 1.0, 1.0)])
def test_a_discriminator_far_ahead_waits(make_task, discriminator, generator, expected):
    task = make_task()
    counts = task.counts(Networks(task), torch.tensor(discriminator), torch.tensor(generator))
    assert counts == expected
    always = make_task(loss={"pause": 0.0})
    assert always.counts(Networks(always), torch.tensor(0.0), torch.tensor(9.0)) == 1


def test_the_ranks_agree_on_whether_it_waits(make_task):
    task = make_task()
    networks = SimpleNamespace(all_reduce_mean=lambda value: torch.tensor([0.2, 1.0]))
    assert task.counts(networks, torch.tensor(0.0), torch.tensor(9.0)) == 1


def test_the_captions_of_a_step_are_taken_into_the_prototypes(make_task):
    task = make_task()
    task.prepare(make_batch(), Networks(task), 0)
    assert task.network.prototypes.count.tolist() == [1, 1, 2]
    assert task.network.prototypes.mean[2].tolist() == [0, 0, 1.5, 0, 0, 0, 0, 0]
    without = make_task(text_encoder=None, preview={"captions": ["class:1"]})
    without.prepare(make_batch() | {"class_id": torch.tensor([-1] * BATCH)}, Networks(without), 0)
    assert not without.needs_classes and not without.network.prototypes.count.any()


# -- keeping

def test_it_comes_back_with_its_companions(make_task, clip_folder, captioner_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(LetterEncoder, "save", lambda self, folder: None, raising=False)
    task = make_task(clip=str(clip_folder), captioner=str(captioner_folder))
    networks = Networks(task)
    task.prepare(make_batch(), networks, 0)
    task.export(str(tmp_path / "model"), {"generator": task.network.state_dict()})
    assert {path.name for path in (tmp_path / "model").iterdir() if path.is_dir()} == \
        {"encoder", "captioner", "clip"}
    loaded = load_gan(tmp_path / "model", "cpu")
    loaded.text_encoder = LetterEncoder()
    painter = task.generator(networks)
    prompts, seeds, seen = ["a red circle", "two pink rings"], [4, 5], []
    for condition in ("caption", "clip", "class"):
        found = loaded.generate(prompts, seeds, condition=condition)
        assert torch.equal(found, painter.generate(prompts, seeds, condition=condition)) and found.float().std() > 0
        assert not any(torch.equal(found, one) for one in seen)
        seen.append(found)
    assert torch.equal(loaded.generate(prompts, seeds), seen[0])       # a captioner comes first
    # no weight of a companion is among those that are trained, averaged or saved
    assert not [name for name in task.network.state_dict() if name.split(".")[0] not in ("stem", "body", "prototypes")]


def test_what_the_companions_must_be(make_task, encoder_folder, clip_folder):
    with pytest.raises(UserError, match="clip: .* holds a 'ppgn_encoder' model"):
        load_companions(str(encoder_folder), clip=str(encoder_folder))
    with pytest.raises(UserError, match="holds a 'clip' model, not 'ppgn_encoder'"):
        load_companions(str(clip_folder))
    with pytest.raises(UserError, match="sees pictures of 32 px, data.image_size is 64"):
        make_task(data={"train": "x", "image_size": 64})
    assert Companions(None).conditions == []


def test_a_run_that_reads_no_captions_previews_classes():
    given = {"name": "ppgn", "encoder": "e", "data": {"train": "x"}, "train": {"preview_every": 5}}
    with pytest.raises(ValidationError, match="set preview.captions to class:0, class:1"):
        PPGNRun(**given)
    PPGNRun(**given, preview={"captions": ["class:0"]})
    PPGNRun(**given, captioner="c")


@pytest.mark.parametrize("name", ["ppgn", "ppgn_shapes"])
def test_the_configs_are_the_sizes_that_they_say(name):
    path = Path(__file__).parents[2] / "configs" / "gans" / f"{name}.yaml"
    config = load_config(path, [], {"ppgn": PPGNRun})
    if name == "ppgn":
        assert config.generator == PPGNConfig() and config.discriminator == PPGNDiscriminatorConfig()
        assert config.loss == PPGNLossConfig()
    else:
        task = filled(config.generator, image_size=config.data.image_size)
        assert task.start_size == 4 and task.by_caption.steps <= 60
