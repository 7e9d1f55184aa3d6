#!/usr/bin/env python
"""Runs of an earlier revision go on under this one, bit for bit: checkpoints, exports and the pictures they paint.

    python tools/bench/across_versions.py --before v0.2.0
    python tools/bench/across_versions.py --before HEAD~20 --only dvae transformer attngan --keep runs/across

The earlier revision is checked out beside this one and trains every task from its own quickstart or ``*_shapes``
config, made small, once for four steps and once for two of the four. This revision goes on from the second, and from
the companions that the first exported. A line a run: how many tensors of the checkpoint and of the export differ from
the four steps of the earlier revision, and how many pictures from those that it paints. Ends with 1 where one does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors.torch import load_file

import gans
from dalle.training.run_folder import leaves

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, HALF = 4, 2
SMALL = {"steps": STEPS, "batch_size": 16, "precision": "fp32", "log_every": 1, "validate_every": 0,
         "preview_every": 0, "evaluate_every": 0, "save_every": HALF}
PICTURES = 2
CAPTION = "a red circle above a small blue square"
PAINTED = "kept/*.png"


class Outcome(NamedTuple):
    """What was compared of one kind, and what is different or in one of the two alone."""

    compared: int
    different: list[str]

    def __str__(self) -> str:
        said = f"{self.compared - len(self.different)} of {self.compared} equal"
        return f"{said} ({', '.join(self.different[:3])}, ...)" if self.different else said


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REVISION", help="of this repository, as git names it")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="configs by name (dvae, attngan), with all they need")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where the runs stay (default: nowhere)")
    return parser.parse_args()


def configs(only: list[str] | None) -> dict[str, Path]:
    """Config by name, each behind those that it needs."""
    found = {path.stem: path for path in (ROOT / "configs" / "quickstart").glob("*.yaml")}
    found |= {path.stem.removesuffix("_shapes"): path for path in (ROOT / "configs" / "gans").glob("*_shapes.yaml")}
    by_run = {f"runs/{yaml.safe_load(path.read_text())['name']}": name for name, path in found.items()}
    ordered: dict[str, Path] = {}

    def add(name: str) -> None:
        for value in leaves(yaml.safe_load(found[name].read_text())):
            for run, other in by_run.items():
                if other != name and f"{value}/".startswith(f"{run}/"):
                    add(other)
        ordered.setdefault(name, found[name])

    for name in only or sorted(found):
        if name not in found:
            sys.exit(f"unknown config {name!r}; known: {', '.join(sorted(found))}")
        add(name)
    return ordered


def made_small(path: Path, place: Path) -> Path:
    """The config with few steps on the small data, its companions the runs in ``place`` as they stand."""
    tree = yaml.safe_load(path.read_text())
    tree |= {"output": "runs", "prerequisites": []}
    tree["train"] = tree["train"] | SMALL
    tree["data"] = {key: value for key, value in tree["data"].items() if "codes" not in key and key != "images"}
    tree["data"]["workers"] = 0
    tree.pop("evaluation", None)
    written = place / "configs" / path.name
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(yaml.safe_dump(tree))
    return written


def command(source: Path, place: Path, *words: object) -> None:
    """A command of the revision in ``source``, in the folder ``place``; what it says is kept for a failure."""
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(source / str(words[0])), *map(str, words[1:])], cwd=place,
                          env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))} in {place} ended with {done.returncode}:\n{done.stderr[-2000:]}")


def make_data(source: Path, place: Path) -> None:
    command(source, place, "tools/make_shards.py", "shapes", "--out", "data/shapes", "--count", 256,
            "--validation", 64, "--size", 64, "--samples-per-shard", 64)
    command(source, place, "tools/train_tokenizer.py", "data/shapes/train", "--out", "data/shapes/tokenizer",
            "--vocab-size", 400)


def tensors(folder: Path, pattern: str) -> dict[str, object]:
    return {f"{path.relative_to(folder)}:{name}": tensor for path in sorted(folder.glob(pattern))
            for name, tensor in load_file(path).items()}


def compared(expected: dict[str, object], found: dict[str, object]) -> Outcome:
    def same(name: str) -> bool:
        if name not in expected or name not in found:
            return False
        one, two = expected[name], found[name]
        return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two

    names = expected.keys() | found.keys()
    return Outcome(len(names), sorted(name for name in names if not same(name)))


def painted(source: Path, place: Path, run: Path, out: str) -> dict[str, object] | None:
    """The pictures of a run by the revision in ``source``; None where it paints none."""
    from dalle.store import GENERATORS, load_generator, model_kind

    model = place / run / "model"
    if model_kind(model) not in GENERATORS:
        return None
    given = ["--image", picture(place)] if load_generator(model).edits else []
    command(source, place, "launch/sample.py", "--model", run, "--prompt", CAPTION, "--candidates", PICTURES,
            "--seed", 7, "--device", "cpu", "--out", out, *given)
    return {path.name: path.read_bytes() for path in sorted((place / out).glob(PAINTED))}


def picture(place: Path) -> Path:
    """A picture to change."""
    from PIL import Image

    path = place / "picture.png"
    if not path.is_file():
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(path)
    return path


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def main() -> int:
    arguments = parse_arguments()
    gans.register()
    chosen = configs(arguments.only)
    with tempfile.TemporaryDirectory() as temporary:
        place = (arguments.keep or Path(temporary) / "place").absolute()
        before = Path(temporary) / "before"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(before), arguments.before], cwd=ROOT,
                       check=True)
        try:
            return compare(before, place, chosen)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(before)], cwd=ROOT, check=True)


def compare(before: Path, place: Path, chosen: dict[str, Path]) -> int:
    """Train there, go on here, and print a line a run."""
    place.mkdir(parents=True, exist_ok=True)
    make_data(before, place)
    worst = 0
    for name, path in chosen.items():
        config = made_small(path, place)
        run = Path("runs") / yaml.safe_load(config.read_text())["name"]
        whole, aside = place / run, place / "halves" / name
        command(before, place, "launch/train.py", config, "--stop-after", HALF)
        shutil.copytree(whole, aside)
        command(before, place, "launch/train.py", config)
        expected = tensors(newest(whole), "**/*.safetensors"), tensors(whole / "model", "**/*.safetensors")
        pictures = painted(before, place, run, f"painted/{name}/before")
        outcomes = {"pictures of the export": None if pictures is None else
                    compared(pictures, painted(ROOT, place, run, f"painted/{name}/after"))}
        kept = place / "wholes" / name
        shutil.move(whole, kept)
        shutil.move(aside, whole)
        command(ROOT, place, "launch/train.py", config)
        outcomes |= {"checkpoint": compared(expected[0], tensors(newest(whole), "**/*.safetensors")),
                     "export": compared(expected[1], tensors(whole / "model", "**/*.safetensors"))}
        shutil.rmtree(whole)
        shutil.move(kept, whole)           # what the next ones read is the earlier revision's
        print(f"{name:12} " + "; ".join(f"{what}: {outcome}" for what, outcome in outcomes.items()
                                        if outcome is not None), flush=True)
        worst |= int(any(outcome is not None and (outcome.different or not outcome.compared)
                         for outcome in outcomes.values()))
    return worst


if __name__ == "__main__":
    sys.exit(main())
