"""The proof that nothing was lost: ends, samples, checkpoints, losses and weights against what was promised."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chaos_parts.blows import Round
from chaos_parts.damage import Truth
from chaos_parts.runs import BATCH_SIZE, Chaos
from chaos_parts.starts import newest_step, parse_lines

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-3
Samples = dict[int, list[tuple[int, str]]]        # step -> (position, key) of its samples


def find_sample_faults(samples: Samples, undisturbed: Samples, truth: Truth, steps: int, batch_size: int) -> list[str]:
    """Where ``samples`` differ from the undisturbed run's, or from what the shards and the reading order promise."""
    return [*find_order_faults(samples, steps, batch_size), *find_differences(samples, undisturbed),
            *find_epoch_faults(samples, truth)]


def find_order_faults(samples: Samples, steps: int, batch_size: int) -> list[str]:
    """Step t holds positions tB ... tB + B - 1, each once."""
    faults = [f"step {step} is not in the log" for step in range(steps) if step not in samples]
    faults += [f"step {step} is beyond the last" for step in sorted(samples) if not 0 <= step < steps]
    for step, entries in sorted(samples.items()):
        positions = [position for position, _ in entries]
        if positions != list(range(step * batch_size, (step + 1) * batch_size)):
            faults.append(f"step {step} was trained on the positions {positions}")
    return faults


def find_differences(samples: Samples, undisturbed: Samples) -> list[str]:
    return [f"step {step} was trained on {samples.get(step)}, undisturbed on {undisturbed.get(step)}"
            for step in sorted(samples.keys() | undisturbed.keys()) if samples.get(step) != undisturbed.get(step)]


def find_epoch_faults(samples: Samples, truth: Truth) -> list[str]:
    """Every good sample once an epoch, and once more for each damaged one it stands in for; no damaged one ever."""
    epochs: dict[int, Counter[str]] = {}
    for position, key in itertools.chain.from_iterable(samples.values()):
        epochs.setdefault(position // truth.num_samples, Counter())[key] += 1
    faults, expected = [], truth.epoch()
    for epoch, counted in sorted(epochs.items()):
        whole = counted.total() >= truth.num_samples
        for key in sorted(expected.keys() | counted.keys()):
            if counted[key] > expected[key] or (whole and counted[key] < expected[key]):
                faults.append(f"epoch {epoch}: sample {key} {counted[key]} times instead of {expected[key]}")
    return faults


def read_losses(run: Path) -> dict[str, dict[int, float]]:
    """Figure -> step -> value, for the training and validation losses; of a step done again, the last."""
    found: dict[str, dict[int, float]] = {}
    for line in parse_lines((run / "log.jsonl").read_text(errors="replace")):
        for name, value in line.items():
            if name == "loss" or name.startswith("validation/"):
                found.setdefault(name, {})[line["step"]] = value
    return found


def compare_losses(disturbed: Path, undisturbed: Path, steps: int) -> tuple[dict[str, float], list[str]]:
    """The largest difference of the losses, at the last step and over all steps; and what is above the tolerance."""
    ours, theirs = read_losses(disturbed), read_losses(undisturbed)
    names = sorted({"loss", *theirs.keys(), *ours.keys()})
    missing = [name for name in names if steps not in ours.get(name, {}) or steps not in theirs.get(name, {})]
    if missing or len(names) < 2:
        return {}, [f"not logged at step {steps} by both runs: {', '.join(missing) or 'a validation loss'}"]
    both = theirs["loss"].keys() & ours["loss"].keys()         # a kill may cost the last lines of a log
    apart = {"training loss, last step": abs(ours["loss"][steps] - theirs["loss"][steps]),
             "validation losses": max(abs(ours[name][steps] - theirs[name][steps]) for name in names if name != "loss"),
             "training loss, any step": max(abs(ours["loss"][step] - theirs["loss"][step]) for step in both)}
    faults = [f"{name}: {difference:.2g} apart, above {LOSS_TOLERANCE}" for name, difference in apart.items()
              if not difference <= LOSS_TOLERANCE]
    return {**apart, "steps compared": len(both)}, faults


def compare_weights(disturbed: Path, undisturbed: Path, steps: int) -> tuple[dict[str, float], list[str]]:
    """The largest difference of weights, averages and optimiser state at the last step."""
    from dalle.training.checkpoint import AVERAGE, OPTIMIZER, WEIGHTS, SavedPlayer

    ours, theirs = (SavedPlayer(run / "checkpoints" / f"step_{steps:08d}" / "transformer")
                    for run in (disturbed, undisturbed))
    figures, faults = {}, []
    for section in (WEIGHTS, AVERAGE, OPTIMIZER):
        if sorted(ours.keys(section)) != sorted(theirs.keys(section)):
            faults.append(f"the names of the {section} differ")
            continue
        figures[section] = max((float((ours.tensor(section, key).float() - theirs.tensor(section, key).float())
                                      .abs().max()) for key in theirs.keys(section)), default=math.nan)
        if not figures[section] <= WEIGHT_TOLERANCE:
            faults.append(f"{section}: {figures[section]:.2g} apart, above {WEIGHT_TOLERANCE}")
    return figures, faults


def find_checkpoint_faults(run: Path, steps: int) -> list[str]:
    from dalle.training.checkpoint import CheckpointStore, find_fault

    faults = [f"{path}: {fault}" for path in CheckpointStore(run / "checkpoints", 2).all()
              if (fault := find_fault(path)) is not None]
    if newest_step(run) != steps:
        faults.append(f"the newest checkpoint of {run} is of step {newest_step(run)}, not {steps}")
    if not (run / "finished").is_file():
        faults.append(f"{run} does not say that it has finished")
    return faults


def prove(chaos: Chaos, truth: Truth, rounds: Sequence[Round]) -> dict[str, dict[str, Any]]:
    """Check -> its faults and figures."""
    from dalle.training.sample_log import surviving

    samples = surviving(chaos.disturbed)
    checks = {
        "starts and ends": ({"starts": len(rounds), "torn saves": sum(one.torn_save for one in rounds)},
                            [f"round {one.number}: {fault}" for one in rounds for fault in one.faults]),
        "samples": ({"steps": len(samples), "good": truth.num_samples - len(truth.bad), "damaged": len(truth.bad),
                     "epochs": round(chaos.steps * BATCH_SIZE / truth.num_samples, 2)},
                    find_sample_faults(samples, surviving(chaos.calm), truth, chaos.steps, BATCH_SIZE)),
        "checkpoints": ({}, find_checkpoint_faults(chaos.disturbed, chaos.steps)),
    }
    if not checks["checkpoints"][1]:                   # otherwise there is nothing to compare
        checks["losses"] = compare_losses(chaos.disturbed, chaos.calm, chaos.steps)
        checks["weights"] = compare_weights(chaos.disturbed, chaos.calm, chaos.steps)
    return {name: {"figures": figures, "faults": faults} for name, (figures, faults) in checks.items()}
