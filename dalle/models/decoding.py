"""Writing image codes one at a time: what a transformer remembers of the slots before, and a step that uses it.

:func:`prefill` once a caption, :meth:`DecodingState.expand` to the candidates, then :func:`decode_step` for each code.
The model is not asked to know any of this: a :class:`BlockCache` runs a block's own pieces around its memory.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dalle.models.attention import Attention, AttentionConstants
from dalle.models.blocks import Block, TokenShift
from dalle.models.kernels import kernels_for
from dalle.models.precision import at_least_single
from dalle.models.transformer import TextToImageTransformer, TransformerConfig

Change = Callable[[Tensor], Tensor]      # of hidden features


def prefill(model: TextToImageTransformer, text: Tensor, codes: Tensor) -> tuple[Tensor, "DecodingState"]:
    """Run text [P, T] and the n known codes [P, n] at once: logits of the next code, fp32 [P, K], and the state."""
    hidden = model.embed(text, codes)
    state = DecodingState(model, len(text), hidden.shape[1])
    constants = model.attention_constants(hidden.shape[1], hidden.device, hidden.dtype)
    for cache, layer in zip(state.caches, constants, strict=True):
        hidden = cache.prefill(hidden, layer)
    state.slot = hidden.shape[1]
    return at_least_single(model.image_head(model.norm(hidden[:, -1]))), state


def decode_step(model: TextToImageTransformer, codes: Tensor, state: "DecodingState") -> Tensor:
    """Append one code to each sequence, [B]: logits of the next, fp32 [B, K]. Moves ``state`` on by one slot."""
    hidden = model.code_embedding(codes)
    if state.image_positions is not None:
        hidden = hidden + state.image_positions[state.slot - model.config.prefix]
    for cache in state.caches:
        hidden = cache.step(hidden, state.slot)
    state.slot += 1
    return at_least_single(model.image_head(model.norm(hidden)))


def for_decoding(model: TextToImageTransformer, dtype: torch.dtype | None = None) -> TextToImageTransformer:
    """``model`` if it has ``dtype`` already, else a copy of it in that type; dropout is off in the copy."""
    if dtype in (None, model.start.dtype):
        return model
    return copy.deepcopy(model).to(dtype).eval()


class DecodingState:
    """The caches of all layers for B sequences, and the next slot to fill."""

    def __init__(self, model: TextToImageTransformer, batch: int, length: int):
        weight = model.start
        self.model, self.batch = model, batch
        self.slot = 0
        self.caches = [BlockCache(block, batch, length, weight.device, weight.dtype) for block in model.blocks]
        self.image_positions = model.image_positions() if model.config.positions == "learned" else None

    def expand(self, rows: Tensor) -> "DecodingState":
        """A state with room for the whole stream whose sequence b goes on from sequence ``rows[b]`` of this one."""
        state = DecodingState(self.model, len(rows), self.model.config.length)
        state._take(self, rows, first=0)
        return state

    @staticmethod
    def join(states: "list[DecodingState]") -> "DecodingState":
        """The sequences of all ``states``, which are at the same slot, one after the other."""
        joined = DecodingState(states[0].model, sum(state.batch for state in states), states[0].slot)
        first = 0
        for state in states:
            joined._take(state, torch.arange(state.batch, device=state.model.start.device), first)
            first += state.batch
        return joined

    def _take(self, source: "DecodingState", rows: Tensor, first: int) -> None:
        self.slot = source.slot
        for cache, other in zip(self.caches, source.caches, strict=True):
            cache.copy_rows(other, rows, self.slot, first)


class BlockCache:
    """One block and what it remembers of B sequences: keys and values, and recent slots where it shifts."""

    def __init__(self, block: Block, batch: int, length: int, device: torch.device, dtype: torch.dtype):
        attention: Attention = block.attention.body
        self.block = block
        self.keys_values = kernels_for(device).key_value_cache(
            batch, attention.heads, attention.head_dim, length, device, dtype)
        self.shifts = [
            None if layer.shift is None else ShiftCache(layer.shift, batch, attention.out.out_features, device, dtype)
            for layer in (block.attention, block.feed_forward)]

    def prefill(self, hidden: Tensor, constants: AttentionConstants) -> Tensor:
        """The block over the first S slots, [B, S, dim], all of which are remembered."""
        shifts = [None if shift is None else shift.prefill for shift in self.shifts]
        return self._run(hidden, shifts, partial(self._attend_and_fill, constants=constants))

    def step(self, hidden: Tensor, slot: int) -> Tensor:
        """The block over the one slot ``hidden`` [B, dim], which sees those before it."""
        shifts = [None if shift is None else partial(shift.step, slot=slot) for shift in self.shifts]
        return self._run(hidden, shifts, partial(self._attend_from, slot=slot))

    def _run(self, hidden: Tensor, shifts: list[Change | None], attend: Change) -> Tensor:
        """The block with ``shifts`` and an attention that remember, in the places of its own."""
        bodies = (attend, self.block.feed_forward.body)
        for layer, shift, body in zip((self.block.attention, self.block.feed_forward), shifts, bodies, strict=True):
            hidden = hidden + layer.leave(body(layer.enter(hidden, shift)))
        return hidden

    def _attend_and_fill(self, inputs: Tensor, constants: AttentionConstants) -> Tensor:
        attention: Attention = self.block.attention.body
        stacked = attention.project(inputs, constants.rotary)
        self.keys_values.fill(stacked[1], stacked[2])
        return attention.attend(stacked, constants)

    def _attend_from(self, inputs: Tensor, slot: int) -> Tensor:
        """Attend from the one slot ``inputs`` [B, dim] to everything remembered that the pattern allows, and itself."""
        attention: Attention = self.block.attention.body
        turns = attention.turns(slot, slot + 1, inputs.device, inputs.dtype)
        queries, keys, values = attention.project(inputs[:, None], turns)
        self.keys_values.put(slot, keys, values)
        return attention.join(self.keys_values.attend(queries, attention.pattern, slot)).squeeze(1)

    def copy_rows(self, source: "BlockCache", rows: Tensor, length: int, first: int) -> None:
        """Take the sequences ``rows`` of ``source`` after ``length`` slots as sequences ``first`` and on."""
        self.keys_values.copy_rows(source.keys_values, rows, length, first)
        for shift, other in zip(self.shifts, source.shifts, strict=True):
            if shift is not None:
                shift.copy_rows(other, rows, first)


class ShiftCache:
    """The shifted half of the features of the last ``width`` slots, slot s at s % width: [width, B, dim / 2]."""

    def __init__(self, shift: TokenShift, batch: int, dim: int, device: torch.device, dtype: torch.dtype):
        self.shift = shift
        self.recent = torch.zeros(shift.width, batch, dim // 4 * 2, device=device, dtype=dtype)

    def prefill(self, inputs: Tensor) -> Tensor:
        """``inputs`` [B, S, dim], the first S slots of the stream, shifted; the last of them are remembered."""
        width, _, kept = self.recent.shape
        first = max(0, inputs.shape[1] - width)
        places = torch.arange(first, inputs.shape[1], device=inputs.device) % width
        self.recent[places] = inputs[:, first:, :kept].transpose(0, 1)
        return self.shift(inputs)

    def step(self, inputs: Tensor, slot: int) -> Tensor:
        """The one slot ``inputs`` [B, dim] shifted, and remembered."""
        width, quarter = self.shift.width, inputs.shape[-1] // 4
        left = self.recent[(slot - 1) % width, :, :quarter]
        above = (self.recent[slot % width] if slot >= self.shift.first_below else inputs)[:, quarter:2 * quarter]
        shifted = torch.cat([left, above, inputs[:, 2 * quarter:]], dim=1)
        self.recent[slot % width] = inputs[:, :2 * quarter]
        return shifted

    def copy_rows(self, source: "ShiftCache", rows: Tensor, first: int) -> None:
        self.recent[:, first:first + len(rows)] = source.recent[:, rows]


def cache_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of decoding caches for one sequence."""
    keys_values = 2 * config.length * config.heads * config.width_of_head
    shifts = 2 * config.grid[1] * (config.dim // 2) if config.token_shift else 0
    return config.depth * (keys_values + shifts) * dtype.itemsize
