"""The reference of all settings, written from the config classes themselves: ``python -m gans settings``.

What several tasks share is printed once and linked; a class that another one extends is printed as what differs. The
text is the same on every machine: it is made of names, defaults and bounds as they are declared, never of a ``repr``.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dalle.config import models_in, resume_rule
from dalle.words import cell

COMMAND = "python -m gans settings > configs/SETTINGS.md"
BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "a multiple of {}",
          "min_length": "at least {} long", "max_length": "at most {} long", "pattern": "matches `{}`"}
KINDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "anything",
         type(None): "null", Path: "path"}
COLUMNS = ("key", "type", "default", "bounds", "at a resume", "what it is")

INTRODUCTION = f"""# Settings

Every key of every config, with what is checked about it; the words are those of the `description` beside each key's
declaration. [README.md](README.md) says what the configs are and how to change one. Generated; after a change:

```bash
{COMMAND}
```

*At a resume*: a **fixed** setting cannot change where a run goes on, because the weights or the order of the samples
would mean nothing; a **free** one may. A default in a section's row says what differs from that section's own defaults.
A list is written `[1, 2]`, nothing `null`; on the command line `model.depth=4`, `data.text_length=64`,
`optimizer.betas=[0.9,0.95]`.
"""


class Place(typing.NamedTuple):
    """Where a section stands: the run's class, its task, and the keys that lead to it."""

    task: str
    root: type[BaseModel]
    path: tuple[str, ...]


def settings_reference(runs: Mapping[str, type[BaseModel]]) -> str:
    """The whole reference, as Markdown."""
    return _Reference(runs).text()


def slug(heading: str) -> str:
    """The anchor that a page gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


class _Reference:
    """The classes to print: the runs, what several runs are built on, and the sections by where they stand."""

    def __init__(self, runs: Mapping[str, type[BaseModel]]):
        self.runs = dict(runs)
        self.places: dict[type[BaseModel], list[Place]] = {}
        for task, root in self.runs.items():
            self._visit(task, root, root, ())
        self.bases = self._bases()
        self.shared = [section for section, places in self.places.items() if len({place[0] for place in places}) > 1]
        self.headings = self._headings()

    def _visit(self, task: str, root: type[BaseModel], owner: type[BaseModel], path: tuple[str, ...]) -> None:
        for name, field in owner.model_fields.items():
            for section in models_in(field.annotation):
                self.places.setdefault(section, []).append(Place(task, root, (*path, name)))
                self._visit(task, root, section, (*path, name))

    def _bases(self) -> dict[type[BaseModel], Place]:
        """What at least two runs are built on, the most general first, each with a run that has its keys."""
        found: dict[type[BaseModel], list[Place]] = {}
        for task, root in self.runs.items():
            for base in reversed(root.__mro__[1:]):
                if issubclass(base, BaseModel) and base.model_fields:
                    found.setdefault(base, []).append(Place(task, root, ()))
        return {base: places[0] for base, places in found.items() if len(places) > 1}

    def _headings(self) -> dict[type[BaseModel], str]:
        headings = {base: f"Runs: `{base.__name__}`" for base in self.bases}
        headings |= {root: f"`{task}`" for task, root in self.runs.items()}
        for section, places in self.places.items():
            keys = ", ".join(f"`{key}`" for key in dict.fromkeys(".".join(place.path) for place in places))
            task = "" if section in self.shared else f"`{places[0].task}`: "
            headings[section] = f"{task}{keys} ({section.__name__})"
        return headings

    def text(self) -> str:
        parts = [INTRODUCTION, self._contents()]
        parts += [self._chapter(base, 2, place) for base, place in self.bases.items()]
        parts.append("## Sections that several tasks share\n")
        parts += [self._chapter(section, 3, self.places[section][0]) for section in self.shared]
        for task, root in self.runs.items():
            parts.append(self._chapter(root, 2, Place(task, root, ())))
            own = [section for section, places in self.places.items()
                   if section not in self.shared and places[0].task == task]
            parts += [self._chapter(section, 3, self.places[section][0]) for section in own]
        return "\n".join(parts)

    def _contents(self) -> str:
        tasks = ", ".join(self._link(root, f"`{task}`") for task, root in self.runs.items())
        shared = ", ".join(self._link(section) for section in self.shared)
        bases = ", ".join(self._link(base, f"`{base.__name__}`") for base in self.bases)
        return "\n".join([f"- By the key `task`: {tasks}", f"- What several tasks are built on: {bases}",
                          f"- Shared sections: {shared}", ""])

    def _link(self, section: type[BaseModel], text: str | None = None) -> str:
        heading = self.headings[section]
        return f"[{text or heading.split(' (')[0]}](#{slug(heading)})"

    def _chapter(self, section: type[BaseModel], level: int, place: Place) -> str:
        """A heading, the class's own words, and a row for each key that no class above has said."""
        parent = self._parent(section)
        names = [name for name, field in section.model_fields.items()
                 if parent is None or not self._same(field, parent.model_fields.get(name))]
        lines = [f"{'#' * level} {self.headings[section]}", "", self._about(section, parent, names), ""]
        if names:
            lines += [row(COLUMNS), row(["---"] * len(COLUMNS))]
            lines += [row(self._cells(name, section.model_fields[name], place)) for name in names]
            lines.append("")
        return "\n".join(lines)

    def _about(self, section: type[BaseModel], parent: type[BaseModel] | None, names: Sequence[str]) -> str:
        doc = inspect.cleandoc(section.__dict__.get("__doc__") or "").partition("\n\n")[0]
        words = re.sub(r":\w+:`([^`]*)`", r"`\1`", doc).replace("``", "`").replace("\n", " ")
        where = f"`{section.__module__.replace('.', '/')}.py`"
        rest = "" if parent is None else f" The keys of {self._link(parent, f'`{parent.__name__}`')}" + (
            ", and as here:" if names else ".")
        return f"{words} ({where}){rest}".strip()

    def _parent(self, section: type[BaseModel]) -> type[BaseModel] | None:
        """The nearest class above that has a chapter of its own."""
        return next((base for base in section.__mro__[1:] if base in self.headings), None)

    def _same(self, field: FieldInfo, other: FieldInfo | None) -> bool:
        return other is not None and self._shown(field) == self._shown(other)

    def _shown(self, field: FieldInfo) -> tuple[str, ...]:
        return (self._type(field.annotation), self._default(field), bounds(field.metadata), field.description or "",
                json.dumps(field.json_schema_extra, sort_keys=True, default=str))

    def _cells(self, name: str, field: FieldInfo, place: Place) -> list[str]:
        rule = "" if models_in(field.annotation) else resume_rule(place.root, ".".join((*place.path, name))) or ""
        return [f"`{name}`", self._type(field.annotation), self._default(field), bounds(field.metadata), rule,
                field.description or ""]

    # -- cells

    def _type(self, annotation: Any) -> str:
        """What may be written there, in words."""
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return self._link(annotation, annotation.__name__)
        if annotation in KINDS:
            return KINDS[annotation]
        origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Literal:
            return " or ".join(f"`{plain(value)}`" for value in inner)
        if origin is typing.Annotated:
            limits = bounds(inner[1:])
            return self._type(inner[0]) + (f" ({limits})" if limits else "")
        if origin in (typing.Union, types.UnionType):
            return " or ".join(self._type(part) for part in inner)
        if origin in (tuple, list):
            return self._list(inner)
        if origin in (dict, Mapping):
            return "keys and values"
        if isinstance(annotation, type) and issubclass(annotation, tuple):
            return self._named(annotation)
        raise TypeError(f"the reference has no words for a setting of type {annotation}")

    def _list(self, inner: Sequence[Any]) -> str:
        kinds = [self._type(part) for part in inner if part is not Ellipsis]
        if Ellipsis in inner or len(kinds) == 1:
            return f"list: {kinds[0]}"
        return f"list of {len(kinds)}: {kinds[0] if len(set(kinds)) == 1 else ', '.join(kinds)}"

    def _named(self, annotation: type) -> str:
        hints = typing.get_type_hints(annotation, include_extras=True)
        return "list of " + ", ".join(f"{name}: {self._type(hint)}" for name, hint in hints.items())

    def _default(self, field: FieldInfo) -> str:
        if field.is_required():
            return "(required)"
        value = field.get_default(call_default_factory=True)
        if isinstance(value, BaseModel):
            union = len(models_in(field.annotation)) > 1
            changed = different(value)
            shown = ([type(value).__name__] if union else []) + [f"`{key}: {plain(part)}`" for key, part in changed]
            return ", ".join(shown)
        return f"`{plain(value)}`"


def different(section: BaseModel, path: tuple[str, ...] = ()) -> list[tuple[str, Any]]:
    """What a section's default sets otherwise than the section's class does."""
    found = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        standard = None if field.is_required() else field.get_default(call_default_factory=True)
        if value == standard:
            continue
        if isinstance(value, BaseModel) and type(value) is type(standard):
            found += different(value, (*path, name))
        else:
            found.append((".".join((*path, name)), value))
    return found


def bounds(metadata: Sequence[Any]) -> str:
    """The limits in a declaration's metadata, of the kinds in ``BOUNDS``, in that order."""
    parts = [part for one in metadata for part in (one.metadata if isinstance(one, FieldInfo) else [one])]
    return ", ".join(words.format(plain(getattr(part, name))) for name, words in BOUNDS.items() for part in parts
                     if getattr(part, name, None) is not None)


def plain(value: Any) -> str:
    """A value as it is written in a config: text without quotes, all else as JSON."""
    if isinstance(value, (str, Path)) and str(value):
        return str(value)
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    return json.dumps(value, ensure_ascii=False, default=as_json)


def as_json(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else str(value)


def row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(cell, cells)) + " |"
