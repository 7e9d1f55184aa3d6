"""The settings that every run has: how long, how much at once, how often to look, and what the engine is told."""

import signal
from typing import Literal

from pydantic import Field, field_validator

from dalle.config import FIXED, FREE, Section
from dalle.errors import UserError
from dalle.training.signals import STOP_SIGNALS


class SpikeConfig(Section, json_schema_extra=FREE):
    """Roll back to the newest checkpoint, and leave out the batch, when a phase's loss jumps."""

    zscore: float | None = Field(default=None, gt=0, description="standard deviations above the mean; null: off. Reads "
                                 "the loss in every step, which waits for the device")
    history: int = Field(default=128, ge=4, description="newest losses that mean and deviation are taken of")
    skip_batches: int = Field(default=1, ge=1, description="batches left out, from the one with the spike on")
    max_rollbacks: int = Field(default=8, ge=1, description="in the run, before it stops")


class ProfileConfig(Section, json_schema_extra=FREE):
    """A Chrome trace of a few steps in the run's ``profile/``."""

    start: int = Field(default=20, ge=0, description="steps that are done before the first in the trace")
    steps: int = Field(default=3, ge=1, description="steps in the trace")
    all_ranks: bool = Field(default=False, description="a trace of every rank, not of the first alone")


class TrainConfig(Section, json_schema_extra=FREE):
    """How long, how much at once, and how often to look."""

    steps: int = Field(default=1000, ge=1, description="optimiser steps of the whole run; the schedules end there")
    batch_size: int = Field(default=32, ge=1, description="samples a step over all processes",
                            json_schema_extra=FIXED)
    micro_batch_size: int | None = Field(default=None, ge=1, description="samples at once in a process; null: all")
    precision: Literal["fp32", "bf16", "fp8"] = Field(
        default="fp32", description="what the networks compute in; bf16 is autocast, fp8 is bf16 with the matrices of "
        "the blocks in fp8; weights and optimiser state stay fp32")
    compile: bool | None = Field(default=None, description="torch.compile the players, block by block where they have "
                                 "blocks; null: on CUDA, from 20 million parameters in blocks and 2,000 steps on, and "
                                 "in fp8")
    capture: bool | None = Field(default=None, description="record the phases of a step once, as CUDA graphs, and "
                                 "replay them, on one GPU without accumulation and compile; null: for models small "
                                 "enough to be bound by the host")
    deterministic: bool = Field(default=False, description="the same bits at every run on the same GPU, by slower "
                                "algorithms; what has none ends the run with its name")
    profile: ProfileConfig | None = Field(default=None, description="trace a few steps; null: none")
    log_every: int = Field(default=10, ge=1, description="steps between two log lines")
    validate_every: int = Field(default=0, ge=0, description="steps between two validations; 0: never")
    validation_samples: int | None = Field(default=None, ge=1, description="samples of data.validation that are "
                                           "measured, from its first on; null: all")
    preview_every: int = Field(default=0, ge=0, description="steps between two previews; 0: never")
    evaluate_every: int = Field(default=0, ge=0, description="steps between two evaluations; 0: never; what is "
                                "measured: `evaluation`")
    save_every: int = Field(default=500, ge=0, description="steps between two checkpoints; 0: at the end only")
    save_minutes: float | None = Field(default=None, gt=0, description="save also when so many minutes have passed")
    async_save: bool = Field(default=True, description="write checkpoints while training goes on")
    keep_last: int = Field(default=2, ge=1, description="checkpoints kept")
    accept_companions: tuple[str, ...] = Field(default=(), description="go on with another codec, text encoder, ... "
                                               "than before: names of those that were changed on purpose")
    stop_signals: tuple[str, ...] = Field(default=STOP_SIGNALS, description="save, and end with status 75")
    log_samples: bool = Field(default=False, description="write the samples of every step into sample_log/")
    spike: SpikeConfig = Field(default=SpikeConfig(), description="what to do about a loss that jumps")
    max_skipped: int = Field(default=20, ge=1, description="non-finite steps of a phase in a row before the run stops")
    minutes: float | None = Field(default=None, gt=0, description="stop, with a checkpoint and status 75, when so many "
                                  "minutes are over; null: no limit")

    @field_validator("stop_signals")
    @classmethod
    def _known_signals(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in signal.Signals.__members__ or name in ("SIGKILL", "SIGSTOP")]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a signal that can be handled; SIGTERM and SIGUSR2 are usual")
        return names

    @property
    def bf16(self) -> bool:
        """Whether networks compute in bf16; in fp8 all but some layers do."""
        return self.precision != "fp32"


class EngineConfig(Section, json_schema_extra=FREE):
    """What the launcher does not say about the backend; DDP or ZeRO, and its stage, come from ``accelerate launch``."""

    gradient_dtype: str = Field(default="fp32", pattern="^(fp32|bf16)$", description="what the ranks exchange "
                                "gradients in")
    offload_optimizer: bool = Field(default=False, description="ZeRO: optimiser state in host memory")
    offload_parameters: bool = Field(default=False, description="ZeRO-3: parameters in host memory")
    shard_size: int | None = Field(default=None, ge=1, description="FSDP2: neighbouring processes that share one copy "
                                   "of the weights, such as those of a node (HSDP); null: all")
    bucket_elements: int | None = Field(default=None, ge=1, description="gradients, in elements, that DDP and ZeRO "
                                        "exchange at once while the backward runs; null: 25 MiB under DDP, 50 million "
                                        "under ZeRO")
    allow_zero3_players: bool = Field(default=False, description="ZeRO-3 for a task of several players")
    timeout_minutes: float = Field(default=10, gt=0, description="minutes: one of the first two steps, a batch of "
                                   "validation, a preview or a save that takes longer ends the run as hung")
    step_timeout_minutes: float = Field(default=5, gt=0, description="minutes: the same for every later step")


class LogConfig(Section, json_schema_extra=FREE):
    """Trackers beside the JSONL, which is always written."""

    wandb: Literal["online", "offline", "disabled"] = Field(default="disabled", description="Weights & Biases: sent as "
                                                            "the run goes, kept in its folder for `wandb sync`, or not "
                                                            "used")
    wandb_project: str = Field(default="tessera", description="the project there")
    wandb_entity: str | None = Field(default=None, description="the account or team there; null: the user's own")
    wandb_tags: tuple[str, ...] = Field(default=(), description="words to find the run by there")
    tensorboard: bool = Field(default=False, description="write event files into the run's tensorboard/")
    images: bool = Field(default=True, description="send previews to wandb and TensorBoard; PNGs are always written")


def split_batch(batch_size: int, micro_batch_size: int | None, world_size: int) -> tuple[int, int]:
    """(samples a process, micro-batches a step) of a global batch; :class:`UserError` where they do not divide."""
    if batch_size % world_size:
        legal = [number for number in range(1, batch_size + 1) if batch_size % number == 0]
        raise UserError(f"train.batch_size {batch_size} does not divide over {world_size} processes; "
                        f"it does over {', '.join(map(str, legal))}")
    local = batch_size // world_size
    micro = local if micro_batch_size is None else min(micro_batch_size, local)
    if local % micro:
        raise UserError(f"train.micro_batch_size {micro} does not divide the {local} samples of each process "
                        f"(train.batch_size {batch_size} over {world_size})")
    return local, local // micro
