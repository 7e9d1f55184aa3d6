"""What every system of ``SYSTEMS`` promises, found by the table: a new system is tested here without a line of its own.

Each is trained from its own small config, on tiny data at half its side, over the prerequisites that the config names.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
import yaml
from published import published
from safetensors.torch import load_file
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from fake_gpu import step_without_waiting
from tapes import PLAIN_STEPS, assert_replay_trains_alike

import gans
from dalle.config import load_config, resume_rule
from dalle.data.loader import train_batches
from dalle.store import load_generator
from dalle.tasks import RUNS, TASKS
from dalle.training.checkpoint import read_state
from dalle.training.companions import records_of
from dalle.training.engines.base import Engine
from dalle.training.engines.launching import create_engine
from dalle.training.optimizers import OptimizerConfig, build_optimizer
from dalle.training.task import Task
from gans import NETWORKS, SYSTEMS
from gans.task import StabiliserConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "gans"
SIZE, BATCH, STEPS = 32, 8, 4
RECORDED = [name for name in SYSTEMS if name != "damsm"]       # it packs captions by their lengths
DOI = r"10\.\d{4,}/[\w./-]+\w"                                  # of a paper that is not on arXiv
ARXIV_ID_OR_DOI = rf"\d{{4}}\.\d{{5}}|{DOI}"
ZERO = {name: published(name).zero for name in SYSTEMS if published(name).zero}     # -> stage
PAINTING = [name for name, system in SYSTEMS.items() if system.paints]
# Small steps, and none whole for what is rounding in a vanishing gradient: else two processes are soon two trainings.
GENTLY = {"lr": 5e-6, "eps": 1e-3}
LOSS_TOLERANCE = 1e-4      # relative, of two processes against one
NORM_TOLERANCE = 2e-2      # of the gradients' norms, which jump where an activation is zero but for rounding

gans.register()


def needs(name: str) -> list[str]:
    """The systems whose runs its small config reads."""
    return [Path(path).name.removesuffix("_shapes.yaml") for path in small_config(name)["prerequisites"]]


def in_order() -> list[str]:
    """The systems, each behind those that it needs."""
    ordered: list[str] = []

    def add(name: str) -> None:
        for other in needs(name):
            add(other)
        if name not in ordered:
            ordered.append(name)

    for name in SYSTEMS:
        add(name)
    return ordered


def small_config(name: str) -> dict:
    tree = yaml.safe_load((CONFIGS / f"{name}_shapes.yaml").read_text())
    tree.setdefault("prerequisites", [])
    return tree


@dataclass
class Zoo:
    """Every system trained for a few steps, by the command that a person types, once a test asks for it."""

    folder: Path
    data: Path
    train: object
    trained: set[str] = field(default_factory=set)

    def config(self, name: str, output: Path | None = None) -> Path:
        """The small config made tiny, the runs that it reads below ``folder``; what it trains goes below ``output``."""
        for other in needs(name):
            self.run(other)
        tree = moved(small_config(name), self.folder)
        tree["output"] = str(output or self.folder)
        data = tree["data"]
        data |= {"train": str(self.data / "train"), "validation": str(self.data / "validation"), "image_size": SIZE,
                 "workers": 0}
        if "tokenizer" in data:
            data["tokenizer"] = str(self.data / "tokenizer")
        tree["train"] = {"steps": STEPS, "batch_size": BATCH, "precision": "fp32", "log_every": 1,
                         "preview_every": STEPS, "save_every": 2, "validate_every": 0}
        tree.pop("evaluation", None)
        tree["prerequisites"] = []
        fields = RUNS[tree["task"]].model_fields
        if "sync_batch_norm" in fields:
            tree["sync_batch_norm"] = True
        for key, info in fields.items():
            if isinstance(info.annotation, type) and issubclass(info.annotation, OptimizerConfig):
                tree[key] = {**tree.get(key, {}), **GENTLY}
        path = Path(tree["output"]) / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path

    def run(self, name: str, output: Path | None = None) -> Path:
        """Its run, trained unless it is to be one below ``output``."""
        if output is None and name not in self.trained:
            assert self.train(self.config(name)) == 0
            self.trained.add(name)
        return (output or self.folder) / "gans" / f"{name}_shapes"


def moved(tree: object, folder: Path) -> object:
    """Paths of runs/ put below ``folder``."""
    if isinstance(tree, dict):
        return {key: moved(value, folder) for key, value in tree.items()}
    if isinstance(tree, str) and tree.startswith("runs/"):
        return str(folder / tree.removeprefix("runs/"))
    return tree


@pytest.fixture(scope="module")
def zoo(workshop, commands, tmp_path_factory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"), workshop.folder / "data", commands["train"])


def players(run: Path) -> dict[str, torch.Tensor]:
    """All that the newest checkpoint keeps of the players."""
    newest = max((run / "checkpoints").glob("step_*"))
    return {f"{path.relative_to(newest)}/{name}": tensor for path in sorted(newest.rglob("*.safetensors"))
            for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_system_says_where_it_comes_from_and_has_what_users_look_for(name):
    system = SYSTEMS[name]
    assert re.fullmatch(ARXIV_ID_OR_DOI, system.paper)
    assert (CONFIGS / f"{name}.yaml").is_file() and (CONFIGS / f"{name}_shapes.yaml").is_file()
    assert (ROOT / "tests" / "gans" / f"test_{system.module.removeprefix('gans.')}.py").is_file()
    readme = (ROOT / "gans" / "README.md").read_text()
    assert re.search(rf"^\|.*`{name}`.*{re.escape(system.paper)}", readme, re.MULTILINE), "no row in gans/README.md"
    load_config(CONFIGS / f"{name}.yaml", [], RUNS)
    assert load_config(CONFIGS / f"{name}_shapes.yaml", [], RUNS).name == f"gans/{name}_shapes"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_valid_and_says_what_to_expect(path):
    config = load_config(path, [], RUNS)
    for prerequisite in config.prerequisites:
        assert (ROOT / prerequisite).is_file()
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(f"launch/train.py configs/gans/{path.name}" in line for line in head)
    assert any("arXiv" in line or re.search(rf"\bdoi {DOI}", line) for line in head)
    assert any("Hardware" in line for line in head)


PRODUCTS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)


@pytest.mark.parametrize("name", SYSTEMS)
def test_only_the_weights_of_products_decay(zoo, name, tmp_path):
    for player in TASKS[name](load_config(zoo.config(name, tmp_path), [], RUNS)).players.values():
        products = {id(weight) for part in player.module.modules() if isinstance(part, PRODUCTS)
                    for weight in part.parameters() if weight.ndim > 1 and weight.requires_grad}
        optimizer = build_optimizer(player.module, player.optimizer.model_copy(update={"weight_decay": 0.1}))
        assert {id(weight) for group in optimizer.param_groups if group["weight_decay"]
                for weight in group["params"]} == products


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_companion_is_known_and_named_by_a_setting_whose_path_may_change(zoo, name):
    config = load_config(zoo.config(name), [], RUNS)
    torch.manual_seed(config.seed)
    task = TASKS[name](config)
    known = task.companions()
    assert task.frozen.keys() <= known.keys()
    assert {resume_rule(RUNS[name], companion.setting) for companion in known.values()} <= {"free"}
    read = {field for field, value in config if isinstance(value, str) and (Path(value) / "checkpoints").is_dir()}
    assert read <= {companion.setting for companion in known.values()}
    assert read_state(max((zoo.run(name) / "checkpoints").glob("step_*")))["companions"] == records_of(task)


def prepared_by(zoo: Zoo, name: str, folder: Path) -> tuple[Engine, Task, dict]:
    """An engine, a fresh task of the system in it, and a batch with what its phases make ahead."""
    config = load_config(zoo.config(name, folder), [], RUNS)
    engine = create_engine(config)
    torch.manual_seed(0)
    task = TASKS[name](config)
    engine.prepare(task, folder)
    batch = task.on_host(next(iter(train_batches(config.data, seed=0, batch_size=BATCH))), 0)
    with torch.no_grad():
        prepared = task.prepare(engine.to_device(batch), engine.networks, 0)
        for phase in task.phases:
            prepared |= phase.make(engine.networks, prepared, 0)
    return engine, task, prepared


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_prepare_hands_to_the_losses_is_declared(zoo, name, tmp_path):
    _, task, prepared = prepared_by(zoo, name, tmp_path)
    declared = get_type_hints(get_type_hints(task.prepare)["return"])
    assert sorted(prepared.keys() - declared.keys()) == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_only_the_phases_player_moves(zoo, name, tmp_path):
    engine, task, prepared = prepared_by(zoo, name, tmp_path)
    for phase in task.phases:
        before = {player: parameters(engine.networks.bare(player)) for player in task.players}
        frozen = {other: states(module) for other, module in task.frozen.items()}
        engine.set_rates(0, STEPS)
        engine.begin_phase(phase)
        engine.begin_micro_batch(last=True)
        made = phase.make(engine.networks, prepared, 0)
        engine.backward(phase.loss(engine.networks, prepared | made, 0).total)
        assert not float(engine.step().skipped)
        for player in task.players:
            after = parameters(engine.networks.bare(player))
            same = all(torch.equal(before[player][key], after[key]) for key in after)
            assert same == (player != phase.player), f"phase {phase.name}: {player}"
        for other, module in task.frozen.items():
            assert all(torch.equal(frozen[other][key], value) for key, value in states(module).items()), other


def parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in module.named_parameters()}


def states(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("name", PAINTING)
def test_pictures_are_of_the_configured_size_and_follow_from_their_seeds(zoo, name):
    generator = load_generator(zoo.run(name))
    source = torch.randint(0, 256, (1, 3, SIZE, SIZE), dtype=torch.uint8)
    captions, seeds = ["a red circle", "a blue square", "a red circle", "a red circle"], [1, 1, 2, 1]

    def painted(*rows: int) -> torch.Tensor:
        options = {"sources": source.expand(len(rows), -1, -1, -1)} if generator.edits else {}
        return generator.generate([captions[row] for row in rows], [seeds[row] for row in rows], **options)

    images = painted(0, 1, 2, 3)
    assert images.dtype == torch.uint8 and images.shape == (4, 3, SIZE, SIZE)
    assert images.float().std() > 0
    assert torch.equal(images[0], images[3]) and torch.equal(painted(2)[0], images[2])
    assert generator.image_size == SIZE and generator.identity["kind"] == name


@pytest.mark.parametrize("name", PAINTING)
def test_a_step_paints_as_often_as_was_published(zoo, name, tmp_path):
    """Counted by the batches that the generator's normalisations saw; a finished network inside it sees none. A
    generator without normalisations is counted by its calls in training mode."""
    expected = published(name)
    if not expected.normalised:
        assert expected.paintings and calls_in_training(zoo, name, tmp_path) == expected.paintings * STEPS
        return
    newest = max((zoo.run(name) / "checkpoints").glob("step_*"))
    files = (newest / expected.player).rglob("*.safetensors")
    seen = {int(tensor) for path in files for key, tensor in load_file(path).items()
            if key.endswith("num_batches_tracked") and expected.finished not in key.split(".")}
    assert expected.paintings and seen == {expected.paintings * STEPS}


def calls_in_training(zoo: Zoo, name: str, folder: Path) -> int:
    """How often a whole run calls its generator, pictures to look at apart; it must have no normalisation."""
    calls = []

    def seen(module: nn.Module, inputs: Any, output: Any) -> None:
        if type(module) is NETWORKS[name]:
            calls.append(module.training)
            assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())

    handle = nn.modules.module.register_module_forward_hook(seen)
    try:
        assert zoo.train(zoo.config(name, folder)) == 0
    finally:
        handle.remove()
    return sum(calls)


@pytest.mark.parametrize("name", SYSTEMS)
def test_four_steps_are_two_and_two(zoo, name, tmp_path):
    """Bit for bit: weights, optimisers, averages, buffers."""
    config = zoo.config(name, tmp_path)
    assert zoo.train(config, "--stop-after", 2) == 0
    assert zoo.train(config) == 0
    whole, parts = players(zoo.run(name)), players(zoo.run(name, tmp_path))
    assert whole.keys() == parts.keys()
    assert [key for key in whole if not torch.equal(whole[key], parts[key])] == []
    newest = max((zoo.run(name, tmp_path) / "checkpoints").glob("step_*"))
    assert read_state(newest)["step"] == STEPS


def steps_of(zoo: Zoo, name: str, folder: Path, batches: int, **changes: Any) -> tuple[Callable[[], Task], Any, list]:
    """What makes a fresh task of the system, its config, and some batches."""
    config = load_config(zoo.config(name, folder), [], RUNS)
    config = config.model_copy(update={name: value for name, value in changes.items() if hasattr(config, name)})

    def make() -> Task:
        torch.manual_seed(0)
        return TASKS[name](config)

    return make, config, list(islice(train_batches(config.data, seed=0, batch_size=BATCH), batches))


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_step_does_not_wait_for_the_device(zoo, name, tmp_path):
    make, config, batches = steps_of(zoo, name, tmp_path, batches=1)
    assert step_without_waiting(make(), config, batches[0], tmp_path).on_device > 100


# the first, one of the middle and the last of the table; all others only where slow tests are asked for
@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name in RECORDED[::len(RECORDED) // 2] else pytest.mark.slow) for name in RECORDED])
def test_replayed_steps_train_as_plain_ones(zoo, name, tmp_path):
    stabiliser = StabiliserConfig(r1=1.0, r1_every=2, spectral_norm=name == "gan_int_cls")
    make, config, batches = steps_of(zoo, name, tmp_path, batches=2 * PLAIN_STEPS + 3, stabiliser=stabiliser)
    if not all(phase.capturable for phase in make().phases):
        pytest.skip("it does not say that its steps may be recorded")
    assert_replay_trains_alike(make, config, batches, tmp_path)


@pytest.fixture(scope="module")
def together(zoo, two_processes, tmp_path_factory) -> Path:
    """All systems trained by two processes in one job, by DDP; then one of each kind by ZeRO-1 and 2, and by ZeRO-3."""
    out = tmp_path_factory.mktemp("together")
    sharded = [argument for stage in (1, 2) for argument in (f"zero={stage}", *(
        zoo.config(name, out / f"zero{stage}") for name, own in ZERO.items() if own == stage))]
    two_processes(Path(__file__).with_name("worker.py"), *(zoo.config(name, out / "ddp") for name in in_order()),
                  *sharded, "zero=3", zoo.config("gan_int_cls", out / "zero3"), seconds=1200)
    return out


def measured(run: Path) -> dict[tuple[int, str], float]:
    """What the log says of every step's losses and gradients."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return {(line["step"], key): value for line in lines for key, value in line.items()
            if key.split("/")[-1] in ("loss", "grad_norm")}


def different(one: Path, two: Path) -> dict[tuple[int, str], tuple[float, float]]:
    """The figures of two runs that are not the same but for rounding."""
    expected, found = measured(one), measured(two)
    assert expected.keys() == found.keys() and {step for step, _ in expected} == set(range(1, STEPS + 1))
    tolerance = {key: NORM_TOLERANCE if key[1].endswith("norm") else LOSS_TOLERANCE for key in expected}
    return {key: (value, found[key]) for key, value in expected.items()
            if found[key] != pytest.approx(value, rel=tolerance[key], abs=1e-6)}


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_processes_train_as_one(zoo, together, name):
    assert different(zoo.run(name), zoo.run(name, together / "ddp")) == {}


@pytest.mark.parametrize("name", ZERO)
def test_zero_trains_as_one_process_does(zoo, together, name):
    run = zoo.run(name, together / f"zero{ZERO[name]}")
    config = load_config(zoo.config(name), [], RUNS)
    torch.manual_seed(config.seed)
    players = TASKS[name](config).players
    assert players and all((run / f"deepspeed_{player}.json").is_file() for player in players)
    assert different(zoo.run(name), run) == {}


def test_zero3_is_refused_for_two_players(together):
    refusal = (together / "zero3" / "gan_int_cls.yaml.refused").read_text()
    assert "ZeRO-3 with 2 players costs more than it saves" in refusal and "launch with DDP or ZeRO-1/2" in refusal
    assert [path.parent.name for path in together.rglob("*.refused")] == ["zero3"]


def test_the_schema_knows_every_system(monkeypatch, capsys):
    from gans.__main__ import main

    monkeypatch.setattr("sys.argv", ["gans", "schema"])
    main()
    kinds = json.loads(capsys.readouterr().out)["discriminator"]["mapping"]
    assert SYSTEMS.keys() | {"dvae", "transformer", "clip", "vs"} <= kinds.keys()
