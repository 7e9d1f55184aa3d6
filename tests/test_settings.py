"""configs/SETTINGS.md is what the config classes say, whole, and every key says what it is."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import pytest
from pydantic import BaseModel, Field, PositiveFloat
from pydantic.fields import FieldInfo

import gans
from dalle.config import FIXED, FREE, Section, models_in
from dalle.settings import COMMAND, settings_reference
from dalle.tasks import RUNS

ROOT = Path(__file__).resolve().parent.parent

gans.register()


def keys_of(root: type[BaseModel], path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key that can be reached from ``root``, sections included."""
    for name, field in root.model_fields.items():
        yield path + name, field
        for section in models_in(field.annotation):
            yield from keys_of(section, f"{path}{name}.")


@pytest.fixture(scope="module")
def reference() -> str:
    return settings_reference(RUNS)


def test_the_file_is_what_the_classes_say(reference):
    assert (ROOT / "configs" / "SETTINGS.md").read_text(encoding="utf-8") == reference, f"it is old: {COMMAND}"


@pytest.mark.parametrize("task", RUNS)
def test_every_key_says_what_it_is(task):
    silent = [key for key, field in keys_of(RUNS[task]) if not (field.description or "").strip()]
    assert not silent, f"{len(silent)} keys of {task} have no description"


def test_every_key_of_every_task_stands_in_the_reference(reference):
    rows = set(re.findall(r"^\| `(\w+)` \|", reference, re.MULTILINE))
    assert {key.rpartition(".")[2] for task in RUNS for key, _ in keys_of(RUNS[task])} == rows


def test_every_link_leads_to_one_heading(reference):
    headings = re.findall(r"^#+ (.*)$", reference, re.MULTILINE)
    anchors = [re.sub(r"[^a-z0-9_\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]*)\)", reference)) <= set(anchors)


# -- on classes of its own, against the text written out

class Weights(NamedTuple):
    first: PositiveFloat = 1.0
    second: float = 2.0


class Shared(Section, json_schema_extra=FREE):
    """What both read.

    And more that is not shown.
    """

    rate: float = Field(default=1e-3, gt=0, lt=1, description="share a step")
    kind: Literal["one", "two"] | None = "one"


class Other(Shared):
    """The same, faster."""

    rate: float = Field(default=0.5, gt=0, lt=1, description="share a step")


class Own(Section, json_schema_extra=FIXED):
    """Of one task."""

    sizes: tuple[Annotated[int, Field(ge=2)], ...] = (2, 4)
    weights: Weights = Weights()
    pair: tuple[float, float] = Field(default=(0.5, 1.5), json_schema_extra=FREE)


class Left(Section, json_schema_extra=FIXED):
    """The first run."""

    task: Literal["left"] = "left"
    shared: Shared = Shared(rate=0.25)
    own: Own = Own()


class Right(Section):
    """The second run."""

    shared: Shared | Other
    options: dict[str, int] = Field(default_factory=dict, description="a | b")


def test_it_reads_as_it_should():
    text = settings_reference({"left": Left, "right": Right})
    assert text.partition("## Sections that several tasks share\n")[2] == '''
### `shared` (Shared)

What both read. (`tests/test_settings.py`)

| key | type | default | bounds | at a resume | what it is |
| --- | --- | --- | --- | --- | --- |
| `rate` | number | `0.001` | > 0, < 1 | free | share a step |
| `kind` | `one` or `two` or null | `one` |  | free |  |

## `left`

The first run. (`tests/test_settings.py`)

| key | type | default | bounds | at a resume | what it is |
| --- | --- | --- | --- | --- | --- |
| `task` | `left` | `left` |  | fixed |  |
| `shared` | [Shared](#shared-shared) | `rate: 0.25` |  |  |  |
| `own` | [Own](#left-own-own) |  |  |  |  |

### `left`: `own` (Own)

Of one task. (`tests/test_settings.py`)

| key | type | default | bounds | at a resume | what it is |
| --- | --- | --- | --- | --- | --- |
| `sizes` | list: whole number (>= 2) | `[2, 4]` |  | fixed |  |
| `weights` | list of first: number (> 0), second: number | `[1.0, 2.0]` |  | fixed |  |
| `pair` | list of 2: number | `[0.5, 1.5]` |  | free |  |

## `right`

The second run. (`tests/test_settings.py`)

| key | type | default | bounds | at a resume | what it is |
| --- | --- | --- | --- | --- | --- |
| `shared` | [Shared](#shared-shared) or [Other](#right-shared-other) | (required) |  |  |  |
| `options` | keys and values | `{}` |  |  | a \\| b |

### `right`: `shared` (Other)

The same, faster. (`tests/test_settings.py`) The keys of [`Shared`](#shared-shared), and as here:

| key | type | default | bounds | at a resume | what it is |
| --- | --- | --- | --- | --- | --- |
| `rate` | number | `0.5` | > 0, < 1 | free | share a step |
'''.replace("tests/test_settings.py", f"{__name__.replace('.', '/')}.py")
