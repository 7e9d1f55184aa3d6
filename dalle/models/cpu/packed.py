"""Weights packed once for many products with few rows, as decoding makes them."""

import copy
from collections.abc import Container

import torch
from torch import Tensor, nn

PACKED_BYTES = 2 << 30    # of weights that are copied: above this a step waits for memory, whatever their order


class PackedLinear(nn.Module):
    """An ``nn.Linear`` whose weight is also kept in oneDNN's own order for ``rows`` rows; for inference alone.

    Without it every call puts the weight in order anew, which for 16 rows takes as long as the product.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(inputs, self.packed, self.bias, "none", [], "")


def packs(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch and this processor have packed products of that type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if not (hasattr(torch.ops.mkldnn, "_reorder_linear_weight") and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_linears(model: nn.Module, rows: int, leave: Container[str] = ()) -> nn.Module:
    """A copy of ``model`` that shares its tensors and packs each linear layer but those that ``leave`` names.

    Subclasses, too, of which the product alone is left. It is ``model`` itself where that cannot be: see
    :func:`packs`, and ``PACKED_BYTES``.
    """
    linears = {name: module for name, module in model.named_modules()
               if isinstance(module, nn.Linear) and name not in leave}
    weights = [linear.weight.detach() for linear in linears.values()]
    plain = all(type(weight) is Tensor and packs(weight.device, weight.dtype) for weight in weights)   # not split
    if not plain or sum(weight.nbytes for weight in weights) > PACKED_BYTES:
        return model
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    for name, linear in linears.items():
        twin.set_submodule(name, PackedLinear(linear, rows))
    return twin


def leave_linears(model: nn.Module, rows: int, leave: Container[str] = ()) -> nn.Module:
    """``model``: the form of devices whose products take weights as they are."""
    return model
