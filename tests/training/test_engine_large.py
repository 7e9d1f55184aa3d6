"""What a model takes that is too large for one process: HSDP in four processes against one, first weights that are made
part by part against those of a plain build, and the bytes that a process has at once against the formula.

Run as a script it is one of the processes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import test_engine_fsdp as fsdp
import toys
import worker
from counting import LiveBytes
from launching import LAUNCH_SECONDS, ROOT, Job, free_port, largest_difference, result

from dalle.errors import UserError
from dalle.models.transformer import TextToImageTransformer, TransformerConfig
from dalle.tasks.transformer_memory import transformer_activations
from dalle.training.deferred import build_player, is_deferred, players_built
from dalle.training.engines.base import Engine
from dalle.training.engines.fsdp import blocks_apart, build_mesh
from dalle.training.engines.launching import create_engine
from dalle.training.loop import train_step
from dalle.training.memory import Layout, Setting, step_memory
from dalle.training.meter import Meter
from dalle.training.optimizers import OptimizerConfig
from dalle.training.task import Loss, Phase, Player, Task

TOLERANCE = 0.1       # a collective's thread may hold on to a block for a moment longer
WIDE = {"dim": 256, "depth": 5, "heads": 4, "text_length": 8, "grid": [4, 4]}        # mostly weights
LONG = {"dim": 64, "depth": 6, "heads": 2, "text_length": 32, "grid": [16, 16]}      # mostly activations
SHAPES = {"wide": WIDE, "long": LONG}
HSDP = {"micro_batch_size": 1, "engine": {"shard_size": 2}}
JOBS = [Job("hsdp", "fsdp2", "DeepTask", optimizer=fsdp.EMA, settings={**HSDP, "validate_every": 2}),
        Job("taken_up", "fsdp2", "DeepTask", "begun_by_one", fsdp.EMA, settings=HSDP)]
CASES = [        # name, shape, processes, settings of train, of the engine, changes to the model
    ("wide2", "wide", 2, {}, {}, {}),
    ("wide2_bf16", "wide", 2, {"precision": "bf16", "micro_batch_size": 2}, {}, {}),
    ("long2", "long", 2, {}, {}, {}),
    ("long2_some", "long", 2, {"precision": "bf16"}, {}, {"checkpointing": 4}),
    ("wide4", "wide", 4, {"precision": "bf16"}, {}, {"checkpointing": True}),
    ("wide2x2", "wide", 4, {}, {"shard_size": 2}, {}),
    ("long4", "long", 4, {"precision": "bf16"}, {}, {"checkpointing": True}),
    ("wide4_twice", "wide", 4, {"precision": "bf16", "micro_batch_size": 1}, {}, {"checkpointing": 2}),
]


class WriterTask(Task):
    """A transformer over streams that are a function of the batch's rows."""

    def __init__(self, config: TransformerConfig):
        self.config, self.frozen = config, {}
        self.players = {"net": Player(build_player(lambda: TextToImageTransformer(config)),
                                      OptimizerConfig(lr=1e-3, ema=0.9))}
        self.phases = [Phase("fit", "net", self.fit)]

    def prepare(self, batch, networks, step):
        ids = (batch["x"][:, :1].abs() * 1000).long() + torch.arange(self.config.length)
        text, codes = ids.split([self.config.text_length, self.config.num_image_slots], dim=1)
        return {"text": text % (self.config.num_text_tokens - 1) + 1, "codes": codes % self.config.num_codes}

    def fit(self, networks, batch, step):
        text, image = networks["net"](batch["text"], batch["codes"], batch["text"])
        return Loss(text / batch["text"].numel() + image / batch["codes"].numel())


def measure(case: list, out: Path) -> dict:
    """Peak and formula of the second step, when optimiser state is there."""
    name, shape, _, train, engine_settings, changes = case
    config = toys.toy_run(out / name, engine=engine_settings, log_every=1, **train)
    model = TransformerConfig(**SHAPES[shape], num_text_tokens=40, num_codes=32, attention_backend="sdpa", **changes)
    engine = create_engine(config)
    torch.manual_seed(3)
    with players_built("deferred"):
        task = WriterTask(model)
    deferred = is_deferred(task.players["net"].module)
    engine.prepare(task, out)
    member = engine.members["net"]
    torch.manual_seed(3)
    plain = TextToImageTransformer(model)
    equal = all(torch.equal(engine.whole(own), other)
                for own, other in zip(member.module.parameters(), plain.parameters(), strict=True))
    del plain
    batches = [next(iter(toys.ToyLoader(step, engine.rank, engine.world_size))) for step in (0, 1)]
    train_step(engine, task, batches[0], 0, config, Meter())
    state = [value for entry in member.optimizer.state.values() for value in entry.values()]
    counter = LiveBytes([*member.wrapper.rows.values(), *state, *member.ema.state_dict().values()])
    with counter:
        train_step(engine, task, batches[1], 1, config, Meter())
    samples, bf16 = engine.local_batch // engine.accumulation, engine.bf16
    with players_built("shapes"):
        blocks = blocks_apart(build_player(lambda: TextToImageTransformer(model)), bf16)
    layout = Layout("fsdp2", engine.world_size, config.engine.shard_size or engine.world_size)
    parts = step_memory(blocks, layout, Setting(bf16, True, engine.accumulation > 1),
                        transformer_activations(model, samples, bf16))
    return {"peak": counter.peak, "parts": parts, "formula": sum(parts.values()), "deferred": deferred,
            "equal": equal}


def main() -> None:
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    for case in CASES:
        if case[2] == int(os.environ["WORLD_SIZE"]):
            (out / f"{case[0]}.rank{os.environ['RANK']}.json").write_text(json.dumps(measure(case, out)))
    toys.DeepTask = fsdp.DeepTask
    sys.argv[1] = str(out / "jobs.json")
    worker.main()


def launch_here(out: Path, processes: int, jobs: list[Job]) -> None:
    (out / "jobs.json").write_text(json.dumps([{**vars(job), "out": str(out / (job.folder or job.name))}
                                               for job in jobs]))
    command = [sys.executable, "-m", "accelerate.commands.launch",
               "--config_file", str(ROOT / "launch/engines/fsdp2.yaml"), "--num_processes", str(processes),
               "--main_process_port", str(free_port()), __file__, str(out)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=out, capture_output=True, text=True, timeout=LAUNCH_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("large")
    fsdp.alone(out / "alone")
    fsdp.alone(out / "begun_by_one", stop_after=2)
    launch_here(out, 4, JOBS)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    launch_here(out, 2, [])
    return out


@pytest.mark.parametrize("folder", ["hsdp", "begun_by_one"])
@pytest.mark.parametrize("section", fsdp.SECTIONS)
def test_two_copies_on_two_ranks_each_equal_one_process(out, folder, section):
    assert largest_difference(fsdp.state(out, folder, section), fsdp.state(out, "alone", section)) < fsdp.EXACT


def test_all_four_ranks_of_the_two_copies_agree(out):
    ends = [result(out, "hsdp", rank=rank) for rank in range(4)]
    assert {end["world_size"] for end in ends} == {4}
    assert len({(end["loss"], end["validation/error"]) for end in ends}) == 1


def found(out: Path, case: list) -> list[dict]:
    return [json.loads((out / f"{case[0]}.rank{rank}.json").read_text()) for rank in range(case[2])]


def check(out: Path, case: list) -> None:
    """Of every process: the bytes follow the formula, and the weights made part by part are those of a plain build."""
    for one in found(out, case):
        assert one["peak"] == pytest.approx(one["formula"], rel=TOLERANCE), one["parts"]
        assert one["deferred"] and one["equal"]


@pytest.mark.parametrize("case", [case for case in CASES if case[2] == 4], ids=lambda case: case[0])
def test_bytes_and_first_weights_of_four_processes(out, case):
    check(out, case)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case[2] == 2], ids=lambda case: case[0])
def test_bytes_and_first_weights_of_two_processes(two, case):
    check(two, case)


def test_groups_that_cannot_be_equal_are_refused():
    with pytest.raises(UserError, match="shard_size 3 does not divide the 4"):
        build_mesh("cpu", 4, 3)


def test_sharing_copies_is_refused_where_the_engine_cannot(tmp_path):
    engine = Engine(toys.toy_run(tmp_path, engine={"shard_size": 2}), torch.device("cpu"), 0, 2)
    with pytest.raises(UserError, match="shard_size is for FSDP2"):
        engine.check(toys.SingleTask())


if __name__ == "__main__":
    main()
