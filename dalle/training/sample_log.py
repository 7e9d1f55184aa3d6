"""Which samples each step was trained on, for those who must prove it: ``train.log_samples``.

``sample_log/rank00000.jsonl`` has a line ``{"start": STEP, "id": ID, "world_size": W, "rank": R}`` at every start and
rollback, then one ``{"step": t, "position": [...], "key": [...]}`` a step: positions of the reading order and the keys
of the samples that were read for them. A start at STEP makes void what was logged for STEP and later before it.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FOLDER = "sample_log"


class SampleLog:
    """One rank's log; each line has left the process before the next step begins."""

    def __init__(self, folder: Path, rank: int, world_size: int):
        (folder / FOLDER).mkdir(exist_ok=True)
        self._file = open(folder / FOLDER / f"rank{rank:05d}.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (a run long)
        self._rank, self._world_size = rank, world_size

    def start(self, step: int, identity: str) -> None:
        """Training goes on at ``step``; ``identity`` is the same on all ranks and new at every start."""
        # a kill may have torn the last line: begin on a new one
        self._write({"start": step, "id": identity, "world_size": self._world_size, "rank": self._rank}, before="\n")

    def add(self, step: int, batch: Mapping[str, Any]) -> None:
        positions = batch["position"].tolist() if "position" in batch else []
        self._write({"step": step, "position": positions, "key": list(batch.get("key", ()))})

    def _write(self, entry: dict[str, Any], before: str = "") -> None:
        self._file.write(before + json.dumps(entry) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def surviving(folder: str | Path) -> dict[int, list[tuple[int, str]]]:
    """Step -> (position, key) of its samples over all ranks, by position: what the run's weights have seen."""
    files = sorted((Path(folder) / FOLDER).glob("rank*.jsonl"))
    starts: list[tuple[str, int]] = []                              # of rank 0: (id, step), as they came
    seen: dict[str, dict[int, list[tuple[int, str]]]] = {}          # id -> step -> samples
    for path in files:
        steps: dict[int, list[tuple[int, str]]] = {}
        for entry in _entries(path):
            if "start" in entry:
                steps = seen.setdefault(entry["id"], {})
                if entry["rank"] == 0:
                    starts.append((entry["id"], entry["start"]))
            else:
                steps.setdefault(entry["step"], []).extend(zip(entry["position"], entry["key"], strict=True))
    kept: dict[int, list[tuple[int, str]]] = {}
    for identity, first in starts:
        kept = {step: samples for step, samples in kept.items() if step < first}
        kept |= {step: sorted(samples) for step, samples in seen[identity].items()}
    return kept


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue                              # empty, or torn by a kill
    return entries
