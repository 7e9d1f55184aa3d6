"""One query a sequence against a long cache: flash-decoding over tiles of a fixed size, joined by their log-sum-exps.

The slot is read from the device, so that a launch is the same at every slot and can be captured; tiles beyond it read
nothing. The candidates of a caption read its one prefix. A sequence's result does not depend on how many others there
are: each (sequence, head, tile) is one program, and the tiles are of one size whatever the batch. Source of the split:
arXiv 2205.14135, section 3.1, applied to the keys of one query.

With ``TRITON_INTERPRET=1`` the same code runs on a CPU, which is how it is tested.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 128      # slots of one program


@triton.jit
def attend_tiles(queries, new_keys, new_values, keys, values, owners, slot, table, outputs, maxima, sums,
                 query_row, query_head, key_row, key_head, value_row, value_head,
                 heads, prefix, image_slots, first_image, width, tiles, scale,
                 HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr, PREFIX_TILES: tl.constexpr,
                 GATHERED: tl.constexpr):
    """One tile of one head of one sequence: its unnormalised output, its largest score and its sum.

    ``keys`` and ``values`` are pools of rows [HEAD_DIM]: [captions, heads, prefix], then, from ``first_image`` on,
    [sequences, heads, image_slots]. The first ``PREFIX_TILES`` tiles are the prefix's, the others the image's.
    """
    sequence_head = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    sequence = sequence_head // heads
    head = sequence_head % heads
    now = tl.load(slot).to(tl.int32) - prefix                # the image slot that asks, and is new
    in_prefix = tile < PREFIX_TILES
    in_image = tile >= PREFIX_TILES
    places = tl.where(in_prefix, tile, tile - PREFIX_TILES) * TILE + tl.arange(0, TILE)
    if GATHERED:
        named = tl.load(table + now * width + places, mask=(places < width) & in_image, other=-1)
        slots = tl.where(in_prefix, places, named)
    else:
        slots = places
    seen = (slots >= 0) & (slots < tl.where(in_prefix, prefix, now + 1))
    is_new = seen & (slots == now) & in_image
    stored = seen & ((slots != now) | in_prefix)
    owner = tl.load(owners + sequence)
    first = tl.where(in_prefix, (owner * heads + head) * prefix, first_image + sequence_head * image_slots)

    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < HEAD_DIM
    offsets = (first + slots)[:, None] * HEAD_DIM + dims[None, :]
    readable = stored[:, None] & inside[None, :]
    key_tile = tl.load(keys + offsets, mask=readable, other=0.0).to(tl.float32)
    value_tile = tl.load(values + offsets, mask=readable, other=0.0).to(tl.float32)
    query = tl.load(queries + sequence * query_row + head * query_head + dims, mask=inside, other=0.0).to(tl.float32)
    new_key = tl.load(new_keys + sequence * key_row + head * key_head + dims, mask=inside, other=0.0)
    new_value = tl.load(new_values + sequence * value_row + head * value_head + dims, mask=inside, other=0.0)
    key_tile = tl.where(is_new[:, None], new_key.to(tl.float32)[None, :], key_tile)
    value_tile = tl.where(is_new[:, None], new_value.to(tl.float32)[None, :], value_tile)

    scores = tl.where(seen, tl.sum(key_tile * query[None, :], axis=1) * scale, float("-inf"))
    largest = tl.max(scores, axis=0)
    alive = largest != float("-inf")
    weights = tl.where(seen, tl.exp(scores - tl.where(alive, largest, 0.0)), 0.0)
    place = sequence_head * tiles + tile
    tl.store(maxima + place, largest)
    tl.store(sums + place, tl.sum(weights, axis=0))
    tl.store(outputs + place * HEAD_DIM + dims, tl.sum(weights[:, None] * value_tile, axis=0), mask=inside)
    if tile == PREFIX_TILES:                                 # one program remembers the new slot; none reads it
        remembered = (first + now) * HEAD_DIM + dims
        tl.store(keys + remembered, new_key, mask=inside)
        tl.store(values + remembered, new_value, mask=inside)


@triton.jit
def join_tiles(outputs, maxima, sums, joined, active, tiles,
               HEAD_DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_TILES: tl.constexpr):
    """The output of one head of one sequence from its tiles; zeros from the ``active``-th (sequence, head) on."""
    sequence_head = tl.program_id(0).to(tl.int64)
    numbers = tl.arange(0, BLOCK_TILES)
    dims = tl.arange(0, BLOCK_DIM)
    inside = dims < HEAD_DIM
    is_active = sequence_head < active
    places = sequence_head * tiles + numbers
    known = (numbers < tiles) & is_active
    largest = tl.load(maxima + places, mask=known, other=float("-inf"))
    alive = largest != float("-inf")
    totals = tl.load(sums + places, mask=known & alive, other=0.0)
    parts = tl.load(outputs + places[:, None] * HEAD_DIM + dims[None, :],
                    mask=(known & alive)[:, None] & inside[None, :], other=0.0)
    shares = tl.where(alive, tl.exp(largest - tl.max(largest, axis=0)), 0.0)
    total = tl.sum(shares * totals, axis=0)
    output = tl.sum(shares[:, None] * parts, axis=0) / tl.where(is_active, total, 1.0)
    output = tl.where(is_active, output, 0.0)
    tl.store(joined + sequence_head * HEAD_DIM + dims, output.to(joined.dtype.element_ty), mask=inside)


def attend(queries: Tensor, new_keys: Tensor, new_values: Tensor, keys: Tensor, values: Tensor, owners: Tensor,
           slot: Tensor, table: Tensor | None, prefix: int, image_slots: int, first_image: int) -> Tensor:
    """[R, heads * head_dim] for the one slot ``slot`` [1], which is stored; zeros after the first len(owners) rows.

    Queries, new keys and new values [R, heads, 1, head_dim] with dense features; ``keys`` and ``values`` [rows,
    head_dim] are pools as :func:`attend_tiles` has them; ``owners`` int64 [n] is each sequence's caption; ``table``
    int32 [N, k] names the image slots that each sees (-1: none), None for all up to itself.
    """
    rows, heads, _, head_dim = queries.shape
    assert queries.stride(-1) == new_keys.stride(-1) == new_values.stride(-1) == 1
    width = image_slots if table is None else table.shape[1]
    prefix_tiles, image_tiles = triton.cdiv(prefix, TILE), triton.cdiv(width, TILE)
    tiles, active = prefix_tiles + image_tiles, len(owners) * heads
    outputs = torch.empty(active, tiles, head_dim, device=queries.device, dtype=torch.float32)
    maxima = torch.empty(active, tiles, device=queries.device, dtype=torch.float32)
    sums, joined = torch.empty_like(maxima), queries.new_empty(rows, heads * head_dim)
    block_dim = triton.next_power_of_2(head_dim)
    attend_tiles[(active, tiles)](
        queries, new_keys, new_values, keys, values, owners, slot, slot if table is None else table, outputs, maxima,
        sums, queries.stride(0), queries.stride(1), new_keys.stride(0), new_keys.stride(1), new_values.stride(0),
        new_values.stride(1), heads, prefix, image_slots, first_image, width, tiles, head_dim ** -0.5,
        HEAD_DIM=head_dim, BLOCK_DIM=block_dim, TILE=TILE, PREFIX_TILES=prefix_tiles, GATHERED=table is not None,
        num_warps=4 if block_dim <= 64 else 8)
    join_tiles[(rows * heads,)](outputs, maxima, sums, joined, active, tiles, HEAD_DIM=head_dim, BLOCK_DIM=block_dim,
                                BLOCK_TILES=triton.next_power_of_2(tiles), num_warps=2)
    return joined


@torch.inference_mode()
def attends_rightly(device: torch.device) -> bool:
    """Try the kernel on one head of one sequence, with a table and without: weights that are equal give a mean."""
    prefix, image, head_dim = 3, 4, 16
    values = torch.arange(7.0, device=device)[:, None].expand(7, head_dim).contiguous()
    zeros, new = torch.zeros_like(values), torch.full((1, 1, 1, head_dim), 9.0, device=device)
    owners, slot = torch.zeros(1, dtype=torch.int64, device=device), torch.full((1,), prefix + 2, device=device)
    table = torch.tensor([[0, -1], [0, 1], [0, 2], [0, 3]], dtype=torch.int32, device=device)
    nothing = torch.zeros_like(new)
    means = [attend(nothing, nothing, new, zeros, values.clone(), owners, slot, names, prefix, image,
                    prefix).unique().tolist() for names in (None, table)]
    expected = (0 + 1 + 2 + 3 + 4 + 9) / 6, (0 + 1 + 2 + 3 + 9) / 5
    return all(len(mean) == 1 and abs(mean[0] - right) < 1e-4 for mean, right in zip(means, expected, strict=True))
