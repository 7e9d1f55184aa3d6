"""Which checkpoint an exported model came from, where that is written down."""

from pathlib import Path
from typing import NamedTuple

from dalle.files import read_json
from dalle.sampling.generator import EXPORT_FOLDER

SOURCE_FILE = "source.json"      # in an export: {"step": N, "averaged": true}


class Origin(NamedTuple):
    """None where nothing tells."""

    step: int | None
    weights: str | None          # EMA or raw


def origin_of(folder: Path) -> Origin:
    """Of a model folder: by its own note, or by the newest checkpoint of the run that it is the export of."""
    note = read_json(folder / SOURCE_FILE)
    if note is not None:
        return Origin(note.get("step"), "EMA" if note.get("averaged") else "raw")
    checkpoints = sorted(folder.parent.glob("checkpoints/step_*/state.json")) if folder.name == EXPORT_FOLDER else []
    for path in reversed(checkpoints):
        state = read_json(path)
        if state is not None:
            return Origin(state.get("step"), "EMA" if any(path.parent.glob("*/average*")) else "raw")
    return Origin(None, None)
