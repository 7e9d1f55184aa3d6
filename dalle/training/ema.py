"""An exponential average of a player's weights, kept beside them in fp32.

An average of decay d takes 1 / (1 - d) steps to forget the first weights: after 500 steps one of 0.999 is still 61 %
random start. So it warms up as TensorFlow's does (``tf.train.ExponentialMovingAverage``, ``num_updates``; counted as in
latent diffusion, ``ldm/modules/ema.py``): the n-th update decays by min(d, (1 + n) / (10 + n)).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

# (parameters, rank that may change them or None) -> while open, the parameters hold their full values
Access = Callable[[list[nn.Parameter], int | None], AbstractContextManager]


def full_access(parameters: list[nn.Parameter], owner: int | None) -> AbstractContextManager:
    """The access of an engine that never splits a parameter."""
    return nullcontext()


class EMA:
    """average <- decay * average + (1 - decay) * weight, from the initial weights on; buffers are not averaged.

    ``warmup`` lets the decay grow over the first updates; it follows from the step alone, so there is nothing to save.

    Where the engine splits parameters over ranks (ZeRO-3), each parameter's average lives on one rank, which reads and
    writes it through ``access``; elsewhere every rank keeps all of it. ``device`` is where it is kept, if not beside
    the weights.
    """

    def __init__(self, module: nn.Module, decay: float, every: int = 1, *, warmup: bool = True,
                 access: Access = full_access, rank: int = 0, owners: int = 1, device: torch.device | None = None):
        self.decay, self.every, self.warmup = decay, every, warmup
        self._access, self._rank, self._owners = access, rank, owners
        self._parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self._owner = {name: index % owners if owners > 1 else rank for index, name in enumerate(self._parameters)}
        self._values: dict[str, Tensor] = {}
        self._lent: dict[str, Tensor] = {}       # where a live weight waits while its average is in its place
        for name, parameter in self._parameters.items():
            with access([parameter], None):
                if self._owner[name] == rank:
                    self._values[name] = parameter.detach().to(device, torch.float32, copy=True)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after ``step`` steps; does nothing between multiples of ``every``."""
        if step % self.every:
            return
        self._check_not_lent()
        weight = 1 - self.decay_at(step // self.every)
        if self._owners == 1 and self._access is full_access:
            live = [parameter.detach() for parameter in self._parameters.values()]
            torch._foreach_lerp_(list(self._values.values()), live, weight)
            return
        for name, parameter in self._parameters.items():
            with self._access([parameter], None):
                if name in self._values:
                    self._values[name].lerp_(parameter.detach().to(self._values[name].device), weight)

    def decay_at(self, update: int) -> float:
        """What the average is multiplied by in the ``update``-th update, counted from 1."""
        decay = self.decay**self.every           # the same horizon in steps whatever the interval
        return min(decay, (1 + update) / (10 + update)) if self.warmup else decay

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in place of the live weights, which come back unchanged at the end.

        The two change places tensor by tensor, so that no second copy of the weights is ever held; meanwhile the
        average can be neither read nor moved (``RuntimeError``), and so nothing can be saved.
        """
        try:
            self._exchange(lend=True)
            yield
        finally:
            self._exchange(lend=False)

    @torch.no_grad()
    def _exchange(self, lend: bool) -> None:
        """Lend every average that is not lent, or take back every one that is: what failed half way can be undone."""
        for name, parameter in self._parameters.items():
            with self._access([parameter], self._owner[name]):
                if name in self._values and (name in self._lent) != lend:
                    live, average = parameter.detach(), self._values[name]
                    if live.dtype == average.dtype:
                        change_places(live, average)
                        self._lent[name] = average
                    elif lend:       # a weight of fewer bits would lose the average's
                        self._lent[name] = live.clone()
                        live.copy_(average)
                    else:
                        live.copy_(self._lent[name])
                    if not lend:
                        del self._lent[name]

    def _check_not_lent(self) -> None:
        if self._lent:
            raise RuntimeError("the average is in place of the weights now: nothing can be saved, loaded or updated")

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
        self._check_not_lent()
        return dict(self._values)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Raises ``ValueError`` when ``state`` does not hold just this rank's parameters."""
        self._check_not_lent()
        if state.keys() != self._values.keys():
            different = sorted(state.keys() ^ self._values.keys())
            raise ValueError(f"the saved average does not fit: {different[0]!r} is only on one side")
        for name, value in self._values.items():
            value.copy_(state[name])


def change_places(left: Tensor, right: Tensor) -> None:
    held = right.clone()
    right.copy_(left)
    left.copy_(held)
