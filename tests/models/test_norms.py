"""The norms: what they compute, and that autocast leaves them their type on every device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dalle.models.norms import make_norm

each_norm = pytest.mark.parametrize("name", ["layernorm", "rmsnorm"])
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def by_formula(inputs: torch.Tensor, gain: torch.Tensor, name: str) -> torch.Tensor:
    if name == "layernorm":
        inputs = inputs - inputs.mean(dim=-1, keepdim=True)
    return inputs / (inputs.square().mean(dim=-1, keepdim=True) + (1e-5 if name == "layernorm" else 1e-6)).sqrt() * gain


@each_norm
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_norm_reads_and_writes_one_type_and_computes_in_a_wider(name, device, dtype):
    torch.manual_seed(0)
    norm = make_norm(name, 64, bias=False).to(device)
    norm.weight.data.copy_(torch.linspace(0.5, 2, 64).bfloat16())
    inputs = (torch.randn(3, 64, device=device) * 5 + 2).to(dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        outputs = norm(inputs)
    assert outputs.dtype == dtype
    exact = by_formula(inputs.detach().double(), norm.weight.detach().double(), name)
    torch.testing.assert_close(outputs.detach().double(), exact, atol=1e-5, rtol=2**-8 if dtype == torch.bfloat16
                               else 1e-5)
    outputs.sum().backward()
    assert (inputs.grad.dtype, norm.weight.grad.dtype) == (dtype, torch.float32)


@each_norm
def test_cudas_autocast_leaves_a_norm_its_type(name):
    """By the types alone, without a GPU; torch's own norm shows what it would do."""
    was = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), torch.device("cuda"):
        norm, inputs = make_norm(name, 8, bias=True), torch.empty(2, 8, dtype=torch.bfloat16)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert norm(inputs).dtype == torch.bfloat16
            assert torch.nn.functional.layer_norm(inputs, (8,)).dtype == torch.float32
        finally:
            torch.set_autocast_enabled("cuda", was[0])
            torch.set_autocast_dtype("cuda", was[1])
