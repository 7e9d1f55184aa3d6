"""The section ``data`` of a run: what is read and how."""

import logging
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dalle.config import FIXED, FREE, NOTED, Section
from dalle.data.damage import BadShards
from dalle.data.decode import MAX_PIXELS
from dalle.data.transforms import Crop

log = logging.getLogger(__name__)


class DataConfig(Section, json_schema_extra=FIXED):
    """What is read and how. ``train``: a folder of shards, a glob, a brace range, or several joined by ``::``.

    ``tier``: ``exact`` reads local shards in an order that any resume continues to the sample; ``resampled`` and
    ``sequential`` read them front to back, from URLs too (:mod:`dalle.data.streaming`). Validation is always exact.
    """

    train: str = Field(json_schema_extra=FREE,            # by its fingerprint: files may move
                       description="training shards: a folder, a glob, a brace range or, in a streaming tier, URLs; "
                                   "several joined by ::")
    validation: str | None = Field(None, json_schema_extra=FREE,
                                   description="held-out shards, local ones; null: nothing is validated")
    tier: Literal["exact", "resampled", "sequential"] = Field(
        "exact", description="exact: indexed local shards, every sample once an epoch; resampled: shards drawn with "
                             "replacement; sequential: shards front to back, again and again")
    bad_shards: BadShards = Field("refuse", json_schema_extra=FREE,
                                  description="missing or damaged shards: stop, or train without what is lost of them")
    allow_pipe: bool = Field(False, json_schema_extra=FREE,
                             description="whether pipe: URLs may run their shell command")
    read_timeout: float = Field(30.0, gt=0, json_schema_extra=FREE,
                                description="seconds of silence from a server or a pipe before another attempt")
    read_retries: int = Field(4, ge=0, json_schema_extra=FREE,
                              description="further attempts in a row at a read that failed, 1, 2, 4, ... seconds apart")
    shuffle_buffer: int = Field(1000, ge=1, json_schema_extra=FREE,
                                description="samples, as stored, that wait in each loader worker (tier resampled)")
    image_size: int = Field(256, ge=1, description="side of the square pictures of a batch, in pixels")
    crop: Crop = Field("center", description="which square of a picture: none (all of it, aspect not kept), center, "
                                             "random, or DALL-E's recipes dvae and transformer; validation: center")
    crop_from: float = Field(1.0, ge=1, le=4, description="training pictures are resized to so many times image_size, "
                                                          "then cut at random")
    flip: bool = Field(False, description="whether half of the training pictures are mirrored")
    places: Literal["boxes", "keypoints"] | None = Field(
        None, description="what is read of each sample's JSON to say where things are, moved as the picture is cut and "
                          "mirrored; null: nothing")
    images: bool = Field(True, description="whether pictures are read; false: only text and cached codes")
    jpeg_draft: bool = Field(True, json_schema_extra=NOTED,
                             description="whether the JPEG decoder may shrink pictures of twice the needed size or "
                                         "more, where that is exact enough: 1.5 to 2 times as fast; false: each is "
                                         "decoded whole")
    max_pixels: int = Field(MAX_PIXELS, ge=1, le=2 * MAX_PIXELS,
                            description="pixels of the largest picture that is decoded; larger ones are bad samples")
    caption: Literal["random", "first", "none"] = Field(
        "random", description="which of a sample's captions; none: captions are not read")
    num_captions: int = Field(1, ge=1, description="captions drawn of each sample; above 1, batches have them as "
                                                   "`captions`")
    tokenizer: str | None = Field(None, json_schema_extra=FREE,        # by its digest
                                  description="folder of the tokenizer; null: batches have no ids")
    text_length: int = Field(256, ge=1, description="ids of a caption in tokens: longer ones are cut, shorter ones "
                                                    "filled up with 0")
    bpe_dropout: float = Field(0.1, ge=0, le=1, description="probability in [0, 1] that a merge of the BPE is skipped "
                                                            "(training)")
    caption_dropout: float = Field(0.0, ge=0, le=1, description="share in [0, 1] of the captions that are left empty "
                                                                "(training), for guidance")
    codes: str | None = Field(None, json_schema_extra=FREE,            # by the digest of their codec
                              description="folder of cached codes of the training shards; null: the codec runs")
    validation_codes: str | None = Field(None, json_schema_extra=FREE,
                                         description="folder of cached codes of the validation shards")
    workers: int = Field(2, ge=0, json_schema_extra=FREE,
                         description="processes that make batches for each rank; 0: the training process does")
    lanes: int = Field(64, ge=1, description="places of the epoch that a batch is drawn from in turns: so many shards "
                                             "mix in it (tier exact)")
    window: int = Field(16, ge=1, description="consecutive shards of a lane whose samples are shuffled together "
                                              "(tier exact)")
    max_bad_fraction: float = Field(0.1, ge=0, le=1, json_schema_extra=FREE,
                                    description="share in [0, 1] of samples that cannot be used, above which the run "
                                                "ends")

    @model_validator(mode="before")
    @classmethod
    def _older_name(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "on_missing" not in values:
            return values
        if "bad_shards" in values:
            raise ValueError("on_missing is the older name of bad_shards; set bad_shards alone")
        log.warning("data.on_missing is now data.bad_shards, which is for damaged shards, too: taken as that")
        return {"bad_shards" if key == "on_missing" else key: value for key, value in values.items()}

    @model_validator(mode="after")
    def _something_is_read(self) -> Self:
        if self.caption == "none" and self.tokenizer:
            raise ValueError("caption is none, but a tokenizer is set; choose caption random or first")
        if self.num_captions > 1 and self.caption != "random":
            raise ValueError(f"num_captions {self.num_captions} draws captions, but caption is {self.caption}; set "
                             "caption to random")
        if self.caption == "none" and not self.images and not self.codes:
            raise ValueError("images is false, caption is none and codes is not set: nothing would be read")
        if self.crop_from > 1 and self.crop not in ("none", "random"):
            raise ValueError(f"crop_from {self.crop_from} is for a random cut, but crop is {self.crop}; set crop "
                             "to random, or to none to resize whole pictures whatever their shape")
        if self.crop_from > 1 and self.codes:
            raise ValueError(f"codes are of pictures cut when they were made, crop_from {self.crop_from} would cut "
                             "others: leave one of them out")
        if self.tier != "exact" and self.codes:
            raise ValueError(f"codes belong to an index, which tier {self.tier} does not use; set tier to exact, "
                             "or leave codes out and let the codec run")
        return self
