"""OpenAI's published pickles, imitated: whole modules whose classes cannot be imported."""

import json
import os
import sys
import types

import pytest
import torch
from torch import nn

from dalle.errors import UserError
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.dvae_networks import OpenAINetworkConfig
from dalle.models.quantizers import GumbelConfig
from dalle.store import load_codec

SMALL = DVAEConfig(image_size=32, network=OpenAINetworkConfig(hidden=8, blocks_per_group=1, decoder_input=6),
                   quantizer=GumbelConfig(num_codes=10))


def released_like(module, monkeypatch):
    """``module`` with each of its own classes renamed into the package of the published files."""
    packages = {name: types.ModuleType(name) for name in ("dall_e", "dall_e.encoder")}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    for part in module.modules():
        if type(part).__module__.startswith("dalle."):
            name = type(part).__name__
            known = getattr(packages["dall_e.encoder"], name, None)
            if known is None:
                known = type(name, (type(part),), {"__module__": "dall_e.encoder", "__qualname__": name})
                setattr(packages["dall_e.encoder"], name, known)
            part.__class__ = known
    return module


@pytest.fixture
def pickles(tmp_path, monkeypatch):
    """encoder.pkl, decoder.pkl and the model that they are of."""
    torch.manual_seed(0)
    model = DiscreteVAE(SMALL)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with monkeypatch.context() as patched:
        for part in ("encoder", "decoder"):
            torch.save(released_like(getattr(model, part), patched), tmp_path / f"{part}.pkl")
    return tmp_path, expected


def test_the_published_pickles_become_a_codec(commands, pickles):
    folder, expected = pickles
    with pytest.raises(ModuleNotFoundError):
        torch.load(folder / "encoder.pkl", weights_only=False)
    out = folder / "codec"
    assert commands["import_checkpoint"]("openai-dvae", folder / "encoder.pkl", folder / "decoder.pkl", "--out", out,
                                         "--image-size", 32) == 0
    codec = load_codec(out, "cpu")
    assert codec.config == SMALL
    assert codec.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in codec.state_dict().items())
    with pytest.raises(UserError, match="holds a model"):
        commands["import_checkpoint"]("openai-dvae", folder / "encoder.pkl", folder / "decoder.pkl", "--out", out)


def test_a_malicious_encoder_runs_nothing_and_is_refused(commands, tmp_path):
    marker = tmp_path / "marker"

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for part in ("encoder", "decoder"):
        torch.save({"blocks.input.w": Payload()}, tmp_path / f"{part}.pkl")
    with pytest.raises(UserError, match="is no tensor"):
        commands["import_checkpoint"]("openai-dvae", tmp_path / "encoder.pkl", tmp_path / "decoder.pkl", "--out",
                                      tmp_path / "out")
    assert not marker.exists() and not (tmp_path / "out").exists()


def test_weights_of_something_else_are_refused_in_one_line(commands, pickles):
    folder, _ = pickles
    torch.save(nn.Linear(2, 2), folder / "linear.pkl")
    with pytest.raises(UserError, match="are not the encoder and the decoder") as raised:
        commands["import_checkpoint"]("openai-dvae", folder / "linear.pkl", folder / "decoder.pkl", "--out",
                                      folder / "out")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="are not the encoder and the decoder"):
        commands["import_checkpoint"]("openai-dvae", folder / "decoder.pkl", folder / "encoder.pkl", "--out",
                                      folder / "out")
    assert not (folder / "out").exists()


def test_the_config_says_the_published_sizes(commands, pickles):
    folder, _ = pickles
    commands["import_checkpoint"]("openai-dvae", folder / "encoder.pkl", folder / "decoder.pkl", "--out",
                                  folder / "codec")
    description = json.loads((folder / "codec/config.json").read_text())
    assert description["model_type"] == "dvae" and description["image_size"] == 256
