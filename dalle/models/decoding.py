"""Writing image codes one at a time: what a transformer remembers of the slots before, and a step that uses it.

:func:`prefill` once a caption, :meth:`DecodingState.expand` to the candidates, then :func:`decode_step` for each code.
The model is not asked to know any of this: a :class:`BlockCache` runs a block's own pieces around its memory. All of it
runs in the type of the weights, without autocast.
"""

import copy

import torch
from torch import Tensor

from dalle.models.attention import Attention, AttentionConstants
from dalle.models.blocks import Block, TokenShift
from dalle.models.kernels import KeyValueCache, kernels_for
from dalle.models.precision import at_least_single
from dalle.models.rotary import rotary_table
from dalle.models.transformer import TextToImageTransformer, TransformerConfig


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
    """Append one code to each sequence, [B]: logits of the next, fp32 [B, K]. Moves ``state`` on by one slot.

    ``state`` may as well be a ``FixedState``, whose slot is a tensor [1] on the device.
    """
    hidden, position, turns = model.code_embedding(codes), state.position(), state.turn()
    if position is not None:
        hidden = hidden + position
    for cache in state.caches:
        hidden = cache.step(hidden, state.slot, turns)
    state.slot += 1
    return at_least_single(model.image_head(model.norm(hidden)))


def for_decoding(model: TextToImageTransformer, dtype: torch.dtype | None, rows: int) -> TextToImageTransformer:
    """``model``, made ready for steps of ``rows`` sequences: in ``dtype``, its weights packed where that is faster.

    What has to be changed is a copy; dropout is off in it.
    """
    if dtype not in (None, model.start.dtype):
        model = copy.deepcopy(model).to(dtype).eval()
    return kernels_for(model.start.device).packed(model, rows, ("text_head",))


def rotary_rows(model: TextToImageTransformer) -> tuple[Tensor, Tensor] | None:
    """The tables of cosines and signed sines, [prefix + N, head_dim] in the type of the weights; None: learned."""
    config, weight = model.config, model.start
    if config.positions != "rotary":
        return None
    return rotary_table(config.prefix, config.grid, config.width_of_head, weight.device, weight.dtype)


class DecodingState:
    """The caches of all layers for B sequences, and the next slot to fill."""

    def __init__(self, model: TextToImageTransformer, batch: int, length: int):
        weight = model.start
        self.model, self.batch = model, batch
        self.slot = 0
        self.caches = [make_cache(block, batch, length, weight.device, weight.dtype) for block in model.blocks]
        self.image_positions = model.image_positions() if model.config.positions == "learned" else None
        self.turns = rotary_rows(model)

    def position(self) -> Tensor | None:
        """[dim] to add to the next slot's embedding; None with rotary positions."""
        return None if self.image_positions is None else self.image_positions[self.slot - self.model.config.prefix]

    def turn(self) -> tuple[Tensor, ...] | None:
        """The next slot's rows of the rotary tables."""
        return None if self.turns is None else tuple(table[self.slot:self.slot + 1] for table in self.turns)

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


def make_cache(block: Block, batch: int, length: int, device: torch.device, dtype: torch.dtype) -> "BlockCache":
    """Room for B sequences of ``length`` slots, in the forms that the device's kernels name."""
    attention: Attention = block.attention.body
    keys_values = kernels_for(device).key_value_cache(batch, attention.heads, attention.head_dim, length, device, dtype)
    shifts = [Unshifted() if layer.shift is None else
              ShiftCache(layer.shift, batch, attention.out.out_features, device, dtype)
              for layer in (block.attention, block.feed_forward)]
    return BlockCache(block, keys_values, shifts)


class BlockCache:
    """One block and what it remembers of B sequences: keys and values, and recent slots where it shifts."""

    def __init__(self, block: Block, keys_values: KeyValueCache, shifts: "list[ShiftCache | Unshifted]"):
        self.layers = block.attention, block.feed_forward
        self.attention: Attention = block.attention.body
        self.keys_values, self.shifts = keys_values, shifts

    def prefill(self, hidden: Tensor, constants: AttentionConstants) -> Tensor:
        """The block over the first S slots, [B, S, dim], all of which are remembered."""
        (first, second), (first_shift, second_shift) = self.layers, self.shifts
        stacked = self.attention.project(first_shift.prefill(first.norm(hidden)), constants.rotary)
        self.keys_values.fill(stacked[1], stacked[2])
        hidden = hidden + first.leave(self.attention.attend(stacked, constants))
        return hidden + second.leave(second.body(second_shift.prefill(second.norm(hidden))))

    def step(self, hidden: Tensor, slot: int, turns: tuple[Tensor, ...] | None) -> Tensor:
        """The block over the one slot ``hidden`` [B, dim], which sees those before it."""
        (first, second), (first_shift, second_shift) = self.layers, self.shifts
        hidden = hidden + first.leave(self._attend_from(first_shift.step(first.norm(hidden), slot), slot, turns))
        return hidden + second.leave(second.body(second_shift.step(second.norm(hidden), slot)))

    def _attend_from(self, inputs: Tensor, slot: int, turns: tuple[Tensor, ...] | None) -> Tensor:
        """Attend from the one slot ``inputs`` [B, dim] to everything remembered that the pattern allows, and itself."""
        attention = self.attention
        heads = attention.project(inputs[:, None], turns)
        self.keys_values.put(slot, heads[1], heads[2])
        return attention.out(self.keys_values.attend(heads[0], attention.pattern, slot))

    def copy_rows(self, source: "BlockCache", rows: Tensor, length: int, first: int) -> None:
        """Take the sequences ``rows`` of ``source`` after ``length`` slots as sequences ``first`` and on."""
        self.keys_values.copy_rows(source.keys_values, rows, length, first)
        for shift, other in zip(self.shifts, source.shifts, strict=True):
            shift.copy_rows(other, rows, first)


class Unshifted:
    """What a layer without a token shift remembers of it."""

    def prefill(self, inputs: Tensor) -> Tensor:
        return inputs

    def step(self, inputs: Tensor, slot: int) -> Tensor:
        return inputs

    def copy_rows(self, source: "Unshifted", rows: Tensor, first: int) -> None:
        """Nothing."""


class ShiftCache:
    """The shifted half of the features of the last ``width`` slots, slot s at s % width: [width, B, dim / 2]."""

    def __init__(self, shift: TokenShift, batch: int, dim: int, device: torch.device, dtype: torch.dtype):
        self.shift, self.first_below = shift, shift.first_below
        self.quarters = [dim // 4, dim // 4, dim - dim // 4 * 2]
        self.recent = torch.zeros(shift.width, batch, dim // 4 * 2, device=device, dtype=dtype)
        # Views are made once: in a small model they would cost a step as much as its products.
        self.slots = self.recent.unbind(0)
        self.left, self.above = zip(*(slot.chunk(2, dim=1) for slot in self.slots), strict=True)

    def prefill(self, inputs: Tensor) -> Tensor:
        """``inputs`` [B, S, dim], the first S slots of the stream, shifted; the last of them are remembered."""
        width, _, kept = self.recent.shape
        first = max(0, inputs.shape[1] - width)
        places = torch.arange(first, inputs.shape[1], device=inputs.device) % width
        self.recent[places] = inputs[:, first:, :kept].transpose(0, 1)
        return self.shift(inputs)

    def step(self, inputs: Tensor, slot: int) -> Tensor:
        """The one slot ``inputs`` [B, dim] shifted, and remembered."""
        width = len(self.slots)
        first, second, rest = inputs.split(self.quarters, dim=1)
        above = self.above[slot % width] if slot >= self.first_below else second
        shifted = torch.cat([self.left[(slot - 1) % width], above, rest], dim=1)
        self.left[slot % width].copy_(first)
        self.above[slot % width].copy_(second)
        return shifted

    def copy_rows(self, source: "ShiftCache", rows: Tensor, first: int) -> None:
        self.recent[:, first:first + len(rows)] = source.recent[:, rows]


def cache_bytes(config: TransformerConfig, dtype: torch.dtype) -> int:
    """Bytes of decoding caches for one sequence."""
    keys_values = 2 * config.length * config.heads * config.width_of_head
    shifts = 2 * config.grid[1] * (config.dim // 2) if config.token_shift else 0
    return config.depth * (keys_values + shifts) * dtype.itemsize
