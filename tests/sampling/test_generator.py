"""The transformer behind the generator interface: the same seed is the same picture, and every mismatch has a line."""

import json
import shutil

import pytest
import torch
from PIL import Image

from dalle.data.formats import read_picture
from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.models.dvae import DiscreteVAE, DVAEConfig
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.sampling.caption_warnings import lost_warnings
from dalle.sampling.generator import TransformerGenerator, equal_groups, sampling_config
from dalle.store import GENERATORS, load_generator, load_tokenizer

CODEC = {
    "image_size": 32,
    "likelihood": "gaussian",
    "network": {"kind": "compact", "patch": 4, "widths": [8, 16], "blocks": 1, "tail": 8},
    "quantizer": {"kind": "fsq", "levels": [4, 4]},
}
SEEDS = [11, 12, 13, 14]


def make_transformer(**changes) -> TextToImageTransformer:
    values = {"dim": 16, "depth": 1, "heads": 2, "text_length": 6, "num_text_tokens": 300, "grid": (4, 4),
              "num_codes": 16}
    return TextToImageTransformer(TransformerConfig(**{**values, **changes}))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run folder with the export of a random transformer."""
    torch.manual_seed(0)
    run = tmp_path_factory.mktemp("runs") / "painter"
    make_transformer().save_pretrained(run / "model")
    DiscreteVAE(DVAEConfig(**CODEC)).save_pretrained(run / "model" / "codec")
    tokenizer = CaptionTokenizer.train(["a red star", "a blue circle"] * 3, vocab_size=280)
    tokenizer.save(run / "model" / "tokenizer")
    return run


@pytest.fixture(scope="module")
def generator(run_folder) -> TransformerGenerator:
    return load_generator(run_folder)


def test_a_run_folder_and_its_model_folder_are_the_same_generator(run_folder, generator):
    other = load_generator(run_folder / "model")
    assert torch.equal(other.generate(["a red star"], [1]), generator.generate(["a red star"], [1]))
    assert generator.image_size == 32
    assert generator.identity["kind"] == "text_to_image_transformer"
    assert len(generator.identity["digest"]) == len(generator.identity["codec_digest"]) == 16


def test_pictures_and_codes_agree(generator):
    images, details = generator.generate_with_details(["a red star"] * 2, SEEDS[:2])
    codes = torch.tensor([detail["codes"] for detail in details])
    assert images.dtype == torch.uint8 and images.shape == (2, 3, 32, 32) and codes.shape == (2, 16)
    expected = (generator.codec.decode(codes) * 255).round().clamp(0, 255).byte()
    assert (images.int() - expected.int()).abs().max() <= 1     # another batch size may round differently


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_picture_does_not_depend_on_its_company(generator, batch_size):
    captions = ["a red star", "a blue circle", "a red star", "a red circle"]
    together = generator.generate(captions, SEEDS, batch_size=batch_size)
    alone = [generator.generate([caption], [seed], batch_size=batch_size)[0]
             for caption, seed in zip(captions, SEEDS, strict=True)]
    assert torch.equal(together, torch.stack(alone))


def test_captions_of_unequal_counts_keep_their_places(generator):
    captions = ["a", "b", "a", "c", "c"]
    assert equal_groups(captions) == [[[0, 2], [3, 4]], [[1]]]
    together = generator.generate(captions, [1, 2, 3, 4, 5])
    assert torch.equal(together[4], generator.generate(["c"], [5])[0])
    assert torch.equal(together[1], generator.generate(["b"], [2])[0])


def test_no_captions_give_no_pictures(generator):
    assert generator.generate([], []).shape == (0, 3, 32, 32)


def test_completion_keeps_the_first_rows_of_codes(generator):
    image = torch.randint(0, 256, (3, 40, 50), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    _, details = generator.complete(["a red star"] * 3, SEEDS[:3], image, rows=2)
    square = torch.nn.functional.interpolate(image[None, :, :, 5:45].float() / 255, (32, 32), mode="bicubic",
                                             antialias=True).clamp(0, 1)
    known = generator.codec.encode(square)[0, :8].tolist()
    assert all(detail["codes"][:8] == known for detail in details)
    assert len({tuple(detail["codes"]) for detail in details}) > 1


@pytest.mark.parametrize("rows", [0, 4, -1])
def test_rows_out_of_range(generator, rows):
    with pytest.raises(UserError, match="4 rows of codes, so 1 to 3"):
        generator.complete(["a"], [0], torch.zeros(3, 32, 32, dtype=torch.uint8), rows=rows)


def test_a_long_prompt_is_told(generator):
    long = "a red star " * 5
    (warning,) = generator.caption_warnings(["a red star", long, long])
    assert f"{generator.tokenizer.count(long)} tokens" in warning and "first 6 are kept" in warning


@pytest.mark.parametrize(("place", "words"), [
    ("data/tokenizer", "the tokenizer {here}/data/tokenizer does not exist; train one: `python "
                       "tools/train_tokenizer.py SHARDS --out {here}/data/tokenizer`"),
    ("model/tokenizer", "{here}/model has no tokenizer/, which belongs to the model: copy the whole folder again, or "
                        "make it from the run with `python tools/export.py RUN --out FOLDER`"),
    ("nowhere/tokenizer", "{here}/nowhere does not exist; its tokenizer is looked for there (one of a data set is made "
                          "by `python tools/train_tokenizer.py SHARDS --out {here}/nowhere/tokenizer`)"),
])
def test_a_missing_tokenizer_is_explained_by_where_it_was_looked_for(tmp_path, place, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    with pytest.raises(UserError) as missing:
        load_tokenizer(tmp_path / place)
    assert str(missing.value) == words.format(here=tmp_path)


def test_unknown_words_are_told():
    tokenizer = CaptionTokenizer.train_words(["a red star"])
    assert lost_warnings(["a red star", "a grün star", "a blau star and"], tokenizer, 4, "prompt") == [
        'the prompt "a grün star" has words that this model does not know, all the same to it: grün',
        'the prompt "a blau star and" has words that this model does not know, all the same to it: blau and']


def test_a_missing_path_lists_what_is_near(run_folder):
    with pytest.raises(UserError, match="does not exist; models near it: .*painter"):
        load_generator(run_folder.parent / "paintre")
    with pytest.raises(UserError, match="holds no model"):
        load_generator(run_folder.parent)


def test_a_checkpoint_of_another_task_is_refused_by_name(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="holds a 'clip' model; sampling needs a generator: .*text_to_image_tr"):
        load_generator(tmp_path)
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="model_type"):
        load_generator(tmp_path)


@pytest.mark.parametrize(("missing", "words"), [
    ("codec", "no codec/"), ("tokenizer", "no tokenizer/"), ("model.safetensors", "cannot load"),
])
def test_an_incomplete_export(run_folder, tmp_path, missing, words):
    shutil.copytree(run_folder, tmp_path / "run")
    victim = tmp_path / "run" / "model" / missing
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(UserError, match=words):
        load_generator(tmp_path / "run")


@pytest.mark.parametrize(("changes", "words"), [
    ({"grid": (8, 8)}, "4 x 4 codes, the transformer writes 8 x 8"),
    ({"num_codes": 32}, "16 codes, the transformer 32"),
    ({"num_text_tokens": 20}, "entries, the transformer 20"),
])
def test_parts_of_different_runs_do_not_fit(generator, changes, words):
    with pytest.raises(UserError, match=words):
        TransformerGenerator(make_transformer(**changes), generator.tokenizer, generator.codec)


@pytest.mark.parametrize(("options", "words"), [
    ({"temperature": -1.0}, "--temperature"), ({"top_p": 1.5}, "--top-p"), ({"topk": 3}, "--topk"),
])
def test_options_out_of_range_are_named(options, words):
    with pytest.raises(UserError, match=words):
        sampling_config(options)


def test_pictures_are_read_or_refused(tmp_path):
    Image.new("RGB", (5, 4), (10, 20, 30)).save(tmp_path / "picture.png")
    assert read_picture(tmp_path / "picture.png")[:, 0, 0].tolist() == [10, 20, 30]
    assert read_picture(tmp_path / "picture.png").shape == (3, 4, 5)
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="not a picture"):
        read_picture(tmp_path / "text.png")
    with pytest.raises(UserError, match="cannot read the picture"):
        read_picture(tmp_path / "none.png")


def test_every_generator_is_listed_by_its_model_type():
    assert GENERATORS[TextToImageTransformer.model_type] == TransformerGenerator.load
