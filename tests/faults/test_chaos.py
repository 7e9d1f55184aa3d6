"""The chaos run: what it proves on a short run, and that its proof fails when there is something to find."""

import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from chaos_parts import proof, starts
from chaos_parts.blows import Round, find_round_faults
from chaos_parts.damage import Truth
from chaos_parts.report import show_round
from dalle.training.sample_log import SampleLog, surviving

TOOLS = Path(__file__).resolve().parents[2] / "tools"
BATCH, STEPS = 4, 6


@pytest.fixture
def truth():
    """Two shards of 5 + 3 samples; b, of the first, and h, the last of the second, are damaged."""
    return Truth((("a", "b", "c", "d", "e"), ("f", "g", "h")), frozenset("bh"))


def write_log(run: Path, steps: dict[int, list[tuple[int, str]]], world_size: int = 1, start: int = 0) -> Path:
    """One start's sample log, dealt to its ranks as a training does."""
    run.mkdir(parents=True, exist_ok=True)
    for rank in range(world_size):
        log = SampleLog(run, rank, world_size)
        log.start(start, f"start at {start}")
        for step, samples in steps.items():
            share = samples[rank::world_size]
            log.add(step, {"position": torch.tensor([position for position, _ in share]),
                           "key": [key for _, key in share]})
        log.close()
    return run


def trained_on() -> dict[int, list[tuple[int, str]]]:
    """Six steps of four: three epochs of eight, c in the place of b and f in that of h."""
    order = "aCcdefgF" + "gcCeafdF" + "FdCacfeg"
    return {step: [(position, order[position].lower()) for position in range(step * BATCH, (step + 1) * BATCH)]
            for step in range(STEPS)}


def faults(truth, run: Path, undisturbed: Path) -> list[str]:
    return proof.find_sample_faults(surviving(run), surviving(undisturbed), truth, STEPS, BATCH)


def test_proof_accepts_the_samples_of_a_run_that_was_killed_and_resumed_with_other_processes(truth, tmp_path):
    whole = trained_on()
    calm = write_log(tmp_path / "calm", whole)
    run = write_log(tmp_path / "run", {step: whole[step] for step in range(4)}, world_size=2)      # killed after step 3
    write_log(run, {step: whole[step] for step in range(3, 5)}, world_size=4, start=3)            # from a save at 3
    write_log(run, {step: whole[step] for step in range(5, 6)}, start=5)
    assert faults(truth, run, calm) == []


def lose_a_sample(steps):
    steps[2].pop(1)


def repeat_a_sample(steps):
    steps[3][0] = (steps[3][0][0], steps[3][1][1])


def read_a_position_twice(steps):
    steps[3][0] = steps[3][1]


def swap_two_steps(steps):
    steps[1], steps[2] = steps[2], steps[1]


def lose_a_step(steps):
    del steps[5]


def train_on_a_damaged_sample(steps):
    steps[0][1] = (1, "b")


@pytest.mark.parametrize("doctor", [lose_a_sample, repeat_a_sample, read_a_position_twice, swap_two_steps, lose_a_step,
                                    train_on_a_damaged_sample])
def test_proof_fails_on_a_doctored_sample_log(truth, tmp_path, doctor):
    steps = trained_on()
    calm = write_log(tmp_path / "calm", steps)
    doctor(steps)
    run = write_log(tmp_path / "run", steps)
    assert proof.find_differences(surviving(run), surviving(calm))
    # and without the other run to compare with: both could be wrong in the same way
    assert [*proof.find_order_faults(surviving(run), STEPS, BATCH), *proof.find_epoch_faults(surviving(run), truth)]


def test_epoch_counts_a_replacement_for_each_damaged_sample(truth):
    assert truth.epoch() == Counter("accdeffg")


@pytest.mark.parametrize("doctored, named", [
    ({"loss": 1.001}, "training loss"), ({"loss": float("nan")}, "training loss"),
    ({"validation/image_ce": 2.001}, "validation"),
])
def test_proof_fails_on_another_loss(tmp_path, doctored, named):
    for run, change in (("calm", {}), ("same", {}), ("other", doctored)):
        (tmp_path / run).mkdir()
        lines = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 1.0, **change}, {"step": 2, "validation/image_ce": 2.0}]
        lines[2] |= {key: value for key, value in change.items() if key in lines[2]}
        (tmp_path / run / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2, "lo')
    assert proof.compare_losses(tmp_path / "same", tmp_path / "calm", 2)[1] == []
    found = proof.compare_losses(tmp_path / "other", tmp_path / "calm", 2)[1]
    assert found and all(named in fault for fault in found)


def round_of(kind: str, **values):
    given = {"processes": 1, "hit": kind != "none", "at_step": 10, "newest_checkpoint": 10}
    return Round(1, kind, **{**given, **values})


@pytest.mark.parametrize("kind, values", [
    ("sigterm", {"status": 75}), ("sigterm", {"status": 1, "processes": 2, "rank_statuses": [75, 75]}),
    ("sigkill", {"status": -9}), ("sigkill-rank", {"status": 1, "processes": 4, "rank_statuses": [-9, 76, 76, 76]}),
    ("sigkill-worker", {"status": 76}), ("none", {"status": 0}),
])
def test_documented_ends_are_accepted(kind, values):
    assert find_round_faults(round_of(kind, **values), finished=kind == "none") == []


@pytest.mark.parametrize("kind, values", [
    ("sigterm", {"status": 75, "newest_checkpoint": 5}), ("sigterm", {"status": -15}),
    ("sigkill-worker", {"status": 1}),
    ("sigkill-rank", {"status": 1, "processes": 2, "rank_statuses": [-9, -6]}), ("stop-file", {"status": 0}),
    ("none", {"status": 2}),
])
def test_other_ends_are_faults(kind, values):
    assert find_round_faults(round_of(kind, **values), finished=False)


def test_processes_left_by_a_command_that_has_ended_are_named_with_the_seconds_waited_for_them(tmp_path, monkeypatch):
    monkeypatch.setattr(starts, "SECONDS_TO_END", 1)
    with starts.Start(["sh", "-c", "sleep 300.5 & exit 3"], tmp_path / "printed.txt", 1) as start:
        left = start.wait(200)
    assert re.fullmatch(r"processes were left \d s later: \d+ \(sleep 300.5\)", left)
    assert start.process.returncode == 3 and not start.all()


def test_end_of_the_log_of_a_wrong_start_is_shown(tmp_path):
    printed = tmp_path / "printed.txt"
    printed.write_text("".join(f"line {number} [/odd]\n" for number in range(100)))
    for faults in ([], ["status 1 instead of 75"]):
        console = Console(file=io.StringIO())
        show_round(round_of("sigterm", faults=faults), printed, console)
        shown = console.file.getvalue()
        assert ("line 99 [/odd]" in shown) == ("line 70 " in shown) == bool(faults) and "line 69 " not in shown


def test_the_command_starts_in_any_folder(tmp_path):
    """Its parts lie beside it, not where it is called."""
    done = subprocess.run([sys.executable, TOOLS / "chaos.py", "--help"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0 and b"sigkill-saving" in done.stdout


def test_run_killed_at_random_loses_and_repeats_no_sample(commands, tmp_path, capsys):
    """The command itself: killed in a save, then a rank of two, then left alone, then the same folder doctored."""
    out = tmp_path / "out"
    assert commands["chaos"]("--seed", 35, "--steps", 24, "--rounds", 2, "--out", out) == 0, capsys.readouterr().out
    report = json.loads((out / "chaos.json").read_text())
    assert report["proven"] and [one["kind"] for one in report["rounds"]][:2] == ["sigkill-saving", "sigkill-rank"]
    run, calm = out / "runs" / "disturbed", out / "runs" / "undisturbed"
    assert len(surviving(run)) == 24

    weights = run / "checkpoints" / "step_00000024" / "transformer" / "weights-00000.safetensors"
    tensors = load_file(weights)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 0.5
    save_file(tensors, weights)
    (fault,) = proof.compare_weights(run, calm, 24)[1]
    assert 0.49 < float(fault.removeprefix("weights: ").split()[0]) < 0.51 and "above 0.001" in fault
    assert any("weights-00000.safetensors" in fault for fault in proof.find_checkpoint_faults(run, 24))
    shutil.rmtree(weights.parents[1])
    assert any("newest checkpoint" in fault for fault in proof.find_checkpoint_faults(run, 24))
