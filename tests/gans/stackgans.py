"""What the tests of both stages of StackGAN share: tiny generators, discriminators, runs and tasks."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dalle.data.settings import DataConfig
from dalle.data.tokenizer import CaptionTokenizer
from dalle.models.clip import ClipConfig, ClipModel
from gans.clip_text import ClipTextEncoder
from gans.stackgan1 import StackGAN1Config, StackGAN1Generator, StackGAN1Run, StackGAN1Task
from gans.stackgan2 import StackGAN2Config, StackGAN2Generator, StackGAN2Run, StackGAN2Task

TINY = {"width": 4, "z_dim": 3, "condition_dim": 4, "sentence_dim": 6}
CAPTIONS = ["a red circle", "a blue square", "a green star", "a yellow heart"]
VARIANTS = pytest.mark.parametrize("variant", ["tf", "pytorch"])
STAGES = pytest.mark.parametrize("stage", [1, 2])


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


def make_shop(folder: Path) -> SimpleNamespace:
    """Two text encoders, and a run of stage I for each form with the first of them."""
    torch.manual_seed(0)
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
