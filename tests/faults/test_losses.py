"""Losses that are no numbers, or jump: the step is skipped, the run goes back, or it ends with a line that says why.

Several processes train toys, one launch for many tests.
"""

import json
import sys
from pathlib import Path

import pytest
from fault_runs import BAD, EXACT, LIMITS, SPIKE, STEPS, checkpoint, equal, events, log_of, losses, results, train_here
from tiny_shards import write_job
from toy_worker import BATCH, Toy, keys, positions, start

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))

from launching import largest_difference, weights
from toys import GanTask, ToyLoader, toy_run

from dalle.errors import UserError
from dalle.training.checkpoint import CheckpointStore
from dalle.training.engines.launching import create_engine
from dalle.training.loop import Trainer
from dalle.training.sample_log import surviving

NOT_FINITE = {1: "nan", 2: "inf", 4: "gradient"}         # with log_every=2: the loss of step 2 is not logged
DDP_AND_ZERO = pytest.mark.parametrize("kind", ["ddp", "zero1", "zero3"])


def not_finite(kind: str) -> list[Toy]:
    """What goes wrong for ever, and what goes wrong on rank 1 alone."""
    settings = {"engine": LIMITS}
    return [Toy(f"{kind}_hopeless", kind=kind, faults=dict.fromkeys(range(3, 20), "nan"),
                settings={**settings, "steps": 20, "max_skipped": 3}),
            Toy(f"{kind}_not_finite", kind=kind, faults=NOT_FINITE,
                settings={**settings, "steps": 6, "save_every": 1, "keep_last": 9})]


def spiking() -> list[Toy]:
    settings = {"steps": STEPS, "save_every": 2, "log_samples": True, "engine": LIMITS}
    jumpy = {**settings, "spike": {**SPIKE, "skip_batches": 2}}
    return [Toy("runaway", spikes=list(range(BAD, 99)), settings={**settings, "spike": {**SPIKE, "max_rollbacks": 2}}),
            Toy("spike", spikes=[BAD], settings=jumpy),
            Toy("without", without=[BAD, BAD + 1], settings=settings),
            Toy("begun", folder="spike_resumed", spikes=[BAD], stop_after=7, settings=jumpy),
            Toy("spike_resumed", spikes=[BAD], settings=jumpy)]


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    """Two processes under DDP."""
    out = tmp_path_factory.mktemp("ddp")
    job = start([*not_finite("ddp"), *spiking()], out)
    assert job.wait() == [0, 0], job.errors(0) + job.errors(1)
    return out


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    """Two processes under DeepSpeed."""
    out = tmp_path_factory.mktemp("zero")
    job = start([*not_finite("zero1"), *not_finite("zero3")], out, ACCELERATE_USE_DEEPSPEED="true")
    assert job.wait() == [0, 0], job.errors(0) + job.errors(1)
    return out


@pytest.fixture
def out(request, kind) -> Path:
    return request.getfixturevalue("ddp" if kind == "ddp" else "zero")


@DDP_AND_ZERO
def test_nan_or_inf_loss_or_gradient_on_one_rank_skips_the_step_on_all_and_moves_nothing(out, kind):
    folder = out / f"{kind}_not_finite"
    after = [checkpoint(folder, step) for step in range(1, 7)]
    moved = [not equal(before, behind) for before, behind in zip(after, after[1:], strict=False)]
    assert [step for step, did in enumerate(moved, start=1) if not did] == list(NOT_FINITE)
    assert [result["skipped"] for result in results(out, folder.name)] == [3, 3]
    assert all(tensor.isfinite().all() for tensor in after[-1].values())
    if kind != "zero3":                                  # where no rank has a whole weight
        first, second = (result["digest"] for result in results(out, folder.name))
        assert first == second


@DDP_AND_ZERO
def test_nan_or_inf_loss_or_gradient_is_logged_with_the_samples_of_all_ranks(out, kind):
    skipped = events(out / f"{kind}_not_finite", "skipped")
    assert [event["step"] - 1 for event in skipped] == list(NOT_FINITE)
    for event in skipped:
        assert (event["player"], event["phase"]) == ("net", "fit")
        assert sorted(event["keys"]) == keys(event["step"] - 1)
    figures = [line for line in log_of(out / f"{kind}_not_finite/toy") if "skipped_steps" in line]
    assert [(line["step"], line["skipped_steps"]) for line in figures] == [(2, 1), (4, 2), (6, 3)]


@DDP_AND_ZERO
def test_nan_loss_on_one_rank_trains_on_as_one_process_does(out, kind, tmp_path):
    train_here(tmp_path / "one", faults=NOT_FINITE, dropout=0, steps=6)
    assert largest_difference(weights(out, f"{kind}_not_finite"), weights(tmp_path, "one")) < EXACT


@DDP_AND_ZERO
def test_nan_loss_in_every_step_ends_with_status_2_and_names_player_phase_step_and_samples(out, kind):
    for result in results(out, f"{kind}_hopeless"):
        assert result["exit"] == 2 and "\n" not in result["error"]
        for words in ("player 'net', phase 'fit'", "3 times in a row", "step 5", *keys(5)):
            assert words in result["error"]


def test_nan_loss_of_a_rare_phase_of_a_gan_names_that_phase(tmp_path):
    class HopelessPenalty(GanTask):
        def r1(self, networks, batch, step):
            loss = super().r1(networks, batch, step)
            loss.total = loss.total * float("nan")
            return loss

    config = toy_run(tmp_path, steps=10, max_skipped=2)
    with pytest.raises(UserError, match="player 'd', phase 'r1'.* 2 times in a row up to step 2"):
        Trainer(HopelessPenalty(), config, create_engine(config), ToyLoader).run()


def test_fp16_whose_overflow_would_need_a_scaler_is_refused_in_one_line(tmp_path, run_here):
    ended = run_here("train", write_job(tmp_path, tmp_path, settings={"precision": "fp16"}).config)
    assert ended.status == 2 and ended.error.count("\n") == 1
    assert all(words in ended.error for words in ("train.precision", "fp16", "fp32", "bf16"))


def test_loss_spike_rolls_back_and_ends_like_a_run_that_never_met_the_batch(tmp_path):
    settings = {"spike": SPIKE, "log_samples": True, "micro_batch_size": 4}
    train_here(tmp_path / "spike", spikes=[BAD], **settings)
    train_here(tmp_path / "without", without=[BAD], **settings)
    assert equal(checkpoint(tmp_path / "spike", STEPS), checkpoint(tmp_path / "without", STEPS))
    assert surviving(tmp_path / "spike/toy") == surviving(tmp_path / "without/toy")
    (event,) = events(tmp_path / "spike", "rollback")
    assert (event["step"], event["to_step"]) == (BAD + 1, 4) and event["zscore"] > SPIKE["zscore"]
    assert event["left_out_positions"] == [[BAD * BATCH, BAD * BATCH + BATCH - 1]] and event["keys"] == keys(BAD)
    assert not events(tmp_path / "without", "rollback")
    assert losses(tmp_path / "spike/toy") == losses(tmp_path / "without/toy")       # nor does it show in the figures


def test_loss_spike_after_a_resume_from_an_older_checkpoint_goes_back_to_that_one(tmp_path):
    """Not to a later one of the steps that the user gave up."""
    train_here(tmp_path / "spike", stop_after=8, keep_last=9, spike=SPIKE)
    train_here(tmp_path / "spike", spikes=[BAD], resume=tmp_path / "spike/toy/checkpoints/step_00000004", spike=SPIKE)
    assert [event["to_step"] for event in events(tmp_path / "spike", "rollback")] == [4]
    train_here(tmp_path / "without", without=[BAD])
    assert equal(checkpoint(tmp_path / "spike", STEPS), checkpoint(tmp_path / "without", STEPS))


def test_loss_spike_is_left_alone_unless_the_config_asks(tmp_path):
    train_here(tmp_path, spikes=[BAD], log_samples=True)
    assert not events(tmp_path, "rollback")
    assert [key for _, key in surviving(tmp_path / "toy")[BAD]] == keys(BAD)


def test_loss_spike_on_one_rank_rolls_back_all_ranks_alike(ddp):
    for result in results(ddp, "spike"):
        assert (result["status"], result["rollbacks"], result["excluded"]) == ("finished", 1, [BAD, BAD + 1])
    of_ranks = [[entry.get("start", entry.get("step")) for entry in sample_log(ddp / "spike", rank)] for rank in (0, 1)]
    assert of_ranks[0] == of_ranks[1] == [0, *range(BAD + 1), 4, *range(4, STEPS)]      # starts at 0, and at 4 again
    (event,) = events(ddp / "spike", "rollback")
    assert sorted(event["keys"]) == keys(BAD)
    assert equal(checkpoint(ddp / "spike", STEPS), checkpoint(ddp / "without", STEPS))


def sample_log(folder: Path, rank: int) -> list[dict]:
    lines = (folder / f"toy/sample_log/rank{rank:05d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def test_loss_spike_leaves_out_its_positions_and_trains_on_all_others_once(ddp):
    kept = surviving(ddp / "spike/toy")
    assert list(kept) == list(range(STEPS))
    numbers = [number for number in range(STEPS + 2) if number not in (BAD, BAD + 1)]
    assert [[position for position, _ in kept[step]] for step in kept] == [positions(n).tolist() for n in numbers]
    assert [[key for _, key in kept[step]] for step in kept] == [keys(number) for number in numbers]


def test_loss_spike_stays_left_out_after_a_restart(ddp):
    (event,) = events(ddp / "spike_resumed", "rollback")
    assert [line["step"] for line in events(ddp / "spike_resumed", "resume")] == [7]
    assert all(result["excluded"] == [BAD, BAD + 1] for result in results(ddp, "spike_resumed"))
    assert equal(checkpoint(ddp / "spike_resumed", STEPS), checkpoint(ddp / "without", STEPS))


def test_loss_spikes_beyond_max_rollbacks_end_with_status_2(ddp):
    for result in results(ddp, "runaway"):
        assert result["exit"] == 2 and "\n" not in result["error"]
        for words in ("player 'net', phase 'fit'", f"step {BAD}", "train.spike.max_rollbacks=2"):
            assert words in result["error"]
    assert len(events(ddp / "runaway", "rollback")) == 2
    assert CheckpointStore(ddp / "runaway/toy/checkpoints", 1).newest()[0].name == "step_00000004"
