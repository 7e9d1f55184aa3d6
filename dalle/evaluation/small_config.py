"""The ``evaluation`` section of a run; apart from its code, whose imports no other training should wait for."""

from typing import Any, Literal

from pydantic import Field

from dalle.config import FREE, Section

LEAST = 2


class SmallEvaluationConfig(Section, json_schema_extra=FREE):
    """What ``train.evaluate_every`` measures; the captions and real pictures are those of ``data.validation``."""

    metrics: tuple[Literal["fid", "kid", "is", "clip", "rprecision", "judge"], ...] = Field(
        default=("fid", "kid"), description="what is measured: fid, kid and is look through the extractor, clip and "
        "rprecision through the CLIP, judge reads captions of shapes")
    samples: int = Field(default=256, ge=LEAST, description="captions, a picture each")
    references: int = Field(default=1000, ge=LEAST, description="real pictures, at most")
    extractor: str | None = Field(default=None, description="network of fid, kid and is: clip:RUN, inception:FILE, "
                                                            "open_clip:NAME/TAG")
    clip: str | None = Field(default=None, description="model of clip and rprecision: a CLIP run or "
                                                       "open_clip:NAME/TAG")
    options: dict[str, Any] = Field(default_factory=dict, description="options of sampling, such as temperature; what "
                                    "is left out has its default")
