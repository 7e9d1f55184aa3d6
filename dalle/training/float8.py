"""fp8 training of the block matrices, through torchao (an optional extra: ``pip install 'tessera-t2i[fp8]'``).

Of each product of a converted layer (output, input's gradient, weight's gradient) both sides are rounded to fp8, scaled
by the largest value of the whole tensor at that moment (arXiv 2209.05433; torchao's "tensorwise" recipe, its fastest),
and summed up in fp32. The weight itself stays an fp32 parameter under its own name: optimiser, averages, checkpoints
and exports are those of any other run, and a run may go on from one precision to another.

Converted are the linear layers of a network's blocks whose two sizes are multiples of 16, as the products
of the hardware need it. Heads, embeddings, norms and attention's own products compute in bf16. What records no gradient
(validation, sampling) computes in bf16, too, as the exported model will.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dalle.errors import UserError
from dalle.training.compiling import repeated_blocks

MULTIPLE = 16                    # of both sizes of a matrix, and of the rows that it is multiplied with
LEAST_CAPABILITY = (8, 9)        # Ada, Hopper and later
EMULATE = False                  # the same roundings in ordinary products, for tests on other devices


def check_float8(device: torch.device) -> None:
    """Raise :class:`UserError` where ``device`` has no fp8 products, or torchao is not installed."""
    try:
        import torchao.float8  # noqa: F401
    except ImportError:
        raise UserError("train.precision=fp8 needs torchao: pip install 'tessera-t2i[fp8]', or set "
                        "train.precision=bf16") from None
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if capability < LEAST_CAPABILITY and not EMULATE:
        found = f"one of capability {capability[0]}.{capability[1]}" if device.type == "cuda" else f"a {device.type}"
        raise UserError(f"train.precision=fp8 needs a GPU of compute capability 8.9 or more (Ada, Hopper), and this is "
                        f"{found}: set train.precision=bf16")


def compute_in_float8(module: nn.Module) -> int:
    """Have the matrices of the blocks of ``module`` multiplied in fp8, in place; how many there are.

    Raises :class:`UserError` where there are none.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    chosen = {id(part) for block in repeated_blocks(module) for part in block.modules() if fits(part)}
    if not chosen:
        raise UserError(f"train.precision=fp8 is for networks with blocks, and {type(module).__name__} has no block "
                        f"with a linear layer whose sizes are multiples of {MULTIPLE}: set train.precision=bf16")
    convert_to_float8_training(module, module_filter_fn=lambda part, name: id(part) in chosen,
                               config=Float8LinearConfig(emulate=EMULATE))
    for part in module.modules():
        if type(part) is _float8_linear().__base__:
            part.__class__ = _float8_linear()
    return len(chosen)


def fits(part: nn.Module) -> bool:
    """Whether it is a linear layer of sizes that fp8 can take (that of ``nn.MultiheadAttention`` is never called)."""
    return (isinstance(part, nn.Linear) and not isinstance(part, nn.modules.linear.NonDynamicallyQuantizableLinear)
            and part.in_features % MULTIPLE == 0 and part.out_features % MULTIPLE == 0)


@cache
def _float8_linear() -> type[nn.Linear]:
    from torchao.float8.float8_linear import Float8Linear

    class TrainedInFloat8(Float8Linear):
        """torchao's layer where a gradient is recorded, and a plain one elsewhere."""

        def forward(self, inputs: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return F.linear(inputs, self.weight, self.bias)
            rows = inputs.numel() // inputs.shape[-1]
            if rows % MULTIPLE:      # the inner size of the weight's gradient
                raise UserError(f"train.precision=fp8 multiplies matrices of a multiple of {MULTIPLE} rows, and a "
                                f"micro-batch has {rows}: set train.micro_batch_size to another number")
            return super().forward(as_autocast(inputs))

    return TrainedInFloat8


def as_autocast(inputs: Tensor) -> Tensor:
    """``inputs`` in autocast's type; torchao's layer asks for that of CUDA, on whatever device."""
    device = inputs.device.type
    return inputs.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else inputs
