"""Reading a run's ``log.jsonl`` as one run.

A run that was killed has logged steps past its newest checkpoint, and logs them again when it goes on from there; so
does one that went back before a spike. What was given up stays in the file, which is only ever added to, and is left
out here.
"""

import json
from pathlib import Path
from typing import Any


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of the run as it is now, every step once. Torn lines are left out. Raises ``OSError``."""
    lines: list[dict[str, Any]] = []
    for entry in entries(path.read_text(encoding="utf-8", errors="replace")):
        back_to = goes_back_to(entry)
        if back_to is not None:
            lines = [line for line in lines if line.get("step", 0) <= back_to]
        lines.append(entry)
    return lines


def entries(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):       # torn by a kill
            continue
        if isinstance(entry, dict) and isinstance(entry.get("step", 0), int):
            found.append(entry)
    return found


def goes_back_to(entry: dict[str, Any]) -> int | None:
    """The step after which all that was logged before this line is void; None for an ordinary line."""
    event = entry.get("event")
    if event == "start":
        return -1
    step = {"resume": entry.get("step"), "rollback": entry.get("to_step")}.get(str(event))
    return step if isinstance(step, int) else None
