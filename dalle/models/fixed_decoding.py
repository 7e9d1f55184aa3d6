"""A decoding step whose shapes do not change: the slot is a number on the device, and so a CUDA graph can be it.

:class:`FixedMemory` are all tensors that such steps read and write; :class:`FixedState` is what ``decode_step`` takes
in place of a ``DecodingState``. The prefix is kept once a caption and read by all its candidates; their image slots
come after it, each sequence's own. Every product with a weight is over ``rows`` rows, however many sequences there
are: only attention, whose cost grows with them, is over the ``active`` ones.
"""

import importlib.util
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dalle.models.blocks import TokenShift
from dalle.models.decoding import BlockCache, DecodingState, Unshifted, rotary_rows
from dalle.models.patterns import AttentionPattern
from dalle.models.transformer import TextToImageTransformer

log = logging.getLogger(__name__)


@lru_cache(maxsize=64)
def visible_table(pattern: AttentionPattern, device: torch.device) -> Tensor | None:
    """int32 [N, k]: the image slots that each image slot sees, itself included, -1 after the last; None: all so far."""
    if pattern.name == "full":
        return None
    with torch.inference_mode(False):
        allowed = pattern.mask()[pattern.prefix:, pattern.prefix:]
        count = allowed.shape[1]
        slots = torch.where(allowed, torch.arange(count), count).sort(dim=1).values[:, :int(allowed.sum(1).max())]
        return slots.where(slots < count, -1).to(device, torch.int32)


class FixedMemory:
    """Room for ``sequences`` sequences of ``prefixes`` captions in steps of ``rows`` rows; it knows no model."""

    def __init__(self, model: TextToImageTransformer, prefixes: int, sequences: int, rows: int):
        config, weight = model.config, model.start
        heads, head_dim, device = config.heads, config.width_of_head, weight.device
        like = {"device": device, "dtype": weight.dtype}
        self.prefixes, self.sequences, self.rows = prefixes, sequences, rows
        self.first_image = prefixes * heads * config.prefix
        slots = self.first_image + sequences * heads * config.num_image_slots
        self.keys = [torch.zeros(slots, head_dim, **like) for _ in range(config.depth)]
        self.values = [torch.zeros(slots, head_dim, **like) for _ in range(config.depth)]
        shifts = 2 * config.depth if config.token_shift else 0
        self.recent = [torch.zeros(config.grid[1], rows, config.dim // 4 * 2, **like) for _ in range(shifts)]
        self.slot = torch.full((1,), config.prefix, dtype=torch.int64, device=device)
        self.owners = torch.zeros(sequences, dtype=torch.int64, device=device)
        self.logits = torch.zeros(rows, config.num_codes, device=device, dtype=torch.promote_types(
            weight.dtype, torch.float32))
        self.codes = torch.zeros(sequences, config.num_image_slots, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(sequences, config.num_image_slots, dtype=torch.float64, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        learned = config.positions == "learned"
        self.image_positions = torch.zeros(config.num_image_slots, config.dim, **like) if learned else None
        # Held here, too: a captured graph knows addresses alone.
        self.turns = rotary_rows(model)
        self.tables = [visible_table(block.attention.body.pattern, device) for block in model.blocks]


class FixedState:
    """What :func:`dalle.models.decoding.decode_step` reads and writes, as views of a :class:`FixedMemory`."""

    def __init__(self, model: TextToImageTransformer, memory: FixedMemory, active: int, form: str):
        self.memory, self.active = memory, active
        self.slot, self.image_positions, self.turns = memory.slot, memory.image_positions, memory.turns
        self.prefix = model.config.prefix
        self.caches = []
        for layer, block in enumerate(model.blocks):
            keys_values = FixedKeyValueCache(memory, layer, block.attention.body, active, FORMS[form])
            shifts = [Unshifted() if sub_layer.shift is None else
                      FixedShiftCache(sub_layer.shift, memory.recent[2 * layer + place], active)
                      for place, sub_layer in enumerate((block.attention, block.feed_forward))]
            self.caches.append(BlockCache(block, keys_values, shifts))

    def position(self) -> Tensor | None:
        """[1, dim] to add to the next slot's embedding; None with rotary positions."""
        return None if self.image_positions is None else self.image_positions.index_select(0, self.slot - self.prefix)

    def turn(self) -> tuple[Tensor, ...] | None:
        """The next slot's rows of the rotary tables."""
        return None if self.turns is None else tuple(table.index_select(0, self.slot) for table in self.turns)

    def load(self, model: TextToImageTransformer, source: DecodingState, rows: Tensor) -> None:
        """Go on from the sequences ``rows`` [active] of ``source``, whose prefixes are copied once each."""
        used, owners = rows.unique(return_inverse=True)
        if self.image_positions is not None:
            self.image_positions.copy_(model.image_positions())
        self.memory.owners[:self.active] = owners
        self.slot.fill_(source.slot)
        for cache, other in zip(self.caches, source.caches, strict=True):
            cache.keys_values.load(other.keys_values, source.slot, used, rows)
            for shift, before in zip(cache.shifts, other.shifts, strict=True):
                shift.copy_rows(before, rows, 0)


class FixedKeyValueCache:
    """Keys and values of one layer: prefixes [captions, heads, P, head_dim], image slots [n, heads, N, head_dim]."""

    def __init__(self, memory: FixedMemory, layer: int, attention, active: int, attend: Callable[..., Tensor]):
        pattern: AttentionPattern = attention.pattern
        self.prefix, self.image_slots = pattern.prefix, pattern.length - pattern.prefix
        self.keys, self.values, self.first_image = memory.keys[layer], memory.values[layer], memory.first_image
        self.owners, self.table = memory.owners[:active], memory.tables[layer]
        self.heads, self.active, self._attend = attention.heads, active, attend

    def prefix_part(self, pool: Tensor) -> Tensor:
        """[captions, heads, P, head_dim] of one of the two pools."""
        return pool[:self.first_image].view(-1, self.heads, self.prefix, pool.shape[-1])

    def image_part(self, pool: Tensor) -> Tensor:
        """[active, heads, N, head_dim] of one of the two pools."""
        return pool[self.first_image:].view(-1, self.heads, self.image_slots, pool.shape[-1])[:self.active]

    def load(self, source, length: int, used: Tensor, rows: Tensor) -> None:
        """Take the prefixes of the sequences ``used``, and the image slots before ``length`` of the ``rows``."""
        for pool, filled in zip((self.keys, self.values), source.filled(length), strict=True):
            self.prefix_part(pool)[:len(used)] = filled[used, :, :self.prefix]
            self.image_part(pool)[:, :, :length - self.prefix] = filled[rows, :, self.prefix:]

    def put(self, slot: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keys and values [R, heads, 1, head_dim] of the slot [1] that :meth:`attend` is then asked for."""
        self.new = keys, values

    def attend(self, queries: Tensor, pattern: AttentionPattern, slot: Tensor) -> Tensor:
        """[R, heads * head_dim]; of rows that are not active, something finite."""
        return self._attend(self, queries, *self.new, slot)


@dataclass(frozen=True)
class Gathered:
    """What a step of plain torch attends to: keys and values [n, heads, P + k, head_dim] and bool [P + k]."""

    keys: Tensor
    values: Tensor
    seen: Tensor


def gather(cache: FixedKeyValueCache, keys: Tensor, values: Tensor, slot: Tensor) -> Gathered:
    """Store the new slot and copy what it may see, its sparse layout's image slots alone, beside the prefix."""
    now, parts = slot - cache.prefix, []
    if cache.table is None:
        seen = torch.arange(cache.image_slots, device=slot.device) <= now
    else:
        places = cache.table.index_select(0, now).squeeze(0)
        seen = places >= 0
    for pool, new in ((cache.keys, keys), (cache.values, values)):
        image = cache.image_part(pool)
        image.index_copy_(2, now, new[:cache.active])
        image = image if cache.table is None else image.index_select(2, places.clamp(min=0))
        parts.append(torch.cat([cache.prefix_part(pool).index_select(0, cache.owners), image], dim=2))
    return Gathered(*parts, F.pad(seen, (cache.prefix, 0), value=True))


def by_products(cache: FixedKeyValueCache, queries: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> Tensor:
    """Two plain products: what the other forms are tested against."""
    all_of_it = gather(cache, keys, values, slot)
    scores = queries[:cache.active] @ all_of_it.keys.transpose(-2, -1) * queries.shape[-1] ** -0.5
    weights = scores.masked_fill(~all_of_it.seen, float("-inf")).softmax(dim=-1)
    return filled_up(weights @ all_of_it.values, len(queries))


def by_sdpa(cache: FixedKeyValueCache, queries: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> Tensor:
    """torch's fused attention with a mask of one row."""
    all_of_it = gather(cache, keys, values, slot)
    mask = all_of_it.seen.expand(cache.active, 1, 1, -1)
    return filled_up(F.scaled_dot_product_attention(queries[:cache.active], all_of_it.keys, all_of_it.values,
                                                    attn_mask=mask), len(queries))


def filled_up(attended: Tensor, rows: int) -> Tensor:
    """[rows, heads * head_dim] from [n, heads, 1, head_dim]: zeros after the first n."""
    return F.pad(attended.flatten(1), (0, 0, 0, rows - len(attended)))


def by_triton(cache: FixedKeyValueCache, queries: Tensor, keys: Tensor, values: Tensor, slot: Tensor) -> Tensor:
    """Our own kernel: it reads the filled slots alone and the prefix in place, where the others copy."""
    from dalle.models.cuda.one_query import attend

    return attend(queries, keys, values, cache.keys, cache.values, cache.owners, slot, cache.table, cache.prefix,
                  cache.image_slots, cache.first_image)


FORMS: dict[str, Callable[..., Tensor]] = {"triton": by_triton, "products": by_products, "sdpa": by_sdpa}
WITHOUT_BATCH = frozenset({"triton"})       # forms whose result for a sequence does not depend on how many there are
BY_BACKEND = {"math": "products", "sdpa": "sdpa"}     # attention_backend: form; any other takes the device's best


def choose_form(backend: str, device: torch.device) -> str:
    """The entry of ``FORMS`` that a config's ``attention_backend`` means on a device."""
    if backend in BY_BACKEND:
        return BY_BACKEND[backend]
    return "triton" if device.type == "cuda" and triton_attends(device) else "products"


@lru_cache(maxsize=8)
def triton_attends(device: torch.device) -> bool:
    """Whether our kernel compiles and is right on ``device``; what is wrong is told once."""
    if importlib.util.find_spec("triton") is None:
        log.warning("Triton is not installed: decoding attends by plain products, which copy the whole cache each step")
        return False
    from dalle.models.cuda.one_query import attends_rightly

    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():     # where Triton launches
            right = attends_rightly(device)
        if right:
            return True
        log.warning("the Triton kernel is not right on %s: decoding attends by plain products", device)
    except Exception as error:      # a compiler's errors have no class in common
        log.warning("the Triton kernel does not run on %s, and decoding attends by plain products: %s", device, error)
    return False


class FixedShiftCache:
    """``ShiftCache`` with the slot on the device: the last ``width`` slots' shifted half, [width, R, dim / 2]."""

    def __init__(self, shift: TokenShift, recent: Tensor, active: int):
        self.first_below, self.recent, self.active = shift.first_below, recent, active

    def step(self, inputs: Tensor, slot: Tensor) -> Tensor:
        """The one slot ``inputs`` [R, dim] shifted, and remembered."""
        width, quarter = len(self.recent), inputs.shape[-1] // 4
        left = self.recent.index_select(0, (slot - 1) % width)[0, :, :quarter]
        above = self.recent.index_select(0, slot % width)[0, :, quarter:]
        above = torch.where(slot >= self.first_below, above, inputs[:, quarter:2 * quarter])
        shifted = torch.cat([left, above, inputs[:, 2 * quarter:]], dim=1)
        self.recent.index_copy_(0, slot % width, inputs[None, :, :2 * quarter])
        return shifted

    def copy_rows(self, source, rows: Tensor, first: int) -> None:
        self.recent.zero_()
        self.recent[:, first:first + len(rows)] = source.recent[:, rows]
