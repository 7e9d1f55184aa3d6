"""Tests of this folder import its helper files by name."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> SimpleNamespace:
    """What StackGAN's tests train over, in ``folder``."""
    from stackgans import make_shop

    return make_shop(tmp_path_factory.mktemp("stackgan"))


@pytest.fixture
def clip_folder(tmp_path) -> Path:
    """The run folder of a CLIP of 32 pixels that was never trained; ``CAPTIONS`` are the words that it knows."""
    from bare import CAPTIONS

    from dalle.data.tokenizer import CaptionTokenizer
    from dalle.models.clip import ClipConfig, ClipModel

    tokenizer = CaptionTokenizer.train(CAPTIONS * 3, vocab_size=300)
    vision = {"layers": 1, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 32}
    model = ClipModel(ClipConfig(embed_dim=8, vision=vision, text={"width": 16, "heads": 2, "layers": 2},
                                 text_length=6, num_text_tokens=tokenizer.vocab_size))
    model.save_pretrained(tmp_path / "clip" / "model")
    tokenizer.save(tmp_path / "clip" / "model" / "tokenizer")
    return tmp_path / "clip"


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)
