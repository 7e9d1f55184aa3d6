"""What every model shares: a strict, frozen config and one way onto disk and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from dalle.tensor_file import write_synced

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"


# as in ``dalle/config.py``, which models do not import: what a resume may change without harm to the weights
FIXED, FREE = {"resume": "fixed"}, {"resume": "free"}


class ModelConfig(BaseModel):
    """Base of the model configs: immutable, and an unknown field, infinity and NaN are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False,
                              json_schema_extra=FIXED)


class PretrainedModel(nn.Module):
    """An ``nn.Module`` built from one config, saved as ``config.json`` and ``model.safetensors``.

    Subclasses set ``model_type`` (written into the file, so that the wrong kind of model is refused by name) and
    ``Config``, and take that config as the only argument of their constructor.
    """

    model_type: ClassVar[str]
    Config: ClassVar[type[ModelConfig]]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def save_pretrained(self, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write config and weights into ``folder``; ``state`` replaces the live weights (an average, say)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = {"model_type": self.model_type, **self.config.model_dump(mode="json")}
        (folder / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")
        state = self.state_dict() if state is None else state
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        write_synced(folder / WEIGHTS_FILE, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu") -> Self:
        """The model saved in ``folder``, in evaluation mode.

        Raises ``FileNotFoundError`` when a file is missing and ``ValueError`` when it holds another kind of model,
        an unreadable config or weights that do not fit; each message names the file.
        """
        folder = Path(folder)
        description = read_description(folder)
        kind = description.pop("model_type", None)
        if kind != cls.model_type:
            raise ValueError(f"{folder / CONFIG_FILE} describes a {kind!r}, not a {cls.model_type!r}")
        try:
            config = cls.Config.model_validate(description)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{folder / CONFIG_FILE}: {where}: {first['msg']}") from error
        try:
            model = cls(config)
        except (RuntimeError, ValueError, TypeError, KeyError, ArithmeticError, MemoryError) as error:
            raise ValueError(f"{folder / CONFIG_FILE} describes a model that cannot be built: {error}") from error
        try:
            state = load_file(folder / WEIGHTS_FILE)
        except SafetensorError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} is not a readable safetensors file: {error}") from error
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{folder / WEIGHTS_FILE} does not fit its config: {error}") from error
        return model.to(device).eval()


def read_description(folder: str | Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a saved model, ``model_type`` included."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no saved model in {folder}: {CONFIG_FILE} is missing")
    try:
        description = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(description, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return description


def named_preset(values: Any, presets: Mapping[str, Any], model: str) -> Any | None:
    """The entry of ``presets`` that a config names by its key ``preset``; None where it names none.

    ``ValueError`` for a name that is not there.
    """
    if not isinstance(values, Mapping) or "preset" not in values:
        return None
    name = values["preset"]
    if name not in presets:
        raise ValueError(f"unknown {model} preset {name!r}; known: {', '.join(presets)}")
    return presets[name]
