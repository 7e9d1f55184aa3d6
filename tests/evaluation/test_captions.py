"""Captions: each text once, each picture once before any twice, the same for the same seed."""

import io
import tarfile

import pytest
from evaluation_stubs import png

from dalle.data.index import ShardIndex
from dalle.errors import UserError
from dalle.evaluation.captions import draw_captions


def tar(path, samples):
    with tarfile.open(path, "w") as file:
        for key, text in samples:
            for name, data in ((f"{key}.png", png()), (f"{key}.txt", text)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))


@pytest.fixture
def index(tmp_path):
    tar(tmp_path / "0.tar", [("a", b"one\ntwo"), ("b", b"one\nthree"), ("c", b"one"), ("d", b"\xff\xfe"),
                             ("e", b"four\nfive\nsix")])
    return ShardIndex.load(str(tmp_path))


def test_no_text_comes_twice_and_unreadable_ones_are_counted(index):
    drawn, left_out = draw_captions(index, 6, seed=0)
    assert sorted(one.caption for one in drawn) == ["five", "four", "one", "six", "three", "two"]
    assert left_out == {"caption_encoding": 1}


@pytest.mark.parametrize("seed", range(6))
def test_every_picture_speaks_before_one_speaks_twice(index, seed):
    drawn, _ = draw_captions(index, 3, seed)
    assert len({one.position for one in drawn}) == 3


def test_a_seed_says_which(index, split):
    assert draw_captions(index, 4, 1) == draw_captions(index, 4, 1)
    validation = ShardIndex.load(split)
    assert draw_captions(validation, 20, 1)[0] != draw_captions(validation, 20, 2)[0]
    assert draw_captions(validation, 12, 1)[0] == draw_captions(validation, 20, 1)[0][:12]


def test_too_few_are_refused_with_the_number_there_is(index):
    with pytest.raises(UserError, match="holds 6 different captions, --samples 7"):
        draw_captions(index, 7, 0)
