"""Decoding rows: all codes of whole pictures by `sample_codes`, as `launch/sample.py` has them written."""

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch

from dalle.models.transformer import TextToImageTransformer, TransformerConfig, attention_patterns
from dalle.sampling.choosing import SamplingConfig
from dalle.sampling.decode import sample_codes
from dalle.sampling.fixed import forget
from gpu_parts.rows import Row, Setting, emit, wait
from gpu_parts.training import architecture_of, make_network


@dataclass(frozen=True)
class Decoding:
    """``candidates`` of one caption in bf16; bars in tokens/s. ``batch_size``: rows of a step's products, if not the
    default; ``backend``: the form of attention; ``method`` as `sample_codes` has it."""

    what: str
    preset: str
    attention: str
    candidates: int
    bar: float | None = None
    goal: float | None = None
    batch_size: int | None = None
    backend: str = "auto"
    method: str = "auto"


DECODINGS = (
    Decoding("xl full, 1 candidate", "xl", "full", 1, 700, 1050),
    Decoding("xl full, 64 candidates", "xl", "full", 64, 10_000, 12_500),
    Decoding("xl dalle, 64 candidates", "xl", "dalle", 64, 10_000, 15_000),
    Decoding("xl-modern full, 1 candidate", "xl-modern", "full", 1),
    Decoding("xl-modern full, 64 candidates", "xl-modern", "full", 64),
    Decoding("xl full, 1 candidate in a step of 1", "xl", "full", 1, 700, 1050, batch_size=1),
    Decoding("xl full, 128 candidates in steps of 128", "xl", "full", 128, batch_size=128),
    Decoding("xl full, 64 candidates, by SDPA", "xl", "full", 64, backend="sdpa"),
)
ASKED_FOR = (       # compiling takes a minute or more, and the growing cache is slow
    Decoding("xl full, 1 candidate in a step of 1, compiled", "xl", "full", 1, 700, 1050, 1, method="compiled"),
    Decoding("xl full, 64 candidates, compiled", "xl", "full", 64, 10_000, 12_500, method="compiled"),
    Decoding("xl full, 64 candidates, growing cache", "xl", "full", 64, method="growing"),
)
CANDIDATES = 512
OPTIONS = SamplingConfig(temperature=0.9, top_k=512, top_p=0.95)


def decoding(setting: Setting, only: str = "") -> None:
    """Tokens a second and the share of the copy bandwidth that the bytes of weights and caches make."""
    chosen = [one for one in (*DECODINGS, *ASKED_FOR) if only in one.what] if only else DECODINGS
    for one in chosen:
        model = make_model(one.preset, one.attention, setting, one.backend)
        how = {"batch_size": one.batch_size, "method": one.method if setting.device.type == "cuda" else "auto"}
        first = timed(model, one.candidates, SamplingConfig(), setting, **how)      # captures, too
        seconds = timed(model, one.candidates, SamplingConfig(), setting, **how)
        report(one, model.config, seconds, first, setting)
        if one in DECODINGS[:2]:
            timed(model, one.candidates, OPTIONS, setting, **how)
            filtered = timed(model, one.candidates, OPTIONS, setting, **how)
            emit(Row(f"decode {one.what}, top-k and top-p", filtered / seconds, "x time", note="against neither"))
        clear(model, setting)
        del model


def candidates(setting: Setting, only: str = "") -> None:
    """Seconds for 512 candidates of one caption, the caption's own pass included."""
    model = make_model("xl", "full", setting)
    count = 8 if setting.small else CANDIDATES
    first = timed(model, count, SamplingConfig(), setting)
    seconds = timed(model, count, SamplingConfig(), setting) if first < 100 else first
    emit(Row(f"{count} candidates of {model.config.num_image_slots} codes, xl full", seconds, "s", bar=60, goal=45,
             note=f"the first time {first:.1f} s", more_is_better=False))


def make_model(preset: str, attention: str, setting: Setting, backend: str = "auto") -> TextToImageTransformer:
    config = architecture_of(preset, setting, attention=attention, attention_backend=backend)
    return make_network(config, setting.device).to(torch.bfloat16).eval()


def timed(model: TextToImageTransformer, count: int, options: SamplingConfig, setting: Setting, **how: Any) -> float:
    """Seconds of one call of `sample_codes`."""
    text = torch.randint(1, model.config.num_text_tokens, (1, model.config.text_length),
                         generator=torch.Generator().manual_seed(0))
    wait(setting.device)
    began = time.perf_counter()
    sample_codes(model, text, range(count), options, **how)
    wait(setting.device)
    return time.perf_counter() - began


def report(one: Decoding, config: TransformerConfig, seconds: float, first: float, setting: Setting) -> None:
    """A token's bytes: every weight that a step reads, and of each candidate the keys and values that it looks at."""
    rate = one.candidates * config.num_image_slots / seconds
    limit = None
    if setting.copy_bandwidth is not None:
        limit = one.candidates * setting.copy_bandwidth / step_bytes(config, one.candidates)
    note = f"the first time {first:.1f} s" + (f", {rate / limit:.0%} of the limit" if limit else "")
    emit(Row(f"decode {one.what}", rate, "tokens/s", limit, one.bar, one.goal, note))


def step_bytes(config: TransformerConfig, candidates: int) -> float:
    """Bytes that a step of ``candidates`` reads in bf16, on the average over the picture's slots.

    The caption's keys and values count once: its candidates share them.
    """
    inner = config.heads * config.width_of_head
    gates = 2 if config.mlp in ("swiglu", "geglu") else 1
    block = config.dim * (4 * inner + (gates + 1) * config.hidden)
    weights = config.depth * block + config.dim * config.num_codes
    slots = range(config.prefix, config.length)
    keys = 0.0
    for pattern in attention_patterns(config):
        seen = pattern.mask()[config.prefix:config.length]                   # [image slots, S]
        keys += config.prefix + candidates * float(seen[:, config.prefix:].sum()) / len(slots)
    return 2 * (weights + 2 * inner * keys)


def clear(model: TextToImageTransformer, setting: Setting) -> None:
    forget(model)
    model.to("meta")
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
