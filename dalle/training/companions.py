"""The networks that a run reads from elsewhere are part of what it is: known by what they hold, not by their path.

A codec that was trained again under its name fits the transformer's shapes and none of its codes. So a checkpoint
keeps the digest of every companion, and neither a resume nor an export goes on with another. ``codes.json`` beside
cached codes names its codec by the same digest.
"""

import logging
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dalle.data.tokenizer import CaptionTokenizer
from dalle.errors import UserError
from dalle.tensor_file import module_digest
from dalle.training.engines.base import Engine
from dalle.training.run import RunConfig
from dalle.training.task import Companion, Task

log = logging.getLogger(__name__)

Records = dict[str, dict[str, str]]      # name -> {"digest": ..., "setting": the key of the config that names it}


def records_of(task: Task) -> Records:
    """What a checkpoint keeps of the task's companions; to be asked before an engine moves or casts them."""
    seen: dict[int, str] = {}
    return {name: {"digest": companion_digest(companion, seen), "setting": companion.setting}
            for name, companion in task.companions().items()}


def companion_digest(companion: Companion, seen: dict[int, str]) -> str:
    """``seen`` remembers modules that several companions share."""
    key = id(companion.module)
    if key not in seen:
        seen[key] = module_digest(companion.module)
    return f"{seen[key]}+{companion.made_from}" if companion.made_from else seen[key]


def agreed_records(engine: Engine, task: Task) -> Records:
    """:func:`records_of`, which must be the same on every rank: a path may lie on another disk of each node."""
    answers = engine.gather((socket.gethostname(), records_of(task)))
    host, first = answers[0]
    for rank, (other, records) in enumerate(answers):
        for name in first:
            if records[name] != first[name]:
                raise UserError(f"the {name} of rank {rank} on {other} is not that of rank 0 on {host} "
                                f"({first[name]['setting']}): put the same files on every node")
    return first


def check_companions(what: str, saved: Mapping[str, Any], config: Mapping[str, Any], found: Records, *,
                     copies: Path, accepted: tuple[str, ...] = (), starts_over: bool = True) -> None:
    """Raise :class:`UserError`, with old and new named, unless those ``found`` are what ``saved`` was trained with.

    ``saved`` is the state of the checkpoint ``what``; ``config`` the settings as they are now; ``accepted`` may be
    others; ``copies``, an export of the run, holds what it was trained with. A companion that only one of both
    has came or went by a setting, whose own rule decides.
    """
    known = saved.get("companions")
    if known is None and found:
        log.warning("%s does not say what it was trained with: whether %s is still the same is not checked", what,
                    ", ".join(found))
    for name in [name for name in found if is_record(known, name)]:
        old, new = known[name], found[name]
        if old["digest"] == new["digest"]:
            continue
        change = f"{name}: {shown(saved['config'], old)} -> {shown(config, new)}"
        if name in accepted:
            log.warning("%s goes on with another companion, as train.accept_companions says: %s", what, change)
            continue
        others = (f"; or start over with --resume none, or go on with the new one by train.accept_companions=[{name}]"
                  if starts_over else "")
        raise UserError(f"{what} was trained with another companion, {change}. "
                        f"{way_out(name, new, copies)}{others}")


def check_packed(what: str, saved: Mapping[str, Any], config: RunConfig, task: Task, copies: Path) -> None:
    """Raise :class:`UserError` unless what an export takes from elsewhere is what ``saved`` was trained with."""
    found = {name: record for name, record in records_of(task).items() if name not in task.unpacked}
    # an export cannot be told to take another one: its weights would mean nothing beside it
    check_companions(what, saved, config.model_dump(mode="json"), found, copies=copies, starts_over=False)
    old = saved["data"].get("tokenizer")
    new = CaptionTokenizer.load(config.data.tokenizer).digest if config.data.tokenizer else None
    if None not in (old, new) and old != new:
        record = {"setting": "data.tokenizer"}
        raise UserError(f"{what} was trained with another tokenizer than data.tokenizer={config.data.tokenizer} holds "
                        f"(digest {old[:8]} -> {new[:8]}). {way_out('tokenizer', record, copies)}")


def is_record(known: Any, name: str) -> bool:
    return isinstance(known, Mapping) and isinstance(known.get(name), Mapping) and "digest" in known[name]


def shown(config: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """``codec=runs/a (digest 12345678)``; where captions were measured with it, ``(digest 12345678, of captions ...)``.
    """
    setting = str(record.get("setting", ""))
    value: Any = config
    for part in setting.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    digest, _, captions = str(record["digest"]).partition("+")
    return (f"{setting}{'' if value is None else f'={value}'} (digest {digest[:8]}"
            f"{f', of captions {captions[:8]}' if captions else ''})")


def way_out(name: str, record: Mapping[str, str], copies: Path) -> str:
    # what was measured over captions is exported with its statistics, and would be measured again
    if (copies / name).is_dir() and "+" not in record.get("digest", ""):
        return f"Its copy is kept: set {record['setting']}={copies / name}"
    return f"Set {record['setting']} to what it was trained with"
