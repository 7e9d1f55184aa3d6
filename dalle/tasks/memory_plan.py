"""What ``launch/train.py --dry-run`` prints about memory: of the launcher's engine, or of any number of devices."""

from typing import Any

from torch import nn

from dalle.errors import UserError
from dalle.models.transformer import PRESETS, TextToImageTransformer, TransformerConfig
from dalle.tasks.transformer import TransformerRun
from dalle.tasks.transformer_memory import transformer_activations
from dalle.training.deferred import build_player, players_built
from dalle.training.engines.base import writing_ranks
from dalle.training.engines.fsdp import blocks_apart
from dalle.training.memory import (
    BF16,
    FP32,
    GB,
    Activations,
    CountsActivations,
    Layout,
    Setting,
    evaluation_memory,
    host_memory,
    step_memory,
)
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig
from dalle.training.settings import split_batch
from dalle.training.task import Task

RESERVE_GB = 5.0       # the allocator's gaps, libraries and NCCL; an estimate, to be measured on the device


def memory_of_task(config: RunConfig, task: Task, layout: Layout) -> list[dict[str, Any]]:
    """An entry for each player of a task that is built."""
    samples = micro_batch(config, layout)
    bf16 = config.train.bf16
    counted = task.activations(samples, bf16) if isinstance(task, CountsActivations) else None
    return [{"player": name, **memory_of_player(config, player.module, player.optimizer, layout, counted)}
            for name, player in task.players.items()]


def memory_elsewhere(config: RunConfig, layout: Layout) -> list[dict[str, Any]]:
    """The same for a transformer whose data and companions need not be there: what they would say is its preset's.

    :class:`UserError` for another task, or a config without a preset that leaves sizes out.
    """
    if not isinstance(config, TransformerRun):
        raise UserError(f"--devices counts a transformer's memory, not that of a {config.task} run: leave it out, and "
                        "start --dry-run under the launcher that you mean")
    given = config.model
    preset = PRESETS.get(given.preset or "")
    found = {"text_length": config.data.text_length}
    for name in ("num_text_tokens", "grid", "num_codes"):
        value = getattr(given, name) or getattr(preset, name, None)
        if value is None:
            raise UserError(f"--devices: model.{name} is left to the codec or the tokenizer; set it, or model.preset")
        found[name] = value
    resolved = TransformerConfig(**given.architecture(), **found)
    with players_built("shapes"):
        module = build_player(lambda: TextToImageTransformer(resolved))
    counted = transformer_activations(resolved, micro_batch(config, layout), config.train.bf16)
    return [{"player": "transformer", **memory_of_player(config, module, config.optimizer, layout, counted)}]


def micro_batch(config: RunConfig, layout: Layout) -> int:
    local, accumulation = split_batch(config.train.batch_size, config.train.micro_batch_size, layout.processes)
    return local // accumulation


def memory_of_player(config: RunConfig, module: nn.Module, optimizer: OptimizerConfig, layout: Layout,
                     counted: Activations | None) -> dict[str, Any]:
    """The figures in 1e9 bytes, as they are printed; ``activations`` is "not counted" where the task cannot say."""
    if layout.processes % layout.shard_size:
        raise UserError(f"engine.shard_size {layout.shard_size} does not divide {layout.processes} devices")
    bf16 = config.train.bf16
    samples = micro_batch(config, layout)
    setting = Setting(bf16, optimizer.ema > 0, samples * layout.processes < config.train.batch_size,
                      BF16 if config.engine.gradient_dtype == "bf16" else FP32)
    blocks = blocks_apart(module, bf16 and layout.engine == "fsdp2")
    parts = step_memory(blocks, layout, setting, counted)
    evaluation = evaluation_memory(blocks, layout, setting)
    host = host_memory(blocks, layout, setting, writing_ranks(layout.processes))
    shown = {name: in_gb(size) for name, size in parts.items()}
    if counted is None:
        shown["activations"] = shown["logits"] = "not counted"
    return {
        "engine": layout.engine, "processes": layout.processes, "shard_size": layout.shard_size,
        "micro_batch_size": samples, "gb_per_device_in_a_step": {**shown, "all": in_gb(sum(parts.values()))},
        "gb_per_device_in_evaluation": in_gb(evaluation),
        "gb_of_host_memory_per_node": {name: in_gb(size) for name, size in host.items()},
        "most": max(sum(parts.values()), evaluation),
    }


def in_gb(size: int) -> float:
    return round(size / GB, 3)


def memory_report(entries: list[dict[str, Any]], device_gb: float | None) -> dict[str, Any]:
    """``memory``, and with ``device_gb`` whether the players fit such a device beside the reserve."""
    together = sum(entry.pop("most") for entry in entries) / GB
    if device_gb is None:
        return {"memory": entries}
    return {"memory": entries, "device_gb": device_gb, "reserve_gb": RESERVE_GB,
            "fits": together + RESERVE_GB <= device_gb}
