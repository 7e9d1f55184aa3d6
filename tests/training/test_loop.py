import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from launching import largest_difference, weights
from PIL import Image
from safetensors.torch import load_file
from toys import GanTask, NanOnOneRank, OftenPaintsOnceTask, OftenTask, PaintsOnceTask, SingleTask, ToyLoader, toy_run

from dalle.errors import UserError
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer, split
from dalle.training.optimizers import OptimizerConfig
from dalle.training.randomness import seed_random
from dalle.training.settings import split_batch
from dalle.training.task import Loss, detached

FULL = OptimizerConfig(name="muon", lr=1e-2, ema=0.8, ema_every=2, warmup=1, weight_decay=0.1)


def train(folder, task=None, *, loader=ToyLoader, resume="auto", stop_after=None, **settings):
    config = toy_run(folder, **settings)
    trainer = Trainer(task or SingleTask(), config, create_engine(config), loader, lambda: ToyLoader(steps=2),
                      resume=resume, stop_after=stop_after)
    return trainer.run()


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "toy/log.jsonl").read_text().splitlines()]


def test_a_validation_without_a_figure_says_so(tmp_path, capsys):
    task = SingleTask()
    task.validate = lambda networks, batches: {}
    train(tmp_path, task, validate_every=4)
    assert ("validation after step 4: no figure, the samples of data.validation are fewer than a toy run measures"
            in capsys.readouterr().out)


def test_a_run_leaves_all_that_the_run_folder_promises(tmp_path):
    summary = train(tmp_path, validate_every=2, preview_every=4)
    assert (summary.status, summary.exit_status, summary.steps, summary.samples) == ("finished", 0, 4, 32)
    run = tmp_path / "toy"
    assert {path.name for path in run.iterdir()} == {"config.yaml", "log.jsonl", "checkpoints", "samples", "model",
                                                   "finished"}
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step_00000002", "step_00000004"]
    assert Image.open(run / "samples/step_00000004_grey.png").size == (6, 4)
    step_line = next(line for line in lines(tmp_path) if line["step"] == 2 and "loss" in line)
    assert {"error", "lr", "grad_norm", "samples_per_second", "tokens_per_second", "data_wait", "memory_gb",
            "skipped_steps", "bad_samples"} <= step_line.keys()
    assert sum("validation/error" in line for line in lines(tmp_path)) == 2


@pytest.mark.parametrize("make", [lambda: SingleTask(FULL, dropout=0.3), lambda: GanTask(),
                                  lambda: PaintsOnceTask(dropout=0.3)])
def test_four_steps_equal_two_saved_and_two_resumed_bit_for_bit(tmp_path, make):
    settings = {"micro_batch_size": 4, "save_every": 1}
    train(tmp_path / "straight", make(), **settings)
    train(tmp_path / "halves", make(), stop_after=2, **settings)
    assert train(tmp_path / "halves", make(), **settings).steps == 4
    assert largest_difference(weights(tmp_path, "straight"), weights(tmp_path, "halves")) == 0
    last = "toy/checkpoints/step_00000004"
    for path in (tmp_path / "straight" / last).rglob("*.safetensors"):
        other = load_file(tmp_path / "halves" / path.relative_to(tmp_path / "straight"))
        assert all(torch.equal(value, other[name]) for name, value in load_file(path).items())
    assert any(line.get("event") == "resume" and line["step"] == 2 for line in lines(tmp_path / "halves"))


def test_resume_takes_the_newest_checkpoint_that_verifies(tmp_path, caplog):
    train(tmp_path, save_every=1, stop_after=3)
    (tmp_path / "toy/checkpoints/step_00000003/net/weights-00000.safetensors").write_bytes(b"torn")
    train(tmp_path, save_every=1)
    assert any(line.get("event") == "resume" and line["step"] == 2 for line in lines(tmp_path))
    assert "step_00000003" in caplog.text and "4 bytes" in caplog.text


def test_a_finished_run_started_again_does_nothing(tmp_path):
    train(tmp_path)
    assert train(tmp_path).status == "finished"
    assert sum("loss" in line for line in lines(tmp_path)) == 2


def test_resume_none_starts_over(tmp_path):
    train(tmp_path)
    train(tmp_path, resume="none", stop_after=1)
    assert {path.name for path in (tmp_path / "toy/checkpoints").iterdir()} == {"step_00000000", "step_00000001"}


def test_a_resume_with_another_seed_shows_the_difference(tmp_path):
    train(tmp_path, stop_after=2)
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        train(tmp_path, seed=1)


def test_a_checkpoint_of_other_shapes_is_refused(tmp_path):
    train(tmp_path, stop_after=2)
    task = SingleTask()
    task.players["net"].module.head = torch.nn.Linear(16, 3)
    with pytest.raises(UserError, match="does not fit the player 'net'"):
        train(tmp_path, task)


def test_a_signal_saves_and_ends_with_its_own_status(tmp_path):
    class Signals(ToyLoader):
        def __iter__(self):
            for step, batch in enumerate(super().__iter__()):
                if step == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                yield batch

    summary = train(tmp_path, steps=10, save_every=0, loader=Signals)
    assert (summary.status, summary.exit_status, summary.steps) == ("signal", 75, 3)
    assert (tmp_path / "toy/checkpoints/step_00000003/manifest.json").is_file()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


class Blind(SingleTask):
    """Fails wherever it is looked at."""

    def __init__(self, looks: str):
        super().__init__()
        self.looks = looks

    def validate(self, networks, batches):
        return self.look("validate") or super().validate(networks, batches)

    def preview(self, networks, step):
        return self.look("preview") or super().preview(networks, step)

    def look(self, what: str) -> None:
        if what == self.looks:
            raise RuntimeError(f"no {what}")


@pytest.mark.parametrize("look", ["validate", "preview", "evaluate"])
def test_a_look_that_fails_does_not_cost_the_steps_before_it(tmp_path, look):
    task = Blind(look)
    config = toy_run(tmp_path, **{f"{look}_every": 3, "save_every": 3})
    with pytest.raises(RuntimeError, match=f"no {look}"):
        Trainer(task, config, create_engine(config), ToyLoader, lambda: ToyLoader(steps=2),
                evaluate=lambda networks, came_forward: task.look("evaluate")).run()
    assert (tmp_path / "toy/checkpoints/step_00000003").is_dir()
    assert train(tmp_path, save_every=3).status == "finished"
    assert [line["step"] for line in lines(tmp_path) if line.get("event") == "resume"] == [3]


def test_an_evaluation_that_comes_forward_may_take_as_long_as_it_takes(tmp_path):
    """The watchdog's time begins anew with every part."""
    deadlines = []

    def evaluate(networks, came_forward):
        for _ in range(3):
            deadlines.append(trainer.watchdog._deadline)
            time.sleep(0.01)
            came_forward()
        return {"score": 1.0}

    config = toy_run(tmp_path, evaluate_every=4)
    trainer = Trainer(SingleTask(), config, create_engine(config), ToyLoader, evaluate=evaluate)
    assert trainer.run().last["evaluation/score"] == 1.0
    assert deadlines == sorted(set(deadlines)) and len(deadlines) == 3


def test_the_first_two_steps_may_take_long_for_a_rank_may_wait_in_the_second_for_anothers_first(tmp_path):
    allowed = []

    class Watching(SingleTask):
        def fit(self, networks, batch, step):
            allowed.append(trainer.watchdog._allowed)
            return super().fit(networks, batch, step)

    config = toy_run(tmp_path, engine={"timeout_minutes": 3, "step_timeout_minutes": 1})
    trainer = Trainer(Watching(), config, create_engine(config), ToyLoader)
    trainer.run()
    assert allowed == [180, 180, 60, 60]


def test_a_spent_budget_stops_with_a_checkpoint(tmp_path):
    summary = train(tmp_path, steps=10, minutes=1e-6)
    assert (summary.status, summary.exit_status, summary.steps) == ("minutes", 75, 1)
    assert (tmp_path / "toy/checkpoints/step_00000001").is_dir()


def test_a_non_finite_step_is_skipped_counted_and_leaves_the_weights(tmp_path):
    train(tmp_path / "a", NanOnOneRank(), stop_after=1)
    assert train(tmp_path / "b", NanOnOneRank(), stop_after=2).last["skipped_steps"] == 1
    assert largest_difference(weights(tmp_path, "a"), weights(tmp_path, "b")) == 0


def test_too_many_skips_in_a_row_name_player_and_phase(tmp_path):
    class Hopeless(SingleTask):
        def fit(self, networks, batch, step):
            return Loss(super().fit(networks, batch, step).total * float("inf"))

    with pytest.raises(UserError, match="player 'net', phase 'fit'.* 3 times"):
        train(tmp_path, Hopeless(), steps=10, max_skipped=3)


def test_a_folder_that_cannot_be_written_fails_before_the_first_step(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        train(tmp_path / "file", loader=lambda start: pytest.fail("the data was opened"))


def test_a_task_that_couples_samples_is_not_split(tmp_path):
    with pytest.raises(UserError, match="cannot be split into 2"):
        train(tmp_path, SingleTask(couples=True), micro_batch_size=4)


@pytest.mark.parametrize(("arguments", "expected"), [((8, None, 2), (4, 1)), ((8, 2, 2), (4, 2)), ((8, 64, 1), (8, 1))])
def test_batches_divide_over_processes_and_micro_batches(arguments, expected):
    assert split_batch(*arguments) == expected


def test_a_batch_that_does_not_divide_lists_the_worlds_that_do():
    with pytest.raises(UserError, match="1, 2, 4, 8"):
        split_batch(8, None, 3)
    with pytest.raises(UserError, match="micro_batch_size 3"):
        split_batch(8, 3, 1)


def test_splitting_keeps_order_and_lists():
    parts = list(split({"x": torch.arange(4), "key": list("abcd")}, 2))
    assert [part["key"] for part in parts] == [["a", "b"], ["c", "d"]] and parts[1]["x"].tolist() == [2, 3]


def test_draws_depend_on_every_part_of_the_key():
    def draw(*key):
        seed_random(*key)
        return torch.rand(1).item()

    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert len({draw(0, 1, 0), draw(1, 0, 0), draw(0, 0, 1), draw(0, 10), draw(1, 0)}) == 5


@pytest.mark.parametrize(("kind", "forwards"), [(GanTask, [2, 2, 2, 2]), (PaintsOnceTask, [1, 1, 1, 1]),
                                                (OftenTask, [3, 1, 3, 1]), (OftenPaintsOnceTask, [2, 1, 2, 1])])
def test_what_is_made_ahead_costs_one_forward_a_step(tmp_path, kind, forwards):
    task, counts = kind(), []
    task.frozen["half"].register_forward_hook(lambda *_: counts.append(0))         # called once, by `prepare`

    def count(*_):
        counts[-1] += 1

    task.players["g"].module.register_forward_hook(count)
    train(tmp_path, task)
    assert counts == forwards


@pytest.mark.parametrize(("made_ahead", "painted_twice"), [(PaintsOnceTask, GanTask), (OftenPaintsOnceTask, OftenTask)])
def test_what_is_made_ahead_trains_as_what_each_phase_makes(tmp_path, made_ahead, painted_twice):
    for task in (made_ahead, painted_twice):
        train(tmp_path / task.__name__, task(), micro_batch_size=4)
    assert largest_difference(*(weights(tmp_path, task.__name__) for task in (made_ahead, painted_twice))) == 0


def test_only_the_phase_that_made_it_gets_the_graph(tmp_path):
    seen = []

    class Watching(PaintsOnceTask):
        def d_loss(self, networks, batch, step):
            seen.append(("d", batch["painted"]["fakes"][0].requires_grad))
            return super().d_loss(networks, batch, step)

        def g_loss(self, networks, batch, step):
            seen.append(("g", batch["painted"]["fakes"][0].requires_grad))
            return super().g_loss(networks, batch, step)

    train(tmp_path, Watching(), stop_after=1)
    assert seen == [("d", False), ("g", True)]


class Pair(NamedTuple):
    left: torch.Tensor
    right: list


def test_what_is_detached_keeps_its_shape():
    weight = torch.ones(2, requires_grad=True)
    bare = detached({"pair": Pair(weight * 2, [weight * 3, None]), "tuple": (weight,)})
    assert type(bare["pair"]) is Pair and bare["pair"].right[1] is None and bare["pair"].left.tolist() == [2, 2]
    assert not any(one.requires_grad for one in (bare["pair"].left, bare["pair"].right[0], *bare["tuple"]))
    with pytest.raises(TypeError, match="made a object ahead"):
        detached({"unknown": object()})


def test_frozen_players_and_companions_get_no_gradient(tmp_path):
    seen = []

    class Watching(GanTask):
        def g_loss(self, networks, batch, step):
            seen.append([parameter.requires_grad for name in ("g", "d", "half")
                         for parameter in list(networks.bare(name).parameters())[:1]])
            return super().g_loss(networks, batch, step)

    train(tmp_path, Watching(), stop_after=1)
    assert seen == [[True, False, False]]


def test_compiled_players_train_like_eager_ones(tmp_path):
    train(tmp_path / "eager", GanTask())
    train(tmp_path / "compiled", GanTask(), compile=True)
    assert largest_difference(weights(tmp_path, "eager"), weights(tmp_path, "compiled")) < 1e-5
