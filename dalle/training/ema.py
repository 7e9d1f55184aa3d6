"""An exponential average of a player's weights, kept beside them in fp32."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

# (parameters, rank that may change them or None) -> while open, the parameters hold their full values
Access = Callable[[list[nn.Parameter], int | None], AbstractContextManager]


def full_access(parameters: list[nn.Parameter], owner: int | None) -> AbstractContextManager:
    """The access of an engine that never splits a parameter."""
    return nullcontext()


class Average:
    """average <- decay * average + (1 - decay) * weight, from the initial weights on; buffers are not averaged.

    Where the engine splits parameters over ranks (ZeRO-3), each parameter's average lives on one rank, which reads and
    writes it through ``access``; elsewhere every rank keeps all of it.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1, *,
                 access: Access = full_access, rank: int = 0, owners: int = 1):
        self.decay, self.every = decay, every
        self._access, self._rank, self._owners = access, rank, owners
        self._parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._owner = {name: index % owners if owners > 1 else rank for index, name in enumerate(self._parameters)}
        self._values: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            with access([parameter], None):
                if self._owner[name] == rank:
                    self._values[name] = parameter.detach().float().clone()

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps; does nothing between multiples of ``every``."""
        if step % self.every:
            return
        weight = 1 - self.decay**self.every      # the same horizon in steps whatever the interval
        if self._owners == 1:
            live = [parameter.detach() for parameter in self._parameters.values()]
            torch._foreach_lerp_(list(self._values.values()), live, weight)
            return
        for name, parameter in self._parameters.items():
            with self._access([parameter], None):
                if name in self._values:
                    self._values[name].lerp_(parameter.detach(), weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the live weights, which come back unchanged at the end."""
        live = self._exchange(self._values)
        try:
            yield
        finally:
            self._exchange(live)

    @torch.no_grad()
    def _exchange(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        previous = {}
        for name, parameter in self._parameters.items():
            with self._access([parameter], self._owner[name]):
                if self._owner[name] == self._rank:
                    previous[name] = parameter.detach().clone()
                    parameter.copy_(values[name])
        return previous

    @property
    def is_split(self) -> bool:
        """Whether each parameter's average lives on one rank only."""
        return self._owners > 1

    @property
    def names(self) -> list[str]:
        """The parameters whose average this rank keeps."""
        return list(self._values)

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's part of the average, by parameter name."""
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` when ``state`` does not hold just this rank's parameters."""
        if state.keys() != self._values.keys():
            different = sorted(state.keys() ^ self._values.keys())
            raise ValueError(f"the saved average does not fit: {different[0]!r} is only on one side")
        for name, value in self._values.items():
            value.copy_(state[name])
