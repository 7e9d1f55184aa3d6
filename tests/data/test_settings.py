"""The section data: what is impossible, and what an older name means."""


import pytest
from pydantic import ValidationError

from dalle.data.settings import DataConfig


def test_the_older_name_of_bad_shards_is_taken(caplog):
    assert DataConfig(train="x", on_missing="skip").bad_shards == "skip" and "is now data.bad_shards" in caplog.text
    with pytest.raises(ValidationError, match="older name of bad_shards"):
        DataConfig(train="x", on_missing="skip", bad_shards="skip")


@pytest.mark.parametrize("wrong", [{"crop": "top"}, {"bpe_dropout": 2}, {"image_size": 0}, {"workers": -1},
                                   {"caption": "none", "tokenizer": "t"}, {"caption": "none", "images": False},
                                   {"unknown": 1}, {"crop": "random", "crop_from": 0.9},
                                   {"crop": "center", "crop_from": 1.2}, {"crop": "dvae", "crop_from": 1.2},
                                   {"crop": "random", "crop_from": 1.2, "codes": "c"}])
def test_impossible_configs(wrong):
    with pytest.raises(ValidationError):
        DataConfig(train="x", **wrong)
