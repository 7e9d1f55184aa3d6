"""What is compiled, how often, and that it computes what the network says; the backend counts, and compiles nothing."""

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.training import compiling
from dalle.training.compiling import blocks_of, compile_network, pays, repeated_blocks, uncompiled


class Block(nn.Module):
    def __init__(self, dim: int = 4):
        super().__init__()
        self.linear, self.dropout = nn.Linear(dim, dim), nn.Dropout(0.5)

    def forward(self, inputs, scale):
        return inputs + scale * self.dropout(torch.tanh(self.linear(inputs)))


class Stack(nn.Module):
    """Six blocks between what is not compiled and what it names."""

    def __init__(self, count: int = 6):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(4, 1)

    def forward(self, inputs, recompute: bool = False):
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = checkpoint(block, hidden, 0.5, use_reentrant=False) if recompute else block(hidden, 0.5)
        return self.loss(hidden)

    def loss(self, hidden):
        return self.head(hidden).square().mean()


class Naming(Stack):
    def compiled_parts(self):
        return [self.loss]


@pytest.fixture
def counter(monkeypatch):
    """A backend that counts the graphs it is given, in a process that has compiled nothing yet."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compiling, "BACKEND", counter)
    yield counter
    torch._dynamo.reset()


def seeded(build, **options):
    torch.manual_seed(3)
    return build(**options)


def gradients(net, *arguments, **options):
    """Loss and gradients of one call, from the same random numbers."""
    net.zero_grad()
    torch.manual_seed(5)
    loss = net(*arguments, **options)
    loss.backward()
    return [loss, *(parameter.grad for parameter in net.parameters())]


def assert_same(left, right):
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other)


@contextmanager
def frozen(net):
    net.requires_grad_(False)
    yield
    net.requires_grad_(True)


INPUTS = torch.linspace(-1, 1, 12).reshape(3, 4)


def test_all_blocks_share_one_graph_and_compute_what_they_did(counter):
    plain, net = seeded(Stack), seeded(Stack)
    assert compile_network(net) == "6 blocks"
    for _ in range(3):
        assert_same(gradients(net, INPUTS), gradients(plain, INPUTS))
    assert counter.frame_count == 1


def test_a_player_learns_in_its_own_phases_alone_whichever_comes_first(counter):
    net, inputs = seeded(Stack), INPUTS.clone().requires_grad_()
    compile_network(net)
    for _ in range(2):
        with frozen(net):
            net(inputs).backward()
        assert inputs.grad is not None and all(parameter.grad is None for parameter in net.parameters())
        assert all(gradient is not None for gradient in gradients(net, inputs))
        net.zero_grad(set_to_none=True)
    assert counter.frame_count == 2


def test_what_a_module_names_is_compiled_with_its_blocks(counter):
    plain, net = seeded(Naming), seeded(Naming)
    assert compile_network(net) == "6 blocks and 1 more parts"
    assert_same(gradients(net, INPUTS), gradients(plain, INPUTS))
    assert counter.frame_count == 2


def test_a_network_without_repeated_blocks_is_compiled_whole(counter):
    plain, net = seeded(Stack, count=3), seeded(Stack, count=3)
    assert compile_network(net) == "the whole network"
    assert_same(gradients(net, INPUTS), gradients(plain, INPUTS))
    assert counter.frame_count == 1


def test_checkpointed_blocks_draw_the_same_dropout_again(counter):
    plain, net = seeded(Stack), seeded(Stack)
    compile_network(net)
    assert_same(gradients(net, INPUTS, recompute=True), gradients(plain, INPUTS))
    assert counter.frame_count == 1


def test_without_a_gradient_nothing_is_compiled(counter):
    net = seeded(Stack).eval()
    compile_network(net)
    with torch.no_grad():
        torch.testing.assert_close(net(INPUTS), seeded(Stack).eval()(INPUTS))
    assert counter.frame_count == 0


def test_uncompiled_it_has_a_second_derivative(counter):
    net, inputs = seeded(Stack, count=2).eval(), INPUTS.clone().requires_grad_()
    compile_network(net)
    with uncompiled():
        slope, = torch.autograd.grad(net(inputs), inputs, create_graph=True)
    slope.square().sum().backward()
    assert net.first.weight.grad.abs().sum() > 0 and counter.frame_count == 0


def test_training_and_evaluation_have_their_own_dropout(counter):
    net = seeded(Stack)
    compile_network(net)
    drawn = {net(INPUTS).item() for _ in range(4)}
    net.eval()
    assert len(drawn) == 4 and len({net(INPUTS).item() for _ in range(4)}) == 1


def test_copies_are_themselves_and_names_stay(counter):
    net = seeded(Stack)
    before = list(net.state_dict())
    compile_network(net)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert gradients(twin, INPUTS)[0] == 0 and gradients(net, INPUTS)[0] > 0
    loaded = pickle.loads(pickle.dumps(net))
    assert list(net.state_dict()) == list(twin.state_dict()) == list(loaded.state_dict()) == before
    assert loaded.blocks[0].forward.__self__ is loaded.blocks[0]
    assert_same(gradients(loaded, INPUTS), gradients(net, INPUTS))


def transformer(**options) -> TextToImageTransformer:
    config = TransformerConfig(dim=16, depth=24, heads=2, text_length=4, grid=(4, 4), num_text_tokens=16, num_codes=8,
                               conv_kernel=3, **options)
    return seeded(lambda: TextToImageTransformer(config))


def losses(net, batch):
    text, codes = net(*batch)
    return text.square().mean() + codes.square().mean()


@pytest.mark.parametrize("options", [{}, {"norm": "rmsnorm", "mlp": "swiglu", "positions": "rotary", "qk_norm": True}])
def test_24_blocks_of_three_patterns_are_compiled_a_few_times_and_never_again(counter, options):
    net, plain = transformer(**options), transformer(**options)
    assert compile_network(net).startswith("24 blocks")
    batch = torch.randint(0, 16, (2, 4)), torch.randint(0, 8, (2, 16))
    found = []
    for _ in range(2):
        loss = losses(net, batch)
        loss.backward()
        found.append(counter.frame_count)
    losses(plain, batch).backward()
    losses(plain, batch).backward()
    assert found[0] == found[1] <= 6
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_blocks_are_alike_in_class_and_shapes():
    lists = nn.ModuleList([*(Block() for _ in range(4)), *(Block(5) for _ in range(3)), nn.Tanh()])
    assert repeated_blocks(lists) == list(lists[:4]) and len(blocks_of(lists)) == 7


@pytest.mark.parametrize(("dim", "device", "steps", "expected"), [
    (2300, "cuda", 2000, True), (2300, "cuda", 1999, False), (2200, "cuda", 2000, False), (2300, "cpu", 2000, False)])
def test_left_open_large_networks_of_long_runs_are_compiled(dim, device, steps, expected):
    with torch.device("meta"):
        net = nn.Sequential(nn.ModuleList(Block(dim) for _ in range(4)))
    assert pays(net, torch.device(device), steps) is expected
