"""What the fault tests share: tiny shards with chosen damage, and a small run over them.

A shard is written member by member, so that a test knows where its bytes lie.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from PIL import Image

from dalle.data.index import ShardIndex

ROOT = Path(__file__).resolve().parents[2]
SHARDS, SAMPLES, SIDE = 5, 12, 32
BLOCK = 512                      # of a tar: one for a header, whole ones for a payload

Parts = Mapping[str, bytes | None]


def sample_key(shard: int, sample: int) -> str:
    return f"{shard:05d}{sample:04d}"


def colour(shard: int, sample: int) -> tuple[int, int, int]:
    """What the pictures of the tiny shards are filled with, so that a batch tells where it came from."""
    return 20 * shard, 20 * sample, 7


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shards(folder: Path, counts: Sequence[int] = (SAMPLES,) * SHARDS, *,
                 damage: Mapping[tuple[int, int], Parts] | None = None,
                 extra: Mapping[int, Sequence[tuple[str, bytes]]] | None = None,
                 side: int = SIDE, index: bool = True) -> Path:
    """``FOLDER/00000.tar``, ... with ``counts`` samples of a picture and a caption each.

    ``damage``: (shard, sample) -> parts that replace the good ones by extension, None to leave one out.
    ``extra``: shard -> members that follow its samples.
    """
    damage, extra = damage or {}, extra or {}
    for shard, count in enumerate(counts):
        members = []
        for sample in range(count):
            picture = Image.new("RGB", (side, side), colour(shard, sample))
            good = {"png": encoded(picture, "png"), "txt": f"sample {sample} of shard {shard}".encode()}
            parts = {**good, **damage.get((shard, sample), {})}
            members += [(f"{sample_key(shard, sample)}.{extension}", data)
                        for extension, data in parts.items() if data is not None]
        write_tar(folder / f"{shard:05d}.tar", [*members, *extra.get(shard, ())])
    if index:
        ShardIndex.build(sorted(folder.glob("*.tar"))).save()
    return folder


@dataclass
class Job:
    """A run of a discrete VAE of some thousand weights, whose data also reads captions."""

    config: Path
    run: Path

    def figures(self) -> list[dict]:
        """The lines of its log that hold a step's figures."""
        lines = self.run / "log.jsonl"
        found = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
        return [line for line in found if "loss" in line]

    def steps(self) -> list[int]:
        return [line["step"] for line in self.figures()]


def write_job(folder: Path, train: Path | str, *, name: str = "job", data: dict | None = None,
              settings: dict | None = None) -> Job:
    """A config whose training data is ``train``; ``data`` and ``settings`` change those sections."""
    tree = {
        "task": "dvae", "name": name, "output": str(folder / "runs"),
        "data": {"train": str(train), "image_size": 16, "workers": 0, "lanes": 4, "window": 2, **(data or {})},
        "model": {"preset": "tiny"},
        "train": {"steps": 5, "batch_size": 12, "log_every": 1, "save_every": 0, **(settings or {})},
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return Job(path, folder / "runs" / name)


def start_command(script: str, *arguments: object, launcher: Sequence[str] = ()) -> subprocess.Popen:
    """A command as a process of its own, on the CPU and one thread, its output as text.

    ``launcher``: a module that starts the script, with its arguments.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *(["-m", *launcher] if launcher else []), str(ROOT / script), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_until(condition: Callable[[], object], process: subprocess.Popen, seconds: float = 60) -> None:
    """Poll until ``condition()`` holds; ``process`` must be alive meanwhile."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.01)
