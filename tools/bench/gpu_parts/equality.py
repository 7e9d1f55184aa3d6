"""Whether the fast ways give what the plain ones give, on this device."""

import subprocess
import sys

import torch

from dalle.sampling.choosing import SamplingConfig
from dalle.sampling.decode import sample_codes
from dalle.training.engines.base import Engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter
from gpu_parts.decoding import make_model
from gpu_parts.rows import Row, Setting, emit
from gpu_parts.stages import ROOT, environment
from gpu_parts.training import architecture_of, make_batches, make_network, run_config
from rounds import Synthetic

STEPS = 6          # the fourth is the first that is replayed
GPU_TESTS = ("tests/training/test_on_gpu.py", "tests/models/test_norms.py", "tests/gans/test_acgan.py")


def equality(setting: Setting, only: str = "") -> None:
    """Losses of a few steps, compiled against plain, for the classic and the modern blocks and the sparse layouts, and
    replayed against plain; codes by captured steps against the growing cache; then the tests that need a GPU."""
    for name, preset, attention in (("small full", "small", "full"), ("small dalle", "small", "dalle"),
                                    ("small-modern full", "small-modern", "full")):
        if only in name:
            plain = losses(preset, attention, setting, compile=False, capture=False)
            compare(f"{name}: compiled / plain loss, off by", plain, losses(preset, attention, setting, compile=True))
            compare(f"{name}: replayed / plain loss, off by", plain,
                    losses(preset, attention, setting, compile=False, capture=True))
    for attention in ("full", "dalle"):
        if only in f"codes {attention}":
            compare_codes(attention, setting)
    if setting.device.type == "cuda" and only in "tests":
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", "-n", "3", *GPU_TESTS], cwd=ROOT,
                               env=environment(setting, ROOT), capture_output=True, text=True)
        print(tests.stdout[-2000:], flush=True)
        emit(Row("tests that need a GPU: status", tests.returncode, "", bar=0, more_is_better=False))


def compare(what: str, plain: list[float], fast: list[float]) -> None:
    largest = max(abs(a - b) / a for a, b in zip(plain, fast, strict=True))
    emit(Row(what, largest, "of it", bar=0.01, more_is_better=False,
             note=f"{STEPS} steps, from {plain[0]:.4f} to {plain[-1]:.4f}"))


def compare_codes(attention: str, setting: Setting) -> None:
    """In fp32, where codes part only at a number that lies at a boundary; one candidate and eight of one caption."""
    model = make_model("debug", attention, setting).float()
    text = torch.randint(1, model.config.num_text_tokens, (1, model.config.text_length),
                         generator=torch.Generator().manual_seed(0))
    plain = sample_codes(model, text, range(8), SamplingConfig(top_k=64), method="growing")
    fixed = "captured" if setting.device.type == "cuda" else "fixed"
    eight, one = (sample_codes(model, text, range(count), SamplingConfig(top_k=64), method=fixed) for count in (8, 1))
    emit(Row(f"codes {attention}: captured unlike plain", float((eight != plain).float().mean()), "of them", bar=0.0,
             more_is_better=False))
    emit(Row(f"codes {attention}: of one candidate unlike of eight", float((one[0] != eight[0]).float().mean()),
             "of them", bar=0.0, more_is_better=False))


def losses(preset: str, attention: str, setting: Setting, **train: object) -> list[float]:
    """The loss of each of the first steps in bf16, the same weights and batches every time."""
    model = architecture_of(preset, setting, attention=attention)
    config = run_config(setting.folder, {"batch_size": 4, "precision": "bf16", **train})
    engine, task = Engine(config, setting.device), Synthetic(config, make_network(model, setting.device))
    engine.prepare(task, setting.folder)
    torch.manual_seed(1)
    batches = make_batches(model, 4, setting.device)
    played = [train_step(engine, task, batches[step % len(batches)], step, config, Meter(setting.device))
              for step in range(STEPS)]
    return [float(one[0].losses[0]) for one in played]
