"""Cached codes equal what the codec says of each picture, and a second run does nothing."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dalle.data.codes import CachedCodes
from dalle.data.index import ShardIndex
from dalle.data.loader import validation_batches
from dalle.data.settings import DataConfig
from dalle.errors import UserError
from dalle.models.dvae import DiscreteVAE
from dalle.training.lock import FolderLock

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def cached(workshop, commands, tmp_path_factory):
    out = tmp_path_factory.mktemp("codes") / "train"
    call = ["--codec", workshop.folder / "runs/dvae", "--data", workshop.folder / "data/train", "--out", out,
            "--batch-size", 10]
    assert commands["cache_codes"](*call) == 0
    return out, call


def contents(folder):
    """Every file, ``codes.json`` as what it says: tests here write it anew."""
    return {path.name: json.loads(path.read_bytes()) if path.suffix == ".json" else path.read_bytes()
            for path in folder.iterdir()}


def test_rows_are_the_codecs_codes(workshop, cached):
    out, _ = cached
    spec = str(workshop.folder / "data/train")
    index = ShardIndex.load(spec)
    codes = CachedCodes(out, index)
    codec = DiscreteVAE.from_pretrained(workshop.folder / "runs/dvae/model")
    images = [batch["image"] for batch in validation_batches(
        DataConfig(train=spec, validation=spec, image_size=16, workers=0), seed=0, batch_size=16)]
    expected = codec.encode(torch.cat(images).float() / 255).numpy()
    found = np.stack([codes.row(shard, sample)
                      for shard, info in enumerate(index.shards) for sample in range(info.count)])
    assert (found == expected).mean() > 0.99     # a rounding of another batch size may tip a code on its edge


def test_a_second_run_does_nothing(cached, commands, capsys):
    out, call = cached
    before = (out / "00000.npy").stat().st_mtime_ns
    assert commands["cache_codes"](*call) == 0
    assert "already made" in capsys.readouterr().out
    assert (out / "00000.npy").stat().st_mtime_ns == before


def test_codes_of_another_codec_are_not_overwritten(cached, commands):
    out, call = cached
    description = json.loads((out / "codes.json").read_text())
    (out / "codes.json").write_text(json.dumps({**description, "codec_digest": "0" * 16}))
    with pytest.raises(UserError, match="another codec"):
        commands["cache_codes"](*call)
    (out / "codes.json").write_text(json.dumps(description))


def test_a_transformer_refuses_codes_of_another_codec(workshop, cached, commands, tmp_path):
    out, _ = cached
    description = json.loads((out / "codes.json").read_text())
    (out / "codes.json").write_text(json.dumps({**description, "codec_digest": "0" * 16}))
    config = workshop.config("transformer", tmp_path)
    with pytest.raises(UserError, match="other codec"):
        commands["train"](config, f"data.codes={out}", "data.images=false", "data.validation=null")
    (out / "codes.json").write_text(json.dumps(description))
    assert commands["train"](config, f"data.codes={out}", "data.images=false", "data.validation=null") == 0


def test_two_at_once_do_not_write_one_folder(cached, commands, tmp_path):
    _, call = cached
    with FolderLock(tmp_path), pytest.raises(UserError, match="already running"):
        commands["cache_codes"](*call[:4], "--out", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_two_processes_make_the_codes_of_one(cached, two_processes, tmp_path):
    out, call = cached
    arguments = [*call[:4], "--out", tmp_path / "two", "--batch-size", 10]
    two_processes(ROOT / "tools/cache_codes.py", *arguments)
    assert contents(tmp_path / "two") == contents(out) and len(contents(out)) == 4


def test_a_run_that_is_killed_goes_on_to_the_same_codes(cached, commands, tmp_path, monkeypatch, capsys):
    out, call = cached
    arguments = [*call[:4], "--out", tmp_path / "again", "--batch-size", 10]
    calls, encode = [], DiscreteVAE.encode

    def killed(codec, images):
        calls.append(len(images))
        if len(calls) == 6:
            raise KeyboardInterrupt
        return encode(codec, images)

    with monkeypatch.context() as patch:
        patch.setattr(DiscreteVAE, "encode", killed)
        with pytest.raises(KeyboardInterrupt):
            commands["cache_codes"](*arguments)
    assert set(calls) == {10} and [path.name for path in (tmp_path / "again").glob("*.npy")] == ["00000.npy"]
    assert commands["cache_codes"](*arguments) == 0
    assert "(32 of them before)" in capsys.readouterr().out
    assert contents(tmp_path / "again") == contents(out)
