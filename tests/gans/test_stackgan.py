"""StackGAN: the sizes of both published forms, conditioning augmentation, losses by hand, and the frozen stage I."""

import math
from types import SimpleNamespace

import pytest
import torch
from bare import BareNetworks, loss_of
from scipy import stats
from torch import nn

from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.clip import ClipConfig, ClipModel
from dalle.training.engines.launching import create_engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from gans.generator import load_gan
from gans.losses import kl_log_sigma, kl_logvar
from gans.stackgan import (
    DiscriminatorConfig,
    MeanDiscriminator,
    Scores,
    SentenceDiscriminator,
    StackGAN1Config,
    StackGAN1Generator,
    StackGAN1Run,
    StackGAN1Task,
    StackGAN2Config,
    StackGAN2Generator,
    StackGAN2Run,
    StackGAN2Task,
    discriminator_loss,
    truncated_normal,
    two_headed_discriminator_loss,
)
from gans.text import ClipTextEncoder

LN2 = math.log(2)
COCO = StackGAN1Config(variant="pytorch", width=192)
COCO_DISCRIMINATOR = DiscriminatorConfig(width=96)
TINY = {"width": 4, "z_dim": 3, "condition_dim": 4, "sentence_dim": 6}
VARIANTS = pytest.mark.parametrize("variant", ["tf", "pytorch"])


def count(module: nn.Module, trainable: bool = False) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad or not trainable)


def noise_for(generator, batch: int, seed: int = 0) -> dict:
    source = torch.Generator().manual_seed(seed)
    return {name: torch.randn(batch, size, generator=source) for name, size in generator.noise_dims.items()}


def tiny(variant: str = "tf", image_size: int = 16) -> StackGAN1Generator:
    torch.manual_seed(0)
    return StackGAN1Generator(StackGAN1Config(**TINY, variant=variant, image_size=image_size))


def tiny_second(variant: str = "tf", image_size: int = 32, **settings) -> StackGAN2Generator:
    torch.manual_seed(0)
    return StackGAN2Generator(StackGAN2Config(
        variant=variant, image_size=image_size, width=4, residuals=1, condition_dim=4, sentence_dim=6,
        stage1=StackGAN1Config(**TINY, variant=variant, image_size=16), **settings))


def lively(module: nn.Module) -> nn.Module:
    """Weights large enough to tell outputs apart; the first ones are small."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0.0, 0.5)
    return module.eval()


# -- the published sizes

def test_the_papers_networks_have_the_papers_parameters():
    with torch.device("meta"):
        assert count(StackGAN1Generator(StackGAN1Config())) == 14_264_192
        assert count(SentenceDiscriminator(64, 1024, DiscriminatorConfig(), stage=1)) == 4_029_824
        assert count(StackGAN2Generator(StackGAN2Config()), trainable=True) == 26_290_080
        assert count(SentenceDiscriminator(256, 1024, DiscriminatorConfig(), stage=2)) == 48_603_520


def test_cocos_networks_have_the_codes_parameters():
    with torch.device("meta"):
        first = StackGAN1Generator(COCO)
        assert (count(first), count(first.augmentation)) == (20_020_832, 262_400)
        assert count(MeanDiscriminator(64, 128, COCO_DISCRIMINATOR, stage=1)) == 12_407_425
        second = StackGAN2Generator(StackGAN2Config(variant="pytorch", width=192, residuals=2, stage1=COCO))
        assert (count(second), count(second, trainable=True)) == (57_151_312, 37_130_480)
        assert count(MeanDiscriminator(256, 128, COCO_DISCRIMINATOR, stage=2)) == 159_889_538


def test_the_pytorch_codes_own_defaults_have_its_parameters():
    first = StackGAN1Config(variant="pytorch")
    with torch.device("meta"):
        assert count(StackGAN1Generator(first)) == 10_301_248
        assert count(MeanDiscriminator(64, 128, DiscriminatorConfig(), stage=1)) == 5_715_713
        assert count(StackGAN2Generator(StackGAN2Config(variant="pytorch", stage1=first)), True) == 26_290_080
        assert count(MeanDiscriminator(256, 128, DiscriminatorConfig(), stage=2)) == 71_269_122


@VARIANTS
def test_the_stages_paint_64_and_256_pixels(variant):
    with torch.device("meta"):
        first = StackGAN1Config(variant=variant)
        second = StackGAN2Generator(StackGAN2Config(variant=variant, stage1=first))
        noise = {name: torch.zeros(2, size) for name, size in second.noise_dims.items()}
        small = second.stage1(noise, torch.zeros(2, 1024)).image
        assert small.shape == (2, 3, 64, 64)
        assert second.encoder(small).shape == (2, 512, 16, 16)
        assert second(noise, torch.zeros(2, 1024)).image.shape == (2, 3, 256, 256)


def test_the_sides_of_stage_1_double_from_four():
    sides = []
    generator = tiny(image_size=64)
    for layer in generator.trunk:
        layer.register_forward_hook(lambda module, inputs, output: sides.append(output.shape[-1]))
    generator(noise_for(generator, 2), torch.randn(2, 6))
    assert sorted(set(sides)) == [4, 8, 16, 32, 64]


@VARIANTS
@pytest.mark.parametrize("image_size", [16, 32, 64])
def test_sizes_follow_the_config(variant, image_size):
    generator = tiny(variant, image_size)
    image = generator(noise_for(generator, 3), torch.randn(3, 6)).image
    assert image.shape == (3, 3, image_size, image_size) and image.abs().max() <= 1
    for stage in (1, 2):
        if variant == "tf":
            scores = SentenceDiscriminator(image_size, 6, DiscriminatorConfig(width=4, text_dim=5), stage)
            assert scores(image, torch.randn(3, 6)).shape == (3,)
        else:
            scores = MeanDiscriminator(image_size, 4, DiscriminatorConfig(width=4), stage)
            assert scores(image, torch.randn(3, 4)).matched.shape == (3,)


@pytest.mark.parametrize("settings", [{"image_size": 48}, {"image_size": 8}])
def test_impossible_sizes_are_refused(settings):
    with pytest.raises(ValueError, match="power of two"):
        StackGAN1Config(**settings)


def test_stage_2_is_no_smaller_than_stage_1_and_reads_the_same_captions():
    with pytest.raises(ValueError, match="64 or more"):
        StackGAN2Config(image_size=32)
    again = tiny_second(image_size=16)
    assert again(noise_for(again, 2), torch.randn(2, 6)).image.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="same captions"):
        StackGAN2Config(sentence_dim=300)


def test_first_weights_are_those_of_the_form():
    for variant, bounded in (("tf", True), ("pytorch", False)):
        torch.manual_seed(0)
        generator = StackGAN1Generator(StackGAN1Config(variant=variant, width=32, sentence_dim=64))
        weights = {kind: torch.cat([part.weight.detach().flatten() for part in generator.modules()
                                    if isinstance(part, kind)]) for kind in (nn.Conv2d, nn.Linear, nn.BatchNorm2d)}
        assert (float(weights[nn.Conv2d].abs().max()) <= 0.04) == bounded
        assert float(weights[nn.Linear].std()) == pytest.approx(0.02, rel=0.02)
        assert float(weights[nn.BatchNorm2d].mean()) == pytest.approx(1, abs=0.01)
        assert float(weights[nn.BatchNorm2d].std()) == pytest.approx(0.02, rel=0.2)


# -- conditioning augmentation

def test_the_divergences_are_those_of_gaussians():
    zero, one = torch.zeros(3, 4), torch.ones(3, 4)
    assert kl_log_sigma(zero, zero) == kl_logvar(zero, zero) == 0
    assert kl_log_sigma(one, zero) == kl_logvar(one, zero) == 0.5
    mean, log_sigma = torch.randn(3, 4), torch.randn(3, 4)
    laws = torch.distributions.Normal(mean, log_sigma.exp()), torch.distributions.Normal(zero, one)
    expected = torch.distributions.kl_divergence(*laws).mean()
    torch.testing.assert_close(kl_log_sigma(mean, log_sigma), expected)
    torch.testing.assert_close(kl_logvar(mean, 2 * log_sigma), expected)


@VARIANTS
def test_the_condition_without_noise_is_the_mean(variant):
    generator = lively(tiny(variant))
    augmented = generator.augmentation(torch.randn(5, 6), torch.zeros(5, 4))
    assert torch.equal(augmented.condition, augmented.mean)
    assert torch.equal(truncated_normal(torch.zeros(2)), torch.zeros(2))


def test_each_form_has_its_own_law_of_the_spread():
    sentence, eps = torch.randn(50, 6), torch.ones(50, 4)
    paper, coco = (lively(tiny(variant)).augmentation for variant in ("tf", "pytorch"))
    for part, scale in ((paper, 1.0), (coco, 0.5)):
        hidden = sentence @ part.project.weight.T + part.project.bias
        hidden = torch.where(hidden > 0, hidden, 0.2 * hidden) if part is paper else hidden.clamp(min=0)
        expected = hidden[:, :4] + (scale * hidden[:, 4:]).exp()
        torch.testing.assert_close(part(sentence, eps).condition, expected)
    augmented = coco(sentence, eps)
    assert augmented.mean.min() >= 0 and augmented.spread.min() >= 0      # sigma >= 1
    assert paper(sentence, eps).mean.min() < 0


def test_the_papers_noise_is_a_truncated_normal():
    normal = torch.linspace(-6, 6, 101)
    expected = stats.truncnorm.ppf(stats.norm.cdf(normal.double().numpy()), -2, 2)
    torch.testing.assert_close(truncated_normal(normal), torch.from_numpy(expected).float(), atol=2e-4, rtol=1e-4)
    assert truncated_normal(torch.tensor([-50.0, 50.0])).tolist() == pytest.approx([-2, 2])


@VARIANTS
def test_only_the_paper_truncates(variant):
    generator = lively(tiny(variant))
    noise = noise_for(generator, 2)
    one, other = ({**noise, "eps": torch.full((2, 4), value)} for value in (9.0, 20.0))
    sentence = torch.randn(2, 6)
    same = torch.allclose(generator(one, sentence).image, generator(other, sentence).image)
    assert same == (variant == "tf")


# -- the networks

@pytest.mark.parametrize("generator", [tiny(), tiny("pytorch"), tiny_second(), tiny_second("pytorch")])
def test_a_picture_depends_on_its_own_noise_and_caption_alone(generator):
    lively(generator)
    noise, sentence = noise_for(generator, 4), torch.randn(4, 6)
    image = generator(noise, sentence).image
    assert torch.equal(image, generator(noise, sentence).image)
    order = torch.tensor([2, 0, 3, 1])
    mixed = generator({name: values[order] for name, values in noise.items()}, sentence[order]).image
    torch.testing.assert_close(mixed, image[order], atol=2e-3, rtol=1e-3)      # sums in another order
    for name in noise:
        other = generator({**noise, name: -noise[name]}, sentence).image
        assert not torch.allclose(other, image, atol=1e-3), name
    assert not torch.allclose(generator(noise, -sentence).image, image, atol=1e-3)


def test_the_forms_read_noise_and_condition_in_their_own_order():
    for variant, z_first in (("tf", False), ("pytorch", True)):
        generator, seen = tiny(variant), []
        generator.trunk[0].register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        noise = noise_for(generator, 2)
        generator(noise, torch.randn(2, 6))
        place = slice(0, 3) if z_first else slice(4, 7)
        assert torch.equal(seen[0][:, place], noise["z"])


def test_a_wrong_mean_is_judged_with_the_features_of_the_picture():
    for stage in (1, 2):
        discriminator = lively(MeanDiscriminator(16, 4, DiscriminatorConfig(width=4), stage))
        image, mean, wrong = torch.randn(3, 3, 16, 16), torch.randn(3, 4), torch.randn(3, 4)
        scores = discriminator(image, mean, wrong)
        torch.testing.assert_close(scores.mismatched, discriminator(image, wrong).matched)
        assert (scores.alone is None) == (stage == 1) and discriminator(image, mean).mismatched is None


def test_a_discriminator_learns_eight_pictures_of_a_frozen_generator():
    generator = tiny(image_size=16).requires_grad_(False)
    torch.manual_seed(1)
    discriminator = SentenceDiscriminator(16, 6, DiscriminatorConfig(width=8, text_dim=4), stage=1)
    optimizer = torch.optim.Adam(discriminator.parameters(), 2e-3, (0.5, 0.999))
    real, sentence = torch.rand(8, 3, 16, 16) * 2 - 1, torch.randn(8, 6)
    for step in range(60):
        fake = generator(noise_for(generator, 8, step), sentence).image
        real_scores, fake_scores = discriminator(real, sentence), discriminator(fake, sentence)
        loss = discriminator_loss(real_scores, fake_scores, fake_scores)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(torch.cat([real_scores > 0, fake_scores < 0]).float().mean()) > 0.9


# -- losses

def test_undecided_discriminators_cost_two_bits():
    zero = torch.zeros(5)
    assert float(discriminator_loss(zero, zero, zero)) == pytest.approx(2 * LN2)
    undecided = Scores(zero, zero, zero)
    assert float(two_headed_discriminator_loss(undecided, undecided)) == pytest.approx(2 * LN2)


def cost(logits: list[float], target: int) -> float:
    return sum(math.log(1 + math.exp(-logit if target else logit)) for logit in logits) / len(logits)


def test_the_losses_agree_with_sums_written_out():
    real, wrong, fake, alone, fake_alone = [1.0, -2.0], [0.5, 3.0], [-1.5, 0.25], [2.0, 0.1], [-0.3, 1.1]
    tensors = [torch.tensor(logits) for logits in (real, wrong, fake, alone, fake_alone)]
    expected = cost(real, 1) + 0.5 * (cost(wrong, 0) + cost(fake, 0))
    assert float(discriminator_loss(*tensors[:3])) == pytest.approx(expected, rel=1e-6)
    expected = (cost(real, 1) + cost(alone, 1)) / 2 + (cost(fake, 0) + cost(wrong, 0) + cost(fake_alone, 0)) / 3
    two_headed = two_headed_discriminator_loss(Scores(tensors[0], tensors[1], tensors[3]),
                                               Scores(tensors[2], None, tensors[4]))
    assert float(two_headed) == pytest.approx(expected, rel=1e-6)


# -- training

CAPTIONS = ["a red circle", "a blue square", "a green star", "a yellow heart"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> SimpleNamespace:
    """Two text encoders, and a run of stage I for each form with the first of them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("stackgan")
    tokenizer = CaptionTokenizer.train_words(CAPTIONS)
    for name in ("encoder", "other"):
        config = ClipConfig(embed_dim=6, text_length=6, num_text_tokens=tokenizer.vocab_size,
                            vision={"layers": 1, "width": 16, "head_width": 16, "patch_size": 8, "image_size": 16},
                            text={"layers": 1, "width": 16, "heads": 1})
        ClipTextEncoder(ClipModel(config), tokenizer).save(folder / name)
    for variant in ("tf", "pytorch"):
        task = StackGAN1Task(first_run(folder, variant))
        task.export(str(folder / variant / "model"), {"generator": task.network.state_dict()})
    return SimpleNamespace(folder=folder)


def first_run(folder, variant: str, **settings) -> StackGAN1Run:
    sizes = {name: value for name, value in TINY.items() if name != "sentence_dim"}
    return StackGAN1Run(name="one", text_encoder=str(folder / "encoder"), data=DataConfig(train="none", image_size=16),
                        generator={"variant": variant, **sizes}, discriminator={"width": 4, "text_dim": 5}, **settings)


def second_run(folder, variant: str, stage1: str | None = None, **settings) -> StackGAN2Run:
    return StackGAN2Run(name="two", stage1=str(folder / (stage1 or variant)), discriminator={"width": 4, "text_dim": 5},
                        data=DataConfig(train="none", image_size=32),
                        generator={"variant": variant, "width": 4, "residuals": 1, "condition_dim": 4}, **settings)


def make_task(shop, variant: str, stage: int):
    torch.manual_seed(0)
    return StackGAN1Task(first_run(shop.folder, variant)) if stage == 1 else \
        StackGAN2Task(second_run(shop.folder, variant))


def loaded(size: int) -> dict:
    source = torch.Generator().manual_seed(2)
    return {"image": torch.randint(0, 256, (4, 3, size, size), dtype=torch.uint8, generator=source),
            "class_id": torch.arange(4), "caption": CAPTIONS}


STAGES = pytest.mark.parametrize("stage", [1, 2])


@VARIANTS
@STAGES
def test_each_phase_gives_gradient_to_its_player(shop, variant, stage):
    task = make_task(shop, variant, stage)
    networks = BareNetworks(task)
    generator, discriminator = networks["generator"], networks["discriminator"]
    batch = task.prepare(loaded(16 * stage), networks, 0)
    loss_of(task, "discriminator", networks, batch).total.backward()
    assert all(each.grad is None for each in generator.parameters())
    assert all(each.grad is not None for each in discriminator.parameters())
    discriminator.requires_grad_(False)
    loss_of(task, "generator", networks, batch).total.backward()
    for name, parameter in generator.named_parameters():
        assert (parameter.grad is None) == name.startswith("stage1."), name


@VARIANTS
@STAGES
def test_the_first_losses_are_those_of_an_undecided_discriminator(shop, variant, stage):
    task = make_task(shop, variant, stage)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(16 * stage), networks, 0)
    for parameter in networks["discriminator"].parameters():
        nn.init.zeros_(parameter)
    with torch.no_grad():
        assert float(loss_of(task, "discriminator", networks, batch).total) == pytest.approx(2 * LN2)
        loss = loss_of(task, "generator", networks, batch)
    heads = 2 if (variant, stage) == ("pytorch", 2) else 1
    assert float(loss.parts["adversarial"]) == pytest.approx(heads * LN2)
    assert float(loss.total) == pytest.approx(heads * LN2 + 2 * float(loss.parts["kl"]), rel=1e-5)


@VARIANTS
@STAGES
def test_cocos_fakes_are_painted_once_a_step_and_the_papers_twice(shop, variant, stage, tmp_path):
    task = make_task(shop, variant, stage)
    engine = create_engine(task.config)
    engine.prepare(task, tmp_path)
    for step in range(2):
        train_step(engine, task, loaded(16 * stage), step, task.config, Meter())
    tracked = {int(buffer) for name, buffer in task.network.named_buffers()
               if name.endswith("num_batches_tracked") and not name.startswith("stage1.")}
    assert tracked == {2 if variant == "pytorch" else 4}


def test_the_paper_pairs_wrong_pictures_and_draws_twice(shop):
    task = make_task(shop, "tf", 1)
    raw = loaded(16)
    batch = task.prepare(raw, BareNetworks(task), 0)
    assert not torch.equal(batch["noise"]["z"], batch["noise_g"]["z"])
    assert bool((batch["wrong_class_id"] != raw["class_id"]).all())
    torch.testing.assert_close(batch["wrong_image"], raw["image"][batch["wrong_class_id"]] / 127.5 - 1)


def test_coco_pairs_the_next_caption_and_draws_once(shop):
    task = make_task(shop, "pytorch", 1)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(16), networks, 0)
    assert "noise_g" not in batch and "wrong_image" not in batch
    painted = networks["generator"](batch["noise"], batch["text"].sentence)
    assert torch.equal(batch["mean"], painted.mean.detach())
    assert torch.equal(batch["wrong_mean"], batch["mean"][[1, 2, 3, 0]])


def test_cocos_augmentation_learns_through_the_picture_alone(shop):
    task = make_task(shop, "pytorch", 1)
    networks, seen = BareNetworks(task), []
    batch = task.prepare(loaded(16), networks, 0)
    networks["discriminator"].register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss_of(task, "generator", networks, batch)
    image, mean = seen[0]
    assert image.requires_grad and not mean.requires_grad


@VARIANTS
@STAGES
def test_r1_looks_at_every_head_of_real_pairs(shop, variant, stage):
    task = make_task(shop, variant, stage)
    networks = BareNetworks(task)
    batch = task.prepare(loaded(16 * stage), networks, 0)
    image = batch["image"].clone().requires_grad_(True)
    scores = task.real_scores(networks.penalty("discriminator"), batch, image)
    assert [len(each) for each in scores] == [4] * (2 if (variant, stage) == ("pytorch", 2) else 1)
    assert all(torch.autograd.grad(each.sum(), image, retain_graph=True)[0].abs().sum() > 0 for each in scores)


# -- stage I inside stage II

def test_stage_1_is_frozen_to_the_last_buffer():
    generator = tiny_second().train()
    before = {name: tensor.clone() for name, tensor in generator.stage1.state_dict().items()}
    generator(noise_for(generator, 4), torch.randn(4, 6)).image.sum().backward()
    assert all(parameter.grad is None for parameter in generator.stage1.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in generator.stage1.state_dict().items())
    assert not generator.stage1.training and generator.encoder.training


def test_stage_1_may_normalise_by_the_batch_as_the_code_does():
    generator = tiny_second(stage1_train=True).train()
    before = {name: tensor.clone() for name, tensor in generator.stage1.state_dict().items()}
    generator(noise_for(generator, 4), torch.randn(4, 6)).image.sum().backward()
    moved = {name for name, tensor in generator.stage1.state_dict().items() if not torch.equal(before[name], tensor)}
    assert moved and all("running" in name or "num_batches" in name for name in moved)
    assert all(parameter.grad is None for parameter in generator.stage1.parameters())
    assert not generator.eval().stage1.training


@VARIANTS
def test_the_export_of_stage_2_paints_alone(shop, variant, tmp_path):
    task = make_task(shop, variant, 2)
    stage1 = StackGAN1Generator.from_pretrained(shop.folder / variant / "model")
    kept = task.network.stage1.state_dict()
    assert all(torch.equal(kept[name], tensor) for name, tensor in stage1.state_dict().items())
    task.export(str(tmp_path / "model"), {"generator": task.network.state_dict()})
    expected = task.generator(BareNetworks(task)).generate(CAPTIONS[:2], [3, 4])
    painter = load_gan(tmp_path / "model", "cpu")
    assert painter.network.config.stage1 == stage1.config
    assert torch.equal(painter.generate(CAPTIONS[:2], [3, 4]), expected)


def test_both_stages_read_captions_with_the_same_encoder(shop):
    StackGAN2Task(second_run(shop.folder, "tf", text_encoder=str(shop.folder / "encoder")))
    with pytest.raises(UserError, match="is not the one that stage1"):
        StackGAN2Task(second_run(shop.folder, "tf", text_encoder=str(shop.folder / "other")))


def test_stage_1_is_a_run_of_stage_1(shop):
    with pytest.raises(UserError, match=r"stage1: .*'clip' model"):
        StackGAN2Task(second_run(shop.folder, "tf", stage1="encoder"))
    with pytest.raises(UserError, match="does not exist"):
        StackGAN2Task(second_run(shop.folder, "tf", stage1="nowhere"))


def test_a_setting_that_follows_from_the_data_is_not_set_otherwise(shop):
    config = first_run(shop.folder, "tf")
    wrong = config.model_copy(update={"generator": StackGAN1Config(image_size=32)})
    with pytest.raises(UserError, match=r"generator\.image_size is 32"):
        StackGAN1Task(wrong)
