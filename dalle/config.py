"""One typed config tree: YAML in, ``key.sub=value`` on top, JSON Schema out.

``python -m dalle.config schema`` prints the JSON Schema of every kind of run, for editors.
"""

import difflib
import json
import reprlib
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dalle.errors import UserError
from dalle.lookup import LazyTable
from dalle.text_file import read_text_file
from dalle.words import one_line

# What a resume does with a setting that has changed, said beside the field (``json_schema_extra``) or for all fields of
# a section (the class's own): the nearest to the setting counts. FIXED: with another value the weights or the order of
# the samples would mean nothing. FREE: the run goes on with the new value. NOTED: as FREE, and the log says so.
RESUME, SAID = "resume", "said_at_resume"
FIXED, FREE = {RESUME: "fixed"}, {RESUME: "free"}
NOTED = {**FREE, SAID: True}


class Section(BaseModel):
    """Base of every config section: immutable, strict about unknown keys and about numbers that are none."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)


Run = TypeVar("Run", bound=Section)

SHORT = reprlib.Repr()      # a few aliases can stand for more values than there is memory
SHORT.maxlevel, SHORT.maxstring, SHORT.maxother = 2, 200, 200


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with a repeated key an error instead of a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {key!r} appears twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: Sequence[str], runs: Mapping[str, type[Run]]) -> Run:
    """The run described by the YAML file at ``path`` with ``key.sub=value`` overrides applied, validated.

    ``runs`` maps the value of the ``task`` key to the config class. Raises :class:`UserError`, one line that names the
    key, the file, what was expected and the nearest valid name.
    """
    tree = read_yaml(path)
    for override in overrides:
        apply_override(tree, override)
    return validate(tree, runs, source=str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file; only plain data, no tags, no repeated keys."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"no config file at {path}")
    try:
        tree = parse_yaml(read_text_file(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must hold a mapping of keys to values, not {type(tree).__name__}")
    return tree


def parse_yaml(text: str) -> Any:
    """The plain data in ``text``. Raises ``yaml.YAMLError`` for all else: PyYAML's own constructors raise whatever
    Python does for a month 99, a list as a key, a number of 5,000 digits or brackets without end."""
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a SafeLoader
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(f"{type(error).__name__}: {error}") from None


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one ``key.sub=value`` in ``tree``; the value is read as YAML."""
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"override {override!r} is not of the form key.sub=value")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: the value is not valid YAML") from None
    for part in parts[:-1]:
        node = tree.get(part)
        if node is None:
            node = tree[part] = {}
        elif not isinstance(node, dict):
            raise UserError(f"override {override!r}: {part} is a single value ({node!r}), it has no keys below it")
        tree = node
    tree[parts[-1]] = value


def validate(tree: dict[str, Any], runs: Mapping[str, type[Run]], source: str) -> Run:
    """``tree`` as the config class that its ``task`` names."""
    known = ", ".join(sorted(runs))
    task = tree.get("task")
    if task is None:
        raise UserError(f"{source}: the key 'task' is missing; it is one of {known}")
    if not isinstance(task, str):
        raise UserError(f"{source}: task {SHORT.repr(task)} is not a name; known: {known}")
    if task not in runs:
        raise UserError(f"{source}: task {task!r} is unknown{did_you_mean(str(task), runs)}; known: {known}"
                        f"{runs.remedy if isinstance(runs, LazyTable) else ''}")
    try:
        return runs[task].model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {explain(error, runs[task])}") from None


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first of pydantic's complaints as one line: the key, what came, what was expected, the nearest name."""
    first, *others = error.errors(include_url=False)
    key = ".".join(str(part) for part in first["loc"]) or "(the whole file)"
    more = f" (and {len(others)} more)" if others else ""
    if first["type"] == "extra_forbidden":
        valid = field_names(root, first["loc"][:-1])
        name = str(first["loc"][-1])
        return f"unknown key {key}{did_you_mean(name, valid)}; valid here: {', '.join(sorted(valid))}{more}"
    if first["type"] == "missing":
        return f"the key {key} is missing{more}"
    message = first["msg"].removeprefix("Value error, ")
    given = first["input"]
    shown = "" if isinstance(given, (dict, BaseModel)) else f", got {SHORT.repr(given)}"
    return f"{key}: {message[0].lower()}{message[1:]}{shown}{more}"


def did_you_mean(name: str, valid: typing.Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def field_names(root: type[BaseModel], location: Sequence[str | int]) -> set[str]:
    """The keys that are valid in the section at ``location`` below ``root``."""
    models = [root]
    for part in location:
        models = [inner for model in models if part in model.model_fields
                  for inner in models_in(model.model_fields[part].annotation)] or models
    return {name for model in models for name in model.model_fields}


def resume_rule(root: type[BaseModel], key: str) -> str | None:
    """"fixed" or "free", as declared nearest to the setting ``key`` (``section.name``); None: there is no such key."""
    return declaration(root, key, RESUME)


def declaration(root: type[BaseModel], key: str, name: str) -> Any:
    """What is declared as ``name`` nearest to the setting ``key``; None: nothing, or there is no such key."""
    rule, models = None, [root]
    for part in key.split("."):
        owner = next((model for model in models if part in model.model_fields), None)
        if owner is None:                                   # below a plain mapping, whose own field has decided
            return rule if not models else None
        field = owner.model_fields[part]
        for declared in (owner.model_config.get("json_schema_extra"), field.json_schema_extra):
            rule = declared.get(name, rule) if isinstance(declared, Mapping) else rule
        models = models_in(field.annotation)
    return rule


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is not None:
        return [model for inner in typing.get_args(annotation) for model in models_in(inner)]
    return []


def to_yaml(config: BaseModel) -> str:
    """The resolved config, defaults included, as YAML that :func:`load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def json_schema(runs: Mapping[str, type[Section]]) -> dict[str, Any]:
    """The JSON Schema of every kind of run, told apart by the key ``task``."""
    union = typing.Union[tuple(runs.values())] if len(runs) > 1 else next(iter(runs.values()))  # noqa: UP007
    annotated = Annotated[union, Field(discriminator="task")] if len(runs) > 1 else union
    return TypeAdapter(annotated).json_schema()


def main(arguments: Sequence[str]) -> None:
    from dalle.tasks import RUNS  # the tasks import this module

    if list(arguments) != ["schema"]:
        raise UserError("usage: python -m dalle.config schema")
    print(json.dumps(json_schema(RUNS), indent=2))


if __name__ == "__main__":
    from dalle.errors import run_command

    run_command(lambda: main(sys.argv[1:]))
