"""The column for CUDA and compiled blocks, on the CPU: what they compute, and how often a block is compiled.

FlexAttention runs here as torch's own reference inside the compiled graph. It has a backward for processors that it
refuses to use; the refusal is taken out.
"""

import dataclasses

import pytest
import torch
from small_transformers import make_batch, make_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention

from dalle.models import fused, kernels
from dalle.models.attention import turn_grid
from dalle.models.transformer import MODERN, TextToImageTransformer


@pytest.fixture
def cuda_column(monkeypatch):
    """The forms of CUDA for tensors on the CPU, FlexAttention from the first slot on."""
    column = dataclasses.replace(kernels.KERNELS["cuda"],
                                 attention=lambda pattern, length: "sdpa" if pattern.name == "full" else "flex")
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setitem(kernels.KERNELS, "cpu", column)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compile_parts(model: TextToImageTransformer, backend) -> None:
    for part in (*model.blocks, *model.compiled_parts()):
        part.compile(backend=backend, fullgraph=True)       # fullgraph: a break in a graph is an error


def loss_and_gradients(model: TextToImageTransformer) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    text, codes = make_batch(model)
    text_sum, image_sum = model(text, codes, model.text_targets(text))
    loss = text_sum / 8 + image_sum
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


FOUR = {"attention": ("row", "column", "conv", "full")}


@pytest.mark.parametrize("pieces", [FOUR, {**FOUR, **MODERN, "token_shift": True, "conv_mode": "torus"}],
                         ids=["first", "modern"])
def test_compiled_blocks_of_the_cuda_column_are_the_plain_model(cuda_column, monkeypatch, pieces):
    """Equal loss and gradients; one compiled graph for all blocks of a pattern."""
    model = make_model(**pieces)
    with monkeypatch.context() as plainly:
        plainly.setitem(kernels.KERNELS, "cpu", kernels.PLAIN)
        expected = loss_and_gradients(model)
    counter = CompileCounterWithBackend("aot_eager")
    compile_parts(model, counter)
    torch.testing.assert_close(loss_and_gradients(model), expected, atol=2e-4, rtol=2e-4)
    assert counter.frame_count == 4 + 2
    loss_and_gradients(model)
    assert counter.frame_count == 4 + 2, "nothing is compiled again"


@pytest.mark.parametrize("pieces", [
    {"sandwich_norm": True, "dropout": 0.1, "mlp": "geglu", "head_dim": 12},
    {"checkpointing": True, "positions": "rotary", "mlp": "relu2", "qk_norm": True, "token_shift": True}],
    ids=["sandwich", "checkpointed"])
def test_no_piece_of_a_block_breaks_its_graph(cuda_column, pieces):
    """Under autocast; twelve layers of three patterns compile their block three times."""
    model = make_model(depth=12, **pieces).train()
    counter = CompileCounterWithBackend("eager")
    compile_parts(model, counter)
    with torch.autocast("cpu", torch.bfloat16):
        loss, *gradients = loss_and_gradients(model)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert counter.frame_count == 3 + 2


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_blocks_that_nobody_compiled_compile_their_attention(cuda_column, monkeypatch):
    """Each mask function by itself, so that patterns do not use up one another's share of compiled forms."""
    compiled, compile_really = [], torch.compile

    def note(function, **named):        # torch's own calls, which name a backend, go through
        return compile_really(function, **named) if named else compiled.append(function.__code__) or function

    monkeypatch.setattr(torch, "compile", note)
    fused._compiled_flex.cache_clear()
    found = loss_and_gradients(model := make_model(attention=("row", "column", "conv"), depth=6))
    fused._compiled_flex.cache_clear()
    assert len({id(code) for code in compiled}) == len(compiled) == 3
    monkeypatch.setitem(kernels.KERNELS, "cpu", kernels.PLAIN)
    torch.testing.assert_close(found, loss_and_gradients(model), atol=2e-4, rtol=2e-4)


def test_the_grid_of_a_stream_is_turned_and_turned_back():
    stream = torch.arange(2 + 3 * 4 - 1.0)[None, :, None]
    turned = turn_grid(stream, 2, 3, 4)
    assert turned.flatten().tolist() == [0, 1, 2, 6, 10, 3, 7, 11, 4, 8, 12, 5, 9]
    assert torch.equal(turn_grid(turned, 2, 4, 3), stream)
