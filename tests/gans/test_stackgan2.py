"""StackGAN's stage II: the frozen stage I inside it, its export, and the runs that it builds on."""

import pytest
import torch
from bare import BareNetworks
from published import Published
from stackgans import CAPTIONS, VARIANTS, make_task, noise_for, second_run, tiny_second

from dalle.errors import UserError
from gans.generator import load_gan
from gans.stackgan1 import StackGAN1Generator
from gans.stackgan2 import StackGAN2Config, StackGAN2Task

PUBLISHED = {"stackgan2": Published(paintings=2, finished="stage1")}


def test_stage_2_is_no_smaller_than_stage_1_and_reads_the_same_captions():
    with pytest.raises(ValueError, match="64 or more"):
        StackGAN2Config(image_size=32)
    again = tiny_second(image_size=16)
    assert again(noise_for(again, 2), torch.randn(2, 6)).image.shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match="same captions"):
        StackGAN2Config(sentence_dim=300)


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
