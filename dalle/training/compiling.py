"""What torch compiles of a network: each block alone, and what the network names besides.

Compiled whole, a network has one backward, which hands out all gradients at its very end: DDP and ZeRO then exchange
nothing while it runs. Compiled by block, a block's gradients are there when its own backward is over, and all blocks of
a class run through one compiled function, so that 64 of them take as long to compile as one. Blocks are the children of
an ``nn.ModuleList`` that come at least ``ALIKE`` times, with the same class and the same shapes. A network without them
(the GANs, whose levels differ, and the codecs) is compiled whole.

Only a ``forward`` that records a gradient runs compiled. Validation and sampling take the layers as they are: compiling
them a second time, without gradient, costs more than it saves, and a decoding step calls no block's forward.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from types import MethodType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

BACKEND = "inductor"
ALIKE = 4                        # blocks of a kind, from which on a network is compiled by block
FORMS = 64                       # of one function: classes, attention patterns, players that learn or do not

# Where `train.compile` is left open. On one H200 compiling 1.3 B parameters whole took 40 to 60 s, and a step then
# gained 31 ms of 194, or 14 of 51 at 123 M parameters: even after 2,000 and 4,000 steps, and sooner by block, which
# compiles a fraction of that. Below 20 M parameters a step is bound by launches from the host, not by what is fused.
LEAST_PARAMETERS = 20_000_000    # in the blocks
LEAST_STEPS = 2_000              # of the run

LEARNS_BY = "_learns_by"         # a compiled module's attribute: the name of its first trainable parameter
_eager = False                   # see `uncompiled`


@runtime_checkable
class NamesCompiledParts(Protocol):
    """A player's module with more to compile than its blocks."""

    def compiled_parts(self) -> list[Callable[..., Any]]:
        """Modules, and methods bound to one (``self.losses``): each is compiled alone, wherever it is called."""


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The children with parameters of every ``nn.ModuleList`` in ``module``, the inner before the outer."""
    containers = (nn.ModuleList, nn.ModuleDict)
    children = [child for part in reversed(list(module.modules())) if isinstance(part, nn.ModuleList)
                for child in part if not isinstance(child, containers) and any(True for _ in child.parameters())]
    return list(dict.fromkeys(children))


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Those of :func:`blocks_of` that come at least ``ALIKE`` times, with the same class and the same shapes."""
    blocks = blocks_of(module)
    kinds = [(type(block), tuple((name, parameter.shape) for name, parameter in block.named_parameters()))
             for block in blocks]
    counts = Counter(kinds)
    return [block for block, kind in zip(blocks, kinds, strict=True) if counts[kind] >= ALIKE]


def pays(module: nn.Module, device: torch.device, steps: int) -> bool:
    """Whether compiling ``module`` is worth its time in a run of ``steps`` steps, where the config does not say."""
    blocks = repeated_blocks(module)
    size = sum(parameter.numel() for block in blocks for parameter in block.parameters())
    return device.type == "cuda" and size >= LEAST_PARAMETERS and steps >= LEAST_STEPS


def compile_network(module: nn.Module, hooked: bool = False) -> str:
    """Have torch compile ``module``, when it is called and in place, while all that it trains is trainable.

    Names, parameters and ``state_dict`` stay as they are. ``hooked``: every block is to have hooks around its call,
    through which nothing can be compiled, so each of them is compiled however few there are. Returns what is compiled,
    in words.
    """
    # one function serves all blocks; what exceeds the limit would run uncompiled. Both are read as torch compiles
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FORMS)
    torch._dynamo.config.optimize_ddp = False      # it would cut a block's graph where a bucket of DDP is full
    blocks = blocks_of(module) if hooked else repeated_blocks(module)
    named = module.compiled_parts() if isinstance(module, NamesCompiledParts) else []
    for part in [*blocks, *named] if blocks else [module]:
        compile_part(part)
    if not blocks:
        return "the whole network"
    return f"{len(blocks)} blocks" + (f" and {len(named)} more parts" if named else "")


def compile_part(part: Callable[..., Any]) -> None:
    """Replace a module's ``forward``, or a bound method, by its compiled form.

    Not the ``__call__`` of a module: FSDP's and ZeRO's hooks lie in it, before and after what is compiled.
    """
    owner, name = (part, "forward") if isinstance(part, nn.Module) else (part.__self__, part.__name__)
    trainable = (name for name, parameter in owner.named_parameters() if parameter.requires_grad)
    setattr(owner, LEARNS_BY, next(trainable, None))
    # a method, which deepcopy binds to the copy and pickle leaves to the class
    setattr(owner, name, MethodType(_compiled(getattr(type(owner), name), BACKEND), owner))


@contextmanager
def uncompiled() -> Iterator[None]:
    """Meanwhile all runs as it is written: compiled code has no second derivative."""
    global _eager
    before, _eager = _eager, True
    try:
        yield
    finally:
        _eager = before


@cache
def _compiled(function: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """``function(owner, ...)``, compiled for all owners of its class at once: their parameters are inputs of the graph.

    Apart for the phases in which the owner learns and for the others: torch 2.11 does not look again at the
    ``requires_grad`` of a module's parameters, and would hand on a graph that has no gradient.
    """
    def call(learns: bool, owner: nn.Module, *arguments: Any, **named: Any) -> Any:
        if learns:                   # read, so that what is compiled holds for this answer alone
            return function(owner, *arguments, **named)
        return function(owner, *arguments, **named)

    # shapes stay fixed: another batch size compiles anew, and does not turn sizes into variables for good
    compiled = torch.compile(call, backend=backend, dynamic=False)

    @wraps(function)
    def method(owner: nn.Module, *arguments: Any, **named: Any) -> Any:
        if _eager or not torch.is_grad_enabled():
            return function(owner, *arguments, **named)
        return compiled(learns(owner), owner, *arguments, **named)

    return method


def learns(owner: nn.Module) -> bool:
    """Whether this is a phase in which the parameters of a compiled module move."""
    name = getattr(owner, LEARNS_BY)
    return name is not None and owner.get_parameter(name).requires_grad
