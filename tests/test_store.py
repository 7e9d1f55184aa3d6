"""Exported models are found, described and loaded by kind; and a second codec is one file and one line of a table."""

import ast
import json
from pathlib import Path

import pytest
import torch

from dalle.data.codes import codes_digest
from dalle.errors import UserError
from dalle.evaluation.job import Job
from dalle.evaluation.measure import evaluate
from dalle.evaluation.processes import Processes
from dalle.models.codec import Codec
from dalle.pictures import to_bytes, to_unit
from dalle.sampling.generator import TransformerGenerator
from dalle.store import (
    CODEC_FOLDER,
    CODECS,
    Origin,
    codec_digests,
    find_model,
    identify,
    load_codec,
    load_generator,
    model_folder,
    model_kind,
    origin_of,
)
from tests.toy_codec import ToyCodec, ToyConfig

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for folder in ("dalle", "gans", "launch", "tools") for path in (ROOT / folder).rglob("*.py")]

# What a codec touches beside its line of CODECS: its own file, and those that make one of its kind. Nobody else.
FILES = {"dvae": {"dalle/models/dvae.py", "dalle/tasks/dvae.py", "tools/import_checkpoint.py"}}


def imported(path: Path) -> set[str]:
    """The project's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in found if name.partition(".")[0] in ("dalle", "gans", "launch", "tools")}


# -- the table ---------------------------------------------------------------------------------------------------------

def test_every_codec_is_one_file_that_only_those_who_make_it_name():
    assert FILES.keys() == CODECS.keys()
    for kind, codec in CODECS.items():
        own = f"{codec.__module__.replace('.', '/')}.py"
        assert issubclass(codec, Codec) and codec.model_type == kind
        naming = {path.relative_to(ROOT).as_posix() for path in SOURCES if codec.__module__ in imported(path)}
        assert naming | {own} == FILES[kind]


def test_every_codec_says_what_a_codec_promises():
    for codec in CODECS.values():
        for member in ("num_codes", "grid", "encode", "decode"):
            assert getattr(codec, member) is not getattr(Codec, member), f"{codec.__name__} has no {member}"
        assert "image_size" in codec.Config.model_fields


def test_the_store_knows_nothing_above_the_models():
    below = ("dalle.data", "dalle.models", "dalle.errors", "dalle.files", "dalle.lookup", "dalle.tensor_file",
             "dalle.words")
    assert [name for name in imported(ROOT / "dalle/store.py") if not name.startswith(below)] == []


# -- a second codec ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def toy():
    """The line in the table, as long as the module's tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CODECS, "_places", dict(CODECS._places))
        CODECS.add({"toy": ("tests.toy_codec", "ToyCodec")})
        yield
    assert "toy" not in CODECS


@pytest.fixture(scope="module")
def run(toy, tmp_path_factory) -> Path:
    """The folder of a run that has exported a toy codec of 16 pixels, 4 x 4 codes of 27."""
    folder = tmp_path_factory.mktemp("runs") / "toy"
    ToyCodec(ToyConfig(image_size=16)).save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def painter(run, workshop, commands, tmp_path_factory) -> Path:
    """The run of a transformer that was trained for four steps on the toy's codes."""
    runs = tmp_path_factory.mktemp("painters")
    assert commands["train"](workshop.config("transformer", runs, codec=str(run))) == 0
    return runs / "transformer"


def test_a_codec_is_found_described_and_loaded_by_kind(run):
    folder = model_folder(run)
    assert folder == find_model(run) == find_model(folder) == run / "model" and find_model(run.parent) is None
    assert model_kind(folder) == "toy" and identify(folder)["kind"] == "toy"
    codec = load_codec(folder, "cpu")
    assert isinstance(codec, ToyCodec) and (codec.grid, codec.num_codes, codec.config.image_size) == ((4, 4), 27, 16)
    assert codec_digests(codec, folder)[1] == identify(folder)["digest"]


def test_a_model_that_is_no_codec_is_refused_by_name(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match=r"holds a 'clip', not a codec: dvae, toy$"):
        load_codec(tmp_path, "cpu")


def test_a_transformer_is_trained_on_its_codes_and_exported_with_it(painter):
    lines = [json.loads(line) for line in (painter / "log.jsonl").read_text().splitlines()]
    assert max(line.get("step", 0) for line in lines) == 4 and any("validation/image_ce" in line for line in lines)
    assert list((painter / "samples").glob("step_*_samples.png"))
    export = painter / "model"
    assert model_kind(export / CODEC_FOLDER) == "toy"
    config = json.loads((export / "config.json").read_text())
    assert (config["grid"], config["num_codes"]) == ([4, 4], 27)
    assert origin_of(export) == Origin(4, "EMA")


def test_a_transformer_paints_with_it(painter):
    generator = load_generator(painter)
    assert isinstance(generator, TransformerGenerator) and isinstance(generator.codec, ToyCodec)
    assert (generator.precision, generator.edits, generator.completes) == ("fp32", False, True)
    images, details = generator.generate_with_details(["a red circle", "a blue square"], [1, 2], temperature=0.5)
    codes = torch.tensor([one["codes"] for one in details])
    assert codes.shape == (2, 16) and torch.equal(images, to_bytes(generator.codec.decode(codes)))
    source = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    _, details = generator.complete(["a red circle"], [3], source, rows=2)
    assert details[0]["codes"][:8] == [26] * 8                                                   # white
    assert load_generator(painter, dtype=torch.bfloat16).precision == "bf16"


def test_its_codes_are_cached_and_a_transformer_reads_them(run, workshop, commands, tmp_path):
    for split in ("train", "validation"):
        assert commands["cache_codes"]("--codec", run, "--data", workshop.folder / "data" / split, "--out",
                                       tmp_path / split, "--device", "cpu") == 0
    codec = load_codec(run / "model", "cpu")
    assert codes_digest(tmp_path / "train") == codec_digests(codec, run / "model")[0]
    cached = {"images": False, "codes": str(tmp_path / "train"), "validation_codes": str(tmp_path / "validation")}
    assert commands["train"](workshop.config("transformer", tmp_path, codec=str(run), data=cached)) == 0


def test_a_clip_looks_through_it(run, workshop, commands, tmp_path):
    assert commands["train"](workshop.config("clip", tmp_path, loss={"reconstructions": 0.5, "codec": str(run)})) == 0


def test_its_reconstructions_are_measured(run, workshop, tmp_path):
    data = str(workshop.folder / "data" / "validation")
    job = Job(model=str(run), data=data, out=tmp_path, cache=tmp_path, metrics=("psnr",), samples=8)
    results = evaluate(job, Processes(), lambda message: None)
    assert results.model["kind"] == "toy" and 5 < results.rows[0].value < 60


def test_the_toy_keeps_what_its_palette_has():
    codec = ToyCodec(ToyConfig(image_size=8))
    image = codec.palette.detach()[torch.tensor([[0, 26], [13, 5]])].permute(2, 0, 1)            # [3, 2, 2]
    pixels = image.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[None]
    assert codec.encode(pixels).tolist() == [[0, 26, 13, 5]]
    assert torch.equal(codec.decode(codec.encode(to_unit(to_bytes(pixels)))), pixels)


# -- where an export came from -----------------------------------------------------------------------------------------

def test_an_export_tells_its_checkpoint_or_the_run_does(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    assert origin_of(folder) == Origin(None, None)
    checkpoint = tmp_path / "checkpoints" / "step_00000007"
    (checkpoint / "net").mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"step": 7}))
    assert origin_of(folder) == Origin(7, "raw")
    (folder / "source.json").write_text(json.dumps({"step": 9, "averaged": True}))
    assert origin_of(folder) == Origin(9, "EMA")


@pytest.mark.parametrize("text", ["[" * 100_000, "not json", "[1]", "\x80"])
def test_a_note_that_cannot_be_read_tells_nothing(tmp_path, text):
    (tmp_path / "source.json").write_text(text, encoding="latin-1")
    assert origin_of(tmp_path) == Origin(None, None)
