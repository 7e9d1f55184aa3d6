"""``train.deterministic``: the same bits at every run on the same machine, or an error that says what cannot be."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dalle.errors import UserError
from dalle.words import one_line

# read by cuBLAS when its first product is made, with the values for which it documents the same result at every call,
# and by inductor when it is imported: what a thread of the backward compiles reads nothing else
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TORCHINDUCTOR_DETERMINISTIC": "1"}


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Meanwhile, where ``wanted``, torch takes only algorithms that add up in a fixed order, and inductor chooses
    kernels by rules, not by how fast they were on the day. An operation that has no such algorithm is a
    :class:`UserError` that names it. To be entered before the first matrix product on a GPU."""
    if not wanted:
        yield
        return
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import torch._inductor.config as inductor

    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
              torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    try:
        with inductor.patch(deterministic=True):
            yield
    except RuntimeError as error:
        if "deterministic implementation" in str(error):
            raise UserError(f"train.deterministic: {one_line(error).split(', but you set')[0]}; set it to false, or "
                            "use a model without that operation") from error
        raise
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before[2:]
