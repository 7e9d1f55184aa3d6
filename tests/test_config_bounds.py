"""Every number of every run's config and of every model's has a lower bound, so that none builds nonsense silently."""

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any

import annotated_types
import pytest
from pydantic import BaseModel, Field, PositiveInt, ValidationError

import gans
from dalle.config import Section
from dalle.models.base import ModelConfig
from dalle.models.transformer import PRESETS, TransformerConfig
from dalle.tasks import RUNS


class Half(Section):
    """Numbers in bounds, and one of each shape without."""

    bounded: int | None = Field(default=None, ge=1)
    pair: tuple[PositiveInt, Annotated[float, Field(gt=0)]] = (1, 1.0)
    plain: int = 1
    inside: tuple[float, ...] = (1.0,)


def numbers(annotation: Any, metadata: list[Any]) -> Iterator[list[Any]]:
    """What is said of each int or float inside an annotation."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (int, float):
        yield metadata
    elif origin is typing.Annotated:
        yield from numbers(inner[0], [*metadata, *annotation.__metadata__])
    elif origin in (typing.Union, types.UnionType):
        for one in inner:
            yield from numbers(one, metadata)
    elif hasattr(annotation, "_fields"):                                   # a named tuple
        for one in typing.get_type_hints(annotation, include_extras=True).values():
            yield from numbers(one, [])
    elif origin is not typing.Literal:
        for one in inner:
            yield from numbers(one, [])


def bounds(metadata: list[Any]) -> list[Any]:
    """The constraints of a field's metadata, a nested ``Field(ge=...)`` opened."""
    return [constraint for entry in metadata for constraint in getattr(entry, "metadata", [entry])]


def unbounded(config: type[BaseModel]) -> list[str]:
    return [name for name, field in config.model_fields.items()
            if any(not any(isinstance(bound, (annotated_types.Ge, annotated_types.Gt)) for bound in bounds(found))
                   for found in numbers(field.annotation, list(field.metadata)))]


def with_all_below(root: type) -> Iterator[type]:
    for below in root.__subclasses__():
        yield below
        yield from with_all_below(below)


def sections(config: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A config class and all that stand in its fields."""
    yield config
    for field in config.model_fields.values():
        yield from (below for model in models_in(field.annotation) for below in sections(model))


def models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in typing.get_args(annotation) for model in models_in(inner)]


def test_the_walk_finds_numbers_without_bounds():
    assert unbounded(Half) == ["plain", "inside"]


def test_every_number_of_a_run_and_of_a_model_has_a_lower_bound():
    gans.register()
    found = {below for run in list(RUNS) for below in sections(RUNS[run])}
    found |= {config for config in with_all_below(ModelConfig) if config.__module__.startswith(("dalle.", "gans."))}
    assert TransformerConfig in found and len(found) > 60
    without = [f"{config.__module__}.{config.__name__}.{name}" for config in found for name in unbounded(config)]
    assert sorted(without) == []


SMALLEST = PRESETS["debug"].model_dump()


@pytest.mark.parametrize("change", [{"grid": (0, 4)}, {"grid": (4, -1)}, {"heads": 0}, {"depth": 0}, {"head_dim": 0},
                                    {"head_dim": -8}, {"dim": -64}, {"num_codes": 0}, {"text_length": 0},
                                    {"dropout": float("nan")}, {"mlp_ratio": float("inf")}, {"embedding_std": 0.0}])
def test_sizes_that_are_none_are_refused(change):
    with pytest.raises(ValidationError):
        TransformerConfig(**{**SMALLEST, **change})
