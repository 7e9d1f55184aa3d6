"""Training rows: the project's own task, engine and step on batches that lie in memory."""

import gc
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dalle.data.batch import Batch
from dalle.models.transformer import PRESETS, TextToImageTransformer, TransformerConfig
from dalle.tasks.transformer import TransformerRun
from dalle.training.engines.base import Engine
from dalle.training.loop import train_step
from dalle.training.meter import Meter, peak_flops
from gpu_parts.rows import Row, Setting, emit, wait
from rounds import Synthetic


@dataclass(frozen=True)
class Model:
    """A row's model, how it is trained, and its bars: shares of the peak, or ratios to the row named ``against``."""

    what: str
    preset: str
    micro_batches: tuple[int, ...]                         # the best of them counts
    changes: tuple[tuple[str, Any], ...] = ()
    train: tuple[tuple[str, Any], ...] = ()
    bar: float | None = None
    goal: float | None = None
    against: str = ""


FULL, DALLE = (("attention", "full"),), (("attention", "dalle"),)
MODELS = (
    Model("xl full bf16", "xl", (8, 16, 24), FULL, bar=0.55, goal=0.60),
    Model("xl full bf16, heads of 128", "xl-128", (16,), FULL),
    Model("xl full fp8", "xl", (16,), FULL, (("precision", "fp8"),), 1.15, 1.35, "xl full bf16"),
    Model("xl dalle bf16", "xl", (16,), DALLE, bar=1.1, goal=1.25, against="xl full bf16"),
    Model("xl-modern full bf16", "xl-modern", (16,), FULL, bar=1.0, goal=1.05, against="xl full bf16"),
    Model("base full bf16", "base", (32, 64), FULL, bar=0.50, goal=0.55),
    Model("xl full bf16, not compiled", "xl", (16,), FULL, (("compile", False),)),
)
TINY = {"dim": 32, "depth": 2, "heads": 2, "text_length": 8, "grid": (4, 4), "num_text_tokens": 64, "num_codes": 32}


def training(setting: Setting, only: str = "") -> None:
    """Tokens a second and share of the peak, each model at the best of its micro-batches.

    A ratio is of tokens a second at the same micro-batch, 16, where both have it, else of the best.
    """
    best: dict[str, float] = {}
    at: dict[tuple[str, int], float] = {}
    for model in MODELS:
        if only and only not in model.what and model.what != "xl full bf16":
            continue
        for micro_batch in (2,) if setting.small else model.micro_batches:
            try:
                seconds, task, compiling, memory = measure(model, micro_batch, setting)
            except torch.cuda.OutOfMemoryError:
                print(f"{model.what}, micro-batch {micro_batch}: out of memory", flush=True)
                continue
            except Exception as error:                     # the other rows are worth having
                print(f"{model.what}, micro-batch {micro_batch}: {type(error).__name__}: {error}", flush=True)
                continue
            rate = micro_batch * task.tokens_per_sample / seconds
            at[model.what, micro_batch] = rate
            best[model.what] = max(rate, best.get(model.what, 0))
            report(model, micro_batch, seconds, task, f"compiled in {compiling:.0f} s, {memory:.1f} GiB", setting)
            del task
            gc.collect()
            torch._dynamo.reset()
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
        if model.against and model.what in best and model.against in best:
            shared = [at[model.what, size] / at[model.against, size] for size in model.micro_batches
                      if (model.what, size) in at and (model.against, size) in at]
            ratio = max(shared) if shared else best[model.what] / best[model.against]
            emit(Row(f"{model.what} / {model.against}", ratio, "x", bar=model.bar, goal=model.goal))


def report(model: Model, micro_batch: int, seconds: float, task: Synthetic, note: str, setting: Setting) -> None:
    rate = micro_batch * task.tokens_per_sample / seconds
    name = f"{model.what}, micro-batch {micro_batch}"
    emit(Row(name, rate, "tokens/s", note=f"{seconds * 1e3:.1f} ms a step, {note}"))
    peak = peak_flops(setting.device)
    if peak is not None:
        asked = (None, None) if model.against else (model.bar, model.goal)
        emit(Row(f"{name}: MFU", micro_batch * task.flops_per_sample / seconds / peak, "of peak",
                 setting.matrix_rate and setting.matrix_rate / peak, *asked))


def measure(model: Model, micro_batch: int, setting: Setting) -> tuple[float, Synthetic, float, float]:
    """(median seconds of a step, the task, seconds until the first two were done, GiB at the peak)."""
    config = run_config(setting.folder, {"batch_size": micro_batch, "precision": "bf16", **dict(model.train)})
    architecture = architecture_of(model.preset, setting, **dict(model.changes))
    engine = Engine(config, setting.device)
    task = Synthetic(config, make_network(architecture, setting.device))
    engine.prepare(task, setting.folder)
    batches, meter = make_batches(architecture, micro_batch, setting.device), Meter(setting.device)
    if setting.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(setting.device)
    step, began = 0, time.perf_counter()
    for _ in range(2):
        train_step(engine, task, batches[step % len(batches)], step, config, meter)
        step += 1
    wait(setting.device)
    compiling = time.perf_counter() - began
    seconds = []
    for _ in range(2 if setting.small else 5):             # blocks of steps, so that the host may run ahead
        began = time.perf_counter()
        for _ in range(4):
            train_step(engine, task, batches[step % len(batches)], step, config, meter)
            step += 1
        wait(setting.device)
        seconds.append((time.perf_counter() - began) / 4)
    memory = torch.cuda.max_memory_allocated(setting.device) / 2**30 if setting.device.type == "cuda" else 0.0
    return statistics.median(seconds), task, compiling, memory


def run_config(folder: Path, train: dict[str, Any]) -> TransformerRun:
    return TransformerRun.model_validate({
        "name": "gpu", "output": str(folder), "codec": "none",
        "data": {"train": "memory", "tokenizer": "none"},
        "optimizer": {"lr": 1e-4, "clip": 1.0, "schedule": "constant", "weight_decay": 0.05},
        "train": {"steps": 10_000, **train}})


def architecture_of(preset: str, setting: Setting, **changes: Any) -> TransformerConfig:
    """The preset with its changes; of a few channels where the setting is small."""
    return PRESETS[preset].model_copy(update={**changes, **(TINY if setting.small else {})})


def make_network(model: TransformerConfig, device: torch.device) -> TextToImageTransformer:
    torch.manual_seed(0)
    with device:                                           # 1.3e9 random numbers are minutes of a processor
        return TextToImageTransformer(model)


def make_batches(model: TransformerConfig, size: int, device: torch.device) -> list[Batch]:
    """A few batches, in pinned memory as a loader's are."""
    batches = [{"text": torch.randint(1, model.num_text_tokens, (size, model.text_length)),
                "codes": torch.randint(0, model.num_codes, (size, model.num_image_slots))} for _ in range(4)]
    if device.type == "cuda":
        batches = [{name: tensor.pin_memory() for name, tensor in batch.items()} for batch in batches]
    return [{**batch, "key": [str(index) for index in range(size)]} for batch in batches]
