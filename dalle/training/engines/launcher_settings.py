"""What accelerate's and DeepSpeed's own files say about precision, accumulation, clipping and compilation.

The run's config decides all of it, so that a run is the same under every launcher. What a file says otherwise is
refused with the key to use; what it says alike, or leaves at the launcher's default or to "auto", is accepted.
"""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from dalle.config import Section
from dalle.errors import UserError
from dalle.training.optimizers import OptimizerConfig
from dalle.training.run import RunConfig

UNSET = (None, "", "none", "no", "false", "auto")
ELSEWHERE = {"ACCELERATE_USE_MEGATRON_LM": "Megatron-LM", "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config"}
DEEPSPEED_KEYS = ("zero_optimization", "fp16", "bf16", "gradient_clipping", "gradient_accumulation_steps",
                  "train_batch_size", "train_micro_batch_size_per_gpu")


class Wanted:
    """What the run's config says, to hold a launcher's words against."""

    def __init__(self, config: RunConfig, world_size: int):
        train = config.train
        self.precision, self.compile, self.batch = train.precision, train.compile, train.batch_size
        self.world_size, self.local = world_size, train.batch_size // world_size
        self.micro = min(train.micro_batch_size or self.local, self.local)
        self.clips = dict(clips(config))

    def check_precision(self, where: str, said: str) -> None:
        """``said``: fp16, bf16 or fp8; or no, which is accelerate's default."""
        if said == "fp16":
            raise UserError(f"{where} is fp16: runs are fp32, bf16 or fp8; remove it, and set train.precision=bf16")
        if said in ("bf16", "fp8") and self.precision != said:
            raise UserError(f"{where} is {said} and train.precision is {self.precision}: set train.precision={said}, "
                            "or remove it")

    def check_accumulation(self, where: str, said: int) -> None:
        if said in (1, self.local // self.micro):      # 1 is accelerate's default
            return
        advice = f"set train.micro_batch_size={self.local // said}" if self.local % said == 0 else (
            f"which does not divide the {self.local} samples of a process")
        raise UserError(f"{where} is {said} and the run makes {self.local // self.micro} micro-batches a step: "
                        f"{advice}, or remove it")

    def check_clip(self, where: str, said: float) -> None:
        different = [name for name, clip in self.clips.items() if clip != said]
        if different:
            raise UserError(f"{where} is {said:g} and {different[0]}.clip is {self.clips[different[0]]:g}: set "
                            f"{different[0]}.clip={said:g}, or remove it")

    def check_equal(self, where: str, said: Any, here: int, key: str) -> None:
        if said != here:
            raise UserError(f"{where} is {said} and the run's is {here}: set {key}, or remove it")


def clips(config: Section, prefix: str = "") -> Iterator[tuple[str, float]]:
    """(key, largest norm) of every optimiser in a config."""
    for name, value in config:
        if isinstance(value, OptimizerConfig):
            yield prefix + name, value.clip
        elif isinstance(value, Section):
            yield from clips(value, f"{prefix}{name}.")


def check_launcher(config: RunConfig, world_size: int, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse, in one line, what ``accelerate launch`` was told and the run's config does not say."""
    wanted = Wanted(config, world_size)

    def said(name: str) -> str | None:
        value = environment.get(f"ACCELERATE_{name}", "").lower()
        return None if value in UNSET else value

    for name, what in ELSEWHERE.items():
        if environment.get(name, "").lower() in ("1", "true"):
            raise UserError(f"accelerate was told to use {what}, which this trainer does not: take a file of "
                            "launch/engines")
    if precision := said("MIXED_PRECISION"):
        wanted.check_precision("accelerate's mixed_precision", precision)
    if accumulation := said("GRADIENT_ACCUMULATION_STEPS"):
        wanted.check_accumulation("accelerate's gradient_accumulation_steps", number(accumulation, int))
    if clip := said("GRADIENT_CLIPPING"):
        wanted.check_clip("accelerate's gradient_clipping", number(clip, float))
    if (backend := said("DYNAMO_BACKEND")) and not (backend == "inductor" and wanted.compile):
        raise UserError(f"accelerate's dynamo_backend is {backend}: runs are compiled by inductor, with "
                        "train.compile=true; set that, or remove it")
    if environment.get("FSDP_ACTIVATION_CHECKPOINTING", "").lower() == "true":
        raise UserError("accelerate's fsdp_activation_checkpointing is true: set model.checkpointing=true, where the "
                        "model has it, and remove it")
    if environment.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() in ("false", "shard_grad_op", "no_shard"):
        raise UserError("accelerate's fsdp_reshard_after_forward is false: blocks always give back what they gathered; "
                        "set it to true, or launch with launch/engines/zero2.yaml")


def check_deepspeed_file(path: str, tree: Mapping[str, Any], config: RunConfig, world_size: int) -> None:
    """Refuse, in one line, what a DeepSpeed JSON says about the run beside its ``zero_optimization``."""
    wanted, name = Wanted(config, world_size), f"{path}:"
    others = sorted(set(tree) - set(DEEPSPEED_KEYS))
    if others:
        raise UserError(f"the DeepSpeed file {path} sets {others[0]}: the run's config decides that, remove it")
    values = {key: value for key, value in tree.items() if value != "auto"}
    enabled = {key: values[key].get("enabled") for key in ("fp16", "bf16") if isinstance(values.get(key), dict)}
    for key in (key for key, on in enabled.items() if on is True):
        wanted.check_precision(f"{name} {key}.enabled", key)
    if enabled.get("bf16") is False and wanted.precision == "bf16":
        raise UserError(f"{name} bf16.enabled is false and train.precision is bf16: set train.precision=fp32, or "
                        "remove it")
    if "gradient_accumulation_steps" in values:
        wanted.check_accumulation(f"{name} gradient_accumulation_steps",
                                  number(values["gradient_accumulation_steps"], int))
    if "gradient_clipping" in values:
        wanted.check_clip(f"{name} gradient_clipping", number(values["gradient_clipping"], float))
    if "train_batch_size" in values:
        wanted.check_equal(f"{name} train_batch_size", values["train_batch_size"], wanted.batch,
                           f"train.batch_size={values['train_batch_size']}")
    if "train_micro_batch_size_per_gpu" in values:
        wanted.check_equal(f"{name} train_micro_batch_size_per_gpu", values["train_micro_batch_size_per_gpu"],
                           wanted.micro, f"train.micro_batch_size={values['train_micro_batch_size_per_gpu']}")


def number(value: Any, kind: type) -> Any:
    """A number of a launcher's file, more than 0 where it counts micro-batches."""
    try:
        read = kind(value)
    except (TypeError, ValueError):
        read = -1
    if read < (1 if kind is int else 0):
        raise UserError(f"{value!r} in the launcher's settings is not a number that can be used: remove it")
    return read
