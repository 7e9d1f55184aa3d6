"""A payload in every file that any command reads: nothing of it runs, and the command ends in one line or goes on.

A payload makes a folder when it is unpickled (or built by a YAML tag) the ordinary way; :func:`test_the_payloads_work`
holds that. A job of every kind is made once; each test copies it, replaces one file and runs the command that reads it.
"""

import contextlib
import fnmatch
import importlib.util
import io
import json
import pickle
import shutil
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from payloads import PAYLOADS, payloads_for
from PIL import Image
from torch import nn

from dalle.errors import run_command
from dalle.files import sha256_of
from dalle.models.base import CONFIG_FILE, WEIGHTS_FILE
from tests.conftest import ROOT, Workshop

STEP = "step_00000002"
CHECKPOINT = f"runs/transformer/checkpoints/{STEP}"
REFUSED, HARMLESS = (2,), (0, 2)


def test_the_payloads_work(tmp_path):
    readers = {
        "pickle": pickle.loads,
        "torch": lambda data: torch.load(io.BytesIO(data), weights_only=False),
        "numpy": lambda data: np.load(io.BytesIO(data), allow_pickle=True),
        "yaml": lambda data: yaml.load(data, Loader=yaml.UnsafeLoader),
    }
    for name, read in readers.items():
        read(PAYLOADS[name](tmp_path / name))
        assert (tmp_path / name).is_dir()


# --- the job ----------------------------------------------------------------------------------------------------------


def train(folder: Path, task: str, *arguments: object) -> list[object]:
    """The train command on the job in ``folder``, with the codes from the cache."""
    data = {"codes": str(folder / "data/codes/train"), "validation_codes": str(folder / "data/codes/validation")}
    sections = {"data": data} if task == "transformer" else {}
    return ["train", Workshop(folder).config(task, folder / "runs", **sections), *arguments]


def cache(folder: Path, split: str, out: str = "data/codes") -> list[object]:
    return ["cache_codes", "--codec", folder / "runs/dvae", "--data", folder / f"data/{split}", "--out",
            folder / out / split]


def sample(folder: Path, *arguments: object) -> list[object]:
    return ["sample", "--model", folder / "runs/transformer", "--out", folder / "out", "--candidates", 2, "--device",
            "cpu", *(arguments or ("--prompt", "a red circle"))]


def shards(folder: Path, source: str) -> list[object]:
    return ["make_shards", "folder", folder / "own" / source, "--out", folder / "own/shards", "--workers", 1]


def emoji(folder: Path) -> list[object]:
    return ["make_shards", "emoji", "--font", folder / "own/font.ttf", "--annotations", folder / "own/cldr", "--out",
            folder / "own/emoji", "--workers", 1]


def imported(folder: Path) -> list[object]:
    return ["import_checkpoint", "openai-dvae", folder / "own/encoder.pkl", folder / "own/decoder.pkl", "--out",
            folder / "own/imported"]


def judge(folder: Path) -> list[object]:
    return ["judge", "--model", folder / "runs/transformer", "--rerank", folder / "runs/clip", "--data",
            folder / "data/validation", "--captions", 2, "--candidates", 2, "--out", folder / "out/judge.json"]


COMMANDS: dict[str, Callable[[Path], list[object]]] = {
    "resume": lambda folder: train(folder, "transformer"),
    "train a transformer": lambda folder: train(folder, "transformer", "--resume", "none"),
    "train a CLIP": lambda folder: train(folder, "clip", "--resume", "none"),
    "train by a config": lambda folder: ["train", folder / "own/config.yaml"],
    "sample": lambda folder: sample(folder, "--rerank", folder / "runs/clip", "--prompts", folder / "own/prompts.txt",
                                    "--image", folder / "own/picture.png", "--rows", 1),
    "rank by a hub folder": lambda folder: sample(folder, "--prompt", "a", "--rerank", folder / "own/hub"),
    "rank by a file": lambda folder: sample(folder, "--prompt", "a", "--rerank",
                                            f"open_clip:ViT-S-32-alt/{folder / 'own/weights.pt'}"),
    "judge": judge,
    "cache codes": lambda folder: cache(folder, "train", out="own/codes"),
    "cache codes again": lambda folder: cache(folder, "train"),
    "train a tokenizer": lambda folder: ["train_tokenizer", folder / "data/train", "--out", folder / "own/tokenizer",
                                         "--vocab-size", 300],
    "index": lambda folder: ["index_shards", folder / "data/train", "--workers", 1],
    "check the index": lambda folder: ["index_shards", folder / "data/train", "--workers", 1, "--check"],
    "shards of a folder": lambda folder: shards(folder, "pictures"),
    "shards of a csv": lambda folder: shards(folder, "table.csv"),
    "shards of a tsv": lambda folder: shards(folder, "table.tsv"),
    "shards of a jsonl": lambda folder: shards(folder, "table.jsonl"),
    "shards of a parquet": lambda folder: shards(folder, "table.parquet"),
    "shards of emoji": emoji,
    "shards made before": lambda folder: ["make_shards", "shapes", "--out", folder / "data", "--count", 96,
                                          "--validation", 24, "--size", 16, "--samples-per-shard", 32],
    "import": imported,
}

SHARDS = {"{0}/index/index.json": REFUSED, "{0}/index/*.npy": REFUSED, "{0}/*.tar": REFUSED}


def shards_in(split: str) -> dict[str, tuple[int, ...]]:
    return {pattern.format(f"data/{split}"): statuses for pattern, statuses in SHARDS.items()}


def model_in(folder: str) -> dict[str, tuple[int, ...]]:
    return {f"{folder}/{CONFIG_FILE}": REFUSED, f"{folder}/{WEIGHTS_FILE}": REFUSED}


TOKENIZER = "data/tokenizer/tokenizer.json"
READ: dict[str, dict[str, tuple[int, ...]]] = {
    "resume": {
        f"{CHECKPOINT}/state.json": REFUSED,
        f"{CHECKPOINT}/transformer/weights*": REFUSED,
        f"{CHECKPOINT}/transformer/optimizer*": REFUSED,
        f"{CHECKPOINT}/transformer/average*": REFUSED,
        f"{CHECKPOINT}/manifest.json": HARMLESS,                 # passed over: the checkpoint before it is whole
        "runs/transformer/log.jsonl": HARMLESS,
        "runs/transformer/wandb_id": HARMLESS,
        "runs/transformer/finished": HARMLESS,
    },
    "train a transformer": {
        **shards_in("train"), **shards_in("validation"), **model_in("runs/dvae/model"), TOKENIZER: REFUSED,
        "data/codes/train/codes.json": REFUSED, "data/codes/train/*.npy": REFUSED,
        "data/codes/validation/codes.json": REFUSED, "data/codes/validation/*.npy": REFUSED,
    },
    "train a CLIP": {**model_in("runs/dvae/model"), TOKENIZER: REFUSED},
    "train by a config": {"own/config.yaml": REFUSED},
    "sample": {
        **model_in("runs/transformer/model"), **model_in("runs/transformer/model/codec"), **model_in("runs/clip/model"),
        "runs/transformer/model/tokenizer/tokenizer.json": REFUSED, "runs/clip/model/tokenizer/tokenizer.json": REFUSED,
        "own/prompts.txt": HARMLESS,                             # any text is a prompt
        "own/picture.png": REFUSED,
    },
    "rank by a hub folder": {"own/hub/open_clip_config.json": REFUSED, "own/hub/open_clip_pytorch_model.bin": REFUSED},
    "rank by a file": {"own/weights.pt": REFUSED},
    "judge": shards_in("validation"),
    "cache codes": {**shards_in("train"), **model_in("runs/dvae/model")},
    "cache codes again": {"data/codes/train/codes.json": REFUSED},
    "train a tokenizer": shards_in("train"),
    "index": {"data/train/*.tar": HARMLESS, "data/train/index/*": (0,)},
    "check the index": {"data/train/*.tar": (1, 2), "data/train/index/index.json": REFUSED},
    "shards of a folder": {"own/pictures/*": REFUSED},           # left out, so that no sample is left
    "shards of a csv": {"own/table.csv": REFUSED},
    "shards of a tsv": {"own/table.tsv": REFUSED},
    "shards of a jsonl": {"own/table.jsonl": REFUSED},
    "shards of a parquet": {"own/table.parquet": REFUSED},
    "shards made before": {"data/dataset.json": REFUSED},
    "shards of emoji": {"own/cldr/*/en.xml": REFUSED, "own/font.ttf": REFUSED},
    "import": {"own/encoder.pkl": REFUSED, "own/decoder.pkl": REFUSED},
}
NOT_READ = [
    "*/tokenizer_config.json", "*/samples/*.png", "runs/*.yaml", "runs/*/config.yaml",
    "runs/clip/checkpoints/*", "runs/dvae/checkpoints/*", "runs/transformer/checkpoints/step_00000000/*",
    "runs/clip/log.jsonl", "runs/dvae/log.jsonl", "runs/*/finished",
    "runs/*/model/source.json",     # a note that launch/evaluate.py does without: tests/evaluation
]


@pytest.fixture(scope="module")
def job(workshop, commands, tmp_path_factory) -> Path:
    """Data, tokenizer, codec, codes, a transformer that is stopped half-way, a CLIP, and files of a user's own."""
    folder = tmp_path_factory.mktemp("jobs") / "job"
    shutil.copytree(workshop.folder, folder)
    torch.manual_seed(0)
    for name, *arguments in (cache(folder, "train"), cache(folder, "validation"),
                             train(folder, "transformer", "--stop-after", 2), train(folder, "clip")):
        assert commands[name](*arguments) == 0
    own = folder / "own"
    (own / "pictures").mkdir(parents=True)
    picture = Image.new("RGB", (20, 20), (200, 30, 30))
    for name in ("picture.png", "pictures/one.png", "pictures/two.png", "pictures/three.png"):
        picture.save(own / name)
    for name in ("one", "two", "three"):
        (own / f"pictures/{name}.txt").write_text("a red picture")
    rows = [{"path": f"pictures/{name}.png", "caption": "a red picture"} for name in ("one", "two", "three")]
    for name, comma in (("table.csv", ","), ("table.tsv", "\t")):
        lines = [comma.join(row) for row in [["path", "caption"], *(row.values() for row in rows)]]
        (own / name).write_text("\n".join(lines))
    (own / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), own / "table.parquet")
    (own / "prompts.txt").write_text("a red circle\n")
    (own / "config.yaml").write_text("task: dvae\n")
    for part in ("annotations", "annotationsDerived"):
        (own / "cldr" / part).mkdir(parents=True)
        (own / "cldr" / part / "en.xml").write_text('<ldml><annotation cp="*" type="tts">star</annotation></ldml>')
    (own / "font.ttf").write_bytes(b"")
    for name in ("encoder.pkl", "decoder.pkl"):
        torch.save(nn.Linear(1, 1), own / name)
    save_hub_folder(own / "hub")
    (own / "weights.pt").write_bytes((own / "hub/open_clip_pytorch_model.bin").read_bytes())
    return folder


def save_hub_folder(folder: Path) -> None:
    description = {
        "embed_dim": 8,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": description, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**description).state_dict(), folder / "open_clip_pytorch_model.bin")


@dataclass
class Scene:
    """A copy of the job, in which one file may be replaced."""

    folder: Path

    @property
    def marker(self) -> Path:
        return self.folder / "marker"

    def replace(self, path: Path, content: bytes) -> None:
        """Put ``content`` into ``path``; where a checkpoint's manifest lists the file, it says the new hash."""
        path.write_bytes(content)
        for parent in path.parents:
            manifest = parent / "manifest.json"
            if manifest.is_file() and manifest != path:
                listed = json.loads(manifest.read_text())
                listed["files"][path.relative_to(parent).as_posix()] = {"size": len(content), "sha256": sha256_of(path)}
                manifest.write_text(json.dumps(listed))
            if parent == self.folder:
                break


@pytest.fixture
def scenes(job, tmp_path) -> Iterator[Callable[[], Scene]]:
    """Copies of the job, one a call."""
    count = 0

    def copy() -> Scene:
        nonlocal count
        count += 1
        folder = tmp_path / f"job{count}"
        shutil.copytree(job, folder)
        return Scene(folder)

    with warnings.catch_warnings(action="ignore"):          # torch on the protocols of pickles
        yield copy


def test_every_command_ends_well_on_the_whole_job(scenes, run_here):
    for name, arguments in COMMANDS.items():
        if name in ("train by a config", "shards of emoji", "import", "rank by a file"):
            continue                                        # their files are no more than payloads' places
        scene = scenes()
        ended = run_here(*arguments(scene.folder))
        assert ended.status == 0, (name, ended.error)


def test_every_file_of_the_job_is_replaced_by_some_test(job):
    patterns = [*NOT_READ, *(pattern for files in READ.values() for pattern in files)]
    files = [path.relative_to(job).as_posix() for path in job.rglob("*") if path.is_file()]
    assert len(files) > 50
    assert [file for file in files if not any(fnmatch.fnmatch(file, pattern) for pattern in patterns)] == []


CASES = [(command, pattern) for command, files in READ.items() for pattern in files]


@pytest.mark.parametrize(("command", "pattern"), CASES, ids=[f"{command}: {pattern}" for command, pattern in CASES])
def test_malicious_file_is_not_run_and_refused_in_one_line(command, pattern, scenes, run_here, job):
    files = sorted(path.relative_to(job) for path in job.glob(pattern)) or [Path(pattern)]
    for name in payloads_for(files[0]):
        scene = scenes()
        for file in files:
            scene.replace(scene.folder / file, PAYLOADS[name](scene.marker))
        ended = run_here(*COMMANDS[command](scene.folder))
        assert not scene.marker.exists(), name
        assert ended.status in READ[command][pattern], (name, ended)
        if ended.status == 2:
            assert one_line(ended.error), (name, ended.error)
        shutil.rmtree(scene.folder)


def one_line(error: str) -> bool:
    return [line.startswith("error: ") for line in error.splitlines()].count(True) == 1 and "Traceback" not in error


# --- what needs more than another content -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../../marker/x", "/tmp/marker", "transformer/../../x", "a\0b", ""])
def test_checkpoint_whose_manifest_names_a_file_outside_is_passed_over(name, scenes, run_here, caplog):
    scene = scenes()
    manifest = scene.folder / CHECKPOINT / "manifest.json"
    listed = json.loads(manifest.read_text())
    listed["files"][name] = {"size": 1, "sha256": "0"}
    manifest.write_text(json.dumps(listed))
    ended = run_here(*COMMANDS["resume"](scene.folder))
    assert ended.status == 0 and f"passed over {scene.folder / CHECKPOINT}" in caplog.text, ended.error


def test_tensors_that_the_manifest_does_not_list_are_never_loaded(scenes, run_here, caplog):
    scene = scenes()
    weights = next((scene.folder / CHECKPOINT / "transformer").glob("weights*"))
    shutil.copy(weights, weights.with_name("weights-00009.safetensors"))
    assert run_here(*COMMANDS["resume"](scene.folder)).status == 0
    assert "weights-00009.safetensors is not in manifest.json" in caplog.text


STATES = {
    "players": ["../../x"], "step": "../../x", "config": None, "data": [], "format": {"a": 1}, "samples": -1,
    "excluded_batches": "x", "rollbacks": {}, "usual_losses": 3,
}


@pytest.mark.parametrize("key", STATES)
def test_hostile_state_of_a_checkpoint_is_refused_in_one_line(key, scenes, run_here):
    scene = scenes()
    path = scene.folder / CHECKPOINT / "state.json"
    scene.replace(path, json.dumps({**json.loads(path.read_text()), key: STATES[key]}).encode())
    ended = run_here(*COMMANDS["resume"](scene.folder))
    assert ended.status == (0 if key == "samples" else 2) and "Traceback" not in ended.error, ended
    assert sorted(path.name for path in scene.folder.iterdir()) == ["data", "own", "runs"]


def test_hub_folder_that_brings_python_of_its_own_does_not_run_it(scenes, run_here):
    for options in ({"trust_remote_code": True}, {}):
        scene = scenes()
        hub = scene.folder / "own/hub"
        description = json.loads((hub / "open_clip_config.json").read_text())
        description["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "mine", "tokenizer_kwargs": options}
        (hub / "open_clip_config.json").write_text(json.dumps(description))
        (hub / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["mine.Mine", None]}}))
        (hub / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "mine.Mine"}}))
        (hub / "mine.py").write_text(f"import os; os.mkdir({str(scene.marker)!r})\nclass Mine: pass\n")
        ended = run_here(*COMMANDS["rank by a hub folder"](scene.folder))
        assert ended.status == 2 and one_line(ended.error), ended.error
        assert not scene.marker.exists()


def test_parquet_with_a_pickled_column_type_is_not_unpickled(scenes, run_here):
    scene = scenes()
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type",
                b"ARROW:extension:metadata": PAYLOADS["pickle"](scene.marker)}
    schema = pyarrow.schema([pyarrow.field("path", pyarrow.string()),
                             pyarrow.field("caption", pyarrow.string(), metadata=metadata)])
    rows = pyarrow.parquet.read_table(scene.folder / "own/table.parquet").to_pylist()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), scene.folder / "own/table.parquet")
    assert run_here(*COMMANDS["shards of a parquet"](scene.folder)).status == 0
    assert not scene.marker.exists()


def test_links_in_a_shard_are_never_followed(scenes, run_here, capsys):
    scene = scenes()
    secret = scene.folder / "secret.png"
    Image.new("RGB", (16, 16)).save(secret)
    shutil.rmtree(scene.folder / "data/train/index")
    with tarfile.open(scene.folder / "data/train/00000.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "soft"), (tarfile.LNKTYPE, "hard"), (tarfile.CHRTYPE, "device")):
            link = tarfile.TarInfo(f"{name}.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
            text = tarfile.TarInfo(f"{name}.txt")
            text.size = 4
            tar.addfile(text, io.BytesIO(b"text"))
    assert run_here(*COMMANDS["index"](scene.folder)).status == 0
    table = json.loads((scene.folder / "data/train/index/index.json").read_text())
    assert {shard["name"]: shard["count"] for shard in table["shards"]}["00000.tar"] == 0


def test_model_that_asks_for_terabytes_is_refused_in_one_line(scenes, run_here):
    scene = scenes()
    path = scene.folder / "runs/transformer/model/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dim": 2**40, "heads": 2**20}))
    ended = run_here(*COMMANDS["sample"](scene.folder))
    assert ended.status == 2 and one_line(ended.error), ended.error


YAML_BOMB = "\n".join([
    "task: dvae", "a0: &a0 [x, x, x, x, x, x, x, x, x, x]",
    *(f"a{level}: &a{level} [{', '.join(10 * [f'*a{level - 1}'])}]" for level in range(1, 12)), "name: *a11"])


@pytest.mark.parametrize("text", [
    YAML_BOMB, YAML_BOMB.replace("task: dvae", "size: 1").replace("name:", "task:"),
    "task: dvae\n? [a]\n: 1\n", "&a [*a]", "task: *nowhere", "? ? a", "\0"])
def test_hostile_yaml_is_refused_in_one_line_at_once(text, tmp_path, run_here):
    (tmp_path / "config.yaml").write_text(text)
    began = time.monotonic()
    ended = run_here("train", tmp_path / "config.yaml")
    assert ended.status == 2 and one_line(ended.error) and len(ended.error) < 2000, ended.error[:2000]
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("file", ["stages.json", "judge.json", "dvae/log.jsonl"])
def test_malicious_state_of_the_quickstart_is_not_run_and_refused_in_one_line(file, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("quickstart_under_attack", ROOT / "launch/quickstart.py")
    quickstart = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, quickstart)
    spec.loader.exec_module(quickstart)
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setitem(quickstart.STAGES, "shapes", (list, Path("runs/quickstart")))
    monkeypatch.setattr(sys, "argv", ["quickstart.py"])
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs/quickstart"
    for name in ("dvae", "transformer", "clip"):
        (runs / name).mkdir(parents=True)
        (runs / name / "log.jsonl").write_text(json.dumps({f"validation/{figure}": 0.5 for figure in (
            "psnr", "codes_used", "perplexity", "bits_per_image_token", "recall@1_in_64")}) + "\n")
    for name in payloads_for(Path(file)):
        (runs / file).write_bytes(PAYLOADS[name](tmp_path / "marker"))
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
            run_command(quickstart.main)
        assert ended.value.code == 2 and one_line(errors.getvalue()), errors.getvalue()
        assert not (tmp_path / "marker").exists()
