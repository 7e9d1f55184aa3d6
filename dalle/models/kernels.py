"""Which form of each operation runs on which type of device: the one place that says it.

``KERNELS`` has a column a device type and a row an operation. A form that is faster on some device is a new function
beside the others and a new name in that device's column; models ask :func:`kernels_for` and never look at the device.
The plain forms (``dalle/models/plain.py``) are what every other is tested against.
"""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.models import fused, plain
from dalle.models.cpu.activations import squared_relu
from dalle.models.cpu.attention import MATH_LONGEST, attend, math_attention, without_fused_kernels
from dalle.models.cpu.dropout import dropout
from dalle.models.cpu.key_value_cache import KeyValueCache as DenseKeyValueCache
from dalle.models.cpu.linear import linear
from dalle.models.cpu.packed import leave_linears, pack_linears
from dalle.models.cpu.rotary import rotate
from dalle.models.cpu.softmax import softmax_errors
from dalle.models.cpu.token_shift import shift_slots
from dalle.models.masks import additive_mask, block_mask, boolean_mask
from dalle.models.patterns import AttentionPattern
from dalle.models.plain import Heads

FLEX_SHORTEST = 512   # below this a stream has few blocks to leave out, and a dense mask of it is small

Backend = Literal["auto", "sdpa", "math", "flex"]      # what a config may ask for


class KeyValueCache(Protocol):
    """Keys and values of one layer for B sequences, allocated once; the layout is the form's own affair."""

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Store the first S slots; both [B, heads, S, head_dim]."""

    def put(self, slot: int, keys: Tensor, values: Tensor) -> None:
        """Store one slot; both [B, heads, 1, head_dim]."""

    def copy_rows(self, source: Self, rows: Tensor, length: int, first: int) -> None:
        """Take the first ``length`` slots of the sequences ``rows`` of ``source`` as sequences ``first`` and on."""

    def filled(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``length`` slots, each [B, heads, length, head_dim]."""

    def attend(self, queries: Tensor, pattern: AttentionPattern, slot: int) -> Tensor:
        """Attention of the queries [B, heads, 1, head_dim] of ``slot`` to all filled slots that the pattern permits.

        The heads' outputs side by side: [B, heads * head_dim].
        """


@dataclass(frozen=True)
class AttentionForm:
    """One way to compute softmax(q k^T / sqrt(head_dim) + mask) v, and the mask that it takes."""

    mask: Callable[[AttentionPattern, int, torch.device, torch.dtype], Any]   # of the first so many slots
    attend: Callable[[Heads, Any], Tensor]
    # of a stream whose image slots stand column after column, where the form gains from that order
    mask_by_columns: Callable[[AttentionPattern, int, torch.device, torch.dtype], Any] | None = None


def _boolean_mask_or_none(pattern: AttentionPattern, length: int, device: torch.device,
                          dtype: torch.dtype) -> Tensor | None:
    return None if pattern.name == "full" else boolean_mask(pattern, length, device)


def _block_mask(pattern: AttentionPattern, length: int, device: torch.device, dtype: torch.dtype) -> Any:
    return block_mask(pattern, length, device)


def _block_mask_by_columns(pattern: AttentionPattern, length: int, device: torch.device, dtype: torch.dtype) -> Any:
    return block_mask(pattern, length, device, by_columns=True)


def _math_attention(heads: Heads, mask: Tensor) -> Tensor:
    return math_attention(heads if isinstance(heads, Tensor) else plain.join_heads(*heads), mask)


ATTENTION: dict[str, AttentionForm] = {
    "plain": AttentionForm(additive_mask, plain.attention),
    "math": AttentionForm(additive_mask, _math_attention),
    "sdpa": AttentionForm(_boolean_mask_or_none, fused.sdpa_attention),
    "flex": AttentionForm(_block_mask, fused.flex_attention, _block_mask_by_columns),
}


@dataclass(frozen=True)
class Kernels:
    """The forms that run on one type of device: no default, so that each column names every operation."""

    attention: Callable[[AttentionPattern, int], str]          # the entry of ATTENTION for a pattern and a length
    attend: Callable[[Tensor, Tensor | None], Tensor]          # with any additive mask [S, S], or none
    tower_attention: Callable[[], AbstractContextManager]      # around networks whose attention is their own (CLIP's)
    split_heads: Callable[[Tensor, int], Heads]                 # of the one product that makes q, k and v
    join_heads: Callable[[Tensor, Tensor, Tensor], Heads]       # what rotation and attention take, of three
    dropout: Callable[[Tensor, float], Tensor]                  # in training, of inputs and the share of zeros
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor]   # of inputs, weight and bias
    rotate: Callable[[Heads, Tensor, Tensor], Heads]
    squared_relu: Callable[[Tensor], Tensor]
    shift_slots: Callable[[Tensor, int, int], Tensor]
    softmax_errors: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]       # may take the place of the logits
    # from B, heads, head_dim, slots, device, type
    key_value_cache: Callable[[int, int, int, int, torch.device, torch.dtype], KeyValueCache]
    # a model for many steps of so many rows, without the linear layers named
    packed: Callable[[nn.Module, int, Container[str]], nn.Module]


def _attention_on_cpu(pattern: AttentionPattern, length: int) -> str:
    return "math" if length <= MATH_LONGEST else "sdpa"


def _attention_on_cuda(pattern: AttentionPattern, length: int) -> str:
    return "sdpa" if pattern.name == "full" or length < FLEX_SHORTEST else "flex"


def _as_they_are(queries: Tensor, keys: Tensor, values: Tensor) -> Heads:
    return queries, keys, values


# On CUDA blocks are compiled, and what stands between two products is fused: plain operations, nothing hand-written
# that a compiler cannot look into. Elsewhere the forms that were made for CPUs run.
KERNELS: dict[str, Kernels] = {
    "cpu": Kernels(
        attention=_attention_on_cpu,
        attend=attend,
        tower_attention=without_fused_kernels,
        split_heads=plain.split_heads,
        join_heads=plain.join_heads,
        dropout=dropout,
        linear=linear,
        rotate=rotate,
        squared_relu=squared_relu,
        shift_slots=shift_slots,
        softmax_errors=softmax_errors,
        key_value_cache=DenseKeyValueCache,
        packed=pack_linears,
    ),
    "cuda": Kernels(
        attention=_attention_on_cuda,
        attend=fused.attend,
        tower_attention=nullcontext,
        split_heads=fused.split_heads,
        join_heads=_as_they_are,
        dropout=F.dropout,
        linear=F.linear,
        rotate=fused.rotate,
        squared_relu=plain.squared_relu,
        shift_slots=fused.shift_slots,
        softmax_errors=plain.softmax_errors,
        key_value_cache=DenseKeyValueCache,
        packed=leave_linears,
    ),
}
ELSEWHERE = Kernels(                                            # any other type of device
    attention=lambda pattern, length: "sdpa",
    attend=fused.attend,
    tower_attention=nullcontext,
    split_heads=plain.split_heads,
    join_heads=plain.join_heads,
    dropout=F.dropout,
    linear=F.linear,
    rotate=rotate,
    squared_relu=squared_relu,
    shift_slots=shift_slots,
    softmax_errors=plain.softmax_errors,
    key_value_cache=DenseKeyValueCache,
    packed=leave_linears,
)
PLAIN = Kernels(                                                # what they all compute
    attention=lambda pattern, length: "plain",
    attend=plain.attend,
    tower_attention=nullcontext,
    split_heads=plain.split_heads,
    join_heads=plain.join_heads,
    dropout=F.dropout,
    linear=F.linear,
    rotate=plain.rotate,
    squared_relu=plain.squared_relu,
    shift_slots=plain.shift_slots,
    softmax_errors=plain.softmax_errors,
    key_value_cache=plain.KeyValueCache,
    packed=leave_linears,
)


def kernels_for(device: torch.device) -> Kernels:
    """The column of a device's type."""
    return KERNELS.get(device.type, ELSEWHERE)


def choose_backend(backend: Backend, pattern: AttentionPattern, length: int, device: torch.device) -> str:
    """The entry of ``ATTENTION`` that is meant: ``auto`` stands for the device's own, by pattern and length.

    Raises ``ValueError`` for ``flex`` off CUDA: it has no backward there.
    """
    if backend == "flex" and device.type != "cuda":
        raise ValueError(f"attention_backend 'flex' needs a CUDA device, not {device.type}; use 'auto'")
    return kernels_for(device).attention(pattern, length) if backend == "auto" else backend
