"""fp8 through torchao's emulation: which layers, how far from bf16, and that weights and checkpoints stay what they
were. Skipped where torchao is not installed, but for what is refused."""

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

import toys
from launching import LAUNCH_SECONDS, ROOT, largest_difference, mean_difference, weights

from dalle.errors import UserError
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.training import compiling, float8
from dalle.training.engines.launching import create_engine
from dalle.training.float8 import check_float8, compute_in_float8
from dalle.training.loop import Trainer
from dalle.training.task import Player

needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
CONFIG = TransformerConfig(dim=32, depth=4, heads=2, text_length=4, grid=(4, 4), num_text_tokens=16, num_codes=16,
                           conv_kernel=3)
BATCH = torch.arange(8).reshape(2, 4) % 16, torch.arange(32).reshape(2, 16) % 16       # 40 rows: not a multiple of 16


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(float8, "EMULATE", True)
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    torch._dynamo.reset()


class Wide(nn.Module):
    """Four blocks of 16 features, for the toys' batches."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(6, 16), nn.Linear(16, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
                                    for _ in range(4))

    def forward(self, inputs):
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


class WideTask(toys.SingleTask):
    def __init__(self):
        super().__init__()
        self.players = {"net": Player(toys.seeded(Wide), self.players["net"].optimizer)}


def train(folder: Path, *, stop_after: int | None = None, **settings) -> None:
    config = toys.toy_run(folder, batch_size=32, **settings)
    engine = create_engine(config)
    if engine.world_size > 1:
        engine.close = engine.barrier        # the next run uses the same process group
    Trainer(WideTask(), config, engine, lambda start: Rows32(start, engine.rank, engine.world_size),
            stop_after=stop_after).run()


class Rows32(toys.ToyLoader):
    def __iter__(self):
        for step in range(self.start, self.steps):
            rows = toys.global_batch(step, 32)[self.rank::self.world_size]
            yield {"x": rows, "key": [str(index) for index in range(len(rows))]}


def transformer() -> TextToImageTransformer:
    return toys.seeded(lambda: TextToImageTransformer(CONFIG))


def test_where_it_cannot_run_it_is_refused(tmp_path):
    words = "compute capability 8.9" if importlib.util.find_spec("torchao") else "pip install 'tessera-t2i"
    with pytest.raises(UserError, match=words):
        train(tmp_path, precision="fp8")


def test_without_torchao_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"pip install 'tessera-t2i\[fp8\]'"):
        check_float8(torch.device("cuda"))


@needs_torchao
@pytest.mark.parametrize(("capability", "allowed"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_it_needs_a_device_that_has_fp8(monkeypatch, capability, allowed):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if allowed:
        check_float8(torch.device("cuda"))
    else:
        with pytest.raises(UserError, match="capability 8.0"):
            check_float8(torch.device("cuda"))


@needs_torchao
def test_the_matrices_of_the_blocks_are_converted_and_nothing_else(emulated):
    net = transformer()
    before = {name: (parameter.data_ptr(), parameter.shape) for name, parameter in net.named_parameters()}
    assert compute_in_float8(net) == 4 * 4           # qkv, out, up, down of each block
    assert {name: (parameter.data_ptr(), parameter.shape) for name, parameter in net.named_parameters()} == before
    converted = [name for name, part in net.named_modules() if type(part).__name__ == "TrainedInFloat8"]
    assert len(converted) == 16 and all(name.startswith("blocks.") for name in converted)


@needs_torchao
def test_sizes_that_do_not_fit_and_networks_without_blocks_stay_or_are_refused(emulated):
    odd = nn.ModuleList(nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 16)) for _ in range(4))
    for net in (odd, toys.Block()):
        with pytest.raises(UserError, match="multiples of 16"):
            compute_in_float8(net)


@needs_torchao
def test_rows_that_do_not_fit_are_refused_by_their_number(emulated):
    net = transformer()
    compute_in_float8(net)
    with pytest.raises(UserError, match="has 40: set train.micro_batch_size"):
        net(*BATCH)


@needs_torchao
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_near_those_of_bf16_and_not_the_same(emulated, compiled):
    rounded, plain = toys.seeded(Wide), toys.seeded(Wide)
    compute_in_float8(rounded)
    if compiled:
        assert compiling.compile_network(rounded) == "4 blocks"
    for net in (rounded, plain):
        with torch.autocast("cpu", torch.bfloat16):
            net(toys.global_batch(0, 16)).float().square().mean().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in rounded.parameters())
    found, expected = (torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
                       for net in (rounded, plain))
    assert 0 < (found - expected).norm() < 0.15 * expected.norm()      # e5m2 rounds gradients by up to an eighth


@needs_torchao
def test_without_a_gradient_it_computes_as_the_exported_model_will(emulated):
    net, plain = transformer(), transformer()
    compute_in_float8(net)
    with torch.no_grad():
        for one, other in zip(net(*BATCH), plain(*BATCH), strict=True):
            assert torch.equal(one, other)


@needs_torchao
def test_a_run_goes_on_from_one_precision_to_another_and_exports_the_same_names(emulated, tmp_path):
    train(tmp_path / "bf16", precision="bf16")
    train(tmp_path / "fp8", precision="fp8", compile=True)
    train(tmp_path / "both", precision="fp8", stop_after=2)
    train(tmp_path / "both", precision="bf16")
    train(tmp_path / "back", precision="bf16", stop_after=2)
    train(tmp_path / "back", precision="fp8")
    expected = weights(tmp_path, "bf16")
    for folder in ("fp8", "both", "back"):
        assert 0 < mean_difference(weights(tmp_path, folder), expected) < 5e-3


@needs_torchao
def test_it_resumes_bit_for_bit(emulated, tmp_path):
    train(tmp_path / "straight", precision="fp8")
    train(tmp_path / "halves", precision="fp8", stop_after=2)
    train(tmp_path / "halves", precision="fp8")
    assert largest_difference(weights(tmp_path, "halves"), weights(tmp_path, "straight")) == 0


@needs_torchao
def test_two_processes_are_near_one_under_ddp_and_fsdp(emulated, tmp_path):
    """Not equal: each rank scales by the largest of its own activations."""
    train(tmp_path / "one", precision="fp8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__,
               str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True,
                          timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    one = weights(tmp_path, "one")
    for kind in ("ddp", "fsdp2"):
        assert 0 < mean_difference(weights(tmp_path, kind), one) < 5e-3


if __name__ == "__main__":
    torch.set_num_threads(1)
    float8.EMULATE, compiling.BACKEND = True, "aot_eager"
    for kind in ("ddp", "fsdp2"):
        os.environ["ACCELERATE_USE_FSDP"] = str(kind == "fsdp2").lower()
        train(Path(sys.argv[1]) / kind, precision="fp8", compile=True)
    (Path(sys.argv[1]) / f"done{os.environ['RANK']}").touch()
    while not (Path(sys.argv[1]) / "done0").exists():      # who leaves while another is in a collective ends that, too
        time.sleep(0.05)
    sys.stderr.flush()
    os._exit(0)
