"""Whether the fast ways give what the plain ones give, on this device."""

import subprocess
import sys

import torch

from dalle.models.transformer import PRESETS
from dalle.training.engines.base import Engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from gpu_parts.rows import Row, Setting, emit
from gpu_parts.stages import ROOT, environment
from gpu_parts.training import TINY, Synthetic, make_batches, run_config

STEPS = 4


def equality(setting: Setting, only: str = "") -> None:
    """Losses of a few steps, compiled against plain, for the classic and the modern blocks and the sparse layouts; then
    the tests that need a GPU."""
    for name, preset, attention in (("small full", "small", "full"), ("small dalle", "small", "dalle"),
                                    ("small-modern full", "small-modern", "full")):
        if only in name:
            plain = losses(preset, attention, setting, compile=False)
            compiled = losses(preset, attention, setting, compile=True)
            largest = max(abs(a - b) / a for a, b in zip(plain, compiled, strict=True))
            emit(Row(f"{name}: compiled / plain loss, off by", largest, "of it", bar=0.01, more_is_better=False,
                     note=f"{STEPS} steps, from {plain[0]:.4f} to {plain[-1]:.4f}"))
    if setting.device.type == "cuda" and only in "tests":
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "4", "-k", "cuda", "tests"], cwd=ROOT,
                               env=environment(setting, ROOT), capture_output=True, text=True)
        print(tests.stdout[-2000:], flush=True)
        emit(Row("tests that need a GPU: status", tests.returncode, "", bar=0, more_is_better=False))


def losses(preset: str, attention: str, setting: Setting, **train: object) -> list[float]:
    """The loss of each of the first steps in bf16, the same weights and batches every time."""
    model = PRESETS[preset].model_copy(update={"attention": attention})
    if setting.small:
        model = model.model_copy(update=TINY)
    config = run_config(setting.folder, {"batch_size": 4, "precision": "bf16", **train})
    engine, task = Engine(config, setting.device), Synthetic(config, model, setting.device)
    engine.prepare(task, setting.folder)
    torch.manual_seed(1)
    batches = make_batches(model, 4)
    played = [train_step(engine, task, batches[step % len(batches)], step, config, Meter()) for step in range(STEPS)]
    return [float(one[0].losses[0]) for one in played]
