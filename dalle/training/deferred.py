"""First weights of a model that is too large to be built whole: its parameters begin without memory (the device
"meta") and get their values one at a time, the same bits as in a module that is built the plain way.

What a constructor does to its parameters is noted, not done: which generator state an operation in place began from,
and its arguments. The default generator moves on as ever, for the numbers are drawn and dropped, one parameter's at a
time; so the first weights are the same function of the seed for every engine and number of processes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

How = Literal["plain", "deferred", "shapes"]
Module = TypeVar("Module", bound=nn.Module)
_how: ContextVar[How] = ContextVar("how players are built", default="plain")

# in place, on the whole of a parameter, and reading nothing else: what can be noted and done later
DRAWS = (torch.ops.aten.normal_.default, torch.ops.aten.uniform_.default)
FILLS = (torch.ops.aten.zero_.default, torch.ops.aten.fill_.Scalar)
READS_NOTHING = (torch.ops.aten.empty.memory_format, torch.ops.aten.detach.default, torch.ops.aten.ones.default,
                 torch.ops.aten.zeros.default, torch.ops.aten.empty_like.default)


@contextmanager
def players_built(how: How) -> Iterator[None]:
    """How :func:`build_player` builds meanwhile: plain, deferred (to be given memory by :func:`materialise`), or
    shapes alone, which never get any."""
    token = _how.set(how)
    try:
        yield
    finally:
        _how.reset(token)


def build_player(build: Callable[[], Module]) -> Module:
    """``build()``, whose parameters have no memory yet where the run asked for that. A model whose constructor does
    more than fill whole parameters in place is built the plain way."""
    how = _how.get()
    if how == "plain":
        return build()
    state = torch.get_rng_state()
    noted = Noted(draws=how == "deferred")
    try:
        with torch.device("meta"), noted:
            module = build()
        if any(True for _ in module.buffers()):
            raise CannotDefer("it has buffers")
        noted.attach(module)
    except CannotDefer as reason:
        print(f"the model is built whole in host memory: {reason}", flush=True)
        torch.set_rng_state(state)
        return build()
    return module


def is_deferred(module: nn.Module) -> bool:
    return any(parameter.is_meta for parameter in module.parameters())


def materialise(module: nn.Module, device: torch.device) -> nn.Module:
    """Give every parameter of ``module`` that has no memory yet its first values, on ``device``; one at a time is in
    host memory. The parameters are new objects under the same names."""
    made: dict[int, nn.Parameter] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in made:
                    values = parameter.first_values.draw(parameter)
                    made[id(parameter)] = nn.Parameter(values.to(device), parameter.requires_grad)
                part._parameters[name] = made[id(parameter)]
    return module


class CannotDefer(Exception):
    """What the constructor does cannot be noted and done later."""


@dataclass
class FirstValues:
    """How a parameter comes by its first values: the last operation on all of it."""

    operation: Any = None                           # None: a constant
    arguments: tuple[Any, ...] = ()
    generator_state: Tensor | None = None
    constant: float | None = None

    def draw(self, pattern: Tensor) -> Tensor:
        values = torch.empty(pattern.shape, dtype=pattern.dtype)
        if self.operation is None:
            return values.fill_(self.constant)
        now = torch.get_rng_state()
        torch.set_rng_state(self.generator_state)
        try:
            return self.operation(values, *self.arguments)
        finally:
            torch.set_rng_state(now)


@dataclass
class Noted(TorchDispatchMode):
    """Notes what a constructor does to parameters without memory; with ``draws`` the default generator moves on."""

    draws: bool
    found: dict[int, FirstValues] = field(default_factory=dict)     # by the identity of a storage
    kept: list[Any] = field(default_factory=list)                   # those storages: an identity is not given twice

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        result = function(*arguments, **named)
        if function in DRAWS or function in FILLS:
            self.note(function, *arguments, **named)
        elif function in (torch.ops.aten.ones.default, torch.ops.aten.zeros.default):
            self.remember(result, FirstValues(constant=float(function is torch.ops.aten.ones.default)))
        elif function not in READS_NOTHING:
            raise CannotDefer(f"{function} is no filling in place of a whole parameter")
        return result

    def note(self, function: Any, tensor: Tensor, *arguments: Any, generator: Any = None) -> None:
        if not tensor.is_meta or generator is not None or tensor.untyped_storage().nbytes() != tensor.nbytes \
                or not tensor.is_contiguous():
            raise CannotDefer(f"{function} of a part of a parameter, or with a generator of its own")
        if function in FILLS:
            self.remember(tensor, FirstValues(constant=float(arguments[0]) if arguments else 0.0))
            return
        self.remember(tensor, FirstValues(function, arguments, torch.get_rng_state() if self.draws else None))
        if self.draws:
            function(torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"), *arguments)

    def remember(self, tensor: Tensor, values: FirstValues) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.found:
            self.kept.append(storage)
        self.found[storage._cdata] = values

    def attach(self, module: nn.Module) -> None:
        for name, parameter in module.named_parameters():
            if parameter.untyped_storage()._cdata not in self.found:
                raise CannotDefer(f"nothing was seen to fill {name}")
            parameter.first_values = self.found[parameter.untyped_storage()._cdata]
