"""One portable folder from a checkpoint of any engine: safetensors, config, tokenizer and a card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dalle.files import write_json
from dalle.store import SOURCE_FILE
from dalle.training.checkpoint import AVERAGE, SavedPlayer, read_state
from dalle.training.run_log import read_log
from dalle.training.task import Task
from dalle.words import cell

CARD = "README.md"


def export_checkpoint(task: Task, checkpoint: Path, folder: Path, averaged: bool = True) -> None:
    """Write the models of ``checkpoint`` into ``folder``; the averaged weights where there are any, or the raw ones.

    ``source.json`` notes which they are, for the protocol of what is measured with them.
    """
    players = {name: SavedPlayer(checkpoint / name) for name in task.players}
    task.export(str(folder), {name: player.model_state(averaged) for name, player in players.items()})
    averaged = averaged and any(player.keys(AVERAGE) for player in players.values())
    write_json(folder / SOURCE_FILE, {"step": read_state(checkpoint)["step"], "averaged": averaged})


def write_card(folder: Path, state: Mapping[str, Any], figures: Mapping[str, float], averaged: bool,
               parameters: Mapping[str, int]) -> None:
    """``README.md``: what the weights are and how they were made, for people and for the front matter's readers.

    ``state`` is a checkpoint's state.json, ``figures`` the newest validation, ``parameters`` the count of each network.
    """
    config = state["config"]
    front = {"library_name": "tessera", "pipeline_tag": "text-to-image", "tags": ["tessera", config["task"]]}
    rows = {"task": config["task"], "run": config["name"], "steps": f"{state['step']:,}",
            "samples seen": f"{state['samples']:,}", "weights": "averaged (EMA)" if averaged else "raw",
            **{f"parameters of {name}": f"{count:,}" for name, count in parameters.items()},
            "data fingerprint": state["data"].get("fingerprint", "unknown"),
            **{name: f"{value:.4g}" for name, value in figures.items()},
            **{f"{name} version": version for name, version in state["versions"].items()}}
    table = "\n".join(f"| {name} | {cell(value)} |" for name, value in rows.items())
    settings = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    text = (f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {cell(config['name'])}\n\n"
            f"Trained with Tessera.\n\n| | |\n| --- | --- |\n{table}\n\n"
            f"## Configuration\n\n```yaml\n{settings}```\n")
    (folder / CARD).write_text(text, encoding="utf-8")


def newest_validation(run: Path, step: int) -> dict[str, float]:
    """The last validation in the run's log at or before ``step``; empty where there was none."""
    found: dict[str, float] = {}
    try:
        lines = read_log(run / "log.jsonl")
    except OSError:
        return found
    for entry in lines:
        figures = {key: value for key, value in entry.items()
                   if key.startswith("validation/") and isinstance(value, (int, float))}
        if figures and entry.get("step", step + 1) <= step:
            found = figures
    return found
