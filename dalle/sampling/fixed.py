"""Writing codes by steps of one shape, each a replay of one CUDA graph: logits, the next code, the next logits.

The host only launches graphs. What a graph reads and writes lies in a ``FixedMemory``, which is kept with the graphs
for as long as their model lives, so that a second call captures nothing; weights may change in place between calls. A
model whose weights lie elsewhere than at the capture is captured anew.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.models.decoding import DecodingState, decode_step
from dalle.models.fixed_decoding import WITHOUT_BATCH, FixedMemory, FixedState, choose_form
from dalle.models.transformer import TextToImageTransformer
from dalle.sampling.choosing import SamplingConfig, choose_codes, guide

log = logging.getLogger(__name__)

WARM_UP = 3             # steps before a capture: kernels are compiled, chosen and given their workspaces
MOST_GRAPHS = 16        # of one model; the oldest goes first
STEPS_PER_REPORT = 32   # progress is told so often, one interval late: the host never waits for the newest step


@dataclass
class Kept:
    """What one model's graphs share: the memory that they use, and where its weights lay when they were captured."""

    memory: FixedMemory
    weights: tuple[int, ...]
    graphs: dict[Any, Callable[[], None]] = field(default_factory=dict)


KEPT: "WeakKeyDictionary[TextToImageTransformer, Kept]" = WeakKeyDictionary()


def active_candidates(model: TextToImageTransformer, candidates: int, batch_size: int) -> int:
    """How many of the ``batch_size`` places are attended for: the power of two that holds the ``candidates``.

    All of them where the form of attention may round differently with another number of sequences.
    """
    if choose_form(model.config.attention_backend, model.start.device) not in WITHOUT_BATCH:
        return batch_size
    return min(batch_size, _power_of_two(candidates))


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def write_fixed(model: TextToImageTransformer, source: DecodingState, logits: Tensor, rows: Tensor, numbers: Tensor,
                batch_size: int, options: SamplingConfig, method: str,
                on_share: Callable[[float], None]) -> tuple[Tensor, Tensor]:
    """Codes [m, N] from the first unknown slot on, and whether all logits were finite, for m = len(numbers).

    Sequence b (the m candidates', then with guidance the m without captions) goes on from sequence ``rows[b]`` of
    ``source``, whose next logits are ``logits[rows[b]]``. ``method`` is ``fixed``, ``captured`` or ``compiled``.
    """
    with _on(model.start.device):
        return _write_fixed(model, source, logits, rows, numbers, batch_size, options, method, on_share)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Streams and graphs belong to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _write_fixed(model: TextToImageTransformer, source: DecodingState, logits: Tensor, rows: Tensor, numbers: Tensor,
                 batch_size: int, options: SamplingConfig, method: str,
                 on_share: Callable[[float], None]) -> tuple[Tensor, Tensor]:
    kept = keep(model, _power_of_two(len(rows.unique())), len(rows), options.streams * batch_size)
    memory = kept.memory
    state = FixedState(model, memory, len(rows), choose_form(model.config.attention_backend, model.start.device))
    advance = _advance_of(kept, model, state, options, method)
    state.load(model, source, rows)
    memory.logits[:len(rows)] = logits[rows]
    memory.numbers[:len(numbers)] = numbers
    memory.codes.zero_()
    memory.finite.fill_(True)
    first, last = source.slot - model.config.prefix, model.config.num_image_slots - 1
    reports = Reports(on_share, model.start.device, last + 1 - first)
    for _ in range(first, last):
        advance()
        reports.step()
    choose(state, options)
    reports.finish()
    return memory.codes[:len(numbers)].clone(), memory.finite.clone()


def choose(state: FixedState, options: SamplingConfig) -> Tensor:
    """Write the code of the state's slot, from the logits and numbers in its memory: [m]."""
    memory, place = state.memory, state.slot - state.prefix
    candidates = state.active // options.streams
    guided = guide(memory.logits[:state.active], options)
    memory.finite.logical_and_(guided.amax(dim=-1).isfinite().all())
    codes = choose_codes(guided, memory.numbers[:candidates].index_select(1, place).squeeze(1), options)
    memory.codes[:candidates].index_copy_(1, place, codes[:, None])
    return codes


def step(model: TextToImageTransformer, state: FixedState, options: SamplingConfig) -> None:
    """Choose a code for each candidate, and from it the logits of the next: all that one replay does."""
    codes = choose(state, options).repeat(options.streams)
    filled = F.pad(codes, (0, state.memory.rows - state.active))
    state.memory.logits.copy_(decode_step(model, filled, state))


def keep(model: TextToImageTransformer, prefixes: int, sequences: int, rows: int) -> Kept:
    """The memory and graphs of ``model``: those of before where they are large enough and still fit its weights."""
    weights = tuple(tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()))
    before = KEPT.get(model)
    if before is not None and before.weights == weights and before.memory.rows == rows:
        prefixes, sequences = max(prefixes, before.memory.prefixes), max(sequences, before.memory.sequences)
        if (prefixes, sequences) == (before.memory.prefixes, before.memory.sequences):
            return before
    del before
    KEPT.pop(model, None)      # before there is a second one
    KEPT[model] = Kept(FixedMemory(model, prefixes, sequences, rows), weights)
    return KEPT[model]


def forget(model: TextToImageTransformer) -> None:
    """Free what is kept for ``model``: one in training needs the room for other things."""
    KEPT.pop(model, None)


def _advance_of(kept: Kept, model: TextToImageTransformer, state: FixedState, options: SamplingConfig,
                method: str) -> Callable[[], None]:
    """One step of ``state``; its memory's slot and caches are spent by a capture."""
    def plain() -> None:
        step(model, state, options)

    if method == "fixed":
        return plain
    key = (state.active, options, method)
    if key not in kept.graphs:
        while len(kept.graphs) >= MOST_GRAPHS:
            kept.graphs.pop(next(iter(kept.graphs)))
        run = torch.compile(plain, dynamic=False) if method == "compiled" else plain
        try:
            kept.graphs[key] = capture(run, lambda: state.slot.fill_(state.prefix))
        except (RuntimeError, NotImplementedError) as error:
            log.warning("decoding could not be captured as a CUDA graph, and runs step by step: %s", error)
            kept.graphs.clear()
            return plain
    return kept.graphs[key]


def capture(run: Callable[[], None], rewind: Callable[[], Any]) -> Callable[[], None]:
    """``run`` as a CUDA graph; it is run a few times before, each time after ``rewind``."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            rewind()
            run()
        rewind()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):    # a loader's threads may use the device
        run()
    return graph.replay


class Reports:
    """Tells which share of the steps is done, now and then, and never waits for the device's newest work."""

    def __init__(self, on_share: Callable[[float], None], device: torch.device, steps: int):
        self.on_share, self.is_cuda, self.steps = on_share, device.type == "cuda", steps
        self.launched, self.pending = 0, None

    def step(self) -> None:
        """One more step was launched."""
        self.launched += 1
        if self.launched % STEPS_PER_REPORT == 0:
            self._tell()
            event = torch.cuda.Event() if self.is_cuda else None
            if event is not None:
                event.record()
            self.pending = self.launched, event

    def _tell(self) -> None:
        if self.pending is not None:
            launched, event = self.pending
            if event is not None:
                event.synchronize()
            self.on_share(launched / self.steps)

    def finish(self) -> None:
        """All steps were launched: wait for them."""
        if self.is_cuda:
            torch.cuda.synchronize()
        self.on_share(1.0)
