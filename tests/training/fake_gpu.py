"""A step on a GPU that is not there: tensors without data that say ``cuda``, so that what waits for one is seen.

torch's fake tensors carry shape and device through every operation; a mode above them refuses what makes the host wait
for the device, or a CUDA graph impossible. Only the backward is left out, which torch cannot do without the device: its
gradients are zeros here. What it asks for is seen on a CPU, by the recorder of ``tapes.py``.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tapes import reason_against
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle.training import loop
from dalle.training.engines.base import Engine
from dalle.training.engines.copies import Copies
from dalle.training.meter import Meter
from dalle.training.task import Task

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)


class Watch(TorchDispatchMode):
    """Raises where the host would wait for the device; where ``recorded``, for any copy between them."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = False
        self.on_device = 0          # operations there

    def __torch_dispatch__(self, operation: Any, types: Any, arguments: tuple = (), named: dict | None = None) -> Any:
        named = named or {}
        before = [leaf.device.type for leaf in tree_leaves((arguments, named)) if isinstance(leaf, Tensor)]
        if "cuda" in before:
            self.on_device += 1
            reason = reason_against(operation, arguments)
            if reason is not None:
                raise AssertionError(f"the host waits for the device: {reason}")
        given = operation(*arguments, **named)
        after = {leaf.device.type for leaf in tree_leaves(given) if isinstance(leaf, Tensor)}
        if operation in (aten._to_copy.default, aten.copy_.default) and len({*before, *after}) > 1:
            self._crosses(operation, arguments, named, to_host="cpu" in after)
        return given

    def _crosses(self, operation: Any, arguments: tuple, named: dict, to_host: bool) -> None:
        waits = not named.get("non_blocking", len(arguments) > 2 and arguments[2])
        if to_host or waits:
            raise AssertionError(f"{operation} {'reads the device' if to_host else 'waits for its copy'}")
        if self.recorded:
            raise AssertionError(f"{operation} copies from the host in phases that are recorded")


def step_without_waiting(task: Task, config: Any, batch: dict, folder: Any) -> Watch:
    """Make two steps of ``task``, whose networks become fakes, watching the second; ``AssertionError`` where it waits.
    """
    batch = task.on_host(batch, 0)              # with real values, as the loop has them there
    task.on_host = lambda batch, step: batch
    if hasattr(task, "check"):                  # it waits for the copy of the step before, by an event
        task.check = lambda class_id: class_id.clamp(min=0)
    phases, watch = loop.play_phases, Watch()

    def recorded(*arguments: Any) -> Any:
        watch.recorded = all(phase.capturable for phase in task.phases)
        try:
            return phases(*arguments)
        finally:
            watch.recorded = False

    with FakeTensorMode(allow_non_fake_inputs=True) as fakes:
        for module in [*(player.module for player in task.players.values()), *task.frozen.values()]:
            move(module, fakes)
        config = config.model_copy(update={"train": config.train.model_copy(update={"capture": False})})
        engine = Engine(config, CUDA)
        engine.copies = Copies(CUDA)            # without streams, of which there are none here
        engine.prepare(task, folder)
        with no_backward(engine):
            loop.train_step(engine, task, batch, 0, config, Meter())      # what is made once may be waited for
            with patch.object(loop, "play_phases", recorded), watch:
                loop.train_step(engine, task, batch, 1, config, Meter())
    return watch


@contextmanager
def no_backward(engine: Engine) -> Iterator[None]:
    def backward(loss: Tensor) -> None:
        for parameter in engine.active.trainable:
            parameter.grad = torch.zeros_like(parameter)

    def gradients(outputs: Any, inputs: Any, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        inputs = [inputs] if isinstance(inputs, Tensor) else inputs
        return tuple(torch.zeros_like(one) + outputs.sum() for one in inputs)

    with patch.object(engine, "backward", backward), patch.object(torch.autograd, "grad", gradients), recurrent():
        yield


@contextmanager
def recurrent() -> Iterator[None]:
    """Recurrent networks ask the device's library for its version, and packing has no shape: only shapes here."""
    def run(network: nn.RNNBase, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        directions = 2 if network.bidirectional else 1
        batch = inputs.shape[0 if network.batch_first else 1]
        outputs = inputs.new_zeros(*inputs.shape[:2], directions * network.hidden_size) + inputs.sum()
        last = inputs.new_zeros(directions * network.num_layers, batch, network.hidden_size) + inputs.sum()
        return outputs, (last, last) if isinstance(network, nn.LSTM) else last

    def pack(inputs: Tensor, lengths: list[int], **_: Any) -> Tensor:
        assert isinstance(lengths, list), "lengths would be read from the device"
        return inputs

    with ExitStack() as patches:
        for kind in (nn.LSTM, nn.GRU):
            patches.enter_context(patch.object(kind, "forward", run))
        for module in [module for name, module in sys.modules.items() if name.startswith("gans.")]:
            if hasattr(module, "pack_padded_sequence"):
                patches.enter_context(patch.object(module, "pack_padded_sequence", pack))
                patches.enter_context(patch.object(module, "pad_packed_sequence", lambda packed, **_: (packed, None)))
        yield


def move(module: nn.Module, fakes: FakeTensorMode) -> None:
    """Every parameter and buffer of ``module`` as a fake on the GPU."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=CUDA)
        return made[id(tensor)]

    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                part._parameters[name] = made.setdefault(
                    ~id(parameter), nn.Parameter(fake(parameter), parameter.requires_grad))
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = fake(buffer)
        if isinstance(part, nn.RNNBase):
            part._init_flat_weights()
    module.to = lambda *arguments, **named: module      # it is there, and torch cannot swap fakes
