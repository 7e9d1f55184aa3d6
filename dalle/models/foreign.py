"""Weights that others saved, as plain tensors: state dicts, and pickles of whole modules, none of whose code is run.

A pickle is a program that names functions and calls them. Here every name outside a list of six becomes
:class:`Inert`, which takes whatever it is called with and does nothing; a module is then only the attributes that its
pickle gave it, and its parameters are read off them.
"""

import collections
import pickle
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

DEEPEST_MODULE = 64


class ForeignFileError(ValueError):
    """A file of weights that cannot be read without running what it holds, or at all."""


def read_foreign_state(path: str | Path) -> dict[str, Tensor]:
    """The weights in ``path`` by name: a safetensors file, a state dict or a whole module saved by ``torch.save``.

    Raises :class:`ForeignFileError`, in one line, for everything else.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        check_archive(path)
        with warnings.catch_warnings(action="ignore"):
            try:
                content = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:       # more than tensors and plain containers: a whole module, perhaps
                content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert_pickle())
        state = find_state(content)
        check_sizes(state, path.stat().st_size)
        return state
    except ForeignFileError as error:
        raise ForeignFileError(f"{path}: {error}") from None
    except OSError as error:
        raise ForeignFileError(f"{path} cannot be read: {error.strerror or error}") from None
    except SafetensorError as error:
        raise ForeignFileError(f"{path} is not a safetensors file: {error}") from None
    except Exception as error:      # a damaged or hostile pickle can end in anything
        raise ForeignFileError(f"{path} is not a file of weights ({type(error).__name__})") from None


def check_archive(path: Path) -> None:
    """Refuse what ``torch.load`` would hand to other readers, and archives that unfold to more than they are."""
    with open(path, "rb") as file:
        start = file.read(4)
    if start != b"PK\x03\x04":             # before torch 1.6
        if start[:1] != b"\x80" or tarfile.is_tarfile(path):
            raise ForeignFileError("neither a zip archive nor a pickle")
        return
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise ForeignFileError("a TorchScript archive is a program: save its state_dict() and give that")
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ForeignFileError("a compressed archive, torch.save writes none")


class Inert:
    """What stands for every class and function that is not known: takes all, keeps attributes, does nothing."""

    dump_patches = False      # torch asks it of module classes

    def __init__(self, *arguments: Any, **named: Any):
        pass

    def __new__(cls, *arguments: Any, **named: Any) -> "Inert":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):
            if isinstance(part, dict):
                self.__dict__.update({str(key): value for key, value in part.items()})

    def __call__(self, *arguments: Any, **named: Any) -> "Inert":
        return self

    def nothing(self, *arguments: Any, **named: Any) -> None:
        pass

    append = extend = add = __setitem__ = nothing      # a container's pickle calls these


class Known:
    """A function that a pickle may call, closed against the attributes that it might set on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise ForeignFileError("it changes the functions that it is read with")


def inert_pickle() -> Any:
    """A stand-in for the module ``pickle`` that :func:`torch.load` may use; fresh each time, so nothing can stick."""
    placeholder = type("Inert", (Inert,), {})
    tensor = Known(lambda storage, offset, size, stride, *rest: torch._utils._rebuild_tensor(
        storage, offset, size, stride))
    known = {
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_parameter"): Known(lambda data, *rest: data),
        ("torch", "Size"): Known(tuple),
        ("builtins", "set"): set,
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return known.get(("builtins" if module == "__builtin__" else module, name), placeholder)

    def load(file: Any, **options: Any) -> Any:
        return Unpickler(file, **options).load()

    return SimpleNamespace(Unpickler=Unpickler, load=load, __name__="dalle.models.foreign")


def find_state(content: Any) -> dict[str, Tensor]:
    """The state dict that ``content`` is, holds under ``state_dict``, or, as a module, describes."""
    if isinstance(content, Inert):
        state = dict(module_state(content))
    else:
        state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state or not isinstance(state, dict):
        raise ForeignFileError("it holds neither a state dict nor a module")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ForeignFileError(f"its entry {name!r:.80} is no tensor: save the model's state_dict() and give that")
    return dict(state)


def module_state(module: Inert, prefix: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the module's parameters and lasting buffers, as its ``state_dict()`` would give them."""
    if depth > DEEPEST_MODULE:
        raise ForeignFileError(f"modules are nested more than {DEEPEST_MODULE} deep")
    attributes = vars(module)
    passing = attributes.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, value in attributes.get(kind, {}).items():
            if value is not None and name not in passing:
                yield f"{prefix}{name}", value
    for name, child in attributes.get("_modules", {}).items():
        if isinstance(child, Inert):
            yield from module_state(child, f"{prefix}{name}.", depth + 1)


def check_sizes(state: dict[str, Tensor], size: int) -> None:
    """Refuse views that repeat few bytes as many."""
    for name, tensor in state.items():
        if tensor.numel() * tensor.element_size() > size:
            raise ForeignFileError(f"its entry {name!r:.80} claims more than the file holds")
