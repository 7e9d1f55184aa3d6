"""What every run has in common; each task's config adds its model, losses and optimisers."""

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from dalle.config import FIXED, FREE, Section
from dalle.data.settings import DataConfig
from dalle.training.settings import EngineConfig, LogConfig, TrainConfig


class RunConfig(Section, json_schema_extra=FIXED):
    """One run: what it is called, its data, and how the loop trains it."""

    task: str = Field(description="what is trained")
    name: str = Field(min_length=1, description="the run's folder below `output`", json_schema_extra=FREE)
    output: str = Field(default="runs", description="the folder that runs are in", json_schema_extra=FREE)
    seed: int = Field(default=0, ge=0, description="of the first weights, the reading order and every draw")
    prerequisites: tuple[str, ...] = Field(default=(), description="configs of the runs that this one reads; "
                                           "launch/train.py --with-prerequisites trains them first",
                                           json_schema_extra=FREE)
    data: DataConfig = Field(description="what is read, and how")
    train: TrainConfig = Field(default=TrainConfig(), description="how long, how much at once, how often to look")
    log: LogConfig = Field(default=LogConfig(), description="trackers beside the run's own log")
    engine: EngineConfig = Field(default=EngineConfig(), description="what the launcher does not say about the backend")

    @field_validator("name")
    @classmethod
    def _inside_output(cls, name: str) -> str:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError("a run's name is a relative path inside `output`, without '..'")
        return name

    @model_validator(mode="after")
    def _captions_are_all_read(self) -> Self:
        if self.data.num_captions > 1 and not self.reads_several_captions:
            raise ValueError(f"data.num_captions is {self.data.num_captions}, but a {self.task} run reads one caption "
                             "of each sample: leave it out")
        return self

    @property
    def reads_several_captions(self) -> bool:
        """Whether ``data.num_captions`` above 1 means something to the task."""
        return False

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name
