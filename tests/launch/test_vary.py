"""The command: all kinds of a tiny model, what is left out, and one line for each mistake."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from gans.fusedgan import FusedGANConfig, FusedGANGenerator
from gans.gan_int_cls import GANINTCLSConfig, GANINTCLSGenerator
from gans.generator import TEXT_FOLDER, Painter, load_gan
from gans.vse import VSE, VSEConfig, VSETextEncoder

CAPTIONS = ["a red <circle>", "a blue square", "a green star"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`fused` and `plain`, a GAN without an augmentation, with random weights and a text encoder."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs")
    tokenizer = CaptionTokenizer.train_words(CAPTIONS)
    sizes = {"image_size": 16, "sentence_dim": 8, "width": 2}
    networks: dict[str, Painter] = {"fused": FusedGANGenerator(FusedGANConfig(**sizes, z_dim=3, condition_dim=4)),
                                    "plain": GANINTCLSGenerator(GANINTCLSConfig(**sizes, noise_dim=3))}
    for name, network in networks.items():
        network.save_pretrained(folder / name / "model")
        VSETextEncoder(VSE(VSEConfig(word_dim=4, hidden_dim=8, num_text_tokens=tokenizer.vocab_size, text_length=6,
                                     trunk=None)), tokenizer).save(folder / name / "model" / TEXT_FOLDER)
    (folder / "plain" / "config.yaml").write_text(yaml.safe_dump({"preview": {"captions": CAPTIONS[1:]}}))
    Image.new("RGB", (40, 30), (200, 30, 30)).save(folder / "picture.png")
    return folder


@pytest.fixture
def vary(commands, tmp_path):
    def run(*arguments: object) -> dict:
        commands["vary"]("--out", tmp_path, "--device", "cpu", *arguments)
        return json.loads((tmp_path / "results.json").read_text())

    return run


def prompts(*captions: str) -> list[str]:
    return [part for caption in captions for part in ("--prompt", caption)]


def test_all_kinds_of_pictures_are_on_the_page(runs, vary, tmp_path):
    found = vary("--model", runs / "fused", *prompts(*CAPTIONS), "--rows", 2, "--columns", 3, "--seed", 7)
    assert found["model"]["kind"] == "fusedgan" and found["options"]["truncation"] == 1.0 and found["seed"] == 7
    assert {name: (len(sheet["rows"]), len(sheet["columns"])) for name, sheet in found["varied"].items()} == {
        "style": (2, 4), "detail": (3, 3), "noises": (3, 3), "texts": (2, 3)}
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img ") == sum(len(sheet["pictures"]) for sheet in found["varied"].values()) == 32
    assert "a red &lt;circle&gt;" in page and "<circle>" not in page and "<script" not in page
    for sheet in found["varied"].values():
        assert set(sheet["figures"]) == {"difference_along_rows", "difference_along_columns"}
    # the sheet shows what can be painted again from the file
    cell = found["varied"]["style"]["pictures"][6]
    expected = load_gan(runs / "fused" / "model", "cpu").generate([cell["caption"]], [cell["seed"]])[0]
    assert (cell["caption"], cell["seed"]) == (CAPTIONS[1], 8)
    drawn = np.array(Image.open(tmp_path / "style.png"))
    enlarged = expected.permute(1, 2, 0).numpy().repeat(8, axis=0).repeat(8, axis=1)
    windows = np.lib.stride_tricks.sliding_window_view(drawn[::1], (1, 128, 3))[:, :, 0, 0]
    rows, columns = np.nonzero((windows == enlarged[0]).all(axis=(2, 3)))
    assert any((drawn[row:row + 128, column:column + 128] == enlarged).all() for row, column in
               zip(rows, columns, strict=True))


def test_a_model_without_an_augmentation_has_the_other_kinds_and_the_prompts_of_its_run(runs, vary, tmp_path, capsys):
    found = vary("--model", runs / "plain", "--rows", 1, "--columns", 2)
    assert list(found["varied"]) == ["style", "noises", "texts"]
    assert "left out: detail: a gan_int_cls model draws no eps, only z" in capsys.readouterr().err
    assert found["varied"]["style"]["columns"] == CAPTIONS[1:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "noises.png", "results.json",
                                                                "style.png", "texts.png"]


def test_an_earlier_call_is_replaced_and_other_files_are_left(runs, vary, tmp_path):
    vary("--model", runs / "plain", "--columns", 2)
    (tmp_path / "mine.txt").write_text("kept")
    found = vary("--model", runs / "plain", "--kinds", "texts", "--columns", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.html", "mine.txt", "results.json", "texts.png"]
    assert list(found["varied"]) == ["texts"]
    (tmp_path / "style.png").write_text("a picture of the user's")
    with pytest.raises(UserError, match="style.png is not of an earlier call and would be overwritten"):
        vary("--model", runs / "plain", "--kinds", "style")


def test_options_of_the_model_and_truncation_reach_every_picture(runs, vary):
    found = vary("--model", runs / "fused", *prompts(*CAPTIONS[:2]), "--kinds", "style", "--rows", 3, "--truncation",
                 0.0, "--option", "unconditional=yes")
    assert found["options"] == {"truncation": 0.0, "unconditional": True, "image": None}
    assert found["varied"]["style"]["figures"] == {"difference_along_rows": 0, "difference_along_columns": 0}


MISTAKES = {
    "no prompt": (["--model", "{runs}/fused"], "nothing to paint"),
    "an unknown kind": (["--model", "{runs}/plain", "--kinds", "style,x"], "unknown kind 'x'; known: style, detail"),
    "a kind that the model cannot": (["--model", "{runs}/plain", "--kinds", "detail"], "--kinds detail: a gan_int_cls"),
    "too few prompts": (["--model", "{runs}/fused", "--prompt", "a star", "--kinds", "texts"], "needs 2 prompts"),
    "a picture for a painter": (["--model", "{runs}/plain", "--image", "{runs}/picture.png"], "leave --image out"),
    "an option of another model": (["--model", "{runs}/plain", "--option", "top-k=3"], "--top-k is not an option"),
    "no model": (["--model", "{runs}/fusde", "--prompt", "a star"], "does not exist; models near it"),
    "no number": (["--model", "{runs}/plain", "--rows", "few"], "'few' is not a whole number of at least 1"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_line(runs, vary, mistake):
    arguments, words = MISTAKES[mistake]
    with pytest.raises(UserError) as raised:
        vary(*(argument.format(runs=runs) for argument in arguments))
    assert words in str(raised.value) and "\n" not in str(raised.value)
